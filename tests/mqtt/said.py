"""What a worker's log says of MQTT."""

import time

from tests.tooling.waiting import eventually
from tests.tooling.worker import Worker


def warnings(worker: Worker) -> list[str]:
    return [line for line in worker.log().splitlines() if "MQTT" in line and "WARNING" in line]


def one_warning(worker: Worker, *, within_s: float = 10.0, quiet_s: float = 4.0) -> str:
    """The one warning that comes; for a while no other one follows."""
    eventually(lambda: warnings(worker), within_s, "a warning about MQTT")
    time.sleep(quiet_s)
    (warning,) = warnings(worker)
    return warning
