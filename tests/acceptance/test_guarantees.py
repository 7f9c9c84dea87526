"""The table of guarantees, row by row: embedded broker with SQLite, RabbitMQ and Redis with PostgreSQL."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import pyvips
from celery import chain
from kombu import Connection
from sqlalchemy import text

from db import schema
from tasks.errors import CorruptMedia, InputMissing, LimitExceeded, UnsupportedMedia
from tests.acceptance.deployment import deployed, lines
from tests.mqtt.listener import Listener
from tests.mqtt.road import Road
from tests.mqtt.said import one_warning, warnings
from tests.services import HOST, unique_name
from tests.tooling import processes
from tests.tooling.locks import Lock
from tests.tooling.waiting import eventually, stays

pytestmark = pytest.mark.slow

COMPLETED = ["created", "claimed", "started", "completed"]
TAKEN_OVER = ["created", "claimed", "started", "lost", "claimed", "started", "completed"]
GET = {"timeout": 60}
AGAIN_WITHIN_S = {"embedded": 3, "rabbitmq": 5, "redis": 30}
GONE_WITHIN_S = 3
# A worker with one slot has up to two jobs of a second in hand, which no other can overtake any more.
RESERVED_S = 3
MEGABYTE = 1 << 20


@pytest.fixture
def own(own_on_broker):
    return own_on_broker


def empty(own, broker):
    """Take away all that the broker holds, as an operator does by mistake."""
    if broker == "embedded":
        for path in own.server_dir.glob("broker.db*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif broker == "redis":
        with Connection(own.env["CELERY_BROKER_URL"]) as connection:
            connection.default_channel.client.flushdb()
    else:
        with Connection(own.env["CELERY_BROKER_URL"]) as connection:
            for queue in ("note", "add", "image_resize"):
                with connection.channel() as channel:
                    try:
                        channel.queue_purge(queue)
                    except connection.channel_errors:
                        continue


def results(jobs, within_s):
    """What the jobs return, all of them before one deadline."""
    deadline = time.monotonic() + within_s
    return [job.get(timeout=max(deadline - time.monotonic(), 0.1)) for job in jobs]


def make_large_image(path):
    """One that takes seconds to be written as AVIF."""
    (pyvips.Image.perlin(6000, 6000, cell_size=50) * 100 + 128).cast("uchar").pngsave(str(path), compression=1)


def temp_files(directory):
    return list(directory.glob(".media-tasks-*"))


def resident_bytes(pid):
    """The memory that a process has in use."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held_by_workers(own):
    """What `inspect` shows of jobs that lie in the memory of a worker and do not run."""
    inspect = own.app.control.inspect(timeout=20, limit=len(own.workers))
    replies = [inspect.scheduled(), inspect.reserved()]
    assert all(replies), "the worker answers"
    return [held for reply in replies for jobs in reply.values() for held in jobs]


def events_of_all(own, jobs):
    return {tuple(own.events(job)) for job in jobs}


