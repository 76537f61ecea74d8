"""MQTT: bytes in, bytes out. The only module that knows aiomqtt and paho.

A `Link` is one durable MQTT 5 session. It reconnects for as long as the program runs,
hands messages over one at a time and tells the broker that a message is done only when
the consumer says so, so a message whose consumer died is delivered again. What is
published is confirmed by the broker or raises `TransportError`.

What it sets, and why, is in docs/adr/aiomqtt.md. Payloads are opaque here: they are
signed and checked by `pyscan.protocol`, so a broker that lies can delay, nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import aiomqtt
from paho.mqtt.client import Client as PahoClient
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from pyscan.errors import TransportError

if TYPE_CHECKING:
    from paho.mqtt.client import SocketLike  # paho defines it for type checkers only

log = logging.getLogger(__name__)
#: What aiomqtt and paho log about each packet that they do not like; `Link.problem` has it.
_packet_log = logging.getLogger(f"{__name__}.packets")
_packet_log.setLevel(logging.CRITICAL)

#: Broker keeps the session, and what is queued in it, this long without us.
SESSION_EXPIRY_S = 7 * 24 * 3600
#: Messages that may be unacknowledged at once; the broker holds back the others.
RECEIVE_MAX = 64
#: Largest packet that we accept. No envelope has more than half of it (docs/spec/wire.md).
PACKET_BYTES_MAX = 1 << 17
#: What may wait for the consumer: RECEIVE_MAX of the largest packets, or thousands of usual
#: ones. mosquitto 2.0.11 does not keep to ReceiveMaximum once a client acknowledges only a part
#: of what it has, so more messages than that are no reason to hang up.
INCOMING_BYTES_MAX = RECEIVE_MAX * PACKET_BYTES_MAX
#: What a message takes besides its payload, roughly.
MESSAGE_OVERHEAD_BYTES = 1024
KEEPALIVE_S = 15
#: Bound of every single exchange with the broker.
EXCHANGE_TIMEOUT_S = 5.0
CONNECT_POLL_S = 0.02
CLOSE_POLLS_MAX = 100
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 10.0
#: A connection that was lost sooner counts as a failed attempt: a broker that accepts us only
#: to throw us out must not set the pace.
STABLE_S = 5.0
#: Wait before an entry that the broker refused is offered again.
REFUSED_RETRY_S = 5.0
#: Reason codes from here on are failures (MQTT 5, section 2.4).
FIRST_FAILURE_CODE = 0x80
AT_LEAST_ONCE = 1

#: What to do about a reason code of CONNACK or DISCONNECT (MQTT 5, sections 3.2.2.2, 3.14.2.1).
_ADVICE = {
    0x80: "the connection was lost; is the broker running?",  # what paho makes of a dead socket
    0x85: "the broker does not accept this client id; check [identity] name",
    0x86: "check [mqtt] username and password_file",
    0x87: "check [mqtt] username and password_file, and the broker's access list",
    0x8A: "the broker banned this identity; ask its operator",
    0x8C: "the broker wants another way to authenticate; check [mqtt]",
    0x8E: "the same program runs twice; give each its own [identity] name",
    0x9D: "the broker moved; check [mqtt] host and port",
}


class LinkState(StrEnum):
    """Where a link is in its life."""

    CLOSED = "closed"
    CONNECTING = "connecting"
    ONLINE = "online"
    WAITING = "waiting"  # an attempt failed; the next one follows after a pause


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """How to reach the broker. TLS is used when `ca` is set."""

    host: str
    port: int
    identity: str  # the MQTT client id: it names the session, so it must be unique
    username: str | None = None
    password: str | None = None
    ca: Path | None = None
    crl: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    durable: bool = True  # false: the broker forgets the session when its connection ends


@dataclass(frozen=True, slots=True)
class Publication:
    """One message to publish, always at QoS 1."""

    topic: str
    payload: bytes
    retain: bool = False
    expiry_s: int | None = None
    response_topic: str = ""
    correlation: bytes = b""
    content_type: str = ""
    user_properties: tuple[tuple[str, str], ...] = ()


class Message:
    """One received message, owned by the consumer until it calls `acknowledge`."""

    __slots__ = ("_acknowledge", "payload", "topic")

    def __init__(self, topic: str, payload: bytes, acknowledge: Callable[[], None]) -> None:
        self.topic = topic
        self.payload = payload
        self._acknowledge = acknowledge

    @property
    def weight(self) -> int:
        """Bytes of memory that it takes, roughly."""
        return len(self.payload) + MESSAGE_OVERHEAD_BYTES

    def acknowledge(self) -> None:
        """Tell the broker that the message is done and must not come again.

        Without effect after the connection that brought the message is gone: the broker
        delivers it again, so a consumer must know what it has done already.
        """
        self._acknowledge()


class OutboxEntry(Protocol):
    """What `Link.pump` needs to know of an outbox entry; fields as in `Publication`."""

    @property
    def number(self) -> int:
        """Names the entry."""

    @property
    def topic(self) -> str:
        """Where it goes."""

    @property
    def payload(self) -> bytes:
        """Signed bytes."""

    @property
    def retain(self) -> bool:
        """Whether the broker keeps it."""

    @property
    def expiry_s(self) -> int | None:
        """Seconds that are left; None: for ever."""

    @property
    def correlation(self) -> bytes:
        """What it answers."""


class PendingEntries(Protocol):
    """A durable queue of what is still to be published: `pyscan.outbox.Outbox`."""

    def pending(self) -> Sequence[OutboxEntry]:
        """A bounded number of entries, oldest first."""

    def sent(self, number: int) -> None:
        """The broker has it; forget the entry."""


class PublishRefusedError(TransportError):
    """The broker answered, and said no: another message may well be accepted."""


class _Session:
    """One connection: an aiomqtt client and what is in flight on it."""

    def __init__(self, client: aiomqtt.Client) -> None:
        self.client = client
        # aiomqtt offers neither the reason code of a PUBACK nor acknowledgement by the
        # consumer; its paho client does. Versions are pinned for this.
        self._paho: PahoClient = client._client
        self._paho.manual_ack_set(True)
        self._paho.on_publish = self._on_publish
        self._confirmations: dict[int, asyncio.Future[ReasonCode]] = {}
        self._unacknowledged: deque[list[int | bool]] = deque()
        self._closed = False

    def _on_publish(
        self, _client: PahoClient, _user: object, mid: int, code: ReasonCode, _props: Properties
    ) -> None:
        confirmation = self._confirmations.pop(mid, None)
        if confirmation is not None and not confirmation.done():
            confirmation.set_result(code)

    async def publish(self, publication: Publication) -> None:
        """Publish and wait for the PUBACK. Raises TransportError."""
        info = self._paho.publish(
            publication.topic,
            publication.payload,
            qos=AT_LEAST_ONCE,
            retain=publication.retain,
            properties=_publish_properties(publication),
        )
        if self._closed or info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise TransportError(f"{publication.topic} was not published: no connection")
        confirmation: asyncio.Future[ReasonCode] = asyncio.get_running_loop().create_future()
        self._confirmations[info.mid] = confirmation
        try:
            async with asyncio.timeout(EXCHANGE_TIMEOUT_S):
                code = await confirmation
        except TimeoutError:
            raise TransportError(
                f"{publication.topic} was not confirmed within {EXCHANGE_TIMEOUT_S:g} s; "
                "is the broker overloaded?"
            ) from None
        finally:
            self._confirmations.pop(info.mid, None)
        if code.value >= FIRST_FAILURE_CODE:
            raise PublishRefusedError(
                f"{publication.topic} was refused by the broker: {code}; check its access list"
            )

    def message(self, received: aiomqtt.Message) -> Message:
        """Wrap a received message; it stays unacknowledged until the consumer says so."""
        entry: list[int | bool] = [received.mid, False]
        self._unacknowledged.append(entry)

        def acknowledge() -> None:
            entry[1] = True
            # MQTT 5, 4.6: PUBACKs go out in the order in which the PUBLISHes came in.
            while self._unacknowledged and self._unacknowledged[0][1]:
                mid, _ = self._unacknowledged.popleft()
                if not self._closed:
                    self._paho.ack(int(mid), AT_LEAST_ONCE)

        payload = received.payload if isinstance(received.payload, bytes) else b""
        return Message(str(received.topic), payload, acknowledge)

    def close(self) -> None:
        """Fail what waits for a confirmation, let later acknowledgements go nowhere."""
        self._closed = True
        for confirmation in self._confirmations.values():
            if not confirmation.done():
                confirmation.set_exception(TransportError("the connection was lost"))
        self._confirmations.clear()


class Link:
    """One durable MQTT session that outlives connections, brokers and this process.

    Run `run()` and, with an outbox, `pump()` as tasks of the program's TaskGroup; both
    end only by cancellation. `greeting` gives what is published first on every
    connection (retained state); `will` is made anew for every connection attempt and is
    what the broker publishes when we vanish, and what we publish on a clean stop.
    """

    def __init__(
        self,
        settings: LinkSettings,
        subscriptions: Sequence[str] = (),
        *,
        will: Callable[[], Publication] | None = None,
        greeting: Callable[[], Iterable[Publication]] = tuple,
    ) -> None:
        self._settings = settings
        self._subscriptions = tuple(subscriptions)
        self._will = will
        self._greeting = greeting
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._incoming_bytes = 0
        self._online = asyncio.Event()
        self._outbox_changed = asyncio.Event()
        self._session: _Session | None = None
        self._state = LinkState.CLOSED
        self._problem = ""
        self._unconfirmed_dropped = 0
        self._online_since_s = 0.0

    @property
    def state(self) -> LinkState:
        """Where the link is now."""
        return self._state

    @property
    def problem(self) -> str:
        """Why the link is not online; empty while it is."""
        return self._problem

    async def wait_online(self) -> None:
        """Return once the session stands and its subscriptions are granted."""
        await self._online.wait()

    @property
    async def messages(self) -> AsyncIterator[Message]:
        """Received messages, oldest first; INCOMING_BYTES_MAX of them wait here."""
        while True:
            message = await self._incoming.get()
            self._incoming_bytes -= message.weight
            yield message

    async def publish(self, publication: Publication) -> None:
        """Publish at QoS 1; returns when the broker has confirmed it.

        Raises TransportError when there is no connection, when it is lost meanwhile (the
        message may or may not have arrived), or when the broker refuses the message.
        """
        if self._session is None:
            raise TransportError(
                f"{publication.topic} was not published: no connection to {self._address}"
            )
        await self._session.publish(publication)

    def wake(self) -> None:
        """Tell `pump` that the outbox has a new entry. Call it after the commit."""
        self._outbox_changed.set()

    async def pump(self, outbox: PendingEntries) -> None:
        """Publish what is pending in `outbox`, for ever: in order, at least once, same bytes.

        An entry leaves the outbox only when the broker has confirmed it. An entry that the
        broker refuses holds up its own topic, no other.
        """
        while True:
            await self._online.wait()
            self._outbox_changed.clear()
            try:
                refused = await self._pump_once(outbox)
            except TransportError as error:
                log.debug("outbox waits problem=%s", error)
                await self._wait_outbox(BACKOFF_FIRST_S)
                continue
            await self._wait_outbox(REFUSED_RETRY_S if refused else None)

    async def _pump_once(self, outbox: PendingEntries) -> bool:
        """Publish all pending entries; tells whether one of them was refused."""
        refused: dict[str, PublishRefusedError] = {}
        while entries := [entry for entry in outbox.pending() if entry.topic not in refused]:
            for entry in entries:
                if entry.topic in refused:
                    continue
                try:
                    await self.publish(_publication(entry))
                except PublishRefusedError as error:
                    refused[entry.topic] = error
                else:
                    outbox.sent(entry.number)
        if refused:
            first = next(iter(refused.values()))
            log.warning("outbox entries kept topics=%d problem=%s", len(refused), first)
        return bool(refused)

    async def _wait_outbox(self, timeout_s: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._outbox_changed.wait()

    async def run(self) -> None:
        """Keep the session up until cancelled. Never raises TransportError."""
        attempt = 0
        try:
            while True:
                self._enter(LinkState.CONNECTING, self._problem)
                try:
                    await self._connected_once()
                except TransportError as error:
                    attempt = 0 if self._was_stable() else attempt + 1
                    self._enter(LinkState.WAITING, str(error))
                await asyncio.sleep(backoff_s(attempt))
        finally:
            self._enter(LinkState.CLOSED, "")

    def _was_stable(self) -> bool:
        now_s = asyncio.get_running_loop().time()
        return self._state is LinkState.ONLINE and now_s - self._online_since_s >= STABLE_S

    async def _connected_once(self) -> None:
        """One connection, from CONNECT until it is lost. Always raises."""
        client = self._client()
        try:
            await _connect(client)
        except aiomqtt.MqttError as error:
            raise TransportError(f"broker {self._address}: {_explain(error)}") from None
        session = _Session(client)
        try:
            await self._greet(session)
            await self._read(session)
        except aiomqtt.MqttError as error:
            raise TransportError(f"broker {self._address}: {_explain(error)}") from None
        finally:
            self._online.clear()
            self._session = None
            await self._leave(session)

    async def _greet(self, session: _Session) -> None:
        # What an earlier connection brought is not acknowledged, so it comes again.
        while not self._incoming.empty():
            self._incoming.get_nowait()
        self._incoming_bytes = 0
        if self._subscriptions:
            topics = [(topic, SubscribeOptions(qos=AT_LEAST_ONCE)) for topic in self._subscriptions]
            codes = await session.client.subscribe(topics)
            for topic, code in zip(self._subscriptions, codes, strict=True):
                if not isinstance(code, ReasonCode) or code.value >= FIRST_FAILURE_CODE:
                    raise TransportError(
                        f"broker {self._address}: subscription to {topic} refused: {code}; "
                        "check the broker's access list"
                    )
        for publication in self._greeting():
            try:
                await session.publish(publication)
            except PublishRefusedError as error:
                log.warning("greeting lost problem=%s", error)
        self._session = session
        self._online_since_s = asyncio.get_running_loop().time()
        self._enter(LinkState.ONLINE, "")
        self._online.set()

    async def _read(self, session: _Session) -> None:
        """The only reader of the connection: cancelling aiomqtt's iterator loses messages."""
        async for received in session.client.messages:
            if received.qos != AT_LEAST_ONCE:
                # Not under ReceiveMaximum, so it could push out what is.
                self._unconfirmed_dropped += 1
                if self._unconfirmed_dropped == 1:
                    log.warning("qos 0 message dropped topic=%s", received.topic)
                continue
            message = session.message(received)
            self._incoming_bytes += message.weight
            if self._incoming_bytes > INCOMING_BYTES_MAX:
                raise TransportError(
                    f"broker {self._address} sends far more than ReceiveMaximum={RECEIVE_MAX}"
                )
            self._incoming.put_nowait(message)

    async def _leave(self, session: _Session) -> None:
        """Say goodbye on a clean stop (the broker keeps a will to itself then), and disconnect."""
        task = asyncio.current_task()
        stopping = task is not None and task.cancelling() > 0
        if stopping and self._will is not None:
            with contextlib.suppress(TransportError):
                await session.publish(self._will())
        session.close()
        try:
            with contextlib.suppress(aiomqtt.MqttError):
                await session.client.__aexit__(None, None, None)
        finally:
            # After an error in what it received, aiomqtt leaves the socket open, and reads on.
            session.client._client._sock_close()

    def _client(self) -> aiomqtt.Client:
        settings = self._settings
        connect = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho has no hints here
        connect.SessionExpiryInterval = SESSION_EXPIRY_S if settings.durable else 0
        connect.ReceiveMaximum = RECEIVE_MAX
        connect.MaximumPacketSize = PACKET_BYTES_MAX
        client = aiomqtt.Client(
            settings.host,
            settings.port,
            identifier=settings.identity,
            username=settings.username,
            password=settings.password,
            protocol=aiomqtt.ProtocolVersion.V5,
            clean_start=not settings.durable,
            properties=connect,
            keepalive=KEEPALIVE_S,
            logger=_packet_log,
            timeout=EXCHANGE_TIMEOUT_S,
            tls_context=_tls_context(settings),
            # Without it a QoS 1 exchange waits for the delayed ACK: 88 ms instead of 1 ms.
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
            will=_last_will(self._will()) if self._will is not None else None,
        )
        client._client.on_socket_register_write = _write_watch(asyncio.get_running_loop())
        client._client._sock_recv = _bounded_receive(client._client)  # type: ignore[assignment]
        return client

    @property
    def _address(self) -> str:
        return f"{self._settings.host}:{self._settings.port}"

    def _enter(self, state: LinkState, problem: str) -> None:
        changed = (state, problem) != (self._state, self._problem)
        news = problem != self._problem or state in {LinkState.ONLINE, LinkState.CLOSED}
        self._state, self._problem = state, problem
        if not changed:
            return
        level = logging.DEBUG if not news else logging.WARNING if problem else logging.INFO
        log.log(
            level, "link state=%s broker=%s problem=%s", state.value, self._address, problem or "-"
        )


