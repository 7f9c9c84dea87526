"""A broker refuses some events, with a reason: what it may take later waits, what it never takes stops no other."""

import time

import pytest

from tests.mqtt.judge import Judge
from tests.mqtt.said import warnings
from tests.tooling.waiting import eventually

IMPLEMENTATION_SPECIFIC = 0x83
QUOTA_EXCEEDED = 0x97


@pytest.mark.slow
def test_an_event_that_the_broker_never_takes_stops_no_other(deploy, listen, private_mosquitto, worker_id):
    broker = private_mosquitto()
    with Judge(broker.port, lambda packet: b"nobody takes this" in packet, IMPLEMENTATION_SPECIFIC) as judge:
        deployment = deploy(judge.port)
        worker = deployment.start_worker("--concurrency=1", "-Q", "add,fail")
        listener = listen(broker.port)
        listener.wait_for_capability(worker_id)

        refused = deployment.task.fail.delay(message="nobody takes this")
        eventually(lambda: judge.refusals, 20)
        jobs = [deployment.task.add.delay(number, 1) for number in range(5)]

        for job in jobs:
            listener.wait_for_change(job, "completed", 40)
            assert [change["sequence"] for change in listener.changes(job)] == [1, 2, 3, 4]
        assert [change["sequence"] for change in listener.changes(refused)] == [1, 2, 3]
        (waits, passed_over) = eventually(lambda: warnings(worker) if len(warnings(worker)) > 1 else None, 5)
        assert "refuses messages" in waits
        assert f"change 4 of job {refused.id}" in passed_over


class Quota:
    """So many events, and each second some more."""

    def __init__(self, most: int, more: float) -> None:
        self._most, self._more = most, more
        self._left, self._at = float(most), time.monotonic()

    def is_used_up(self, packet: bytes) -> bool:
        if b"/events" not in packet:
            return False
        at = time.monotonic()
        self._left = min(self._left + (at - self._at) * self._more, self._most)
        self._at = at
        if self._left < 1:
            return True
        self._left -= 1
        return False


@pytest.mark.slow
def test_more_than_a_brokers_quota_is_told_in_time(deploy, listen, private_mosquitto, worker_id):
    broker = private_mosquitto()
    with Judge(broker.port, Quota(30, more=6).is_used_up, QUOTA_EXCEEDED) as judge:
        deployment = deploy(judge.port)
        worker = deployment.start_worker("--concurrency=1", "-Q", "add")
        listener = listen(broker.port)
        listener.wait_for_capability(worker_id)

        jobs = [deployment.task.add.delay(number, 1) for number in range(30)]

        for job in jobs:
            listener.wait_for_change(job, "completed", 60)
            assert [change["sequence"] for change in listener.changes(job)] == [1, 2, 3, 4]
        assert judge.refusals
        (warning,) = warnings(worker)
        assert "Quota exceeded" in warning
