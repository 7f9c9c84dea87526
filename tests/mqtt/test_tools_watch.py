"""`mqtt watch`: each event on a readable line as it comes, and a word where some are missing."""

import json
import re
import shlex
import subprocess
import time

import pytest

from tasks.cli.mqtt_events import event_line, parsed
from tasks.cli.mqtt_watch import Sequences
from tests.mqtt.messages import validate
from tests.mqtt.road import Road
from tests.mqtt.tools import event

ID = "8af269fb-e3fe-466a-b147-05f91584394b"
OTHER = "91aaa2bd-2bc0-4c6f-9414-66a341ac416d"
RESULT = {"output": "/data/out.webp", "format": "webp", "width": 800, "height": 600, "size_bytes": 53812}
FAILURE = {"error_type": "CorruptMedia", "error_message": "in.jpg can't be decoded"}


@pytest.fixture
def watch(tools):
    """`watch(...)`: a watcher that has subscribed."""

    def start(*args):
        started = tools.start("watch", *args)
        assert started.line("err").startswith(f"watching {tools.settings.mqtt_topic} on 127.0.0.1:")
        return started

    return start


# In a process of its own


def test_events_are_lines_that_people_read(tools, watch):
    watching = watch("--count", "3", "--timeout", "20")
    tools.tell(event(ID, 3), event(ID, 4, "completed", {"result": RESULT}), event(OTHER, 3, "failed", FAILURE))

    started, completed, failed = (watching.line() for _ in range(3))

    assert watching.wait() == 0
    time = r"\d\d:\d\d:\d\d\.\d{3}"
    assert re.fullmatch(rf"{time}  processing  8af269fb  image_resize +  running +0 %  edge-1", started)
    assert re.fullmatch(rf"{time}  completed   8af269fb .* completed +100 %  edge-1 +out.webp 800x600", completed)
    assert re.fullmatch(rf"{time}  error       91aaa2bd .* failed .* CorruptMedia: in.jpg can't be decoded", failed)


def test_json_is_the_payload_and_job_chooses_one_by_the_beginning_of_its_id(tools, watch):
    watching = watch("--json", "--job", ID[:6], "--count", "2", "--timeout", "20")
    events = [event(ID, 1, "created"), event(OTHER, 1, "created"), event(ID, 2, "claimed")]
    tools.tell(*events)

    assert watching.wait() == 0
    lines = watching.rest()
    assert [json.loads(line) for line in lines] == [events[0], events[2]]
    for line in lines:
        validate(tools.settings.mqtt_topic, line)


def test_a_gap_is_told_with_the_command_that_fetches_it(tools, watch):
    watching = watch("--count", "6", "--timeout", "20")
    tools.tell(event(ID, 1, "created"), event(ID, 2, "claimed"), event(ID, 5), event(ID, 5), event(OTHER, 7))
    tools.tell(event(ID, 7, "completed"))

    assert watching.wait() == 0
    assert watching.rest("err") == [
        f"8af269fb: changes 3 to 4 did not arrive; celery -A tasks mqtt replay --job {ID}",
        f"8af269fb: change 6 did not arrive; celery -A tasks mqtt replay --job {ID}",
    ]


def test_ctrl_c_ends_it_cleanly(tools, watch):
    watching = watch()
    tools.tell(event(ID, 1, "created"))
    watching.line()

    watching.interrupt()

    assert watching.wait() == 0
    assert watching.rest("err") == []


def test_what_is_no_event_is_said_and_passed_over(tools, watch):
    watching = watch("--count", "1", "--timeout", "20")
    tools.publish(tools.settings.mqtt_topic, "{}", b"\xff\x1b[2J", event(ID, "1"), event(ID, 1))

    assert watching.wait() == 0
    notes = watching.rest("err")
    assert len(notes) == 3
    assert all(note.startswith("this is no event: ") and note.isprintable() for note in notes)


def test_fewer_events_than_counted_within_the_time_is_exit_code_1(watch):
    watching = watch("--count", "1", "--timeout", "0.2")

    assert watching.wait() == 1
    assert watching.rest("err") == []


@pytest.mark.parametrize("timeout", ["nan", "0", "-1", "soon"])
def test_a_time_that_is_none_is_refused(tools, timeout):
    result = tools.mqtt("watch", "--timeout", timeout)

    assert result.exit_code == 2
    assert "--timeout" in result.stderr
    assert timeout in result.stderr


def test_it_comes_back_with_the_broker_and_says_how_to_fetch_what_was_missed(tools_for, private_mosquitto):
    server = private_mosquitto()
    tools = tools_for(server.port)
    watching = tools.start("watch")
    watching.line("err")

    server.kill9()
    assert "MQTT_BROKER" in watching.line("err")
    server.start()

    assert re.fullmatch(
        r"connected again; what happened meanwhile: celery -A tasks mqtt replay --since \S+", watching.line("err")
    )
    tools.tell(event(ID, 4))
    assert "processing" in watching.line()


