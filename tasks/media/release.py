"""A decorator: what a function held when it failed is free once its error has left it.

The frames of a traceback keep their variables, and libvips' sources and targets have descriptors of their own. Celery's
tracer keeps errors in a cycle until the garbage collector runs, and with them the disk space of deleted temp files.
"""

import traceback
from collections.abc import Callable
from functools import wraps
from types import FrameType, TracebackType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def releasing(function: Callable[P, T]) -> Callable[P, T]:
    """Empty the frames of each error that leaves `function`, and of those that led to it; the lines of ours stay."""

    @wraps(function)
    def released(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except BaseException as exc:
            _release(exc)
            raise

    return released


def _release(exc: BaseException) -> None:
    chain: list[BaseException | None] = [exc]
    seen: set[int] = set()
    while chain:
        error = chain.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        _cut_at_engine(error.__traceback__)
        chain += [error.__cause__, error.__context__]


def _cut_at_engine(step: TracebackType | None) -> None:
    """Drop the lines within pyvips, and of what it calls back: its methods are closures over their image, which their
    frames keep when emptied, and frames keep their callers.
    """
    while step is not None and step.tb_next is not None:
        frame = step.tb_next.tb_frame
        if _is_engine(frame) or _is_engine(frame.f_back):
            step.tb_next = None
        step = step.tb_next


def _is_engine(frame: FrameType | None) -> bool:
    return frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "pyvips"
