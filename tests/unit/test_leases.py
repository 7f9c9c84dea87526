"""Who lives: by a lock on this host, by a row elsewhere."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from db.records import Holder, Liveness, now
from tasks.errors import SettingsError
from tasks.leases import LATE_S, WATCHED_FOR_S, Leases, Watch
from tests.tooling.waiting import eventually
from tests.unit.jobs import claimed_by

STEADY_S = 15.0  # LEASE_TIMEOUT_S
REPOSITORY = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from tasks import app
app.leases.take()
print(app.lease, flush=True)
sys.stdin.read()
"""


@contextmanager
def process_with_lease(server_dir, worker_id="other"):
    """Another process that holds a lease; its lease's name."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "CL_SERVER_DIR": str(server_dir)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env=env | {"WORKER_ID": worker_id},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            process.lease = process.stdout.readline().strip()
            assert process.lease
            yield process
        finally:
            process.kill()


@pytest.fixture
def leases(producer, clock):
    """Those of a process that has seen the database answer for a while."""
    leases = producer.app.leases
    clock.pass_s(STEADY_S)
    return leases


def holder_of(producer, worker_id):
    (holder,) = producer.app.store.holders(worker_id=worker_id)
    return holder


def test_a_worker_that_holds_its_lock_lives(producer, leases):
    leases.take()

    holder = holder_of(producer, producer.app.worker_id)
    assert holder.lease == producer.app.lease
    assert leases.judge(holder) is Liveness.ALIVE
    assert not leases.seems_dead(holder)


def test_a_lease_that_was_given_back_leaves_neither_row_nor_file(producer, leases):
    leases.take()

    leases.release()

    assert producer.app.store.holders() == []
    assert list((producer.server_dir / "leases").iterdir()) == []


def test_a_lease_that_still_holds_an_attempt_keeps_its_row_and_is_dead(producer, leases):
    leases.take()
    job = producer.task.add.delay(1, 1)
    claimed_by(producer.app, job, "dead")

    producer.app.store.forget_lease("lease of dead")

    assert leases.judge(holder_of(producer, "dead")) is Liveness.DEAD


def silent_for(seconds, lease, host_id):
    return Holder(lease, "w", host_id, now() - timedelta(seconds=seconds), now())


def test_a_worker_whose_lock_file_was_tidied_away_lives_while_it_renews(producer, leases):
    leases.take()
    holder = holder_of(producer, producer.app.worker_id)
    (producer.server_dir / "leases" / holder.lease).unlink()

    assert leases.judge(holder) is Liveness.UNCERTAIN
    assert leases.judge(silent_for(16, holder.lease, holder.host_id)) is Liveness.DEAD


def silent_in_its_file(leases, seconds):
    """The holder of this process's lease, if it had not touched its file for so long."""
    (leases._directory / leases._app.lease).write_text(f"{time.monotonic() - seconds:020.3f}")
    return Holder(leases._app.lease, "w", leases.host_id, now(), now())


def test_a_lock_file_in_use_looks_new_to_who_tidies_up(producer, leases):
    leases.take()
    path = producer.server_dir / "leases" / producer.app.lease
    os.utime(path, (1, 1))

    leases.renew()

    assert time.time() - path.stat().st_mtime < 60


def test_a_clock_that_is_set_kills_nobody(leases):
    """As on a board without a battery, whose clock leaps ahead when it reaches a time server."""
    leases.take()

    assert leases.judge(silent_for(10**6, leases._app.lease, leases.host_id)) is Liveness.ALIVE


def test_a_file_that_was_never_touched_proves_no_silence(leases):
    leases.take()
    (leases._directory / leases._app.lease).write_text("")

    assert leases.judge(silent_for(0, leases._app.lease, leases.host_id)) is Liveness.ALIVE


def test_a_full_disk_or_a_database_that_is_away_does_not_look_like_a_stopped_worker(leases, monkeypatch):
    leases.take()
    holder = silent_in_its_file(leases, 100)
    assert leases.judge(holder) is Liveness.DEAD

    monkeypatch.setattr(leases._app.store, "renew_lease", lambda *_: 1 / 0)
    with suppress(ZeroDivisionError):
        leases.renew()

    assert leases.judge(holder) is Liveness.ALIVE


def test_a_lease_that_is_renewed_more_seldom_than_every_minute_is_alive_for_longer(producer, leases, monkeypatch):
    leases.take()
    settings = replace(producer.app.settings, lease_timeout_s=300.0)
    monkeypatch.setitem(producer.app.__dict__, "settings", settings)

    assert leases.judge(silent_in_its_file(leases, 200)) is Liveness.ALIVE


