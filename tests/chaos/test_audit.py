"""The audit finds what a storm must not leave: here, what subscribers are told."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from tests.chaos.audit import Audit
from tests.chaos.crew import Blow

BEGIN = datetime(2026, 11, 22, tzinfo=UTC)
LOG = ["created", "claimed", "started", "completed"]
HEARD = [(1, "queued"), (2, "processing"), (3, "processing"), (4, "completed")]


def audit_of(**logs):
    rows = [
        {"job_id": job_id, "sequence": number, "event_type": event, "created_at": BEGIN}
        for job_id, events in logs.items()
        for number, event in enumerate(events, 1)
    ]
    store = SimpleNamespace(_rows=lambda _statement: rows)
    return Audit(SimpleNamespace(store=store), material=None, blows=[])


def subscriber_of(*absences, **changes):
    return SimpleNamespace(changes=changes, absences=absences)


def test_a_subscriber_that_heard_the_whole_log_is_no_finding():
    audit = audit_of(a=LOG, b=["created"])

    audit.told(subscriber_of(a=HEARD, b=[(1, "queued")]))

    assert audit.findings == []


@pytest.mark.parametrize(
    ("heard", "text"),
    [
        ({}, "did not hear [(1, 'queued'), "),
        ({"a": HEARD[:1] + HEARD[2:]}, "did not hear [(2, 'processing')], and heard []"),
        ({"a": [*HEARD, (5, "lost")]}, "did not hear [], and heard [(5, 'lost')]"),
        ({"a": [*HEARD[:3], (4, "error")]}, "did not hear [(4, 'completed')], and heard [(4, 'error')]"),
        ({"a": HEARD, "b": [(1, "queued")]}, "did not hear [], and heard [(1, 'queued')]"),
    ],
    ids=["nothing", "gap", "untrue", "another end", "no such job"],
)
def test_what_was_not_heard_or_is_not_true_is_a_finding(heard, text):
    audit = audit_of(a=LOG)

    audit.told(subscriber_of(**heard))

    (finding,) = audit.findings
    assert (finding.verdict, finding.job_id) == ("wrong", "b" if "b" in heard else "a")
    assert text in finding.text


@pytest.mark.parametrize(("away_after_s", "is_excused"), [(-10, True), (15, True), (-60, False), (60, False)])
def test_what_a_subscriber_missed_while_it_was_away_is_excused_and_counted(away_after_s, is_excused):
    audit = audit_of(a=LOG)
    away = BEGIN + timedelta(seconds=away_after_s)
    subscriber = subscriber_of((away, away + timedelta(seconds=15)), a=[HEARD[0], HEARD[3]])

    audit.told(subscriber)

    assert audit.is_told(subscriber) == is_excused
    assert audit.missed == (2 if is_excused else 0)
    assert bool(audit.findings) != is_excused


@pytest.mark.parametrize(("away_s", "claimed_after_s", "is_fault"), [(30, 5, False), (30, 40, True), (10, 40, False)])
def test_no_claim_in_a_long_outage_of_mqtt_is_a_finding(away_s, claimed_after_s, is_fault):
    audit = audit_of()
    audit.blows = [Blow("mqtt frozen", BEGIN, until=BEGIN + timedelta(seconds=away_s))]
    audit.claims = [BEGIN + timedelta(seconds=claimed_after_s)]

    said = audit.outages_of_mqtt()

    assert bool(audit.findings) == is_fault
    assert f"within the {away_s} s" in said
