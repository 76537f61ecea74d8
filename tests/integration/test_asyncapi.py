"""docs/spec/asyncapi.yaml: valid by itself, equal to the code, and true of what is sent.

One incident runs through all programs, as processes around a real broker; an observer notes
every message with its properties.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.subscribeoptions import SubscribeOptions
from site_parts import DEADLINE_S, HOST, OBSERVER, VM, Hypervisor, until
from test_control import ENFORCE
from test_monitor import Watched
from test_operator import ANN, BOB, IDENTITIES, Installation
from wire_document import DOCUMENT, Described, Heard, load, problems_of, resolved

from pyscan import protocol
from pyscan.agent.actions import VmState, arguments
from pyscan.lab.broker import ADDRESS, Broker, Role
from pyscan.lab.process import RunDirectory
from pyscan.protocol import RejectReason, TopicKind, accounts, commands
from pyscan.records import Action
from pyscan.transport import SESSION_EXPIRY_S

#: What the incident below cannot show, and why that is so.
NEVER_SEEN = {
    ("state", "stateForgotten"): "sent when nobody has found a machine for an hour",
}
#: What an observer has to have seen for the test to mean something: report states, properties.
STATES = {"accepted", "started", "progress", "succeeded", "rejected", "failed"}


# ------------------------------------------------------------------- the document itself


def test_the_document_is_valid() -> None:
    assert problems_of(load()) == []


@pytest.mark.parametrize(
    ("where", "key", "value", "problem"),
    [
        ((), "asyncapi", "2.6.0", "3.0.0"),
        (("channels", "command"), "subscribe", {}, "subscribe"),
        (("channels", "command", "parameters"), "target", {"$ref": "#/info"}, "its address"),
        (("operations", "sendSweep"), "action", "publish", "publish"),
        (("operations", "sendSweep"), "channel", {"$ref": "#/channels/sweeps"}, "nowhere"),
        (
            ("operations", "sendSweep"),
            "messages",
            [{"$ref": "#/channels/state/messages/state"}],
            "no message of its channel",
        ),
        (("operations", "sendSweep", "bindings", "mqtt"), "qos", 3, "3"),
        (("components", "schemas", "code"), "type", "text", "text"),
        (("components", "messages"), "more", {"payload": True}, "contentType"),
    ],
)
def test_a_damaged_document_is_not(where: Any, key: str, value: Any, problem: str) -> None:
    document = copy.deepcopy(load())
    inner = document
    for step in where:
        inner = inner[step]
    inner[key] = value
    assert any(problem in each for each in problems_of(document))


# --------------------------------------------------------------- the document and the code


def test_channels_are_the_topics() -> None:
    channels = load()["channels"]
    assert set(channels) == set(TopicKind)
    for kind in TopicKind:
        filter_ = re.sub(r"\{[^}]*\}", "+", channels[kind]["address"])
        assert filter_ == protocol.subscription(kind)


WIRES = {
    "command": commands._CommandWire,
    "approval": commands._ApprovalWire,
    "report": accounts._ReportWire,
    "verdict": accounts._VerdictWire,
}


@pytest.mark.parametrize("name", WIRES)
def test_payloads_are_those_of_the_protocol(name: str) -> None:
    document = load()
    described = document["components"]["schemas"][name]
    generated = msgspec.json.schema(WIRES[name])
    assert _plain(resolved(document, described)) == _plain(_inlined(generated, generated["$defs"]))


def test_limits_and_content_types_are_those_of_the_protocol() -> None:
    document = load()
    messages = document["components"]["messages"]
    assert {
        name: (message["x-cose-content-type"], message["x-bytes-max"])
        for name, message in messages.items()
        if "x-cose-content-type" in message
    } == {
        "command": (protocol.CONTENT_COMMAND, protocol.COMMAND_BYTES_MAX),
        "approval": (protocol.CONTENT_APPROVAL, protocol.APPROVAL_BYTES_MAX),
        "report": (protocol.CONTENT_REPORT, protocol.REPORT_BYTES_MAX),
        "verdict": (protocol.CONTENT_VERDICT, protocol.VERDICT_BYTES_MAX),
    }
    expiry = document["operations"]["sendCommand"]["bindings"]["mqtt"]["messageExpiryInterval"]
    assert expiry["maximum"] == protocol.COMMAND_LIFETIME_S_MAX
    server = document["servers"]["broker"]["bindings"]["mqtt5"]
    assert server["sessionExpiryInterval"] == SESSION_EXPIRY_S


def test_codes_and_arguments_are_those_of_the_code() -> None:
    schemas = load()["components"]["schemas"]
    assert schemas["rejectReason"]["enum"] == [str(reason) for reason in RejectReason]
    assert schemas["vmState"]["enum"] == [str(state) for state in VmState]
    assert schemas["ttl"]["maximum"] == arguments.TTL_S_MAX
    chosen = [
        (part["if"]["properties"]["act"]["const"], part["then"]["properties"]["args"]["$ref"])
        for part in schemas["command"]["allOf"]
    ]
    assert chosen == [(action, f"#/components/schemas/{action}Arguments") for action, _ in chosen]
    assert {
        action: set(schemas[reference.rpartition("/")[2]]["properties"])
        for action, reference in chosen
    } == arguments._NAMES


def test_the_text_says_the_same() -> None:
    """wire.md: its table of topics, and its table of refusals."""
    text = DOCUMENT.with_name("wire.md").read_text()
    document = load()
    retained = {
        document["channels"][channel]["address"]: operation["bindings"]["mqtt"]["retain"]
        for operation in document["operations"].values()
        for channel in [operation["channel"]["$ref"].rpartition("/")[2]]
    }
    rows = re.findall(r"^\| `(pyscan/[^`]*)` \|.*\| (yes|no|never) \|$", text, re.MULTILINE)
    assert {topic: kept == "yes" for topic, kept in rows} == retained
    refusals = text.partition("## 6 ")[2].partition("## 7 ")[0]
    codes = re.findall(r"^\| `([a-z_]+)` \|", refusals, re.MULTILINE)
    assert codes == [str(reason) for reason in RejectReason]


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """msgspec's schema without references."""
    if isinstance(node, list):
        return [_inlined(value, definitions) for value in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in node.items() if key != "$defs"}


