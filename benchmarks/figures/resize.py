"""image_resize jobs end to end: against a bare loop of the same library, the usual task, and itself without rows.

The clock runs from the first publish until the last row is completed (without rows: until the last output appears),
so the producer's work is in it: the worker is idle when it begins, as in life. Every worker and loop is warm.
"""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.measure import Contender, Options, Peer, Row, interleaved, ratio_row, skipped
from benchmarks.photos import photos
from benchmarks.workers import NO_REDIS, redis_server, settings, worker

WITHIN_S = 120.0
BARE, USUAL = "a bare loop in 2 processes", "Celery + Redis + Pillow"


def measure(options: Options) -> list[Row]:
    images, what = photos(options)
    redis = redis_server()
    with ExitStack() as stack:
        enter = stack.enter_context
        bare = enter(bare_loop(options))
        jobs = enter(jobs_of_ours(options, "recorded"))
        untold = enter(jobs_of_ours(options, "untold", BROADCAST_TYPE="noop"))
        unrecorded = enter(jobs_of_ours(options, "unrecorded", MIRROR="off"))
        large = {"jobs": jobs, "bare": bare}
        if redis is not None:
            url = enter(redis.database())
            large |= {"usual": enter(usual_task(options, url)), "draft": enter(usual_task(options, url, draft=True))}
        small = {"bare": bare, "jobs": jobs, "untold": untold, "unrecorded": unrecorded}
        at_1600 = _rates(large, images * (3 if options.is_quick else 6), 1600, options.rounds(3, 9))
        at_400 = _rates(small, images * (8 if options.is_quick else 12), 400, options.rounds(3, 21))

    end_to_end = f"image_resize end to end, {what}, to"
    rows = [
        ratio_row(f"{end_to_end} 1600 px", "≥ 0.90", at_1600["jobs"], at_1600["bare"], unit="images/s", against=BARE),
        ratio_row(f"{end_to_end} 400 px", "≥ 0.85", at_400["jobs"], at_400["bare"], unit="images/s", against=BARE),
    ]
    for name, note in (("usual", ""), ("draft", ", with `draft()`")):
        figure, target = f"the same to 1600 px, against {USUAL}{note}", "≥ 2.0" if name == "usual" else ""
        if redis is None:
            rows.append(skipped(figure, target, NO_REDIS))
        else:
            rows.append(ratio_row(figure, target, at_1600["jobs"], at_1600[name], unit="images/s", against="it"))
    for name, note in (("jobs", ""), ("untold", ": guard and mirror alone, BROADCAST_TYPE=noop")):
        figure = f"image_resize to 400 px, MIRROR=on against off{note}"
        off = at_400["unrecorded"]
        rows.append(ratio_row(figure, "≥ 0.95", at_400[name], off, unit="images/s", against="MIRROR=off"))
    return rows


def _rates(contenders: dict[str, Contender], images: list[str], size_px: int, rounds: int) -> dict[str, list[float]]:
    for run in contenders.values():
        run(images[:8], size_px)
    return interleaved({name: (lambda run=run: run(images, size_px)) for name, run in contenders.items()}, rounds)


@contextmanager
def bare_loop(options: Options) -> Iterator[Contender]:
    """Two processes that take the next image each, without any queue."""
    context = get_context("spawn")
    taken = context.Value("i", 0)
    with Peer(shared=taken) as one, Peer(shared=taken) as other:

        def run(images: list[str], size_px: int) -> float:
            taken.value = 0
            folder = fresh(options.folder / "bare")
            begun = time.time()
            for loop in [peer.start(_resize_next, images, folder, size_px) for peer in (one, other)]:
                loop.result()
            return len(images) / (time.time() - begun)

        yield run


@contextmanager
def jobs_of_ours(options: Options, name: str, **more: str) -> Iterator[Contender]:
    environment = settings(options.folder / name, **more)
    is_recorded = more.get("MIRROR") != "off"
    outputs = options.folder / f"{name}-outputs"
    with worker("tasks", options, environment, queues="image_resize"), Peer(environment) as producer:
        yield lambda images, size_px: producer.run(finish_jobs, images, fresh(outputs), size_px, is_recorded)


@contextmanager
def usual_task(options: Options, url: str, *, draft: bool = False) -> Iterator[Contender]:
    environment = {"BENCH_BROKER": url}
    with worker("benchmarks.apps.usual", options, environment), Peer(environment) as producer:
        yield lambda images, size_px: producer.run(_usual, images, fresh(options.folder / "usual"), size_px, draft)


def fresh(folder: Path) -> str:
    """An empty folder."""
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    return str(folder)


def _resize_next(images: list[str], folder: str, size_px: int) -> None:
    """What image_resize does of its own, without the job: the same loader, kernel, colours, quality and commit."""
    import pyvips

    pyvips.concurrency_set(1)
    pyvips.cache_set_max(0)
    while True:
        with Peer.shared.get_lock():
            number = Peer.shared.value
            Peer.shared.value += 1
        if number >= len(images):
            return
        image = pyvips.Image.thumbnail(images[number], size_px, height=size_px, size="down", fail_on="error")
        temp, target = f"{folder}/{number}.part", f"{folder}/{number}.jpg"
        image.jpegsave(temp, Q=85, keep="none")
        descriptor = os.open(temp, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        os.rename(temp, target)  # noqa: PTH104 (as bare as can be)


def finish_jobs(images: list[str], folder: str, size_px: int, is_recorded: bool) -> float:
    """Publish one job per image, as a producer does, and wait for the last."""
    from tasks import image_resize

    begun = time.time()
    results = [
        image_resize.delay(image, f"{folder}/{number}.jpg", width=size_px, height=size_px)
        for number, image in enumerate(images)
    ]
    ended = _last_output(folder, len(images))
    if is_recorded:
        ended = _last_completion([result.id for result in results])
    return len(images) / (ended - begun)


def _usual(images: list[str], folder: str, size_px: int, draft: bool) -> float:
    from benchmarks.apps.usual import thumbnail

    begun = time.time()
    results = [
        thumbnail.delay(image, f"{folder}/{number}.jpg", size_px, draft=draft) for number, image in enumerate(images)
    ]
    for result in results:
        result.get(timeout=WITHIN_S)
    return len(images) / (time.time() - begun)


def _last_output(folder: str, count: int) -> float:
    """When the last of `count` outputs appeared, by its change time; a rename sets it."""
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        outputs = [entry for entry in os.scandir(folder) if entry.name.endswith(".jpg")]
        if len(outputs) == count:
            return max(entry.stat().st_ctime for entry in outputs)
        time.sleep(0.02)
    raise TimeoutError(f"{len(outputs)} of {count} outputs within {WITHIN_S:g} s")


def _last_completion(job_ids: list[str]) -> float:
    from tasks.celery import app

    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        rows: list[Any] = app.store.jobs_by_id(job_ids)
        if all(row["status"] == "completed" for row in rows):
            return max(row["completed_at"] for row in rows).timestamp()
        time.sleep(0.02)
    raise TimeoutError(f"not all of {len(job_ids)} rows are completed within {WITHIN_S:g} s")
