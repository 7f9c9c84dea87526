"""Limits that no ordinary image of the tests meets; a test that is about one has `replace(LIMITS, ...)`."""

from typing import Final

from tasks.media.sniff import Limits

LIMITS: Final = Limits(max_pixels=150_000_000, max_frames=1000, max_input_bytes=4 * 2**30, media_roots=())
