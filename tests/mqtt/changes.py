"""What the store and the backend write into the log of a job, and what that is to a subscriber.

Written by hand and not taken from tasks.sinks: what is missing there is missing in what is told.
"""

from typing import Any

from tests.acceptance.deployment import Deployment
from tests.mqtt.listener import Listener
from tests.tooling.waiting import eventually

CHANGES = {
    "created": ("queued", "queued"),
    "claimed": ("processing", "claimed"),
    "started": ("processing", "running"),
    "retry": ("retry", "queued"),
    "replaced": ("queued", "queued"),
    "released": ("queued", "queued"),
    "republished": ("queued", "queued"),
    "replayed": ("queued", "queued"),
    "lost": ("lost", "queued"),
    "completed": ("completed", "completed"),
    "failed": ("error", "failed"),
    "cancelled": ("cancelled", "cancelled"),
}
"""{event_type of the log: (event_type, status) of the event}"""


def check_told_as_logged(deployment: Deployment, listener: Listener, job: Any, names: list[str]) -> None:
    """The job's log has these event_types in the end, and so many changes were told, each of them what its row is."""
    eventually(lambda: len(deployment.events(job)) >= len(names), 30, lambda: f"{names}; {deployment.events(job)}")
    assert deployment.events(job) == names
    expected = [(number, *CHANGES[name]) for number, name in enumerate(names, 1)]

    def told() -> list[tuple[int, str, str]]:
        return [(change["sequence"], change["event_type"], change["status"]) for change in listener.changes(job)]

    eventually(lambda: told() == expected, 10, lambda: f"{expected}; told: {told()}")