class TestPoolChildKilled:
    @pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
    def test_it_runs_again_within_seconds_and_its_neighbour_is_left_alone(self, own, task, broker, tmp_path, signum):
        own.start_worker("--concurrency=2")
        job = task.note.delay(str(tmp_path / "runs"), "job", 6.0)
        neighbour = task.note.delay(str(tmp_path / "neighbour"), "neighbour", 6.0)
        eventually(lambda: lines(tmp_path / "runs") and lines(tmp_path / "neighbour"), 20)

        os.kill(int(lines(tmp_path / "runs.pid")[-1]), signum)

        eventually(lambda: len(lines(tmp_path / "runs", "begin")) == 2, AGAIN_WITHIN_S[broker])
        assert job.get(**GET) == "job"
        assert neighbour.get(**GET) == "neighbour"
        assert own.events(job) == TAKEN_OVER
        assert own.events(neighbour) == COMPLETED

    @pytest.mark.parametrize(
        ("broker", "signum"),
        [
            ("embedded", signal.SIGKILL),
            ("embedded", signal.SIGSEGV),
            ("rabbitmq", signal.SIGKILL),
            ("redis", signal.SIGKILL),
        ],
        indirect=["broker"],
    )
    def test_after_three_deaths_it_fails_with_the_reason_and_its_neighbours_are_unharmed(
        self, own, task, tmp_path, signum
    ):
        worker = own.start_worker("--concurrency=2")
        poison = task.kill_its_worker.delay(str(tmp_path / "runs"), signum)
        neighbours = [task.note.delay("/dev/null", str(n), 0.2) for n in range(12)]

        row = own.wait_for(poison, "failed", timeout_s=60)

        assert (row["error_type"], row["deaths"]) == ("WorkerLost", 3)
        assert "MAX_DEATHS=3" in row["error_message"]
        assert lines(tmp_path / "runs") == ["run"] * 3
        assert [neighbour.get(**GET) for neighbour in neighbours] == [str(n) for n in range(12)]
        assert worker.is_alive()

    @pytest.mark.parametrize("broker", ["embedded"], indirect=True)
    def test_a_job_that_dies_three_times_in_mid_write_leaves_no_temp_file_and_no_output(self, own, task, tmp_path):
        worker = own.start_worker("--concurrency=1", "-Q", "image_conversion")
        make_large_image(tmp_path / "in.png")
        job = task.image_conversion.delay(tmp_path / "in.png", tmp_path / "out.avif")

        for death in range(1, 4):
            eventually(lambda: own.row(job)["deaths"] == death - 1 and temp_files(tmp_path), 20)  # noqa: B023
            processes.send(worker.child_pids(), signal.SIGKILL)
            eventually(lambda: own.row(job)["deaths"] == death, 10)  # noqa: B023

        assert own.wait_for(job, "failed")["error_type"] == "WorkerLost"
        eventually(lambda: not temp_files(tmp_path), GONE_WITHIN_S)
        assert not (tmp_path / "out.avif").exists()

    def test_what_waits_for_a_job_that_kills_its_workers_fails_with_it(self, own, task, tmp_path):
        own.start_worker("--concurrency=2")
        steps = chain(task.kill_its_worker.si(str(tmp_path / "runs")), task.add.si(1, 1))()

        row = own.wait_for(steps, "failed", timeout_s=60)

        assert row["error_type"] == "WorkerLost"
        assert own.events(steps) == ["created", "failed"]

    def test_it_runs_again_before_what_has_waited_for_its_first_run(self, own, task, broker, tmp_path):
        own.start_worker("--concurrency=1")
        job = task.dawdle.delay(str(tmp_path / "runs"), 60.0, 0.0)
        eventually(lambda: lines(tmp_path / "runs"), 20)
        waiting = [task.dawdle.delay(str(tmp_path / f"other-{number}"), 1.0, 1.0) for number in range(20)]

        processes.send(own.workers[0].child_pids(), signal.SIGKILL)

        eventually(lambda: len(lines(tmp_path / "runs")) == 2, AGAIN_WITHIN_S[broker] + RESERVED_S)
        assert job.get(**GET) == 2
        assert [own.row(other)["status"] for other in waiting[3:]] == ["queued"] * 17