def backoff_s(attempt: int, chance: Callable[[], float] = random.random) -> float:
    """Pause before attempt `attempt` (from 0), in seconds.

    Doubles up to BACKOFF_MAX_S and is then drawn from its upper half, so that a fleet does
    not return to a restarted broker in step.
    """
    ceiling = min(BACKOFF_MAX_S, math.ldexp(BACKOFF_FIRST_S, min(attempt, 16)))
    return ceiling * (0.5 + 0.5 * chance())


async def _connect(client: aiomqtt.Client) -> None:
    """Enter `client`; raises aiomqtt.MqttError. No socket outlives a failed attempt."""
    attempt = asyncio.ensure_future(client.__aenter__())
    try:
        await asyncio.shield(attempt)
    except asyncio.CancelledError:
        # The thread in which paho connects cannot be cancelled and is bounded by paho. What
        # comes behind it can be, once the socket is closed: aiomqtt's hook for that would
        # trip over a cancelled attempt.
        while not attempt.done() and client._client.socket() is None:
            await asyncio.wait({attempt}, timeout=CONNECT_POLL_S)
        client._client.disconnect()
        for _ in range(CLOSE_POLLS_MAX):
            if client._client.socket() is None:
                break
            await asyncio.sleep(CONNECT_POLL_S)
        attempt.cancel()
        await asyncio.wait({attempt})
        raise
    except aiomqtt.MqttError:
        client._client.disconnect()  # aiomqtt leaves the socket open when CONNACK does not come
        raise


