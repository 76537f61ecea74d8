"""docs/spec/asyncapi.yaml: its rules, and messages held against it.

`RULES` is what of AsyncAPI 3.0.0 (asyncapi.com, "AsyncAPI Specification" and "MQTT Bindings"
0.2.0) matters for this document, as a JSON Schema; `problems_of` adds what a schema cannot
say: where references lead, and that the parts fit each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from pyscan.cose import decode_cbor, verify1
from pyscan.errors import FileFormatError, SignatureInvalid
from pyscan.keys import KeyRing

DOCUMENT = Path(__file__).parents[1] / "docs/spec/asyncapi.yaml"

_EXTENSIONS = {r"^x-[\w.-]+$": {}}
_REFERENCE = {
    "type": "object",
    "required": ["$ref"],
    "additionalProperties": False,
    "properties": {"$ref": {"type": "string", "pattern": "^#/"}},
}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(required),
        "additionalProperties": False,
        "patternProperties": _EXTENSIONS,
        "properties": properties,
    }


def _map_of(item: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "patternProperties": {r"^[A-Za-z0-9._-]+$": item},
    }


_TEXT = {"type": "string", "minLength": 1}
_SCHEMA = {"$ref": "http://json-schema.org/draft-07/schema#"}
_BINDING_VERSION = {"bindingVersion": {"const": "0.2.0"}}
_MESSAGE = _object(
    {
        "title": _TEXT,
        "summary": _TEXT,
        "description": _TEXT,
        "contentType": _TEXT,
        "payload": _SCHEMA,
        "bindings": _object(
            {
                "mqtt": _object(
                    {
                        "payloadFormatIndicator": {"enum": [0, 1]},
                        "correlationData": _SCHEMA,
                        "contentType": _TEXT,
                        "responseTopic": {"anyOf": [_TEXT, _SCHEMA]},
                        **_BINDING_VERSION,
                    }
                )
            }
        ),
    },
    "contentType",
    "payload",
    "bindings",
)
RULES = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    **_object(
        {
            "asyncapi": {"const": "3.0.0"},
            "id": {"type": "string", "pattern": "^[a-z][a-z0-9+.-]*:"},
            "info": _object(
                {
                    "title": _TEXT,
                    "version": _TEXT,
                    "description": _TEXT,
                    "license": _object({"name": _TEXT, "url": _TEXT}, "name"),
                },
                "title",
                "version",
            ),
            "defaultContentType": _TEXT,
            "servers": _map_of(
                _object(
                    {
                        "host": _TEXT,
                        "protocol": _TEXT,
                        "description": _TEXT,
                        "bindings": _object(
                            {
                                "mqtt5": _object(
                                    {
                                        "sessionExpiryInterval": {"type": "integer"},
                                        **_BINDING_VERSION,
                                    }
                                )
                            }
                        ),
                    },
                    "host",
                    "protocol",
                )
            ),
            "channels": _map_of(
                _object(
                    {
                        "address": {"type": "string", "pattern": "^[^?#+]+$"},
                        "description": _TEXT,
                        "parameters": _map_of(_REFERENCE),
                        "messages": _map_of(_REFERENCE),
                    },
                    "address",
                    "messages",
                )
            ),
            "operations": _map_of(
                _object(
                    {
                        "action": {"enum": ["send", "receive"]},
                        "summary": _TEXT,
                        "channel": _REFERENCE,
                        "messages": {"type": "array", "items": _REFERENCE, "minItems": 1},
                        "reply": _object({"channel": _REFERENCE}),
                        "bindings": _object(
                            {
                                "mqtt": _object(
                                    {
                                        "qos": {"enum": [0, 1, 2]},
                                        "retain": {"type": "boolean"},
                                        "messageExpiryInterval": {
                                            "anyOf": [{"type": "integer"}, _SCHEMA]
                                        },
                                        **_BINDING_VERSION,
                                    },
                                    "qos",
                                    "retain",
                                )
                            }
                        ),
                    },
                    "action",
                    "channel",
                    "messages",
                    "bindings",
                )
            ),
            "components": _object(
                {
                    "parameters": _map_of(_object({"description": _TEXT})),
                    "messages": _map_of(_MESSAGE),
                    "schemas": _map_of(_SCHEMA),
                }
            ),
        },
        "asyncapi",
        "info",
    ),
}


class _UniqueKeys(yaml.SafeLoader):
    """YAML of which no key stands twice in a map."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            raise yaml.YAMLError(f"a key stands twice in the map at {node.start_mark}")
        return mapping


