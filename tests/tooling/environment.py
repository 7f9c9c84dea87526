"""The environment that tests and their workers see: nothing of the host's own settings."""

import os
from collections.abc import Mapping

PREFIXES = ("CELERY_", "CL_", "MQTT_", "WORKER_", "LEASE_", "SQLITE_", "LOG_", "MAX_", "AWS_", "S3_", "FLOWER_")
NAMES = frozenset(
    {
        "DATABASE_URL", "ENQUEUE", "SHUTDOWN_GRACE_S", "RETENTION_DAYS", "DB_POOL_SIZE", "MIRROR", "BROADCAST_TYPE",
        "CAPABILITY_TOPIC_PREFIX", "QUEUE_STRATEGY", "MEDIA_ROOTS",
    }
)  # fmt: skip
KEPT = frozenset({"AWS_CA_BUNDLE"})


def is_setting(name: str) -> bool:
    """Whether an environment variable would change what Media Tasks or Celery does."""
    return (name in NAMES or name.startswith(PREFIXES)) and name not in KEPT


def without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not is_setting(name)}


def forget_host_settings() -> None:
    """Take the host's settings out of this process: a test must never write to the database of a real deployment."""
    for name in [name for name in os.environ if is_setting(name)]:
        del os.environ[name]
