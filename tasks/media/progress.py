"""How far libvips is with an image that it works on: told to a callable, in percents."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tasks.media.formats import Format

Progress = Callable[[float], None]
_TOLD_FROM_PIXELS = 24_000_000
_TOLD_STEP_PERCENT = 5
# These are encoded after their last pixel was read, by libraries that tell nothing meanwhile; reading is less than a
# twentieth of the whole.
_READ_BEFORE_ENCODED = ("webp", "avif", "gif", "heic", "jxl")
_SHARE_OF_READING = 0.05


@contextmanager
def telling(image: Any, target: Format, progress: Progress | None) -> Iterator[None]:
    """Tell the percent done of a large image in steps; a small one is done before anybody looks.

    What `progress` raises stops the work, and is raised at the end of the block.
    """
    if progress is None:
        yield
        return
    last = 0
    share = _SHARE_OF_READING if target.name in _READ_BEFORE_ENCODED else 1.0
    failure: BaseException | None = None

    def on_eval(watched: Any, state: Any) -> None:
        nonlocal last, failure
        if failure is None and last + _TOLD_STEP_PERCENT <= state.percent < 100:
            last = state.percent
            try:
                progress(last * share)
            except BaseException as exc:  # it would be lost in C; raised below
                failure = exc
                watched.set_kill(True)

    if image.width * image.height >= _TOLD_FROM_PIXELS:
        image.set_progress(True)
        image.signal_connect("eval", on_eval)
    try:
        yield
    except Exception:
        if failure is None:
            raise
    if failure is not None:
        raise failure
    progress(100.0)
