"""A consumer that waits learns of a message at once, and loses nothing when it does not."""

import os
import threading
import time

import pytest

from tasks.broker.wakeup import Inbox, wake


@pytest.fixture(params=["short", "long"])
def inbox(request, tmp_path):
    directory = tmp_path / ("d" * 120 if request.param == "long" else "d")
    directory.mkdir()
    inbox = Inbox(directory / "one.wake")
    yield inbox
    inbox.close()
    assert list(directory.iterdir()) == []


def waited_s(inbox, timeout_s):
    began = time.monotonic()
    inbox.wait(timeout_s)
    return time.monotonic() - began


def test_a_wake_up_ends_the_wait_also_where_the_path_is_longer_than_a_socket_address(inbox):
    timer = threading.Timer(0.1, wake, [[inbox._path]])
    timer.start()
    assert waited_s(inbox, 20) < 10
    timer.join()


def test_a_wake_up_before_the_wait_is_not_lost_and_counts_once(inbox):
    inbox.wake()
    inbox.wake()

    assert waited_s(inbox, 20) < 10
    assert waited_s(inbox, 0.1) >= 0.09


def test_a_full_or_missing_inbox_is_no_error(inbox, tmp_path):
    for _ in range(2000):
        wake([inbox._path, tmp_path / "gone.wake"])
    assert waited_s(inbox, 20) < 10


def test_a_forked_child_that_closes_it_leaves_it_to_its_parent(inbox):
    pid = os.fork()
    if not pid:
        try:
            inbox.close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0

    wake([inbox._path])
    assert waited_s(inbox, 20) < 10
