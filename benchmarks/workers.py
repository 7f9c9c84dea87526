"""Workers to measure, each in processes of its own, and the servers that some need."""

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import Options
from tests.services import RabbitmqServer, RedisServer, standard_rabbitmq, standard_redis
from tests.tooling.environment import forget_host_settings, without_settings
from tests.tooling.worker import REPOSITORY, Worker

TOPICS = "media-tasks-bench"
NO_REDIS = "no Redis on localhost:6379"
HAS_CPU_CLOCKS = sys.platform == "linux"
NO_CPU_CLOCKS = "no CPU clocks of other processes (Linux has them)"
NO_RABBITMQ = "no RabbitMQ on localhost:5672 (or not allowed to run rabbitmqctl)"


@contextmanager
def worker(
    app: str, options: Options, environment: Mapping[str, str], *, queues: str = "", concurrency: int = 2
) -> Iterator[Worker]:
    """`celery -A app worker`, ready; ended and cleaned up with the block."""
    arguments = [f"--concurrency={concurrency}", *([f"--queues={queues}"] if queues else [])]
    log_path = options.folder / f"{app}-{len(list(options.folder.glob('*.log')))}.log"
    running = Worker(*arguments, app=app, env=environment, log_path=log_path)
    try:
        running.wait_until_ready()
        yield running
    finally:
        if running.is_alive():
            running.terminate()
            running.wait(60)
        running.clean_up()


def cpu_s(pids: Iterable[int]) -> float:
    """User and system time of some processes so far, with all their threads, by their CPU clocks; NaN without such.

    The clock's id is made as clock_getcpuclockid(3) makes it; the ticks of /proc/PID/stat are 10 ms long.
    """
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids) if HAS_CPU_CLOCKS else math.nan


def settings(folder: Path, **more: str) -> dict[str, str]:
    """The environment of workers and producers of `tasks`: a server directory and MQTT topics of their own."""
    forget_host_settings()
    folder.mkdir(exist_ok=True)
    topics = {"MQTT_TOPIC": f"{TOPICS}/events", "CAPABILITY_TOPIC_PREFIX": f"{TOPICS}/workers"}
    return {"CL_SERVER_DIR": str(folder), **topics, **more}


def redis_server() -> RedisServer | None:
    return standard_redis()


def rabbitmq_server() -> RabbitmqServer | None:
    """A RabbitMQ in which a vhost can be made."""
    server = standard_rabbitmq()
    return server if server is not None and server.control else None


def environment_of(settings: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a process that is started with `settings`."""
    return {**without_settings(os.environ), "PYTHONPATH": str(REPOSITORY), **settings}