def test_another_process_of_this_host_lives_until_it_is_killed(producer, leases):
    with process_with_lease(producer.server_dir) as process:
        holder = holder_of(producer, "other")
        assert holder.lease == process.lease
        assert holder.host_id == leases.host_id
        assert leases.judge(holder) is Liveness.ALIVE

        process.kill()
        process.wait()

    assert leases.judge(holder) is Liveness.DEAD
    leases.interrupted()
    assert leases.is_dead(holder)  # a lock that was let go needs no steady time


@pytest.mark.parametrize(("silent_s", "liveness"), [(59, Liveness.ALIVE), (61, Liveness.DEAD)])
def test_a_process_that_holds_its_lock_but_is_stopped_counts_as_dead_after_a_minute(leases, silent_s, liveness):
    leases.take()
    silent = silent_in_its_file(leases, silent_s)

    assert leases.judge(silent) is liveness


@pytest.mark.parametrize(("silent_s", "liveness"), [(0, Liveness.UNCERTAIN), (14, Liveness.UNCERTAIN)])
def test_nothing_is_certain_of_a_worker_elsewhere_that_was_heard_of(leases, silent_s, liveness):
    assert leases.judge(silent_for(silent_s, "x", "another host")) is liveness


def test_a_worker_elsewhere_is_dead_once_its_lease_is_over(leases):
    silent = silent_for(16, "x", "another host")

    assert leases.judge(silent) is Liveness.DEAD


# Outages


@pytest.mark.parametrize("is_here", [True, False])
def test_after_an_outage_silence_proves_nothing_for_a_while(leases, clock, is_here):
    leases.take()
    silent = silent_in_its_file(leases, 61) if is_here else silent_for(61, "x", "another host")
    assert leases.judge(silent) is Liveness.DEAD

    leases.interrupted()

    assert leases.judge(silent) is (Liveness.ALIVE if is_here else Liveness.UNCERTAIN)
    assert leases.seems_dead(silent)
    clock.pass_s(STEADY_S - 1)
    assert not leases.is_dead(silent)
    clock.pass_s(1)
    assert leases.judge(silent) is Liveness.DEAD


def test_who_has_just_begun_knows_of_no_silence(producer):
    assert producer.app.leases.judge(silent_for(61, "x", "another host")) is Liveness.UNCERTAIN


def test_a_pool_child_knows_of_an_outage_what_its_main_process_saw(leases):
    silent = silent_for(61, "x", "another host")
    reading, writing = os.pipe()

    pid = os.fork()
    if pid == 0:
        try:
            os.read(reading, 1)
            os._exit([Liveness.DEAD, Liveness.UNCERTAIN].index(leases.judge(silent)))
        finally:
            os._exit(2)
    leases.interrupted()
    os.write(writing, b"x")

    os.close(reading), os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_two_directories_are_two_hosts(producer, leases, tmp_path, monkeypatch):
    leases.take()
    other = Leases(producer.app)
    monkeypatch.setattr(other, "_directory", tmp_path)

    assert other.host_id != leases.host_id
    assert other.judge(holder_of(producer, producer.app.worker_id)) is Liveness.UNCERTAIN


# Names


@pytest.fixture
def named(producer, monkeypatch):
    monkeypatch.setattr("tasks.leases._REFUSED_AFTER_S", 0.3)
    monkeypatch.setattr("tasks.leases._RETRY_S", 0.05)
    producer.app.worker_id = "other"
    return producer.app.leases


def test_a_second_worker_of_a_name_is_refused_by_its_variable(producer, named):
    with process_with_lease(producer.server_dir), pytest.raises(SettingsError, match=r"WORKER_ID=other: .*is alive"):
        named.take()


def test_a_name_that_lives_elsewhere_is_refused_too(producer, named):
    producer.app.store.renew_lease("lease", "other", "another host")

    with pytest.raises(SettingsError, match="WORKER_ID=other"):
        named.take()


def test_the_name_of_a_dead_worker_is_free_at_once(producer, named):
    with process_with_lease(producer.server_dir) as process:
        process.kill()
        process.wait()

    began = time.monotonic()
    named.take()

    assert time.monotonic() - began < 0.25
    assert producer.app.lease != process.lease


def test_a_name_is_free_once_its_worker_ends_within_the_wait(producer, named, monkeypatch):
    monkeypatch.setattr("tasks.leases._REFUSED_AFTER_S", 30)
    with process_with_lease(producer.server_dir) as process:
        monkeypatch.setattr("tasks.leases.time.sleep", lambda _: (process.kill(), process.wait()))
        named.take()

    assert producer.app.lease


