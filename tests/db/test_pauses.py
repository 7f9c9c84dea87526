"""Pauses of queues: durable, with a reason and an end."""

from datetime import timedelta

import pytest

from db.records import now
from tests.db.conftest import open_database

SOON = timedelta(hours=1)


def all_pauses(store):
    with store.database.reading() as connection:
        return set(connection.exec_driver_sql("SELECT queue FROM queue_pauses").scalars())


class TestPauses:
    def test_a_paused_queue_is_listed_with_its_reason(self, store):
        before = now()

        store.pause("video_probe", reason="the disk is full")

        (pause,) = store.paused()
        assert (pause["queue"], pause["reason"], pause["paused_until"]) == ("video_probe", "the disk is full", None)
        assert before <= pause["paused_at"] <= now()

    def test_pausing_again_changes_reason_and_end(self, store):
        until = now() + SOON
        store.pause("video_probe", reason="first")

        store.pause("video_probe", reason="second", until=until)

        (pause,) = store.paused()
        assert (pause["reason"], pause["paused_until"]) == ("second", until)

    def test_a_reason_may_be_no_text(self, store):
        store.pause("video_probe", reason="photo\udcff.jpg\x00")

        assert store.paused()[0]["reason"] == "photo\\udcff.jpg\\0"

    def test_pauses_are_listed_by_queue(self, store):
        for queue in ("c", "a", "b"):
            store.pause(queue)

        assert [pause["queue"] for pause in store.paused()] == ["a", "b", "c"]
        assert set(store.paused_queues()) == {"a", "b", "c"}

    def test_a_resumed_queue_is_not_paused(self, store):
        store.pause("a")
        store.pause("b")

        assert store.resume("a")
        assert not store.resume("a")
        assert not store.resume("unknown")

        assert set(store.paused_queues()) == {"b"}

    def test_a_pause_outlasts_the_process_that_set_it(self, store):
        store.pause("a", until=now() + SOON)
        store.database.close()
        other = type(store)(open_database(store.database.url.render_as_string(hide_password=False)))

        try:
            assert set(other.paused_queues()) == {"a"}
        finally:
            other.database.close()

    @pytest.mark.parametrize("ended_before", [timedelta(0), SOON])
    def test_a_pause_whose_end_has_come_is_not_in_force(self, store, ended_before):
        store.pause("a", until=now() - ended_before)

        assert store.paused() == []
        assert not store.paused_queues()

    def test_ended_pauses_are_forgotten_and_no_others(self, store):
        store.pause("ended", until=now())
        store.pause("later", until=now() + SOON)
        store.pause("endless")

        store.forget_ended_pauses()

        assert all_pauses(store) == {"later", "endless"}

    def test_a_pause_that_has_ended_can_be_set_again(self, store):
        store.pause("a", until=now())

        store.pause("a")

        assert set(store.paused_queues()) == {"a"}
