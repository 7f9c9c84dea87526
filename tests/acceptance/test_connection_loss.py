"""A pool child that dies together with the connection to the broker does not end its worker."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from urllib.parse import urlsplit, urlunsplit

import pytest

from tests.acceptance.deployment import deployed
from tests.tooling.waiting import eventually
from tests.tooling.worker import REPOSITORY

A_POOL = """
import os
import signal
from types import SimpleNamespace
from celery.concurrency.asynpool import AsynPool
from kombu.asynchronous import Hub
from tasks import consumer

consumer.Consumer.on_close = lambda self: self.pool._pool.maintain_pool()
spare = os.dup(0)
hub, pool = Hub(), AsynPool(1, threads=False)
pool.register_with_event_loop(hub)
mine = consumer.MediaConsumer.__new__(consumer.MediaConsumer)
mine.pool, mine.hub, mine.controller = SimpleNamespace(_pool=pool), hub, SimpleNamespace()
(child,) = pool._pool
{what_happens}
mine.on_close()
hub.reset()
pool.register_with_event_loop(hub)
heard = {{fd for fd, (call, _) in hub.readers.items() if call == pool.handle_result_event}}
print(heard == {{child.outqR_fd for child in pool._pool}}, len(pool._pool), flush=True)
pool.terminate()
"""
# Its pipe was seen to close, and it can't be waited for yet.
A_CHILD_THAT_IS_WATCHED_NO_MORE = "pool._event_process_exit(hub, child)"
# Its queues are destroyed, and the new ones get other file numbers.
A_DEATH_IN_MID_JOB = """
os.kill(child.pid, signal.SIGKILL)
while child._is_alive():
    pass
os.close(spare)
pool.on_partial_read(SimpleNamespace(_accepted=True), child)
"""


class Road:
    """A port that leads to another one, until it is cut; then it is open again."""

    def __init__(self, port):
        self._far_port = port
        self._ends = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        ends, self._ends = self._ends, []
        for end in ends:
            _shut(end)

    def close(self):
        _shut(self._server)
        self._server.close()
        self.cut()

    def _accept(self):
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._far_port))
                self._ends += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one, other):
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for end in (one, other):
            _shut(end)
        one.close()


def _shut(end):
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def road(fresh_rabbitmq_url):
    road = Road(urlsplit(fresh_rabbitmq_url).port)
    yield road
    road.close()


@pytest.mark.slow
def test_a_child_dies_and_the_connection_is_lost_before_the_worker_is_ready(
    road, fresh_rabbitmq_url, server_dir, tmp_path
):
    parts = urlsplit(fresh_rabbitmq_url)
    url = urlunsplit(parts._replace(netloc=parts.netloc.replace(str(parts.port), str(road.port))))
    with deployed(server_dir, tmp_path, {"CELERY_BROKER_URL": url}) as deployment:
        worker = deployment.start_worker("-Q", "note", "--concurrency=2", ready_timeout_s=0)
        eventually(lambda: "Connected to" in worker.log(), 30, worker.log)
        assert " ready." not in worker.log()

        os.kill(worker.child_pids()[0], signal.SIGKILL)
        road.cut()

        worker.wait_until_ready(30)
        jobs = [deployment.task.note.delay(str(tmp_path / f"runs-{n}"), "", 1.0) for n in range(2)]
        for job in jobs:
            deployment.wait_for(job, "completed")
        pids = {(tmp_path / f"runs-{n}.pid").read_text() for n in range(2)}
        assert len(pids) == 2  # the new child works, too
        assert worker.log().count("Connection to broker lost") == 1


def test_a_worker_without_the_mirror_outlives_its_connection(road, fresh_rabbitmq_url, server_dir, tmp_path):
    parts = urlsplit(fresh_rabbitmq_url)
    url = urlunsplit(parts._replace(netloc=parts.netloc.replace(str(parts.port), str(road.port))))
    with deployed(server_dir, tmp_path, {"CELERY_BROKER_URL": url, "MIRROR": "off"}) as plain:
        worker = plain.start_worker("-Q", "note", "--concurrency=1")

        road.cut()

        eventually(lambda: "Connection to broker lost" in worker.log(), 30, worker.log)
        plain.task.note.delay(str(tmp_path / "run"), "", 0.0)
        eventually((tmp_path / "run").exists, 30, worker.log)
        assert worker.is_alive()
        worker.clean_up()


@pytest.mark.parametrize(
    "what_happens", [A_CHILD_THAT_IS_WATCHED_NO_MORE, A_DEATH_IN_MID_JOB], ids=["watched no more", "death in mid-job"]
)
def test_the_next_connection_listens_to_the_living_children_and_to_nothing_else(what_happens):
    script, env = A_POOL.format(what_happens=what_happens), os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stdout) == (0, "True 1\n"), done.stderr
