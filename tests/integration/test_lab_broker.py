"""The private broker: who may do what, and what survives a crash."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from pyscan import protocol
from pyscan.lab.broker import ADDRESS, Broker

TIMEOUT_S = 10.0
COMMAND = protocol.command_topic("host-1", "guest")


class Peer:
    """A plain MQTT 5 client: what came in, and the reason codes of what went out."""

    def __init__(self, name: str) -> None:
        self.client = Client(CallbackAPIVersion.VERSION2, name, protocol=MQTTProtocolVersion.MQTTv5)
        self.messages: queue.Queue[MQTTMessage] = queue.Queue()
        self.connected: queue.Queue[ReasonCode] = queue.Queue()
        self._published: queue.Queue[ReasonCode] = queue.Queue()
        self._subscribed = threading.Event()
        self.client.on_connect = lambda _c, _u, _f, reason, _p: self.connected.put(reason)
        self.client.on_publish = lambda _c, _u, _m, reason, _p: self._published.put(reason)
        self.client.on_subscribe = lambda *_: self._subscribed.set()
        self.client.on_message = lambda _c, _u, message: self.messages.put(message)

    def publish(self, topic: str, payload: str, retain: bool = False) -> ReasonCode:
        self.client.publish(topic, payload, qos=1, retain=retain)
        return self._published.get(timeout=TIMEOUT_S)

    def subscribe(self, topic: str) -> None:
        self.client.subscribe(topic, qos=1)
        assert self._subscribed.wait(TIMEOUT_S)

    def next(self) -> str:
        return self.messages.get(timeout=TIMEOUT_S).payload.decode()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def saved(broker: Broker, *payloads: bytes) -> bool:
    if not broker.database.exists():
        return False
    content = broker.database.read_bytes()
    return all(payload in content for payload in payloads)


@contextmanager
def peer(broker: Broker, name: str, password: str | None = None) -> Iterator[Peer]:
    """Connect with a session that lasts; the connection ends without ending the session."""
    one = Peer(name)
    one.client.username_pw_set(name, password or broker.password_file(name).read_text())
    lasting = Properties(PacketTypes.CONNECT)
    lasting.SessionExpiryInterval = 3600
    one.client.connect(ADDRESS, broker.port, clean_start=False, properties=lasting)
    one.client.loop_start()
    try:
        yield one
    finally:
        one.client.disconnect()
        one.client.loop_stop()


@pytest.mark.parametrize("name", ["card-1", "stranger"])
def test_wrong_credentials_are_refused(broker: Broker, name: str) -> None:
    with peer(broker, name, password="guess") as one:  # noqa: S106 - a wrong password is the point
        assert one.connected.get(timeout=TIMEOUT_S).value == 0x87  # not authorized


@pytest.mark.parametrize(
    ("name", "topic", "allowed"),
    [
        ("card-1", protocol.verdict_topic("card-1", "guest"), True),
        ("card-1", protocol.verdict_topic("card-2", "guest"), False),
        ("card-1", COMMAND, False),
        ("control-1", COMMAND, True),
        ("control-1", protocol.verdict_topic("card-1", "guest"), False),
        ("host-1", protocol.report_topic("host-1", "x"), True),
        ("host-1", protocol.state_topic("host-2", "guest"), False),
        ("host-1", COMMAND, False),
        ("observer-1", COMMAND, False),
    ],
)
def test_identity_writes_only_what_its_role_needs(
    broker: Broker, name: str, topic: str, allowed: bool
) -> None:
    with peer(broker, name) as one:
        assert one.publish(topic, "x").is_failure != allowed


def test_agent_hears_commands_for_its_own_host_only(broker: Broker) -> None:
    with peer(broker, "control-1") as control, peer(broker, "host-1") as agent:
        agent.subscribe(protocol.subscription(protocol.TopicKind.COMMAND))
        control.publish(protocol.command_topic("host-2", "guest"), "for another")
        control.publish(COMMAND, "for us")
        assert agent.next() == "for us"


def test_queued_and_retained_messages_survive_a_crash(broker: Broker) -> None:
    state = protocol.state_topic("host-1", "guest")
    port = broker.port
    with peer(broker, "host-1") as agent:
        agent.subscribe(COMMAND)
        assert not agent.publish(state, "running", retain=True).is_failure
    with peer(broker, "control-1") as control:
        assert not control.publish(COMMAND, "freeze").is_failure
    # mosquitto acknowledges first and saves right after; a crash between the two loses it.
    wait_until(
        lambda: all(text in broker.database.read_bytes() for text in (b"freeze", b"running"))
    )
    broker.kill()
    broker.start()
    assert broker.port == port
    with peer(broker, "host-1") as agent:
        assert agent.next() == "freeze"
    with peer(broker, "observer-1") as observer:
        observer.subscribe(state)
        assert observer.next() == "running"


def test_passwords_are_private(broker: Broker) -> None:
    for name in ("card-1", "host-1"):
        assert broker.password_file(name).stat().st_mode & 0o077 == 0
    hashes = (broker.password_file("card-1").parent / "passwords").read_text()
    assert broker.password_file("card-1").read_text() not in hashes