START_TOGETHER = """
import sys, time
from tasks import app
from tasks.errors import SettingsError
app.store.holders()
print("ready", flush=True)
sys.stdin.readline()
try:
    app.leases.take()
    print("alive", flush=True)
except SettingsError as exc:
    print("refused", exc, flush=True)
sys.stdin.read()
"""


def test_of_two_workers_of_one_name_that_begin_at_the_same_moment_one_is_refused(producer):
    """As replicas of one container do."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "CL_SERVER_DIR": str(producer.server_dir)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", START_TOGETHER],
            env=env | {"WORKER_ID": "twin"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        said = sorted(process.stdout.readline().split()[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()

    assert said == ["alive", "refused", "refused"]
    assert len(producer.app.store.holders(worker_id="twin")) == 1


def test_a_directory_that_can_not_be_written_is_refused_by_its_variable(producer, leases):
    (producer.server_dir / "leases").write_text("a file stands here")

    with pytest.raises(SettingsError, match="CL_SERVER_DIR"):
        leases.take()


def test_only_old_files_of_the_dead_are_swept(producer, leases):
    leases.take()
    directory = producer.server_dir / "leases"
    (directory / "new").touch()
    (directory / "old").touch()
    for name in ("old", producer.app.lease):
        os.utime(directory / name, (0, 0))

    leases.sweep()

    assert {path.name for path in directory.iterdir()} == {"new", producer.app.lease}


class TestWatch:
    """Who holds a job that was redelivered, where no lock can be seen."""

    RENEW_S = 5.0

    @pytest.fixture
    def look(self, leases, clock):
        """One look at a holder on another host, which renewed last so many seconds after the test's beginning."""
        watch = Watch(leases, renew_s=self.RENEW_S)
        began_at, began_s = now(), clock.monotonic()

        def look(*, renewed_s):
            seen_at = began_at + timedelta(seconds=clock.monotonic() - began_s)
            return watch.judge(Holder("its", "w", "other", began_at + timedelta(seconds=renewed_s), seen_at))

        return look

    def test_one_that_renews_is_alive(self, look, clock):
        assert look(renewed_s=-2) is Liveness.UNCERTAIN
        clock.pass_s(1)

        assert look(renewed_s=0.5) is Liveness.ALIVE

    def test_one_that_misses_a_renewal_is_dead(self, look, clock):
        assert look(renewed_s=0) is Liveness.UNCERTAIN
        clock.pass_s(self.RENEW_S + LATE_S - 0.5)
        assert look(renewed_s=0) is Liveness.UNCERTAIN
        clock.pass_s(0.5)

        assert look(renewed_s=0) is Liveness.DEAD

    def test_one_that_could_not_renew_for_an_outage_is_watched_for_a_while(self, look, leases, clock):
        leases.interrupted()
        assert look(renewed_s=-60) is Liveness.UNCERTAIN
        clock.pass_s(WATCHED_FOR_S - 0.5)
        assert look(renewed_s=-60) is Liveness.UNCERTAIN

        assert look(renewed_s=2) is Liveness.ALIVE

    def test_one_that_could_not_renew_for_an_outage_since_is_watched_anew(self, look, leases, clock):
        assert look(renewed_s=-2) is Liveness.UNCERTAIN
        clock.pass_s(60)
        leases.interrupted()
        assert look(renewed_s=-2) is Liveness.UNCERTAIN
        clock.pass_s(WATCHED_FOR_S - 0.5)
        assert look(renewed_s=-2) is Liveness.UNCERTAIN
        clock.pass_s(0.5)

        assert look(renewed_s=-2) is Liveness.DEAD


def test_a_process_holds_a_lease_while_it_runs_a_job_itself(producer, app, leases, monkeypatch):
    monkeypatch.setitem(app.__dict__, "settings", replace(app.settings, lease_renew_s=0.05))

    with leases.of_eager_run():
        name = leases.eager
        holder = holder_of(producer, app.worker_id)
        with leases.of_eager_run():
            assert leases.eager == name
        assert (holder.lease, holder.is_eager, leases.judge(holder)) == (name, True, Liveness.ALIVE)
        eventually(lambda: holder_of(producer, app.worker_id).renewed_at > holder.renewed_at, 5)
        leases.take()  # a worker of that name is no double

    assert leases.eager is None
    assert [holder.lease for holder in app.store.holders()] == [leases.mine]
    assert not list(Path(app.settings.server_dir, "leases").glob("eager-*"))


def test_a_job_runs_in_its_callers_process_where_no_lease_can_be_kept(producer, app, add):
    Path(app.settings.server_dir, "leases").touch()

    assert add.apply((1, 2)).get() == 3
