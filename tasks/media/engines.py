"""What the engines of this machine can do, found by trying: `python -m tasks.media.engines pyvips av …`.

It is for a process of its own, since libvips must not be touched before a fork, and a broken engine may crash. Out: on
stdout a JSON line for each module, as soon as it is known: `{"module": "pyvips", "reason": null}`, where a reason says
why it can't be used; with pyvips, before it, one for each format that it lacks: `{"format": "jxl", "reason": "…"}`.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import IO, Any

from tasks.media.decode import engine, open_image
from tasks.media.encode import encode
from tasks.media.formats import FORMATS, PILLOW_NAMES, READ_ONLY
from tasks.media.sniff import Input, Limits

SIDE_PX = 16


def try_all(modules: list[str], answers: IO[str]) -> None:
    """Try each of these modules; with pyvips also every format."""
    for module in modules:
        reason = _failure(partial(import_module, module))
        if reason is None and module == "pyvips":
            reason = _try_formats(answers)
        _tell(answers, module=module, reason=reason)


def _try_formats(answers: IO[str]) -> str | None:
    """Write and read a small image in each format; why none is left, if so."""
    lacks = {name: _failure(partial(_go_there_and_back, name)) for name in (*FORMATS, *READ_ONLY)}
    for name, reason in lacks.items():
        if reason is not None:
            _tell(answers, format=name, reason=reason)
    return f"it has no format: {lacks['jpeg']}" if all(lacks.values()) else None


def _go_there_and_back(name: str) -> None:
    with tempfile.TemporaryFile() as file:
        if name in FORMATS:
            encode(engine().Image.black(SIDE_PX, SIDE_PX, bands=3), file.fileno(), FORMATS[name])
        else:
            _write_with_pillow(name, file)
        size_bytes = os.fstat(file.fileno()).st_size
        limits = Limits(max_pixels=SIDE_PX**2, max_frames=1, max_input_bytes=size_bytes, media_roots=())
        open_image(Input(f"a {name}", file.fileno(), name, size_bytes, frames=1), limits).avg()


def _write_with_pillow(name: str, file: IO[bytes]) -> None:
    from PIL import Image

    Image.new("RGB", (SIDE_PX, SIDE_PX)).save(file, format=PILLOW_NAMES[name])
    file.flush()


def _failure(do: Callable[[], Any]) -> str | None:
    """Why it can't be done, on one line."""
    try:
        do()
    except Exception as exc:
        return " ".join(f"{type(exc).__name__}: {exc}".split())
    return None


def _tell(answers: IO[str], **what: str | None) -> None:
    print(json.dumps(what), file=answers, flush=True)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)  # whatever an engine prints is no answer
        try_all(sys.argv[1:], stdout)