class TestWholeWorkerKilled:
    def test_a_new_worker_begins_with_the_jobs_that_the_dead_one_ran(self, own, task, broker, tmp_path):
        first = own.start_worker("--concurrency=1")
        job = task.dawdle.delay(str(tmp_path / "runs"), 60.0, 0.0)
        eventually(lambda: lines(tmp_path / "runs"), 20)
        waiting = [task.dawdle.delay(str(tmp_path / f"other-{number}"), 1.0, 1.0) for number in range(40)]
        first.kill9_everything()

        own.start_worker("--concurrency=1")

        eventually(lambda: len(lines(tmp_path / "runs")) == 2, AGAIN_WITHIN_S[broker] + RESERVED_S)
        assert job.get(**GET) == 2
        assert [own.row(other)["status"] for other in waiting[30:]] == ["queued"] * 10

    def test_it_runs_again_on_another_worker_in_time(self, own, task, broker, tmp_path):
        first = own.start_worker("--concurrency=1")
        job = task.note.delay(str(tmp_path / "runs"), "job", 40.0)
        eventually(lambda: lines(tmp_path / "runs"), 20)
        own.start_worker("--concurrency=1")

        first.kill9_everything()

        eventually(lambda: len(lines(tmp_path / "runs", "begin")) == 2, AGAIN_WITHIN_S[broker])
        row = own.wait_for(job, "running")
        assert (row["claimed_by"], row["deaths"]) == ("w2", 1)
        assert {worker["worker_id"]: worker["status"] for worker in own.app.store.workers()}["w2"] in ("busy", "idle")

    def test_a_worker_that_is_started_again_under_its_name_goes_on(self, own, task, tmp_path):
        first = own.start_worker("--concurrency=1", env={"WORKER_ID": "same"})
        job = task.note.delay(str(tmp_path / "runs"), "job", 3.0)
        eventually(lambda: lines(tmp_path / "runs"), 20)

        first.kill9_everything()
        own.start_worker("--concurrency=1", env={"WORKER_ID": "same"})

        assert job.get(**GET) == "job"
        assert own.events(job) == TAKEN_OVER
        assert lines(tmp_path / "runs") == ["begin job", "begin job", "end job"]

    def test_a_job_that_kills_whole_workers_fails_too(self, own, task, tmp_path):
        job = task.note.delay(str(tmp_path / "runs"), "job", 60.0)

        for death in range(1, 4):
            worker = own.start_worker("--concurrency=1")
            eventually(lambda death=death: len(lines(tmp_path / "runs", "begin")) == death, 40)
            worker.kill9_everything()
        own.start_worker("--concurrency=1")

        row = own.wait_for(job, "failed", timeout_s=40)
        assert (row["error_type"], row["deaths"]) == ("WorkerLost", 3)
        assert len(lines(tmp_path / "runs", "begin")) == 3


class TestBrokerEmptied:
    def test_every_job_is_completed_once_within_ninety_seconds(self, own, task, broker, tmp_path):
        own.start_worker("--concurrency=2")
        running = [task.note.delay(str(tmp_path / f"running-{n}"), "running", 10.0) for n in range(2)]
        eventually(lambda: all(lines(tmp_path / f"running-{n}") for n in range(2)), 20)
        waiting = [task.note.delay(str(tmp_path / f"waiting-{n}"), str(n), 0.05) for n in range(40)]

        empty(own, broker)

        assert results([*waiting, *running], 90) == [*map(str, range(40)), "running", "running"]
        republished = [job for job in waiting if "republished" in own.events(job)]
        assert len(republished) >= 30, "all have lost their messages but those that the worker had reserved"
        assert {own.events(job).count("completed") for job in [*waiting, *running]} == {1}
        assert all(len(lines(tmp_path / f"waiting-{n}")) == 2 for n in range(40))
        assert all(len(lines(tmp_path / f"running-{n}")) == 2 for n in range(2))

    @pytest.mark.parametrize("broker", ["rabbitmq"], indirect=True)
    def test_every_job_is_completed_once_when_the_vhost_is_made_anew(self, own, task, rabbitmq_server, tmp_path):
        vhost = own.env["CELERY_BROKER_URL"].rsplit("/", 1)[1]
        worker = own.start_worker("--concurrency=2")
        running = [task.note.delay(str(tmp_path / f"running-{n}"), "running", 12.0) for n in range(2)]
        eventually(lambda: all(lines(tmp_path / f"running-{n}") for n in range(2)), 20)
        waiting = [task.note.delay(str(tmp_path / f"waiting-{n}"), str(n), 0.05) for n in range(20)]

        rabbitmq_server.rabbitmqctl("delete_vhost", vhost)
        worker.wait_for_log("CELERY_BROKER_URL: the broker at ", 30)
        rabbitmq_server.rabbitmqctl("add_vhost", vhost)
        rabbitmq_server.rabbitmqctl("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")

        assert results([*waiting, *running], 90) == [*map(str, range(20)), "running", "running"]
        assert {own.events(job).count("completed") for job in [*waiting, *running]} == {1}
        assert all(len(lines(tmp_path / f"waiting-{n}")) == 2 for n in range(20))
        assert all(len(lines(tmp_path / f"running-{n}")) == 2 for n in range(2))
        assert worker.is_alive()

    def test_a_single_message_is_missed_although_its_queue_is_never_empty(self, own, task, tmp_path):
        lost = task.note.apply_async((str(tmp_path / "lost"), "lost"), priority=10)
        with own.app.connection_for_write() as connection, connection.channel() as channel:
            assert channel.basic_get("note", no_ack=True).headers["id"] == lost.id
        others = [task.note.delay(str(tmp_path / "others"), str(n), 0.5) for n in range(100)]

        own.start_worker("--concurrency=1")

        assert lost.get(timeout=40) == "lost"
        assert own.events(lost)[:2] == ["created", "republished"]
        assert own.row(others[-1])["status"] == "queued"