def _plain(schema: Any) -> Any:
    """A schema without what says nothing, or what only one of the two can say."""
    if isinstance(schema, list):
        return [_plain(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    left_out = {"title", "description", "allOf"}
    plain = {key: _plain_value(key, value) for key, value in schema.items() if key not in left_out}
    if "enum" in plain:
        plain.pop("type", None)
    if plain.get("type") == "integer" and plain.get("minimum") == 0:
        plain.setdefault("maximum", 2**64 - 1)  # where the CBOR decoder ends
    return plain


def _plain_value(key: str, value: Any) -> Any:
    if key == "properties":
        return {name: _plain(each) for name, each in value.items()}
    if key == "pattern":
        # No surrogate gets through UTF-8; \A and \Z are Python's.
        text = value.replace("\ud800-\udfff", "").replace("\\A", "^").replace("\\Z", "$")
        return re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), text)
    if key in {"enum", "required"}:
        return sorted(value)
    return _plain(value)


# ------------------------------------------------------------------ what is really sent


class Everything(Watched, Installation):
    """A target with a monitor, a hypervisor with an agent, a control, two operators."""


class Ear:
    """An MQTT client of another make than the programs': everything, as it was published."""

    def __init__(self, broker: Broker) -> None:
        self.heard: list[Heard] = []
        self._ready = threading.Event()
        client = paho.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        client.username_pw_set(OBSERVER, broker.password_file(OBSERVER).read_text())
        client.on_message = self._take
        client.on_subscribe = lambda *_: self._ready.set()
        client.connect(ADDRESS, broker.port)
        client.subscribe("#", options=SubscribeOptions(qos=1, retainAsPublished=True))
        client.loop_start()
        self._client = client

    def __enter__(self) -> Ear:
        assert self._ready.wait(DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _take(self, _client: paho.Client, _user: object, message: paho.MQTTMessage) -> None:
        properties = message.properties.json() if message.properties else {}
        if "CorrelationData" in properties:  # json() gives it in hex
            properties["CorrelationData"] = bytes.fromhex(properties["CorrelationData"])
        self.heard.append(
            Heard(message.topic, message.payload, message.qos, message.retain, properties)
        )


@pytest.fixture
def broker(run_directory: RunDirectory) -> Iterator[Broker]:
    with Broker(run_directory, {**IDENTITIES, OBSERVER: Role.OBSERVER}) as running:
        yield running


@pytest.fixture
def site(run_directory: RunDirectory, broker: Broker) -> Iterator[Everything]:
    site = Everything(run_directory, broker)
    yield site
    for program in ("monitor", "control", "agent"):
        if site.log(program).exists():
            print(site.log(program).read_text())  # shown on failure


async def test_all_that_is_sent_is_described(
    site: Everything, broker: Broker, run_directory: RunDirectory
) -> None:
    described = Described(site.ring(*site.keys))
    with Hypervisor(run_directory) as hypervisor, Ear(broker) as ear:
        await _incident(site, hypervisor, ear, described)
        await until(
            lambda: sum(b'"offline"' in heard.payload for heard in ear.heard) >= 2, "two farewells"
        )
    for program in ("monitor", "control", "agent"):
        assert "refused by the broker" not in site.log(program).read_text()

    seen = [described.check(heard) for heard in ear.heard]
    kinds = {(channel, message) for channel, message, _ in seen}
    unseen = described.messages - kinds
    assert unseen == set(NEVER_SEEN), f"never seen: {sorted(unseen)}"
    reports = [content for _, message, content in seen if message == "report"]
    assert {report["state"] for report in reports} >= STATES
    assert {report["act"] for report in reports} == set(Action)
    assert {"waiting_approval", "unknown_vm"} <= {report["reason"] for report in reports}
    verdicts = [content["state"] for _, message, content in seen if message == "verdict"]
    assert {"approved", "unapproved"} <= set(verdicts)
    by_control = [heard for heard in ear.heard if "MessageExpiryInterval" in heard.properties]
    assert by_control, "no command of the control was heard with its properties"


async def _incident(
    site: Everything, hypervisor: Hypervisor, ear: Ear, described: Described
) -> None:
    """From the first sweep to the end of the machine, with everything that people can do."""
    where = f"{HOST}/{VM}"

    def reported(state: str, act: str, reason: str = "") -> bool:
        told = [described.check(heard)[2] for heard in list(ear.heard) if "/report/" in heard.topic]
        return any(
            (each["state"], each["act"], each["reason"]) == (state, act, reason) for each in told
        )

    two_person = '[limits]\ntwo_person = ["kill"]'
    with ExitStack() as stack:
        stack.enter_context(site.start("control", site.control_config(ENFORCE)))
        agent = site.start("agent", site.agent_config(hypervisor.table(), two_person))
        stack.enter_context(agent)
        for program in ("control", "agent"):
            await site.wait_log(program, "state=online")
        monitor = stack.enter_context(site.start("monitor", site.config))
        await site.wait_log("monitor", "verdict=approved")
        await until(lambda: any(h.topic.endswith("/sweep") for h in ear.heard), "counters")

        site.target.flip(0)
        await until(lambda: reported("succeeded", "freeze"), "the freeze")
        monitor.kill()  # says nothing more, and its will is published

        assert (await site.pyscan("vm", "release", where, "--wait")).status == 0
        sandbox = ("vm", "sandbox", where, "--wait", "--cpu-percent", "50", "--ttl", "3600")
        await site.pyscan(*sandbox)
        assert reported("progress", "sandbox")
        assert (await site.pyscan("vm", "query", where)).status == 0
        await site.pyscan("vm", "capture", where, "--wait", "--no-memory", "--no-screenshot")
        assert (await site.pyscan("vm", "freeze", f"{HOST}/web-9", "--wait")).status == 4

        ordered = (await site.pyscan("vm", "kill", where, "--yes", "--json")).json()
        await until(lambda: reported("accepted", "kill", "waiting_approval"), "the question")
        approval = ("vm", "approve", where, "kill", ordered["command"], ordered["digest"])
        assert (await site.pyscan(*approval, "--wait", name=BOB)).status == 0
        # There is nothing left to be frozen: that fails.
        assert (await site.pyscan("vm", "freeze", where, "--wait", name=ANN)).status == 4
        agent.kill()
        assert monitor.exit_status is not None
        assert hypervisor.child.exit_status is not None
