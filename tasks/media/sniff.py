"""What an input is and whether it may be opened, before any decoder sees it: a path in, an open `Input` out.

The magic bytes decide, never the suffix. Paths, bytes and frames are checked here, with the standard library only;
pixels by the decoder as soon as it has read the header.
"""

import errno
import mmap
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import CorruptMedia, InputMissing, LimitExceeded, PathNotAllowed, UnsupportedMedia

_HEAD_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may be opened. `max_pixels` counts width x height x frames of what is decoded."""

    max_pixels: int
    max_frames: int
    max_input_bytes: int
    media_roots: tuple[str, ...]


@dataclass(frozen=True)
class Input:
    """A regular file, open for reading, that holds `format`; `frames` is counted for animations only."""

    path: str
    fd: int
    format: str
    size_bytes: int
    frames: int


@contextmanager
def open_input(path: str, limits: Limits) -> Iterator[Input]:
    """Open `path` after every check that needs no decoder.

    Raises:
        InputMissing: it does not exist, is no regular file, or is empty.
        PathNotAllowed: it is relative, outside MEDIA_ROOTS, or not readable by this worker.
        UnsupportedMedia: its magic bytes are of no image format.
        LimitExceeded: it has more bytes or frames than the limits allow.
        CorruptMedia: its frames can't be counted.
    """
    real_path = resolved_within(path, limits.media_roots)
    fd = _open_regular(path, real_path)
    try:
        size_bytes = os.fstat(fd).st_size
        if size_bytes == 0:
            raise InputMissing(f"{path} is empty (0 bytes); upload it again")
        if size_bytes > limits.max_input_bytes:
            raise LimitExceeded(
                f"{path} has {size_bytes:,} bytes; the limit is {limits.max_input_bytes:,} (MAX_INPUT_BYTES): "
                "give a smaller one, or raise it"
            )
        media_format = sniff(os.pread(fd, _HEAD_BYTES, 0), path)
        frames = _count_frames(fd, media_format, path, limits.max_frames)
        if frames > limits.max_frames:
            raise LimitExceeded(
                f"{path} has more than {limits.max_frames:,} frames; the limit is {limits.max_frames:,} (MAX_FRAMES): "
                "give a shorter one, or raise it"
            )
        yield Input(path, fd, media_format, size_bytes, frames)
    finally:
        os.close(fd)


def check_output(path: str, source: Input, limits: Limits) -> None:
    """Refuse an output that is relative, outside MEDIA_ROOTS, or the input itself under any name."""
    resolved_within(path, limits.media_roots, parent_only=True)
    try:
        is_input = os.path.samestat(Path(path).stat(), os.fstat(source.fd))
    except OSError:
        return
    if is_input:
        raise PathNotAllowed(f"output {path} is the input {source.path} itself; write to another file")


def sniff(head: bytes, path: str = "the input") -> str:
    """The format that the first bytes of a file announce, or `UnsupportedMedia` that says what they look like."""
    for media_format, pattern in _MAGIC:
        if pattern.match(head):
            return media_format
    if pattern_match := _ISO_BRANDS.match(head):
        brands = _brands(head, int.from_bytes(pattern_match[1], "big"))
        if brands & {b"avif", b"avis"}:
            return "avif"
        if brands & {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}:
            return "heic"
    raise UnsupportedMedia(
        f"{path} {_resemblance(head)}; an image must be jpeg, png, webp, avif, tiff, gif, bmp, jp2, heic or jxl "
        "(its content decides, not its suffix)"
    )


def resolved_within(path: str, roots: tuple[str, ...], *, parent_only: bool = False) -> Path:
    """The path with symlinks resolved; of an output only its directory's, since a rename replaces a symlink itself.

    Raises:
        PathNotAllowed: it is relative, can't be resolved, or lies outside of all roots, if there are any.
    """
    if not Path(path).is_absolute():
        raise PathNotAllowed(f"{path!r} is not an absolute local path; a worker stands in another directory: give one")
    if "\0" in path:
        raise PathNotAllowed(f"{path!r} holds a null byte; give a path without it")
    try:
        real_path = Path(path).parent.resolve() / Path(path).name if parent_only else Path(path).resolve()
    except (RuntimeError, OSError) as exc:  # a circle of symlinks, a name too long
        raise PathNotAllowed(f"{path} can't be resolved: {exc}; give a path without circular symlinks") from exc
    if roots and not any(real_path.is_relative_to(Path(root).resolve()) for root in roots):
        raise PathNotAllowed(
            f"{path} lies outside of {', '.join(roots)} (MEDIA_ROOTS); move it there, or have MEDIA_ROOTS hold its "
            "directory"
        )
    return real_path


def _open_regular(path: str, real_path: Path) -> int:
    try:
        mode = real_path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise InputMissing(f"{path} is {kind_of(mode)}, not a regular file; give the path of an image")
        return os.open(real_path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise InputMissing(f"{path} does not exist on this worker; check the path, or the mount") from exc
    except PermissionError as exc:
        raise PathNotAllowed(f"{path} can't be read by this worker: {exc.strerror}; let its user read it") from exc
    except OSError as exc:
        if exc.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise InputMissing(f"{path} can't be a file: {exc.strerror}; check the path") from exc
        raise


def kind_of(mode: int) -> str:
    """What a file that is not regular is, by its mode."""
    kinds = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device")


_MAGIC = [
    (media_format, re.compile(pattern, re.DOTALL))
    for media_format, pattern in (
        ("jpeg", rb"\xff\xd8\xff"),
        ("png", rb"\x89PNG\r\n\x1a\n"),
        ("webp", rb"RIFF....WEBP"),
        ("gif", rb"GIF8[79]a"),
        ("tiff", rb"II[*+]\0|MM\0[*+]"),
        ("bmp", rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"),
        ("jp2", rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
        ("jxl", rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
    )
]
_ISO_BRANDS = re.compile(rb"(....)ftyp", re.DOTALL)
_REFUSED = [
    (name, re.compile(pattern, re.DOTALL | re.IGNORECASE))
    for name, pattern in (
        ("is an SVG, which may refer to other files and is never opened", rb"\s*(?:\xef\xbb\xbf)?\s*<.*<?svg"),
        ("is a PDF", rb"%PDF"),
        ("is PostScript", rb"%!PS"),
        ("is a Photoshop file", rb"8BPS"),
        ("is compressed (gzip)", rb"\x1f\x8b"),
        ("is a ZIP archive", rb"PK\x03\x04"),
        ("is a video", rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI |#EXTM3U"),
    )
]


def _brands(head: bytes, box_bytes: int) -> set[bytes]:
    box = head[: min(box_bytes, len(head))]
    return {box[8:12]} | {box[i : i + 4] for i in range(16, len(box) - 3, 4)}


def _resemblance(head: bytes) -> str:
    for name, pattern in _REFUSED:
        if pattern.match(head):
            return name
    if re.fullmatch(rb"[\t\n\r\x20-\x7e\x80-\xff]*", head):
        return "holds text, not an image"
    return f"starts with {head[:8].hex(' ')}, which is no image format known here"


def _count_frames(fd: int, media_format: str, path: str, limit: int) -> int:
    """Frames of an animation, counted up to limit + 1; 1 for formats of which only the first image is used."""
    if media_format not in ("gif", "webp"):
        return 1
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as data:
        try:
            return _gif_frames(data, limit) if media_format == "gif" else _webp_frames(data, limit)
        except IndexError:
            raise CorruptMedia(f"{path} is cut off: it ends inside a frame; upload it again") from None


_FULL_SUB_BLOCKS = re.compile(rb"(?:\xff.{255})*+", re.DOTALL)


def _gif_frames(data: mmap.mmap, limit: int) -> int:
    """Walk the blocks of a GIF (https://www.w3.org/Graphics/GIF/spec-gif89a.txt), without decoding any."""
    position = 13 + _colour_table_bytes(data[10])
    frames = 0
    while frames <= limit and position < len(data):
        introducer = data[position]
        if introducer == 0x2C:
            frames += 1
            position += 11 + _colour_table_bytes(data[position + 9])
        elif introducer == 0x21:
            position += 2
        else:  # the trailer, or what decoders take for one
            break
        position = _after_sub_blocks(data, position)
    return frames


def _colour_table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after_sub_blocks(data: mmap.mmap, position: int) -> int:
    while True:
        full = _FULL_SUB_BLOCKS.match(data, position)
        position = full.end() if full else position
        length = data[position]
        position += 1 + length
        if length == 0:
            return position


def _webp_frames(data: mmap.mmap, limit: int) -> int:
    """Count the ANMF chunks of a WebP (https://developers.google.com/speed/webp/docs/riff_container)."""
    position, frames, chunks = 12, 0, 0
    while frames <= limit and chunks < 4 * limit + 64 and position + 8 <= len(data):
        chunks += 1
        frames += data[position : position + 4] == b"ANMF"
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + size + (size & 1)
    return max(frames, 1)
