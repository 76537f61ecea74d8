"""The link against a real broker: delivery, refusal, restarts, nothing lost."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pyscan import protocol
from pyscan.errors import TransportError
from pyscan.lab.broker import ADDRESS, Broker
from pyscan.outbox import Outbox, open_database, transaction
from pyscan.transport import (
    BACKOFF_FIRST_S,
    BACKOFF_MAX_S,
    RECEIVE_MAX,
    Link,
    LinkSettings,
    LinkState,
    Message,
    Publication,
    backoff_s,
)

TOPIC = protocol.command_topic("host-1", "web-1")
COMMANDS = protocol.subscription(protocol.TopicKind.COMMAND, "host-1")
DEADLINE_S = 15


def settings(broker: Broker, name: str, password: str | None = None) -> LinkSettings:
    if password is None:
        password = broker.password_file(name).read_text()
    return LinkSettings(ADDRESS, broker.port, f"test-{name}", name, password)


@asynccontextmanager
async def running(link: Link, *, online: bool = True) -> AsyncIterator[Link]:
    """The link's task, ended in order."""
    task = asyncio.create_task(link.run())
    try:
        if online:
            async with asyncio.timeout(DEADLINE_S):
                await link.wait_online()
        yield link
    finally:
        task.cancel()
        await asyncio.wait({task})
    assert link.state is LinkState.CLOSED


async def receive(link: Link) -> Message:
    async with asyncio.timeout(DEADLINE_S):
        return await anext(link.messages)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition that no event tells."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + DEADLINE_S
    while not condition():
        assert loop.time() < deadline_s, f"{what} did not happen"
        await asyncio.sleep(0.01)


async def test_message_arrives_and_acknowledged_does_not_come_again(broker: Broker) -> None:
    for expected in (b"one", b"two"):
        agent = Link(settings(broker, "host-1"), [COMMANDS])
        async with running(agent), running(Link(settings(broker, "control-1"))) as control:
            await control.publish(
                Publication(
                    TOPIC,
                    expected,
                    expiry_s=30,
                    response_topic="pyscan/v1/hosts/host-1/report/x",
                    correlation=b"c",
                    content_type="application/cbor",
                    user_properties=(("ce_id", "1"),),
                )
            )
            message = await receive(agent)
            assert (message.topic, message.payload) == (TOPIC, expected)
            message.acknowledge()


async def test_unacknowledged_message_is_delivered_again(broker: Broker) -> None:
    agent = settings(broker, "host-1")
    async with running(Link(agent, [COMMANDS])) as link:
        async with running(Link(settings(broker, "control-1"))) as control:
            for payload in (b"one", b"two", b"three"):
                await control.publish(Publication(TOPIC, payload))
        first, second, third = [await receive(link) for _ in range(3)]
        # Out of order: the broker hears of `third` only when those before it are done.
        third.acknowledge()
        first.acknowledge()
        del second
    async with running(Link(agent, [COMMANDS])) as link:
        assert (await receive(link)).payload == b"two"
        assert (await receive(link)).payload == b"three"


async def test_late_acknowledgement_has_no_effect(broker: Broker) -> None:
    link = Link(settings(broker, "host-1"), [COMMANDS])
    async with running(link), running(Link(settings(broker, "control-1"))) as control:
        await control.publish(Publication(TOPIC, b"the stale one"))
        stale = await receive(link)
        broker.stop()
        await until(lambda: link.state is not LinkState.ONLINE, "loss of the connection")
        broker.start()
        await link.wait_online()
        stale.acknowledge()
        again = await receive(link)
        assert again.payload == b"the stale one"
        again.acknowledge()


async def test_back_pressure_holds_messages_at_the_broker(broker: Broker) -> None:
    count = 3 * RECEIVE_MAX
    async with (
        running(Link(settings(broker, "host-1"), [COMMANDS])) as link,
        running(Link(settings(broker, "control-1"))) as control,
    ):
        for number in range(count):
            await control.publish(Publication(TOPIC, str(number).encode()))
        held = [await receive(link) for _ in range(RECEIVE_MAX)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):  # nothing may come: the broker waits for us
                await anext(link.messages)
        for message in held:
            message.acknowledge()
        received = [int(message.payload) for message in held]
        while len(received) < count:
            message = await receive(link)
            received.append(int(message.payload))
            message.acknowledge()
        assert received == list(range(count))