class TestDuplicateDeliveryAndZombies:
    """Zombies that were taken for dead, and what they may not write: test_zombies.py."""

    def test_an_attempt_that_was_taken_over_neither_completes_nor_writes(self, own, task, tmp_path):
        own.start_worker("--concurrency=2")
        job = task.note.delay(str(tmp_path / "runs"), "job", 4.0)
        eventually(lambda: lines(tmp_path / "runs"), 20)
        row = own.wait_for(job, "running")

        # As the reconciler does with an attempt whose holder is silent, while this one in truth goes on.
        own.app.store.close(job.id, row["attempt"], reason="taken for dead")

        assert job.get(**GET) == "job"
        eventually(lambda: len(lines(tmp_path / "runs", "end")) == 2, 20)
        assert own.events(job) == TAKEN_OVER

    def test_a_worker_that_is_stopped_for_a_moment_does_no_job_twice(self, own, task, tmp_path):
        first = own.start_worker("--concurrency=1")
        jobs = [task.note.delay(str(tmp_path / f"{n}"), str(n), 0.3) for n in range(10)]
        eventually(lambda: lines(tmp_path / "0"), 20)

        first.signal(signal.SIGSTOP)
        own.start_worker("--concurrency=1")
        stays(lambda: all(len(lines(tmp_path / str(n), "begin")) <= 1 for n in range(10)), 2)
        first.signal(signal.SIGCONT)

        assert [job.get(**GET) for job in jobs] == [str(n) for n in range(10)]
        assert events_of_all(own, jobs) == {tuple(COMPLETED)}
        assert all(lines(tmp_path / str(n)) == [f"begin {n}", f"end {n}"] for n in range(10))


