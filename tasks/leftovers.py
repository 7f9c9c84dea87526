"""What an attempt leaves behind when it is killed: temp files beside its outputs. In: a job, and the last attempt at it
that is over. Out: the temp files of that one and of all before it are gone. Those of a later one, which may run where
nobody here has heard of it, are never touched.
"""

from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.media.output import temp_files_of, token_in

if TYPE_CHECKING:
    from tasks.celery import MediaTasks


def token_of(job_id: str, attempt: int | str) -> str:
    """Names the temp files of an attempt; `*` stands for all attempts."""
    return f"{sha256(job_id.encode(errors='backslashreplace')).hexdigest()[:24]}.{attempt}"


def remove_temp_files(task: Any, called_with: tuple[Any, Any], job_id: str, *, up_to: int) -> int:
    """Remove the temp files of a job that was called with these args and kwargs, those of the attempts up to this one;
    how many there were.
    """
    return _remove_all(task, task.arguments.by_name(*called_with), job_id, up_to)


def remove_temp_files_of_row(app: "MediaTasks", row: Mapping[str, Any]) -> int:
    """Remove those up to the attempt that a row stands at; none if the row's task is not known here."""
    task = app.tasks.get(row["task_type"])
    if task is None or not hasattr(task, "arguments"):
        return 0
    return _remove_all(task, row["parameters"], row["job_id"], row["attempt"])


def _remove_all(task: Any, parameters: Mapping[str, Any], job_id: str, up_to: int) -> int:
    return sum(_remove(directory, job_id, up_to) for directory in _directories(parameters, task))


def _directories(parameters: Mapping[str, Any], task: Any) -> set[Path]:
    """Where the outputs of a job are written: an output's directory, or the output if it is one."""
    directories: set[Path] = set()
    for name in task.arguments.outputs & parameters.keys():
        output = parameters[name]
        if isinstance(output, str) and output.startswith("/"):
            directories |= {Path(output), Path(output).parent}
    return directories


def _remove(directory: Path, job_id: str, up_to: int) -> int:
    tokens = {token_of(job_id, attempt) for attempt in range(1, up_to + 1)}
    removed = 0
    with suppress(OSError):
        for path in temp_files_of(token_of(job_id, "*"), directory):
            if token_in(path) in tokens:
                with suppress(OSError):
                    path.unlink()
                    removed += 1
    return removed
