"""Every error of the project, split by remedy.

Permanent errors are final: the same job with the same input fails again, so it is never retried.
Transient errors may pass by themselves (network, locks, full disks): they are retried with backoff.
Messages name the file, the limit and the remedy; ids and figures are also attributes. All are picklable.
"""


class MediaTasksError(Exception):
    """Root of all errors that this project raises on purpose."""


class PermanentError(MediaTasksError):
    """Trying again can't help; the caller has to change the input, the arguments or the set-up."""


class TransientError(MediaTasksError):
    """Trying again later may help."""


class SettingsError(PermanentError):
    """A setting has a value that can't be used; the message names the variable."""


class InvalidArguments(PermanentError, ValueError):
    """Arguments that contradict each other or lie outside their range."""


class UnknownTask(PermanentError):
    """No capability of this name is known here, nor served by a live worker."""


class UnknownQueue(PermanentError):
    """No worker serves this queue and no capability has its name."""


class UnknownJob(PermanentError):
    """No job has this id."""


class ResultsNotRead(PermanentError):
    """This process has no job database (ENQUEUE=broker), and so no results."""


class OutOfMemory(PermanentError):
    """The body asked for more memory than there is; another attempt would do the same."""


class InputMissing(PermanentError):
    """The input does not exist, or is no regular file."""


class PathNotAllowed(PermanentError):
    """A path lies outside MEDIA_ROOTS, is relative at a worker, or the output equals the input."""


class UnsupportedMedia(PermanentError):
    """The magic bytes are of no format that this installation reads or writes."""


class CorruptMedia(PermanentError):
    """The file claims a known format, but can't be decoded."""


class LimitExceeded(PermanentError):
    """The input is larger than a configured limit (pixels, frames, bytes, duration)."""


class OutputNotWritable(PermanentError):
    """The output can't be created: permission, a directory in its place, a read-only file system."""


class JobTimeout(PermanentError):
    """The job ran longer than its time limit; the message names the limit."""


class WorkerLost(PermanentError):
    """The job was running on too many workers that died; see MAX_DEATHS."""


class AttemptLost(PermanentError):
    """This attempt no longer owns its job: another one took over, or the job was cancelled."""


class DatabaseNotReady(PermanentError):
    """The job database has no schema, an older one that must be upgraded, or a newer major one."""


class DiskFull(TransientError):
    """No space left (ENOSPC, EDQUOT) while writing an output; the message names the path."""


class AttemptDisturbed(TransientError):
    """Somebody has removed what this attempt was writing; the next one begins anew."""


class RateLimited(TransientError):
    """A server asked to be left alone; `retry_after_s` says for how long, if it did."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])
