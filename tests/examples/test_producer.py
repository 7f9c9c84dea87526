"""The producer that users copy: it works against a real worker, and needs the base install only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.tooling.environment import without_settings

REPOSITORY = Path(__file__).resolve().parents[2]
# An import hook in the place of an installation without media libraries.
WITHOUT_ENGINES = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pyvips", "_libvips", "PIL", "numpy", "av", "pillow_heif"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def produce(server_dir, tmp_path):
    """`produce(*images)` runs the producer in tmp_path."""

    def run(*images, prefix=()):
        environment = without_settings(os.environ) | {"CL_SERVER_DIR": str(server_dir), "BROADCAST_TYPE": "noop"}
        command = [sys.executable, *prefix, str(REPOSITORY / "examples" / "producer.py"), *map(str, images)]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    return run


@pytest.fixture
def images(tmp_path):
    for name in ("a.jpg", "b.png"):
        Image.effect_noise((640, 480), 40).convert("RGB").save(tmp_path / name)
    (tmp_path / "c.jpg").write_text("no photo")
    return ["a.jpg", "b.png", "c.jpg"]


def test_a_producer_gets_the_results_of_jobs_chains_and_groups(produce, run_worker, images, tmp_path):
    run_worker("--concurrency=2")

    done = produce(*images)

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(",")[0].replace(f"{tmp_path}/out/", "") for line in lines if "failed" not in line] == [
        "a-800.webp: 640 x 480 px",
        "b-800.webp: 640 x 480 px",
        "a-icon.png: 64 x 48 px",
        "a-1600.avif: 640 x 480 px",
        "a-200.jpg: 200 x 150 px",
        "a-400.jpg: 400 x 300 px",
    ]
    assert lines[2].startswith(f"c.jpg failed: UnsupportedMedia: {tmp_path}/c.jpg ")
    with Image.open(tmp_path / "out" / "a-200.jpg") as image:
        assert image.size == (200, 150)


def test_a_producer_needs_no_media_library(produce, run_worker, images):
    run_worker("--concurrency=2")

    done = produce(images[0], prefix=("-c", WITHOUT_ENGINES))

    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" px, ") == 5


def test_without_an_image_the_producer_says_how_it_is_called(produce):
    done = produce()

    assert done.returncode == 1
    assert "usage: python examples/producer.py IMAGE..." in done.stderr
