"""Every message that a test receives is held against the schemas: `validate(topic, payload)`.

Tests name their topics so that they can be told apart: MQTT_TOPIC ends with `/events`, CAPABILITY_TOPIC_PREFIX with
`/workers`.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from tasks.sinks import topics

SINKS = Path(topics.__file__).parent
SCHEMAS = SINKS / "schemas"


def validate(topic: str, payload: str | bytes) -> dict[str, Any] | None:
    """The payload as an object; None for the empty one that says that a worker is gone.

    Raises:
        jsonschema.ValidationError: It breaks its schema.
        AssertionError: The topic is none of Media Tasks, or not that of this worker.
    """
    *above, last = topic.split("/")
    if last == "events":
        return checked("event", payload)
    if last == "check":
        return None
    assert above[-1:] == ["workers"], f"{topic} ends neither with /events nor with /workers/WORKER_ID"
    if not payload:
        return None
    capability = checked("capability", payload)
    assert capability["id"] == capability["worker_id"]
    assert topic == topics.capability_topic("/".join(above), capability["worker_id"])
    return capability


def checked(name: str, payload: str | bytes) -> dict[str, Any]:
    """The payload as an object that fits the schema of this name."""
    found = json.loads(payload)
    _validator(name).validate(found)
    return found


@cache
def _validator(name: str) -> Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
