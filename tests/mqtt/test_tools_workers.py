"""`mqtt workers`: who is alive by the retained topics, and who does what by the job table."""

import json
import re

import pytest

ID = "8af269fb-e3fe-466a-b147-05f91584394b"


@pytest.fixture
def crew(tools):
    """One that works, one that stops, one that is gone."""
    tools.show("edge-1", "image_resize", "image_conversion", idle_count=0)
    tools.show("edge-2", "image_resize", idle_count=0, is_draining=True)
    tools.show("gone", "image_resize")
    tools.publish(f"{tools.settings.capability_topic_prefix}/gone", b"", is_retained=True)
    tools.claim(tools.job(ID), "edge-1")
    tools.store.progress(ID, 1, percent=40.0)
    return tools


def test_the_table_shows_who_is_alive_and_what_each_does_now(crew):
    lines = crew.mqtt("workers").stdout.splitlines()

    assert lines[0].split() == ["worker", "status", "idle", "heard", "can", "do", "does", "now"]
    assert len(lines) == 3
    resizes = "image_resize, image_conversion  image_resize 8af269fb 40 %"
    assert re.fullmatch(rf"edge-1  busy +0  \d\d:\d\d:\d\d  {resizes}", lines[1].rstrip())
    assert re.fullmatch(r"edge-2  draining +0  \d\d:\d\d:\d\d  image_resize", lines[2].rstrip())


def test_in_80_columns_each_worker_is_one_line(crew):
    lines = crew.mqtt("workers", columns=80).stdout.rstrip().splitlines()

    assert max(map(len, lines)) <= 80
    assert len(lines) == 2 + 2


def test_json_is_one_object_a_line(crew):
    first, second = [json.loads(line) for line in crew.mqtt("workers", "--json").stdout.splitlines()]

    assert set(first) == {"worker_id", "capabilities", "idle_count", "status", "timestamp", "jobs"}
    assert first["jobs"] == [{"job_id": ID, "task_type": "image_resize", "progress": 40.0, "stage": None}]
    assert (second["worker_id"], second["status"], second["jobs"]) == ("edge-2", "draining", [])


def test_nobody_alive_is_said_with_the_variable(tools):
    result = tools.mqtt("workers")

    assert (result.exit_code, result.stdout) == (0, "")
    assert f"no worker below {tools.settings.capability_topic_prefix} (CAPABILITY_TOPIC_PREFIX)" in result.stderr


def test_what_is_no_capability_is_said_and_passed_over(crew):
    for name, payload in {"x": "[]", "y": {"worker_id": 1, "timestamp": 1}, "z": b"\xff"}.items():
        crew.publish(f"{crew.settings.capability_topic_prefix}/{name}", payload, is_retained=True)

    result = crew.mqtt("workers", "--json")

    assert len(result.stdout.splitlines()) == 2
    assert result.stderr.count("holds no capability") == 3


def test_without_the_job_table_the_workers_are_shown_still(crew, server_dir):
    crew.store.database.close()
    (server_dir / "media_store.db").write_text("no database " * 1000)

    result = crew.mqtt("workers", "--json")

    assert [json.loads(line)["jobs"] for line in result.stdout.splitlines()] == [None, None]
    assert "what they do now is not known" in result.stderr


def test_hundreds_of_workers_are_all_shown(tools):
    from tasks.sinks import topics

    prefix = tools.settings.capability_topic_prefix
    names = [f"edge-{number:04}" for number in range(1200)]
    messages = [
        {"topic": f"{prefix}/{name}", "payload": topics.capability(name, ["x"], 1, is_draining=False), "retain": True}
        for name in names
    ]
    tools.publish_all(messages)

    shown = [json.loads(line)["worker_id"] for line in tools.mqtt("workers", "--json").stdout.splitlines()]

    assert tools.mqtt("cleanup", f"{prefix}/+").exit_code == 0
    assert shown == names


def test_a_real_command_shows_them(crew):
    started = crew.start("workers", "--json")

    assert started.wait() == 0
    assert len(started.rest()) == 2
