"""Frames, as libvips holds them: an animation is one tall roll, and an EXIF orientation says which way up a frame is.

In: an image or a roll. Out: the same, changed frame by frame, upright, or the first frame alone.
"""

from collections.abc import Callable
from typing import Any

from tasks.media.decode import engine
from tasks.media.formats import Format


def frames_in(image: Any) -> int:
    return int(image.height // image.get_page_height())


def each_frame(image: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to each frame of a roll by itself, so that none bleeds into its neighbours."""
    count = frames_in(image)
    if count == 1:
        return change(image)
    vips = engine()
    frames = [change(_frame(image, number)) for number in range(count)]
    roll = vips.Image.arrayjoin(frames, across=1).copy()
    roll.set_type(vips.GValue.gint_type, "page-height", frames[0].height)
    roll.set_type(vips.GValue.gint_type, "n-pages", count)
    return roll


def first_frame_unless(image: Any, target: Format) -> Any:
    """The whole roll if the target can hold one, else its first frame."""
    return image if target.has_frames or frames_in(image) == 1 else _frame(image, 0)


def upright(image: Any) -> Any:
    """Turn an image as its EXIF orientation says; one that lies is decoded whole into memory for that."""
    if _orientation(image) == 1:
        return image
    image = each_frame(image.copy_memory(), lambda frame: frame.autorot())  # a rotation reads out of sequence
    if image.get_typeof("jpeg-thumbnail-data"):  # it still lies on its side
        image = image.copy()
        image.remove("jpeg-thumbnail-data")
    return image


def upright_size(image: Any) -> tuple[int, int]:
    """Width and height in px of one frame, as it will be seen: EXIF orientations 5 to 8 lie on their side."""
    width, height = image.width, image.get_page_height()
    return (height, width) if _orientation(image) >= 5 else (width, height)


def _frame(roll: Any, number: int) -> Any:
    height = roll.get_page_height()
    frame = roll.crop(0, number * height, roll.width, height).copy()
    frame.remove("n-pages")
    frame.remove("page-height")
    return frame


def _orientation(image: Any) -> int:
    return int(image.get("orientation")) if image.get_typeof("orientation") else 1
