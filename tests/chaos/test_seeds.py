"""A seed is all that is needed to make a storm again: its work and its blows depend on nothing else."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.chaos import scenario, servers
from tests.chaos.crew import Crew
from tests.chaos.disk import SmallDisk
from tests.chaos.material import Material
from tests.chaos.scenario import Scenario, Size
from tests.conftest import required

SIZE = Size(jobs=1300, kills=30)  # long enough for the blows that last for a minute


@pytest.fixture
def of_seed(request, tmp_path, monkeypatch):
    """What a scenario of a seed would do: its blows, and its work without the ids of its jobs, which are random."""
    monkeypatch.setattr(scenario, "tempfile", SimpleNamespace(mkdtemp=lambda **_: str(tmp_path)))
    (tmp_path / "in").mkdir()
    for number in range(5):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(b"x" * (100 - number))
    disk = SmallDisk(tmp_path / "small")

    def of_seed(seed, combination="embedded", **more_servers):
        storm = Scenario(combination, seed, SIZE, say=lambda _: None)
        crew = Crew(deployment=None, size=SIZE.workers, hosts=[])
        with required():
            parts = storm._servers() | {name: make() for name, make in more_servers.items()}
        for part in parts.values():
            request.addfinalizer(part.remove)
        blows = storm._havoc(crew, parts, disk).schedule
        orders = storm._workload(Material(tmp_path), disk).orders
        return blows, [(order.at_s, [replace(job, job_id="", members=()) for job in order.jobs]) for order in orders]

    return of_seed


def test_one_seed_gives_the_same_blows_and_the_same_work(of_seed):
    first = of_seed(43)
    random.seed(7)  # whoever else draws

    assert of_seed(43) == first


def test_another_seed_gives_other_blows_and_other_work(of_seed):
    (blows, orders), (other_blows, other_orders) = of_seed(43), of_seed(44)

    assert [blow.at_s for blow in blows] != [blow.at_s for blow in other_blows]
    assert [blow.kind for blow in blows] != [blow.kind for blow in other_blows]
    assert [at_s for at_s, _ in orders] != [at_s for at_s, _ in other_orders]
    assert [jobs for _, jobs in orders] != [jobs for _, jobs in other_orders]


def away(part):
    return {f"{part} {harm}" for harm in ("restarted", "stopped", "frozen")}


@pytest.mark.parametrize(
    ("combination", "on_servers"),
    [
        ("embedded", {"broker emptied", "broker deleted", "database locked"}),
        ("rabbitmq", {*away("broker"), "queues purged", *away("database"), "database locked"}),
        ("redis", {*away("broker"), "redis flushed", *away("database"), "database locked"}),
    ],
)
def test_every_kind_of_blow_and_of_job_is_dealt(of_seed, combination, on_servers):
    blows, orders = of_seed(43, combination, mqtt=servers.Mosquitto)

    kinds = [blow.kind for blow in blows]
    assert sum(kind.startswith("kill ") for kind in kinds) == SIZE.kills
    assert {"kill child", "kill worker", "kill main", "terminate worker", "stop child", "stop worker", "stop main"} | {
        *on_servers, *away("mqtt"), "disk full"
    } == set(kinds)  # fmt: skip
    assert all(blow.lasts_s >= 1 for blow in blows if blow.kind.endswith((" stopped", " frozen", " locked")))
    frozen = {kind for kind in on_servers if kind.endswith(" frozen")}
    assert {blow.kind for blow in blows if blow.lasts_s > 60} == {"stop worker", "mqtt frozen", *frozen}
    jobs = [job for _, jobs in orders for job in jobs]
    assert len(jobs) == SIZE.jobs
    assert {job.kind for job in jobs} == {"image", "broken", "killer", "retry", "member", "body"}
