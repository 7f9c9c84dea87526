"""Every message that a test hears is held against asyncapi.yaml: its topic, payload, QoS and whether it is retained.

`validate(topic, payload, qos=..., is_retained=...)` knows nothing of its own about channels, schemas and bindings.
Tests put one level of their own in place of the first one of each address, so that they can be told apart.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

from tasks.sinks import topics

SINKS = Path(topics.__file__).parent
SCHEMAS = SINKS / "schemas"
JSON = "application/json"


def validate(
    topic: str, payload: str | bytes, *, qos: int | None = None, is_retained: bool | None = None
) -> dict[str, Any] | None:
    """The payload as an object; None for one that is no JSON: that of a worker that is gone, and a probe.

    Args:
        qos: How it was published, and `is_retained` too; None: not known, as of a payload that a command prints.

    Raises:
        jsonschema.ValidationError: The payload is that of no message of its channel.
        AssertionError: The topic is of no channel, or not that of this worker; or the message was sent otherwise than
            its operation says.
    """
    channel, worker_id = channel_of(topic)
    message, found = _message_of(channel, payload if isinstance(payload, str) else payload.decode())
    bindings = bindings_of(channel, message)
    if qos is not None:
        assert qos == bindings["qos"], f"{message} on {topic} came with QoS {qos}: {payload!r}"
    if is_retained is not None:
        assert is_retained == bindings["retain"], f"{message} on {topic} came with retain={is_retained}: {payload!r}"
    if isinstance(found, dict) and worker_id is not None:
        assert found["id"] == found["worker_id"]
        assert topics.capability_topic("any", found["worker_id"]) == f"any/{worker_id}"
    return found if isinstance(found, dict) else None


def checked(name: str, payload: str | bytes) -> dict[str, Any]:
    """The payload as an object that fits the schema in the file of this name."""
    found = json.loads(payload)
    _validator(f"schemas/{name}.json").validate(found)
    return found


@cache
def document() -> Mapping[str, Any]:
    """asyncapi.yaml."""
    return yaml.safe_load((SINKS / "asyncapi.yaml").read_text())


def channel_of(topic: str) -> tuple[str, str | None]:
    """The name of the channel that a topic is of, and the WORKER_ID in it as it is escaped there."""
    found = {name: match for name in document()["channels"] if (match := _pattern(name).fullmatch(topic))}
    assert len(found) == 1, f"{topic} is a topic of {list(found) or 'no channel'} of asyncapi.yaml"
    ((name, match),) = found.items()
    return name, match.groupdict().get("worker_id")


def bindings_of(channel: str, message: str) -> Mapping[str, Any]:
    """QoS and retain of the one operation that sends a message."""
    reference = {"$ref": f"#/channels/{channel}/messages/{message}"}
    (operation,) = [one for one in document()["operations"].values() if reference in one["messages"]]
    assert operation["action"] == "send"
    assert operation["channel"] == {"$ref": f"#/channels/{channel}"}
    return operation["bindings"]["mqtt"]


def _message_of(channel: str, payload: str) -> tuple[str, Any]:
    """The name of the one message of a channel that a payload is, and the payload as what its content type says."""
    fitting, errors = {}, []
    for name in document()["channels"][channel]["messages"]:
        try:
            fitting[name] = _parsed(name, payload)
        except ValidationError as exc:
            errors.append(exc)
    if not fitting:
        raise errors[0]
    assert len(fitting) == 1, f"{payload!r} is {' and '.join(fitting)} at a time"
    ((name, found),) = fitting.items()
    return name, found


def _parsed(message: str, payload: str) -> Any:
    content_type = document()["components"]["messages"][message].get("contentType", document()["defaultContentType"])
    try:
        found = json.loads(payload) if content_type == JSON else payload
    except ValueError as exc:
        raise ValidationError(f"{payload!r} is no JSON") from exc
    _validator(f"asyncapi.yaml#{message}").validate(found)
    return found


@cache
def _pattern(channel: str) -> re.Pattern[str]:
    """The topics of a channel: any first level, then as its address says, with a level for each parameter."""
    _, *levels = document()["channels"][channel]["address"].split("/")
    parts = (f"(?P<{level[1:-1]}>[^/]+)" if level.startswith("{") else re.escape(level) for level in levels)
    return re.compile("/".join(["[^/]+", *parts]))


@cache
def _validator(name: str) -> Draft202012Validator:
    """Of a schema file, or of the payload of one of the document's messages."""
    file, _, message = name.partition("#")
    if message:
        payload = document()["components"]["messages"][message]["payload"]
        schema = payload.get("schema", payload)
    else:
        schema = json.loads((SINKS / file).read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema, registry=_files(), format_checker=Draft202012Validator.FORMAT_CHECKER)


@cache
def _files() -> Registry[Any]:
    """The schemas that the document refers to, by the names that it has for them."""
    files = {f"schemas/{path.name}": json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}
    return Registry().with_resources((name, Resource.from_contents(one)) for name, one in files.items()).crawl()