def _bounded_receive(client: PahoClient) -> Callable[[int], bytes]:
    """What paho reads from its socket with, ended by a packet that we never asked for.

    paho buffers up to the 256 MB that a packet may claim to have, and keeps every QoS 2
    message until the broker releases it: either would let a broker take all our memory.
    """
    receive = client._sock_recv

    def bounded(size: int) -> bytes:
        packet = client._in_packet
        # Type PUBLISH with QoS 2, MQTT 5 section 3.3.1; our subscriptions have QoS 1.
        if packet["remaining_length"] > PACKET_BYTES_MAX or packet["command"] & 0xF6 == 0x34:
            raise ConnectionError("a packet that was not asked for")
        return receive(size)

    return bounded


def _write_watch(
    loop: asyncio.AbstractEventLoop,
) -> Callable[[PahoClient, object, SocketLike], None]:
    """The paho hook that has the loop watch a socket for writing.

    aiomqtt's own watches it one turn of the loop later, when the socket may be closed and
    its number in use for something else, which is then watched for ever.
    """

    def watch(client: PahoClient, _user: object, sock: SocketLike) -> None:
        def add() -> None:
            if client.socket() is sock:
                loop.add_writer(sock.fileno(), client.loop_write)

        try:
            inside = asyncio.get_running_loop() is loop
        except RuntimeError:  # the thread in which paho connects
            inside = False
        if inside:
            add()
        else:
            loop.call_soon_threadsafe(add)

    return watch


