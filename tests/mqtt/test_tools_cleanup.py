"""`mqtt cleanup`: clears what is retained below a pattern, and nothing that could be somebody else's."""

import pytest

from tests.mqtt.tools import event


@pytest.fixture
def leftovers(tools):
    for name in ("b", "a"):
        tools.show(name, "image_resize")
    tools.publish(f"{tools.prefix}/other/deep/er", "x", is_retained=True)
    return tools


def test_it_lists_and_clears_what_is_below_the_pattern_only(leftovers):
    result = leftovers.mqtt("cleanup", f"{leftovers.prefix}/workers/#")

    workers = leftovers.settings.capability_topic_prefix
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"{workers}/a", f"{workers}/b", "2 retained messages cleared"]
    assert leftovers.mqtt("cleanup", f"{leftovers.prefix}/#", "--dry-run").stdout.splitlines() == [
        f"{leftovers.prefix}/other/deep/er",
        "1 retained message; nothing was changed",
    ]


def test_a_dry_run_changes_nothing(leftovers):
    for _ in range(2):
        result = leftovers.mqtt("cleanup", f"{leftovers.prefix}/#", "--dry-run")
        assert result.stdout.splitlines()[-1] == "3 retained messages; nothing was changed"


def test_what_is_not_retained_is_not_counted(leftovers):
    leftovers.tell(event("a", 1))

    assert leftovers.mqtt("cleanup", f"{leftovers.prefix}/events").stdout == "0 retained messages cleared\n"


@pytest.mark.parametrize("pattern", ["#", "+/#", "+", "/#", "$SYS/#", "+/workers/a"])
def test_a_pattern_that_takes_anybodys_topics_needs_force(tools, pattern):
    assert tools.error("cleanup", pattern).endswith("name the first level, or give --force")


@pytest.mark.parametrize("pattern", ["", "a/#/b", "a#", "a/b+", "$share/group/a/#"])
def test_what_is_no_pattern_is_refused(tools, pattern):
    result = tools.mqtt("cleanup", pattern, "--force")

    assert result.exit_code == 2
    assert "is no pattern" in result.stderr


def test_what_cannot_be_sent_is_refused(tools):
    for pattern in ("caf\udce9/#", "a" * 65_536):
        result = tools.mqtt("cleanup", pattern)

        assert result.exit_code == 2
        assert "is too long, or no UTF-8 text" in result.stderr.replace("\n", " ")


def test_a_broker_that_is_a_url_is_refused(tools):
    result = tools.mqtt("cleanup", "a/#", "--broker", "mqtt://u:hunter2@h")

    assert result.exit_code == 2
    assert "no URL; write only that, and its port in --port" in result.stderr
    assert "hunter2" not in result.output


def test_a_dry_run_of_anybodys_topics_needs_no_force(tools_for, private_mosquitto):
    other = tools_for(private_mosquitto().port)
    other.publish("z/z", "x", is_retained=True)

    assert other.mqtt("cleanup", "#", "--dry-run").stdout.splitlines() == [
        "z/z",
        "1 retained message; nothing was changed",
    ]


def test_with_force_it_clears_a_whole_broker_which_broker_and_port_name(tools, tools_for, private_mosquitto):
    server = private_mosquitto()
    other = tools_for(server.port)
    other.show("a", "image_resize")
    other.publish("z/z", "x", is_retained=True)

    result = tools.mqtt("cleanup", "#", "--force", "--broker", "localhost", "--port", str(server.port))

    assert result.stdout.splitlines() == ["mt/workers/a", "z/z", "2 retained messages cleared"]
    assert other.mqtt("cleanup", "#", "--force").stdout == "0 retained messages cleared\n"


def test_thousands_are_cleared(tools):
    topics = [f"{tools.prefix}/many/{number}" for number in range(2500)]
    tools.publish_all([{"topic": topic, "payload": "x", "retain": True} for topic in topics])

    cleared = tools.mqtt("cleanup", f"{tools.prefix}/many/#").stdout.splitlines()

    assert cleared[:-1] == sorted(topics)
    assert cleared[-1] == "2,500 retained messages cleared"
    assert tools.mqtt("cleanup", f"{tools.prefix}/many/#").stdout == "0 retained messages cleared\n"