class TestDatabaseAway:
    @pytest.mark.parametrize("broker", ["embedded"], indirect=True)
    def test_locked_jobs_wait_and_none_fails(self, own, task, tmp_path):
        own.start_worker("--concurrency=2")
        running = task.note.delay(str(tmp_path / "runs"), "job", 1.0)
        eventually(lambda: lines(tmp_path / "runs"), 20)

        with Lock(own.server_dir / "media_store.db", 7.0):
            pass

        assert running.get(**GET) == "job"
        assert own.events(running) == COMPLETED

    @pytest.mark.parametrize("broker", ["rabbitmq", "redis"], indirect=True)
    def test_a_locked_table_delays_jobs_and_fails_none(self, own, task, tmp_path):
        worker = own.start_worker("--concurrency=2")
        running = task.note.delay(str(tmp_path / "runs"), "job", 1.0)
        eventually(lambda: lines(tmp_path / "runs"), 20)
        own.app.control.cancel_consumer("add", reply=True, timeout=2)
        waiting = task.add.delay(1, 1)  # published, and found by the worker while the table is locked

        with own.app.store.database.transaction() as connection:
            connection.execute(text("LOCK TABLE task_queue IN ACCESS EXCLUSIVE MODE"))
            own.app.control.add_consumer("add", reply=True, timeout=2)
            eventually(lambda: lines(tmp_path / "runs", "end"), 20)
            stays(lambda: lines(tmp_path / "runs") == ["begin job", "end job"] and worker.is_alive(), 6)

        assert (running.get(**GET), waiting.get(**GET)) == ("job", 2)
        assert own.events(running) == own.events(waiting) == COMPLETED
        assert lines(tmp_path / "runs") == ["begin job", "end job"]
        assert worker.is_alive()

    def test_a_server_that_restarts_delays_jobs_and_fails_none(
        self, request, broker, private_postgres, server_dir, tmp_path
    ):
        server = private_postgres()
        with server.server.database() as url:
            env = {"DATABASE_URL": url}
            if broker != "embedded":
                env["CELERY_BROKER_URL"] = request.getfixturevalue(f"fresh_{broker}_url")
            with deployed(server_dir, tmp_path, env) as own:
                schema.upgrade(own.app.store.database)
                worker = own.start_worker("--concurrency=2")
                jobs = [own.task.note.delay(str(tmp_path / f"{n}"), str(n), 1.0) for n in range(4)]
                eventually(lambda: lines(tmp_path / "0"), 20)

                server.stop()
                stays(worker.is_alive, 3)
                server.start()

                assert [job.get(**GET) for job in jobs] == ["0", "1", "2", "3"]
                assert events_of_all(own, jobs) == {tuple(COMPLETED)}
                assert all(lines(tmp_path / str(n)) == [f"begin {n}", f"end {n}"] for n in range(4))
                assert worker.is_alive()


class TestMqttBrokerDownSlowOrWrongPassword:
    @pytest.fixture
    def prefix(self):
        return unique_name()

    @pytest.fixture
    def start(self, own, prefix):
        """Start a worker that speaks MQTT to a port."""

        def start(port, **env):
            topics = {"MQTT_TOPIC": f"{prefix}/events", "CAPABILITY_TOPIC_PREFIX": f"{prefix}/workers"}
            mqtt = {"BROADCAST_TYPE": "mqtt", "MQTT_BROKER": HOST, "MQTT_PORT": port, "WORKER_ID": f"{prefix}-w"}
            return own.start_worker("--concurrency=2", env={**topics, **mqtt, **env})

        return start

    @pytest.fixture
    def listen(self, request, prefix):
        def listen(port):
            listener = Listener(port, prefix)
            request.addfinalizer(listener.close)
            return listener

        return listen

    @staticmethod
    def run_jobs(own, count=30):
        began = time.monotonic()
        jobs = [own.task.add.delay(number, 1) for number in range(count)]
        assert [job.get(**GET) for job in jobs] == list(range(1, count + 1))
        assert events_of_all(own, jobs) == {tuple(COMPLETED)}
        assert time.monotonic() - began < 15
        return jobs

    def test_down_jobs_do_not_notice_and_all_is_said_on_its_return(self, own, start, listen, prefix, private_mosquitto):
        broker = private_mosquitto("max_queued_messages 0")
        worker = start(broker.port)
        listen(broker.port).wait_for_capability(f"{prefix}-w")
        broker.stop()

        jobs = self.run_jobs(own)
        one_warning(worker)
        broker.start()

        listener = listen(broker.port)
        assert listener.wait_for_capability(f"{prefix}-w")["idle_count"] == 2
        after = own.task.add.delay(1, 1)
        listener.wait_for_change(after, "completed")
        assert len(warnings(worker)) == 1
        assert events_of_all(own, [*jobs, after]) == {tuple(COMPLETED)}

    def test_slow_jobs_do_not_notice(self, own, start, listen, private_mosquitto):
        broker = private_mosquitto()
        with Road(broker.port, bytes_per_s=4_000) as road:
            worker = start(road.port)
            listener = listen(broker.port)

            jobs = self.run_jobs(own)

            assert len(listener.events()) < 4 * len(jobs)  # it is slow indeed
            listener.wait_for_change(jobs[-1], "completed", 40)
            assert warnings(worker) == []

    def test_wrong_password_jobs_do_not_notice(self, own, start, private_mosquitto):
        broker = private_mosquitto(allow_anonymous=False)
        worker = start(broker.port, MQTT_USERNAME="worker", MQTT_PASSWORD="hunter2-wrong")

        self.run_jobs(own)

        assert "MQTT_USERNAME and MQTT_PASSWORD" in one_warning(worker)
        assert "hunter2" not in worker.log()


