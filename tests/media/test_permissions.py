"""What a user who may not read or write is told. Permissions don't stop root: as root, a child becomes nobody first."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.media.conftest import files_under

ROOT = Path(__file__).parents[2]
# All is imported and used once before the child gives up its rights: nobody may not be allowed to read the source.
CODE = """
import json, os, sys
from tasks.errors import PermanentError
from tasks.media.image import convert, renditions, resize
from tasks.media.options import ConversionOptions, RenditionsOptions, ResizeOptions
from tests.media.limits import LIMITS

work, source, output = sys.argv[1:4]
ways = {
    "resize": lambda source, output: resize(source, output, ResizeOptions(width=9), limits=LIMITS),
    "convert": lambda source, output: convert(source, output, ConversionOptions(), limits=LIMITS),
    "renditions": lambda source, output: renditions(
        source, os.path.dirname(output), RenditionsOptions(sizes=[9], formats=["webp"]), limits=LIMITS
    ),
}
for name, way in ways.items():
    way(f"{work}/good.png", f"{work}/{name}/out.webp")
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for way in ways.values():
    try:
        way(source, output)
        print(json.dumps(["", ""]))
    except PermanentError as exc:
        print(json.dumps([type(exc).__name__, str(exc)]))
"""


@pytest.fixture
def work(quadrants) -> Iterator[Path]:
    """A directory that everybody may enter, as pytest's own are not, with an image that everybody may read."""
    path = Path(tempfile.mkdtemp(prefix="mt-")).resolve()
    path.chmod(0o755)
    quadrants.pngsave(str(path / "good.png"))
    (path / "good.png").chmod(0o644)
    yield path
    for directory in path.rglob("*/"):
        directory.chmod(0o755)
    shutil.rmtree(path)


@pytest.fixture
def refused(work: Path) -> Callable[..., None]:
    """Run all functions as somebody without rights: each must raise this error, about this path, with these words."""

    def run(source: Path, output: Path, error: str, path: Path, *words: str) -> None:
        command = [sys.executable, "-c", CODE, str(work), str(source), str(output)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
        told = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(told) == 3, done.stderr
        for kind, message in told:
            assert kind == error, message
            assert [word for word in (str(path), "Permission denied", *words) if word not in message] == []
            assert "\n" not in message

    return run


def test_an_input_that_may_not_be_read_is_refused(refused, work):
    (work / "secret.png").write_bytes((work / "good.png").read_bytes())
    (work / "secret.png").chmod(0o000)

    refused(
        work / "secret.png", work / "resize" / "o.webp", "PathNotAllowed", work / "secret.png", "let its user read it"
    )


def test_an_input_in_a_directory_that_may_not_be_entered_is_refused(refused, work):
    (work / "closed").mkdir()
    (work / "closed" / "in.png").write_bytes((work / "good.png").read_bytes())
    (work / "closed").chmod(0o000)

    refused(
        work / "closed" / "in.png",
        work / "resize" / "o.webp",
        "PathNotAllowed",
        work / "closed" / "in.png",
        "let its user read it",
    )


@pytest.mark.parametrize("mode", [0o555, 0o444, 0o000])
def test_an_output_directory_that_may_not_be_written_is_refused(refused, work, mode):
    (work / "locked").mkdir()
    (work / "locked").chmod(mode)

    refused(
        work / "good.png",
        work / "locked" / "out.webp",
        "OutputNotWritable",
        work / "locked",
        "make its directory writable for the worker, or write elsewhere",
    )

    (work / "locked").chmod(0o755)
    assert files_under(work / "locked") == set()


def test_an_output_directory_that_may_not_be_made_is_refused(refused, work):
    (work / "locked").mkdir()
    (work / "locked").chmod(0o555)

    deeper = work / "locked" / "deeper"
    refused(work / "good.png", deeper / "out.webp", "OutputNotWritable", deeper, "make its directory writable")


def test_an_output_of_somebody_else_in_a_directory_where_each_may_only_replace_his_own_is_left_alone(refused, work):
    if os.geteuid() != 0:
        pytest.skip("only root can make files of somebody else")
    (work / "shared").mkdir()
    for name in ("out.webp", "good-9.webp"):
        (work / "shared" / name).write_bytes(b"old")
    (work / "shared").chmod(0o1777)
    command = [sys.executable, "-c", CODE, str(work), str(work / "good.png"), str(work / "shared" / "out.webp")]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)

    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == 3
    for kind, message in told:
        assert kind == "OutputNotWritable"
        assert f"{work}/shared/" in message
        assert "Operation not permitted" in message
    assert {path.read_bytes() for path in (work / "shared").iterdir()} == {b"old"}
