"""Size maths of a resize: the input's upright size and the options in, a `Layout` out. Pure."""

from dataclasses import dataclass

from tasks.media.options import ResizeOptions


@dataclass(frozen=True)
class Layout:
    """Scale the image to `scaled_*`, then crop or pad it around its centre to `width_px` x `height_px`."""

    scaled_width_px: int
    scaled_height_px: int
    width_px: int
    height_px: int


def layout(width_px: int, height_px: int, options: ResizeOptions) -> Layout:
    """Where an upright image of this size goes."""
    if options.fit == "fill":
        scaled = _stretched(width_px, height_px, options)
        return Layout(*scaled, *scaled)
    box_width, box_height = options.width, options.height
    ratios = [box / side for box, side in ((box_width, width_px), (box_height, height_px)) if box is not None]
    ratio = max(ratios) if options.fit == "cover" else min(ratios)
    if not options.enlarge:
        ratio = min(ratio, 1.0)
    scaled = max(1, int(width_px * ratio + 0.5)), max(1, int(height_px * ratio + 0.5))
    if box_width is None or box_height is None or options.fit == "inside":
        return Layout(*scaled, *scaled)
    if options.fit == "cover":
        return Layout(*scaled, min(box_width, scaled[0]), min(box_height, scaled[1]))
    return Layout(*scaled, box_width, box_height)


def _stretched(width_px: int, height_px: int, options: ResizeOptions) -> tuple[int, int]:
    width, height = options.width or width_px, options.height or height_px
    if options.enlarge:
        return width, height
    return min(width, width_px), min(height, height_px)
