"""What a worker's log says of MQTT."""

from tests.tooling.waiting import eventually, stays
from tests.tooling.worker import Worker


def warnings(worker: Worker) -> list[str]:
    return [line for line in worker.log().splitlines() if "MQTT" in line and "WARNING" in line]


def one_warning(worker: Worker, *, within_s: float = 10.0, quiet_s: float = 4.0) -> str:
    """The one warning that comes; for a while no other one follows."""
    eventually(lambda: warnings(worker), within_s, "a warning about MQTT")
    stays(lambda: len(warnings(worker)) == 1, quiet_s, lambda: f"one warning about MQTT, not {warnings(worker)}")
    return warnings(worker)[0]


def debug_log(worker: Worker) -> str:
    """The log of a worker that was started with `--loglevel=DEBUG`; LOG_LEVEL gives way to that option."""
    log = worker.log()
    assert ": DEBUG/" in log, log
    return log