def load() -> dict[str, Any]:
    """The document. Raises yaml.YAMLError."""
    document = yaml.load(DOCUMENT.read_text(), _UniqueKeys)  # noqa: S506 - derived from SafeLoader
    assert isinstance(document, dict)
    return document


def lookup(document: dict[str, Any], reference: str) -> Any:
    """What a ``#/a/b`` leads to. Raises KeyError."""
    found: Any = document
    for step in reference.removeprefix("#/").split("/"):
        found = found[step]
    return found


def resolved(document: dict[str, Any], node: Any) -> Any:
    """A copy without references."""
    if isinstance(node, dict):
        if "$ref" in node:
            return resolved(document, lookup(document, node["$ref"]))
        return {key: resolved(document, value) for key, value in node.items()}
    if isinstance(node, list):
        return [resolved(document, value) for value in node]
    return node


def problems_of(document: dict[str, Any]) -> list[str]:
    """What is wrong with the document; empty when nothing is."""
    validator = jsonschema.Draft7Validator(RULES)
    problems = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]
    problems += _bad_references(document, document, "#")
    if problems:
        return problems
    return list(_misfits(document))


def _bad_references(document: dict[str, Any], node: Any, where: str) -> list[str]:
    if isinstance(node, list):
        return [p for n, v in enumerate(node) for p in _bad_references(document, v, f"{where}/{n}")]
    if not isinstance(node, dict):
        return []
    if "$ref" in node:
        try:
            lookup(document, node["$ref"])
        except (KeyError, TypeError):
            return [f"{where}: {node['$ref']} leads nowhere"]
        return [] if len(node) == 1 else [f"{where}: a $ref has siblings, which do not count"]
    return [p for k, v in node.items() for p in _bad_references(document, v, f"{where}/{k}")]


def _channel_misfits(document: dict[str, Any]) -> Iterator[str]:
    for name, channel in document["channels"].items():
        in_address = set(re.findall(r"\{([^}]*)\}", channel["address"]))
        if in_address != set(channel.get("parameters", {})):
            yield f"channel {name}: its parameters are not those of its address"
        if [each["channel"] for each in document["operations"].values()].count(
            {"$ref": f"#/channels/{name}"}
        ) != 1:
            yield f"channel {name}: not exactly one operation sends to it"


def _misfits(document: dict[str, Any]) -> Iterator[str]:
    yield from _channel_misfits(document)
    used = set()
    for name, operation in document["operations"].items():
        channel = operation["channel"]["$ref"]
        if not re.fullmatch("#/channels/[^/]*", channel):
            yield f"operation {name}: its channel is none of the root's"
        for message in operation["messages"]:
            used.add(lookup(document, message["$ref"])["$ref"])
            if not message["$ref"].startswith(f"{channel}/messages/"):
                yield f"operation {name}: {message['$ref']} is no message of its channel"
    for name in document["components"]["messages"]:
        if f"#/components/messages/{name}" not in used:
            yield f"message {name}: nobody sends it"
    for name, schema in document["components"]["schemas"].items():
        for problem in jsonschema.Draft7Validator(
            jsonschema.Draft7Validator.META_SCHEMA
        ).iter_errors(resolved(document, schema)):
            yield f"schema {name}: {problem.message}"