def test_it_goes_on_trying_while_the_broker_that_came_back_refuses_it(tools_for, private_mosquitto, tmp_path):
    file = tmp_path / "passwords"
    file.touch(mode=0o600)

    def let_in(password):
        subprocess.run(["mosquitto_passwd", "-b", file, "watcher", password], check=True, capture_output=True)

    let_in("right")
    broker = private_mosquitto(f"password_file {file}", allow_anonymous=False)
    watching = tools_for(broker.port, MQTT_USERNAME="watcher", MQTT_PASSWORD="right").start("watch")
    watching.line("err")

    broker.kill9()
    assert "is lost" in watching.line("err")
    let_in("other")
    broker.start()
    assert re.search("refuses the connection .* MQTT_PASSWORD; trying again$", watching.line("err"))
    time.sleep(3)  # it is refused once more at least
    broker.kill9()
    let_in("right")
    broker.start()

    assert watching.line("err", 25).startswith("connected again;")


def test_the_command_that_it_prints_finds_what_happened_before_it_noticed_the_loss(tools_for, mosquitto, tools):
    with Road(mosquitto.port) as road:
        watching = tools_for(road.port, mosquitto.topic_prefix).start("watch")
        watching.line("err")

        road.lose()
        tools.claim(tools.job(ID))
        assert "MQTT_BROKER" in watching.line("err", 25)
        road.mend()

        command = shlex.split(watching.line("err", 25).partition(": ")[2])
        assert command[:5] == ["celery", "-A", "tasks", "mqtt", "replay"]
        replayed = tools.mqtt("replay", *command[5:], "--json").stdout.splitlines()
        assert [json.loads(line)["job_id"] for line in replayed] == [ID] * 3


def test_it_ends_in_time_while_the_broker_is_frozen(tools_for, private_mosquitto):
    broker = private_mosquitto()
    watching = tools_for(broker.port).start("watch", "--timeout", "12")
    watching.line("err")
    started = time.monotonic()

    broker.pause()
    watching.wait(30)

    assert time.monotonic() - started < 15.0, "it waits for an answer after its time"


def test_an_id_that_a_shell_would_read_otherwise_is_quoted(tools, watch):
    watching = watch("--count", "2", "--timeout", "20")
    tools.tell(event("a b;c", 1), event("a b;c", 3))

    assert watching.wait() == 0
    assert watching.rest("err") == ["a b;c: change 2 did not arrive; celery -A tasks mqtt replay --job 'a b;c'"]


# Lines


@pytest.mark.parametrize(
    ("one", "end"),
    [
        (event(ID, 3, data={"progress": 40.0, "stage": "encode"}, progress=40.0), "  40 %  edge-1        encode"),
        (event(ID, 1, "created", worker_id=None), "queued       0 %"),
        (event(ID, 4, "lost", {"deaths": 2, "attempt": 3}), "its worker is lost; deaths: 2"),
        (event(ID, 4, "completed", {"result": {"outputs": [RESULT] * 5}}), ", out.webp 800x600 and 2 more"),
        (event(ID, 4, "completed", {"result": 42}), "edge-1        42"),
        (event(ID, 4, "failed", {"error_type": "X", "error_message": "a\nb\x1b[2J"}), r"X: a\nb\x1b[2J"),
    ],
)
def test_the_end_of_a_line_says_what_came_of_it(one, end):
    assert event_line(one).endswith(end)


def test_a_retry_says_when():
    due = {"retry_count": 1, "run_after_utc": "2026-03-01T12:00:00+00:00"}

    assert re.search(
        r"CorruptMedia: in.jpg can't be decoded, again after 03-0[12] \d\d:\d\d$",
        event_line(event(ID, 4, "retry", FAILURE | due)),
    )


@pytest.mark.parametrize(
    "payload",
    ["", "[]", "1", "null", '{"job_id": "a"}', json.dumps(event(ID, 1, timestamp=1e30)), json.dumps(event(ID, 1.5))],
)
def test_what_is_no_event_is_not_parsed(payload):
    assert parsed(payload) is None


# Gaps


def test_the_first_event_of_a_job_misses_nothing_and_repetitions_neither():
    sequences = Sequences()

    for sequence in (5, 5, 6, 4, 6, 7):
        assert not sequences.missing(event(ID, sequence))
    assert sequences.missing(event(ID, 10)) == range(8, 10)
    assert not sequences.missing(event(OTHER, 3))


def test_only_so_many_jobs_are_remembered():
    sequences = Sequences(kept=2)

    for job_id in ("a", "b", "a", "c"):
        sequences.missing(event(job_id, 1))

    assert sequences.missing(event("a", 3)) == range(2, 3)
    assert not sequences.missing(event("b", 3))
