"""Waiting for something to become true, or to see that it remains so, with a message; never a bare sleep."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(
    predicate: Callable[[], T],
    timeout_s: float = 10.0,
    message: str | Callable[[], str] = "",
    *,
    interval_s: float = 0.01,
) -> T:
    """Return the first truthy value of `predicate`, asked again and again until `timeout_s` has passed.

    Args:
        message: said when the time is up; a callable is asked only then, so it can show the state of things.
        interval_s: the first pause; each next one is longer by a half, up to 0.1 s.

    Raises:
        AssertionError: nothing truthy came in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= deadline:
            said = message() if callable(message) else message
            raise AssertionError(f"not within {timeout_s:g} s: {said or repr(predicate)} (last value: {value!r})")
        time.sleep(interval_s)
        interval_s = min(interval_s * 1.5, 0.1)


def stays(
    predicate: Callable[[], T],
    for_s: float,
    message: str | Callable[[], str] = "",
    *,
    interval_s: float = 0.05,
) -> T:
    """Ask `predicate` again and again for as long as `for_s`, and return its last value; each must be truthy.

    It is asked at once, and once more at the end.

    Args:
        message: said when it ceases to hold; a callable is asked only then, so it can show the state of things.

    Raises:
        AssertionError: it was no longer so, said as soon as that is seen.
    """
    began = time.monotonic()
    while True:
        passed_s = time.monotonic() - began
        value = predicate()
        if not value:
            said = message() if callable(message) else message
            raise AssertionError(f"no longer so after {passed_s:.2f} s: {said or repr(predicate)} (value: {value!r})")
        if passed_s >= for_s:
            return value
        time.sleep(min(interval_s, for_s - passed_s))