@dataclass(frozen=True)
class Heard:
    """A message as the broker delivered it, with its MQTT 5 properties by name."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    properties: dict[str, Any] = field(default_factory=dict)


#: Names of paho, and what the bindings call them.
_PROPERTIES = {
    "ContentType": "contentType",
    "CorrelationData": "correlationData",
    "ResponseTopic": "responseTopic",
    "MessageExpiryInterval": "messageExpiryInterval",
    "PayloadFormatIndicator": "payloadFormatIndicator",
}


class Described:
    """The document, ready to hold messages against it."""

    def __init__(self, ring: KeyRing) -> None:
        """`ring` has the keys of everybody who signs."""
        self.document = load()
        self._ring = ring
        self._addresses = {
            name: re.compile(re.sub(r"\\\{[^}]*\\\}", "([^/]+)", re.escape(channel["address"])))
            for name, channel in self.document["channels"].items()
        }
        self._operations = {
            operation["channel"]["$ref"].rpartition("/")[2]: operation
            for operation in self.document["operations"].values()
        }

    @property
    def messages(self) -> set[tuple[str, str]]:
        """Channel and message of everything that may be sent."""
        return {
            (channel, message)
            for channel, each in self.document["channels"].items()
            for message in each["messages"]
        }

    def check(self, heard: Heard) -> tuple[str, str, Any]:
        """Channel, message and content. Raises AssertionError with all that does not fit."""
        fitting = [
            name for name, address in self._addresses.items() if address.fullmatch(heard.topic)
        ]
        assert len(fitting) == 1, f"{heard.topic}: described by {fitting or 'no channel'}"
        channel = fitting[0]
        operation = resolved(self.document, self._operations[channel]["bindings"]["mqtt"])
        assert (heard.qos, heard.retain) == (operation["qos"], operation["retain"]), heard
        reasons = {}
        for name in self.document["channels"][channel]["messages"]:
            message = resolved(self.document, self.document["channels"][channel]["messages"][name])
            try:
                content = self._content(message, heard)
                _check_properties(message, operation, heard)
                jsonschema.validate(content, message["payload"], jsonschema.Draft7Validator)
            except (AssertionError, jsonschema.ValidationError) as problem:
                reasons[name] = str(problem)
            else:
                return channel, name, content
        raise AssertionError(f"{heard.topic}: none of its channel's messages fits: {reasons}")

    def _content(self, message: dict[str, Any], heard: Heard) -> Any:
        content_type = message.get("x-cose-content-type")
        if content_type is None:
            if message["contentType"] == "application/json":
                assert heard.payload, "empty, but not a message that may be"
                return yaml.safe_load(heard.payload)  # JSON is a part of YAML
            return heard.payload.decode()
        assert len(heard.payload) <= message["x-bytes-max"], "too large"
        try:
            verified = verify1(
                heard.payload, self._ring, content_type, heard.topic.encode(), 1 << 17
            )
            return decode_cbor(verified.payload, 1 << 17)
        except (SignatureInvalid, FileFormatError) as problem:
            raise AssertionError(str(problem)) from problem


def _check_properties(message: dict[str, Any], operation: dict[str, Any], heard: Heard) -> None:
    described = {**message["bindings"]["mqtt"]}
    del described["bindingVersion"]
    if "messageExpiryInterval" in operation:
        described["messageExpiryInterval"] = operation["messageExpiryInterval"]
    unknown = set(heard.properties) - set(_PROPERTIES)
    assert not unknown, f"properties {unknown} are not described"
    given = {_PROPERTIES[name]: value for name, value in heard.properties.items()}
    assert set(given) <= set(described), f"{set(given) - set(described)} is not described"
    missing = set(described) - set(given) - set(message.get("x-mqtt-optional", ()))
    assert not missing, f"{missing} is missing"
    for name, value in given.items():
        plain = value.decode("ascii") if isinstance(value, bytes) else value
        wanted = described[name]
        schema = wanted if isinstance(wanted, dict) else {"const": wanted}
        jsonschema.validate(plain, schema, jsonschema.Draft7Validator)