def _explain(error: aiomqtt.MqttError) -> str:
    """One line: what went wrong with the connection, and what to do."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    code = cause.rc if isinstance(cause, aiomqtt.MqttCodeError) else None
    if isinstance(code, ReasonCode):
        return f"{code}; {_ADVICE.get(code.value, 'see the log of the broker')}"
    if code is not None:
        return "connection lost; is the broker running?"
    # aiomqtt keeps of an ssl.SSLError only its text.
    if "CERTIFICATE_VERIFY_FAILED" in str(cause):
        return f"its certificate is refused ({cause}); check [mqtt] host, ca and crl"
    if "[SSL" in str(cause):
        return f"{cause}; check [mqtt] port, certificate and key"
    return f"{cause}; is the broker running, and is [mqtt] right?"


def _tls_context(settings: LinkSettings) -> ssl.SSLContext | None:
    if settings.ca is None:
        return None
    try:
        context = ssl.create_default_context(cafile=settings.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if settings.crl is not None:
            context.load_verify_locations(cafile=settings.crl)
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        if settings.certificate is not None:
            context.load_cert_chain(settings.certificate, settings.key)
    except (OSError, ssl.SSLError) as error:
        raise TransportError(
            f"TLS files cannot be used: {error}; check [mqtt] ca, crl, certificate and key"
        ) from None
    return context


def _publication(entry: OutboxEntry) -> Publication:
    return Publication(
        entry.topic,
        entry.payload,
        entry.retain,
        expiry_s=entry.expiry_s,
        correlation=entry.correlation,
    )


def _last_will(publication: Publication) -> aiomqtt.Will:
    return aiomqtt.Will(
        publication.topic, publication.payload, qos=AT_LEAST_ONCE, retain=publication.retain
    )


def _publish_properties(publication: Publication) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]  # paho has no hints here
    if publication.expiry_s is not None:
        properties.MessageExpiryInterval = publication.expiry_s
    if publication.response_topic:
        properties.ResponseTopic = publication.response_topic
    if publication.correlation:
        properties.CorrelationData = publication.correlation
    if publication.content_type:
        properties.ContentType = publication.content_type
    if publication.user_properties:
        properties.UserProperty = list(publication.user_properties)
    return properties
