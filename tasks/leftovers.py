"""What an attempt leaves behind when it is killed: temp files beside its outputs. In: a job. Out: they are gone."""

from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.media.output import temp_files_of

if TYPE_CHECKING:
    from tasks.celery import MediaTasks


def token_of(job_id: str, attempt: int | str) -> str:
    """Names the temp files of an attempt; `*` stands for all attempts."""
    return f"{sha256(job_id.encode(errors='backslashreplace')).hexdigest()[:24]}.{attempt}"


def remove_temp_files(task: Any, called_with: tuple[Any, Any], job_id: str, attempt: int | None = None) -> int:
    """Remove the temp files of a job that was called with these args and kwargs: an attempt's, or those of all; how
    many there were.
    """
    return _remove_all(task, task.arguments.by_name(*called_with), token_of(job_id, attempt or "*"))


def remove_temp_files_of_row(app: "MediaTasks", row: Mapping[str, Any]) -> int:
    """Remove those of the attempt that a row stands at; none if the row's task is not known here."""
    task = app.tasks.get(row["task_type"])
    if task is None or not hasattr(task, "arguments"):
        return 0
    return _remove_all(task, row["parameters"], token_of(row["job_id"], row["attempt"]))


def _remove_all(task: Any, parameters: Mapping[str, Any], token: str) -> int:
    return sum(_remove(directory, token) for directory in _directories(parameters, task))


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