class TestDiskFull:
    def test_it_is_retried_and_works_once_there_is_space(self, small_disk, own, task, tmp_path):
        own.start_worker("--concurrency=1")
        pyvips.Image.gaussnoise(900, 900).cast("uchar").pngsave(str(tmp_path / "in.png"))
        (small_disk / "filler").write_bytes(b"x" * 900_000)

        job = task.image_resize.delay(tmp_path / "in.png", small_disk / "out.png", width=800)
        eventually(lambda: "retry" in own.events(job), 20)
        row = own.row(job)
        assert (row["error_type"], row["retry_count"]) == ("DiskFull", 1)
        assert str(small_disk / "out.png") in row["error_message"]
        assert os.listdir(small_disk) == ["filler"]  # noqa: PTH208
        (small_disk / "filler").unlink()

        assert job.get(**GET)["width"] == 800
        assert own.row(job)["error_type"] is None

    @pytest.mark.parametrize("broker", ["embedded"], indirect=True)
    def test_it_fails_with_the_path_after_three_attempts(self, small_disk, own, task, tmp_path):
        own.start_worker("--concurrency=1")
        pyvips.Image.gaussnoise(2000, 2000).cast("uchar").pngsave(str(tmp_path / "in.png"))

        job = task.image_resize.delay(tmp_path / "in.png", small_disk / "out.png", width=1900)

        row = own.wait_for(job, "failed", timeout_s=40)
        assert (row["error_type"], row["retry_count"]) == ("DiskFull", 2)
        assert str(small_disk / "out.png") in row["error_message"]
        assert own.events(job).count("retry") == 2
        assert os.listdir(small_disk) == []  # noqa: PTH208


class TestSigtermSigint:
    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    def test_running_jobs_finish_and_the_rest_is_given_back(self, own, task, tmp_path, signum):
        worker = own.start_worker("--concurrency=1", "--prefetch-multiplier=4")
        running = task.note.delay(str(tmp_path / "runs"), "job", 15.0)
        eventually(lambda: lines(tmp_path / "runs"), 20)
        waiting = [task.note.delay(str(tmp_path / f"{n}"), str(n)) for n in range(4)]

        worker.signal(signum)
        own.start_worker("--concurrency=1")

        assert [job.get(**GET) for job in waiting] == ["0", "1", "2", "3"]
        assert {own.row(job)["claimed_by"] for job in waiting} == {"w2"}
        assert own.row(running)["status"] == "running"  # it is at once that the rest is given back
        assert worker.wait(30) == 0
        assert events_of_all(own, [running, *waiting]) == {tuple(COMPLETED)}
        assert lines(tmp_path / "runs") == ["begin job", "end job"]

    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    def test_a_second_signal_requeues_running_jobs(self, own, task, tmp_path, signum):
        worker = own.start_worker("--concurrency=1")
        job = task.note.delay(str(tmp_path / "runs"), "job", 4.0)
        eventually(lambda: lines(tmp_path / "runs"), 20)
        own.wait_for(job, "running")

        worker.signal(signum)
        worker.wait_for_log("running jobs have 300 s", 10)
        worker.signal(signum)
        own.start_worker("--concurrency=1")

        assert job.get(**GET) == "job"
        assert worker.wait(25) == 0
        assert own.events(job) == ["created", "claimed", "started", "released", "claimed", "started", "completed"]
        assert (own.row(job)["claimed_by"], own.row(job)["deaths"], own.row(job)["retry_count"]) == ("w2", 0, 0)
        assert lines(tmp_path / "runs") == ["begin job", "begin job", "end job"]

    def test_the_end_of_the_grace_requeues_them_too(self, own, task, tmp_path):
        worker = own.start_worker("--concurrency=1", env={"SHUTDOWN_GRACE_S": 1})
        job = task.note.delay(str(tmp_path / "runs"), "job", 30.0)
        eventually(lambda: lines(tmp_path / "runs"), 20)
        own.wait_for(job, "running")

        worker.terminate()

        row = own.wait_for(job, "queued")
        assert worker.wait(25) == 0
        assert (row["deaths"], row["retry_count"]) == (0, 0)
        assert own.events(job) == ["created", "claimed", "started", "released"]


