"""What a row can hold of what somebody gave or sent."""

import math
from datetime import UTC, datetime, timedelta, timezone

import pytest

from tasks.values import HIGHEST, LONGEST_NAME, LONGEST_S, is_limit, is_name, is_number, is_whole, moment_of

NOON = datetime(2031, 1, 31, 12, tzinfo=UTC)
LAST_NOON = datetime(9999, 12, 31, 12, tzinfo=timezone(timedelta(hours=-13)))


@pytest.mark.parametrize(("value", "is_one"), [(0, True), (-1.5, True), (True, False), ("1", False), (None, False)])
def test_a_number_is_no_truth_value_and_no_text(value, is_one):
    assert is_number(value) is is_one


@pytest.mark.parametrize(
    ("value", "least", "is_one"),
    [(0, 0, True), (HIGHEST, 0, True), (0, 1, False), (HIGHEST + 1, 0, False), (1.0, 0, False), (True, 0, False)],
)
def test_a_whole_number_has_room_in_its_column(value, least, is_one):
    assert is_whole(value, least) is is_one


@pytest.mark.parametrize(
    ("value", "is_one"), [(0, True), (2.5, True), (LONGEST_S, True), (-1, False), (LONGEST_S + 1, False)]
)
def test_a_limit_is_a_number_of_seconds(value, is_one):
    assert is_limit(value) is is_one
    assert not any(map(is_limit, (math.nan, math.inf, True, "60", None)))


@pytest.mark.parametrize(
    ("value", "is_one"), [("a", True), ("n" * LONGEST_NAME, True), ("n" * (LONGEST_NAME + 1), False), ("", False)]
)
def test_a_name_is_printable_and_fits_its_column(value, is_one):
    assert is_name(value) is is_one
    assert not any(map(is_name, ("a\nb", "\0", b"a", 7, None)))


@pytest.mark.parametrize(
    "value",
    [
        NOON,
        NOON.replace(tzinfo=None),
        NOON.astimezone(timezone(timedelta(hours=-5))),
        "2031-01-31T12:00:00Z",
        "2031-01-31T12:00:00",
        "2031-01-31T13:30:00+01:30",
    ],
)
def test_a_time_is_told_in_utc_whatever_its_zone(value):
    moment = moment_of(value)

    assert moment == NOON
    assert moment.utcoffset() == timedelta()


@pytest.mark.parametrize(
    "value",
    ["", "soon", "2031-13-01T00:00:00Z", 1_900_000_000, True, None, [], "0001-01-01T00:00:00+01:00", LAST_NOON],
)
def test_what_is_no_time_in_utc_is_none(value):
    assert moment_of(value) is None
