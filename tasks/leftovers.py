"""What an attempt leaves behind when it is killed: temp files beside its outputs. In: a job. Out: they are gone."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.media.output import temp_files_of

if TYPE_CHECKING:
    from tasks.celery import MediaTasks


def remove_temp_files(task: Any, called_with: tuple[Any, Any], token: str) -> int:
    """Remove the temp files with this token (`job.attempt`; `job.*` for all attempts) of a job that was called so."""
    args, kwargs = called_with
    return sum(_remove(directory, token) for directory in _directories(task.arguments.by_name(args, kwargs), task))


def remove_temp_files_of_row(app: "MediaTasks", row: Mapping[str, Any], token: str) -> int:
    """The same for a job's row; nothing if its task is not known here."""
    task = app.tasks.get(row["task_type"])
    if task is None or not hasattr(task, "arguments"):
        return 0
    return sum(_remove(directory, token) for directory in _directories(row["parameters"], task))


def _directories(parameters: Mapping[str, Any], task: Any) -> set[Path]:
    """Where the outputs of a job are written: an output's directory, or the output if it is one."""
    directories: set[Path] = set()
    for name in task.arguments.outputs & parameters.keys():
        output = parameters[name]
        if isinstance(output, str) and output.startswith("/"):
            directories |= {Path(output), Path(output).parent}
    return directories


def _remove(directory: Path, token: str) -> int:
    removed = 0
    with suppress(OSError):
        for path in temp_files_of(token, directory):
            with suppress(OSError):
                path.unlink()
                removed += 1
    return removed