class TestCancel:
    def test_a_queued_job_never_starts(self, own, task, tmp_path):
        from tasks import control

        job = task.note.delay(str(tmp_path / "never"), "job")

        assert control.cancel(job.id, "not wanted", app=own.app)
        own.start_worker("--concurrency=1")
        after = task.note.delay(str(tmp_path / "after"), "after")

        assert after.get(**GET) == "after"
        assert not (tmp_path / "never").exists()
        assert own.row(job)["status"] == "cancelled"
        assert job.state == "REVOKED"

    def test_a_job_that_waits_for_a_busy_worker_never_starts_also_after_its_restart(self, own, task, tmp_path):
        from tasks import control

        first = own.start_worker("--concurrency=1", "--prefetch-multiplier=2")
        busy = task.note.delay(str(tmp_path / "busy"), "busy", 4.0)
        eventually(lambda: lines(tmp_path / "busy"), 20)
        # One that the worker has reserved, and others that stand in the queue.
        waiting = [task.note.delay(str(tmp_path / "never"), str(n)) for n in range(4)]

        assert all(control.cancel(job.id, app=own.app) for job in waiting)
        first.kill9_everything()
        own.start_worker("--concurrency=1")
        after = task.note.apply_async((str(tmp_path / "after"), "after"), priority=1)

        assert after.get(**GET) == "after"  # behind all the others
        assert busy.get(**GET) == "busy"
        assert [own.events(job) for job in waiting] == [["created", "cancelled"]] * 4
        assert not (tmp_path / "never").exists()

    def test_a_program_that_a_running_job_has_started_is_gone_within_three_seconds(self, own, task, tmp_path):
        from tasks import control

        own.start_worker("--concurrency=1")
        job = task.stay.delay(str(tmp_path / "runs"), 60.0, True)
        eventually(lambda: lines(tmp_path / "runs.started"), 20)
        own.wait_for(job, "running")
        program = int(lines(tmp_path / "runs.started")[0])
        assert processes.is_running(program)

        control.cancel(job.id, app=own.app)

        eventually(lambda: not processes.is_running(program), GONE_WITHIN_S)
        assert task.add.delay(1, 1).get(**GET) == 2
        assert own.events(job) == ["created", "claimed", "started", "cancelled"]
        assert lines(tmp_path / "runs") == ["begin"]

    def test_the_process_of_a_running_job_is_gone_within_three_seconds(self, own, task, tmp_path):
        from tasks import control

        own.start_worker("--concurrency=1")
        job = task.note.delay(str(tmp_path / "runs"), "job", 60.0)
        eventually(lambda: lines(tmp_path / "runs"), 20)
        own.wait_for(job, "running")
        pid = int(lines(tmp_path / "runs.pid")[-1])

        control.cancel(job.id, app=own.app)

        eventually(lambda: not processes.is_running(pid), GONE_WITHIN_S)
        after = task.add.delay(1, 1)
        assert after.get(**GET) == 2
        assert own.events(job) == ["created", "claimed", "started", "cancelled"]
        assert lines(tmp_path / "runs") == ["begin job"]

    def test_temp_files_of_a_running_job_are_removed(self, own, task, tmp_path):
        from tasks import control

        own.start_worker("--concurrency=1", "-Q", "image_conversion")
        make_large_image(tmp_path / "in.png")
        job = task.image_conversion.delay(tmp_path / "in.png", tmp_path / "out.avif")
        eventually(lambda: temp_files(tmp_path), 20)

        control.cancel(job.id, app=own.app)

        eventually(lambda: not temp_files(tmp_path), GONE_WITHIN_S)
        assert not (tmp_path / "out.avif").exists()
        assert own.row(job)["status"] == "cancelled"

    def test_what_waits_for_a_cancelled_job_is_cancelled(self, own, task, tmp_path):
        from tasks import control

        steps = chain(task.add.s(1, 1), task.add.s(2), task.note_parts.s(str(tmp_path / "never")))()

        control.cancel(steps.parent.parent.id, app=own.app)

        assert own.row(steps)["status"] == own.row(steps.parent)["status"] == "cancelled"
        own.start_worker("--concurrency=1")
        assert task.add.delay(1, 1).get(**GET) == 2
        assert not (tmp_path / "never").exists()


