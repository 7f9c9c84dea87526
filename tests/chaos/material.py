"""What jobs work on: photos and broken files in, recipes (a task with its arguments) and what each must yield out."""

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.tooling.worker import REPOSITORY

SAMPLES = REPOSITORY.parent / "shared" / "samples"
# What a broken input is called, and the error type of the job that reads it.
BROKEN = {"text.jpg": "UnsupportedMedia", "truncated.jpg": "CorruptMedia", "missing.jpg": "InputMissing"}


@dataclass(frozen=True)
class Recipe:
    """A task, its input, the suffix of its output (empty: a directory) and its other arguments."""

    task: str
    input: Path
    suffix: str
    arguments: tuple[tuple[str, Any], ...]

    def call(self, output: Path) -> dict[str, Any]:
        """The keyword arguments of a job that writes to `output`."""
        name = "output" if self.suffix else "output_dir"
        return {"input": str(self.input), name: str(output), **dict(self.arguments)}


@dataclass(frozen=True)
class Yield:
    """The result of a recipe and the bytes of its files, by their names relative to its output."""

    output: Path
    result: dict[str, Any]
    files: dict[str, bytes]

    def result_at(self, output: Path) -> dict[str, Any]:
        """The result of a job that wrote to `output`."""
        if "outputs" in self.result:
            return {
                "outputs": [
                    each | {"output": str(output / Path(each["output"]).name)} for each in self.result["outputs"]
                ]
            }
        return self.result | {"output": str(output)}

    def files_at(self, output: Path) -> dict[Path, bytes]:
        return {output / name if name else output: content for name, content in self.files.items()}


class Material:
    """Inputs in one directory, and what the recipes made of them when they ran here, without a worker."""

    def __init__(self, directory: Path) -> None:
        self._inputs = directory / "in"
        self._direct = directory / "direct"
        self._yields: dict[Recipe, Yield] = {}

    def make(self) -> None:
        """Write the inputs."""
        from tasks.media.samples import make_photos

        self._inputs.mkdir(parents=True)
        self._direct.mkdir()
        if real := sorted(SAMPLES.glob("*.jpg")):
            for photo in real:
                (self._inputs / photo.name).write_bytes(photo.read_bytes())
        else:
            make_photos(self._inputs)
            (self._inputs / "broken-cut-off.jpg").unlink()
        whole = self.photos[0].read_bytes()
        broken = self._inputs / "broken"
        broken.mkdir()
        (broken / "text.jpg").write_text("This is no photograph.\n" * 100)
        (broken / "truncated.jpg").write_bytes(whole[: len(whole) // 3])

    @cached_property
    def photos(self) -> list[Path]:
        return sorted(self._inputs.glob("*.jpg"))

    def broken(self, name: str) -> Path:
        return self._inputs / "broken" / name

    def draw(self, chance: random.Random) -> Recipe:
        """A recipe: mostly image_resize."""
        kind = chance.choices(("image_resize", "image_conversion", "image_renditions"), (80, 10, 10))[0]
        photo = chance.choice(self.photos)
        if kind == "image_resize":
            return self.resize(photo, chance.choice((320, 640, 1280, 2400)), chance.choice((".jpg", ".webp", ".png")))
        if kind == "image_conversion":
            return Recipe(kind, min(self.photos, key=lambda path: path.stat().st_size), ".webp", (("quality", 70),))
        return Recipe(kind, photo, "", (("sizes", (1280, "400x400")), ("formats", ("jpeg", "webp"))))

    @staticmethod
    def resize(photo: Path, width_px: int, suffix: str) -> Recipe:
        return Recipe("image_resize", photo, suffix, (("width", width_px),))

    def yield_of(self, recipe: Recipe, app: Any) -> Yield:
        """What the recipe's function makes, called directly; once for each recipe."""
        if recipe not in self._yields:
            output = self._direct / f"{len(self._yields)}{recipe.suffix}"
            result = app.tasks[recipe.task](**recipe.call(output))
            paths = [output] if recipe.suffix else sorted(output.iterdir())
            files = {"" if path == output else path.name: path.read_bytes() for path in paths}
            self._yields[recipe] = Yield(output, result, files)
        return self._yields[recipe]
