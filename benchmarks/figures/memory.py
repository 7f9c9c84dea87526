"""Memory of a pool child: its peak (VmHWM) after jobs on inputs of 24 megapixels, one worker for each kind of job."""

import re
from pathlib import Path
from typing import Any

from benchmarks.measure import Options, Peer, Row
from benchmarks.photos import make_large
from benchmarks.workers import settings, worker

JOBS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "image_resize": [
        ("large.jpg", "a.jpg", {"width": 1600}),
        ("large.jpg", "b.webp", {"width": 400}),
        ("large.png", "c.jpg", {"width": 1600}),
        ("large-orientation-6.jpg", "d.jpg", {"width": 1600}),
    ],
    "image_conversion": [
        ("large.jpg", "e.png", {}),
        ("large.png", "f.jpg", {}),
        ("large.jpg", "g.webp", {}),
        ("large-orientation-6.jpg", "h.jpg", {}),
    ],
    "image_renditions": [("large.jpg", "r1", {"sizes": [1600, 400]}), ("large.png", "r2", {"sizes": [1600, 400]})],
}


def measure(options: Options) -> list[Row]:
    with Peer() as maker:
        inputs = maker.run(make_large, str(options.folder / "large"))
    return [_row(options, task, inputs) for task in JOBS]


def _row(options: Options, task: str, inputs: dict[str, str]) -> Row:
    environment = settings(options.folder / task)
    after: dict[str, float] = {}
    with (
        worker("tasks", options, environment, queues=task, concurrency=1) as running,
        Peer(environment) as producer,
    ):
        (child,) = running.child_pids()
        after["idle"] = _peak_mb(child)
        for name, output, arguments in JOBS[task]:
            producer.run(_do, task, inputs[name], str(options.folder / output), arguments)
            after[f"{name} → {output}"] = _peak_mb(child)
    peak = max(after.values())
    return Row(
        figure=f"memory of a pool child, {task} of JPEG and PNG of 24 MP",
        target="≤ 200 MB",
        measured=f"**{peak:.0f} MB**",
        detail="peak so far after " + ", ".join(f"{name} {megabytes:.0f}" for name, megabytes in after.items()),
        value=peak,
    )


def _do(task: str, source: str, target: str, arguments: dict[str, Any]) -> None:
    from tasks.celery import app

    app.send_task(task, (source, target), arguments).get(timeout=120)


def _peak_mb(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6