@pytest.mark.skipif(not processes.HAS_PROC, reason="memory is read in /proc")
@pytest.mark.parametrize("broker", ["embedded"], indirect=True)
class TestDueLater:
    # By the row, and by a message of a producer without the database, which comes to the worker.
    @pytest.mark.parametrize("own_env", [{"ENQUEUE": "strict"}, {"ENQUEUE": "broker"}], ids=["strict", "broker"])
    def test_a_thousand_etas_and_retries_take_none_of_a_workers_memory(self, own, task):
        worker = own.start_worker("--concurrency=1")
        self.submit(own, task, 100)  # what a worker needs but once
        assert held_by_workers(own) == []
        before_bytes = resident_bytes(worker.pid)

        self.submit(own, task, 1000)

        assert held_by_workers(own) == []
        assert resident_bytes(worker.pid) - before_bytes < 4 * MEGABYTE

    @staticmethod
    def submit(own, task, count):
        """Jobs that are due in an hour: so many ETAs, and five retries."""
        jobs = [task.add.apply_async((n, 1), countdown=3600) for n in range(count)]
        jobs += [task.be_limited.delay(3600) for _ in range(5)]
        ids = [job.id for job in jobs]

        def resting():
            rows = own.app.store.jobs_by_id(ids)
            return [row for row in rows if row["published_at"] is None and row["run_after_utc"] is not None]

        eventually(lambda: len(resting()) == len(jobs), 60, lambda: f"{len(resting())} of {len(jobs)} rest")
        assert sum(row["retry_count"] for row in resting()) == 5


class TestBadInput:
    def test_it_fails_at_once_with_file_limit_and_remedy(self, own, task, tmp_path):
        worker = own.start_worker("--concurrency=1", env={"MAX_PIXELS": 10_000})
        files = {name: tmp_path / f"{name}.jpg" for name in ("missing", "text", "cut", "large")}
        pyvips.Image.gaussnoise(90, 90).cast("uchar").jpegsave(str(files["cut"]))
        files["cut"].write_bytes(files["cut"].read_bytes()[:2000])
        files["text"].write_text("This is no picture.\n" * 100)
        pyvips.Image.black(400, 300).jpegsave(str(files["large"]))
        pyvips.Image.black(60, 40).pngsave(str(tmp_path / "good.png"))

        jobs = {
            name: task.image_resize.delay(file, tmp_path / "out" / "out.webp", width=30) for name, file in files.items()
        }
        good = task.image_resize.delay(tmp_path / "good.png", tmp_path / "good.webp", width=30)

        assert good.get(**GET)["width"] == 30
        expected = {
            "missing": (InputMissing, "does not exist"),
            "text": (UnsupportedMedia, "not an image"),
            "cut": (CorruptMedia, ""),
            "large": (LimitExceeded, "(MAX_PIXELS): give a smaller one, or raise it"),
        }
        for name, (error, words) in expected.items():
            row = own.row(jobs[name])
            assert own.events(jobs[name]) == ["created", "claimed", "started", "failed"]
            assert (row["error_type"], row["retry_count"], row["deaths"]) == (error.__name__, 0, 0)
            assert str(files[name]) in row["error_message"]
            assert words in row["error_message"]
            with pytest.raises(error):
                jobs[name].get(**GET)
        assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
        assert worker.is_alive()
