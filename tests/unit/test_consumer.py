"""Which messages can be run; the reason for the others holds nothing of their content."""

import json
from types import SimpleNamespace

import pytest

from tasks.consumer import fault_in

HEADERS = {"task": "add", "id": "job-1", "retries": 0, "timelimit": [None, None]}
BODY = [[1, 2], {}, {"callbacks": None}]
STEP = {"task": "add", "args": [1], "kwargs": {}, "options": {"task_id": "step-1"}, "subtask_type": None}


class Message(SimpleNamespace):
    content_type = "application/json"

    @property
    def payload(self):
        return json.loads(self.body)


def message(body=BODY, **headers):
    return Message(headers=HEADERS | headers, body=json.dumps(body))


@pytest.mark.parametrize(
    "good",
    [
        message(),
        message([[], {}, None]),
        message(timelimit=[1, 2.5]),
        message(timelimit=None),
        message(publication=3),
        message({"args": [1], "kwargs": {}}),
        message(publication=None, retries=None, group_index=None, timelimit=[0, None]),
        message(publication=2**31 - 1, retries=2**31 - 1, group_index=0),
        message(eta="2031-01-31T12:00:00", expires="9999-12-31T23:59:59Z", shadow=""),
        message(stamped_headers=["trace"], stamps={"trace": 1}),
        message(stamped_headers=[], stamps=None),
        Message(headers={}, body=json.dumps({"task": "add", "id": "job-1", "args": [1], "kwargs": {}})),
        message([[1], {}, {"callbacks": [STEP], "errbacks": [STEP, STEP], "chain": [STEP], "chord": STEP}]),
        message([[1], {}, {"callbacks": [], "errbacks": None, "chain": None, "chord": None}]),
    ],
    ids=range(14),
)
def test_a_task_message_of_any_protocol_has_no_fault(good):
    assert fault_in(good) is None


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (Message(headers=None, body="{}"), "headers"),
        (Message(headers={}, body="{}"), "names no task"),
        (Message(headers=HEADERS, body="{secret"), "decoded"),
        (Message(headers={"task": "add"}, body=json.dumps(BODY)), "'id'"),
        (message(id=None), "'id'"),
        (message(id=7), "'id'"),
        (message(id=""), "'id'"),
        (message(id="x" * 256), "'id'"),
        (message(id="secret\n"), "'id'"),
        (message(id="secret\0"), "'id'"),
        (message(task=["secret"]), "'task'"),
        (message(None), "body"),
        (message("secret"), "body"),
        (message([]), "body"),
        (message([["secret"], {}]), "body"),
        (message(["secret", {}, {}]), "body"),
        (message([[], ["secret"], {}]), "body"),
        (message([[], {}, "secret"]), "body"),
        (message({"args": "secret", "kwargs": {}}), "body"),
        (message(retries="secret"), "'retries'"),
        (message(publication="secret"), "'publication'"),
        (message(timelimit="secret"), "'timelimit'"),
        (message(timelimit=["secret", 1]), "'timelimit'"),
        (message(timelimit=[True, None]), "'timelimit'"),
        (message(timelimit=[1, 2, 3]), "'timelimit'"),
        (message(eta="secret"), "'eta'"),
        (message(eta=""), "'eta'"),
        (message(expires=5), "'expires'"),
        (message(expires=0), "'expires'"),
        (message(stamped_headers=[["secret"]], stamps={}), "'stamped_headers'"),
        (message(stamped_headers=["trace"], stamps="secret"), "'stamped_headers'"),
        (message({"args": [1], "kwargs": {}, "group_index": 1.5}), "'group_index'"),
        (message({"kwargs": {}}), "body"),
        (message([[], {}, {"chain": ["secret"]}]), "'chain'"),
        (message([[], {}, {"chain": "secret"}]), "'chain'"),
        (message([[], {}, {"chain": [STEP, {"task": "secret"}]}]), "'chain'"),
        (message([[], {}, {"callbacks": [STEP | {"args": "secret"}]}]), "'callbacks'"),
        (message([[], {}, {"errbacks": 7}]), "'errbacks'"),
        (message([[], {}, {"chord": [STEP]}]), "'chord'"),
        (message([[], {}, {"chord": STEP | {"options": None}}]), "'chord'"),
    ],
    ids=range(40),
)
def test_any_other_message_has_a_fault_that_is_named_without_its_content(bad, word):
    fault = fault_in(bad)

    assert word in fault
    assert "secret" not in fault
