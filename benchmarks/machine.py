"""What the figures were measured on: machine, versions, date."""

import os
import platform
import sqlite3
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.measure import Peer
from benchmarks.workers import rabbitmq_server, redis_server


def machine() -> dict[str, str]:
    with Peer() as peer:
        libvips = peer.run(_libvips_version)
    packages = {"Celery": "celery", "kombu": "kombu", "SQLAlchemy": "sqlalchemy", "Pillow": "pillow"}
    versions = {
        "Python": platform.python_version(),
        **{name: version(package) for name, package in packages.items()},
        "libvips": libvips,
        "SQLite": sqlite3.sqlite_version,
        "Redis": _redis_version(),
        "RabbitMQ": _rabbitmq_version(),
    }
    return {
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB, {platform.system()}",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; load average before {os.getloadavg()[0]:.1f}",
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _libvips_version() -> str:
    import pyvips

    return ".".join(str(pyvips.version(part)) for part in range(3))


def _redis_version() -> str:
    server = redis_server()
    if server is None:
        return "none"
    with server.client() as client:
        return str(client.info("server")["redis_version"])


def _rabbitmq_version() -> str:
    server = rabbitmq_server()
    return server.rabbitmqctl("version").stdout.strip() if server else "none"