async def test_a_consumer_that_acknowledges_one_at_a_time_stays_connected(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    """mosquitto sends it more than ReceiveMaximum then; nothing is lost, nobody hangs up."""
    count = 10 * RECEIVE_MAX
    async with (
        running(Link(settings(broker, "host-1"), [COMMANDS])) as link,
        running(Link(settings(broker, "control-1"))) as control,
    ):
        sending = asyncio.gather(
            *(control.publish(Publication(TOPIC, str(n).encode())) for n in range(count))
        )
        received = set()
        while len(received) < count:
            message = await receive(link)
            received.add(int(message.payload))
            await asyncio.sleep(0.001)
            message.acknowledge()
        await sending
    assert "ReceiveMaximum" not in caplog.text


async def test_message_without_acknowledgement_is_dropped(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        running(Link(settings(broker, "host-1"), [COMMANDS])) as link,
        running(Link(settings(broker, "control-1"))) as control,
    ):
        assert control._session is not None
        for _ in range(2 * RECEIVE_MAX):
            control._session.client._client.publish(TOPIC, b"flood", qos=0)
        await control.publish(Publication(TOPIC, b"counts"))
        assert (await receive(link)).payload == b"counts"
    assert caplog.text.count("qos 0 message dropped") == 1


async def test_refused_publication_is_an_error(broker: Broker) -> None:
    async with running(Link(settings(broker, "host-1"))) as link:
        with pytest.raises(TransportError, match="refused by the broker"):
            await link.publish(Publication(TOPIC, b"not mine to send"))
        await link.publish(Publication(protocol.state_topic("host-1", "web-1"), b"allowed"))


async def test_publish_without_connection_is_an_error(broker: Broker) -> None:
    link = Link(settings(broker, "host-1"))
    with pytest.raises(TransportError, match="no connection"):
        await link.publish(Publication(TOPIC, b""))


async def test_wrong_password_is_told_and_retried(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyscan.transport")
    link = Link(settings(broker, "host-1", "wrong"), [COMMANDS])
    async with running(link, online=False):
        await until(lambda: "password_file" in link.problem, "the advice")
        assert link.state in {LinkState.WAITING, LinkState.CONNECTING}
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1  # once, however often it is tried


async def test_broker_that_comes_late_is_found(broker: Broker) -> None:
    broker.stop()
    link = Link(settings(broker, "host-1"), [COMMANDS])
    async with running(link, online=False):
        await until(lambda: "is the broker running" in link.problem, "the problem")
        broker.start()
        await link.wait_online()
        assert link.problem == ""


async def test_stop_while_the_broker_does_not_answer() -> None:
    """A listener that never answers CONNECT must not keep the link from stopping."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(DEADLINE_S):
        with socket.create_server((ADDRESS, 0)) as listener:
            listener.setblocking(False)
            link = Link(LinkSettings(ADDRESS, listener.getsockname()[1], "test"))
            async with running(link, online=False):
                peer, _ = await loop.sock_accept(listener)
            with peer:
                while await loop.sock_recv(peer, 4096):
                    pass  # until its end: the link left no socket behind


async def test_will_and_greeting(broker: Broker) -> None:
    topic = protocol.host_status_topic("host-1")

    def link() -> Link:
        return Link(
            settings(broker, "host-1"),
            will=lambda: Publication(topic, b"offline", retain=True),
            greeting=lambda: [Publication(topic, b"online", retain=True)],
        )

    observer = Link(settings(broker, "observer-1"), [topic])
    async with running(observer):
        async with running(link()):
            assert (await receive(observer)).payload == b"online"
        assert (await receive(observer)).payload == b"offline"  # a clean stop
        killed = asyncio.create_task(_connect_and_drop(link()))
        assert (await receive(observer)).payload == b"online"
        assert (await receive(observer)).payload == b"offline"  # the will
        await killed


async def _connect_and_drop(link: Link) -> None:
    """Lose the connection as a crash does: close the socket without DISCONNECT."""
    async with running(link):
        assert link._session is not None
        sock = link._session.client._client.socket()
        assert sock is not None
        sock.shutdown(2)
        await until(lambda: link.state is not LinkState.ONLINE, "loss of the connection")


async def test_outbox_survives_broker_and_program(broker: Broker, tmp_path: Path) -> None:
    """Put while nobody listens, while the broker is down, over restarts: all of it arrives.

    A restarted mosquitto may deliver again in another order; without a restart it is kept
    (test_back_pressure_holds_messages_at_the_broker).
    """
    database = open_database(tmp_path / "state.sqlite")
    outbox = Outbox(database)
    received: set[bytes] = set()
    numbers = itertools.count()

    def put(count: int) -> None:
        with transaction(database):
            for number in itertools.islice(numbers, count):
                outbox.put(TOPIC, b"%d" % number, message_id=f"m{number}")

    async def collect(link: Link) -> None:
        async for message in link.messages:
            received.add(message.payload)
            message.acknowledge()

    agent = Link(settings(broker, "host-1"), [COMMANDS])
    async with running(agent):
        collector = asyncio.create_task(collect(agent))
        put(100)
        for total in (200, 300):
            # A new link stands for a new program; the broker ends under both.
            link = Link(settings(broker, "control-1"))
            async with running(link, online=False):
                pump = asyncio.create_task(link.pump(outbox))
                await until(lambda: len(received) >= 50, "half of the messages")
                broker.stop()  # in order: a killed mosquitto forgets what it confirmed last
                put(100)
                link.wake()
                broker.start()
                expected = {b"%d" % number for number in range(total)}
                await until(lambda expected=expected: received == expected, f"{total} messages")
                await until(lambda: not outbox.pending(), "an empty outbox")
                pump.cancel()
                await asyncio.wait({pump})
        collector.cancel()
        await asyncio.wait({collector})
    database.close()


async def test_refused_entry_holds_up_its_topic_only(broker: Broker, tmp_path: Path) -> None:
    database = open_database(tmp_path / "state.sqlite")
    outbox = Outbox(database)
    forbidden = protocol.host_status_topic("host-1")
    with transaction(database):
        outbox.put(forbidden, b"refused", message_id="a")
        outbox.put(TOPIC, b"passes", message_id="b")
        outbox.put(forbidden, b"refused too", message_id="c")
    async with (
        running(Link(settings(broker, "host-1"), [COMMANDS])) as agent,
        running(Link(settings(broker, "control-1"))) as control,
    ):
        pump = asyncio.create_task(control.pump(outbox))
        assert (await receive(agent)).payload == b"passes"
        await until(lambda: len(outbox.pending()) == 2, "the passing entry's end")
        assert [entry.payload for entry in outbox.pending()] == [b"refused", b"refused too"]
        pump.cancel()
        await asyncio.wait({pump})
    database.close()


@pytest.mark.parametrize("attempt", [0, 1, 5, 1000])
def test_backoff_is_bounded(attempt: int) -> None:
    least, most = backoff_s(attempt, lambda: 0.0), backoff_s(attempt, lambda: 1.0)
    assert 0 < least < most <= BACKOFF_MAX_S
    assert most >= BACKOFF_FIRST_S
