"""What is told of an image that is encoded after it was read; `test_image.py` has what a caller sees."""

from types import SimpleNamespace

import pytest

from tasks.media.formats import FORMATS
from tasks.media.progress import telling


@pytest.mark.parametrize(
    ("target", "told_at_99"),
    [("jpeg", 99), ("png", 99), ("webp", 4.95), ("avif", 4.95), ("gif", 4.95), ("heic", 4.95), ("jxl", 4.95)],
)
def test_what_is_encoded_after_it_was_read_is_not_told_to_be_nearly_done(target, told_at_99):
    watched = SimpleNamespace(width=6000, height=4000, set_progress=lambda is_on: None)
    watched.signal_connect = lambda signal, on_eval: setattr(watched, "on_eval", on_eval)
    told: list[float] = []
    with telling(watched, FORMATS[target], told.append):
        watched.on_eval(watched, SimpleNamespace(percent=99))
    assert told == [pytest.approx(told_at_99), 100]
