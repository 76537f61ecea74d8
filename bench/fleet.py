"""A fleet of simulated agents, each with a key and a connection of its own, in one process.

They speak the real protocol (verify, refuse replays, sign) and carry nothing out. Their MQTT
is a client that does no more than they need, so that a thousand of them cost less than what
is measured: commands and reports through the broker, and the control.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final

from pyscan import protocol
from pyscan.errors import LabError, Rejected
from pyscan.ids import new_id
from pyscan.keys import KeyRing, SigningKey
from pyscan.records import Command, Report, ReportState

ADDRESS: Final = "127.0.0.1"
#: Messages that are under way to or from a client at once.
IN_FLIGHT: Final = 64
#: Connections that are made at a time.
DIALLING: Final = 50
TIMEOUT_S: Final = 120.0
CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 1, 2, 3, 4, 8, 9
FIRST_FAILURE_CODE: Final = 0x80

Handler = Callable[["MqttClient", str, bytes], None]


class MqttClient(asyncio.Protocol):
    """MQTT 5, QoS 1, a session that ends with its connection, no reconnecting."""

    def __init__(self, name: str, password: str, take: Handler) -> None:
        self._name, self._password, self._take = name, password, take
        self._buffer = bytearray()
        self._packet_id = 0
        self._in_flight: set[int] = set()
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None

    async def connect(self, port: int, *subscriptions: str) -> None:
        """Connect and subscribe. Raises LabError when either is refused."""
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self, ADDRESS, port)
        properties = b"\x21" + IN_FLIGHT.to_bytes(2, "big")  # ReceiveMaximum
        flags = 0x02 | 0x40 | 0x80  # clean start, password, user name
        head = _text("MQTT") + bytes((5, flags, 0, 0, len(properties))) + properties
        await self._ask(CONNECT << 4, head + b"".join(map(_text, self._login())))
        if subscriptions:
            self._answer = loop.create_future()
            topics = b"".join(_text(topic) + b"\x01" for topic in subscriptions)
            await self._ask(SUBSCRIBE << 4 | 2, b"\x00\x01\x00" + topics)

    def _login(self) -> tuple[str, str, str]:
        return f"bench-{self._name}", self._name, self._password

    async def _ask(self, kind: int, body: bytes) -> None:
        self._send(kind, body)
        async with asyncio.timeout(TIMEOUT_S):
            await self._answer

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish, now or when fewer are in flight."""
        self._waiting.append((topic, payload))
        self._flush()

    def _flush(self) -> None:
        while self._waiting and len(self._in_flight) < IN_FLIGHT:
            topic, payload = self._waiting.popleft()
            self._packet_id = self._packet_id % 0xFFFF + 1
            self._in_flight.add(self._packet_id)
            packet_id = self._packet_id.to_bytes(2, "big")
            self._send(PUBLISH << 4 | 2, _text(topic) + packet_id + b"\x00" + payload)

    def _send(self, kind: int, body: bytes) -> None:
        if self.transport is not None:
            self.transport.write(bytes((kind,)) + _length(len(body)) + body)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio calls it; TCP_NODELAY is asyncio's default."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio calls it."""
        if not self._answer.done():
            self._answer.set_exception(LabError(f"{self._name}: the broker hung up ({error})"))

    def data_received(self, data: bytes) -> None:
        """asyncio calls it; takes every whole packet."""
        self._buffer += data
        while (found := _packet(self._buffer)) is not None:
            first, start, end = found
            body = bytes(self._buffer[start:end])
            del self._buffer[:end]
            self._packet(first, body)

    def _packet(self, first: int, body: bytes) -> None:
        kind = first >> 4
        if kind == PUBLISH:
            topic_end = 2 + int.from_bytes(body[:2], "big")
            packet_id = body[topic_end : topic_end + 2]
            size, skipped = _number(body, topic_end + 2)
            payload = body[topic_end + 2 + skipped + size :]
            self._take(self, body[2:topic_end].decode(), payload)
            self._send(PUBACK << 4, packet_id)
        elif kind == PUBACK:
            self._in_flight.discard(int.from_bytes(body[:2], "big"))
            if len(body) > 2 and body[2] >= FIRST_FAILURE_CODE:
                raise LabError(f"{self._name}: a message was refused, code {body[2]:#x}")
            self._flush()
        elif kind in {CONNACK, SUBACK} and not self._answer.done():
            code = body[1] if kind == CONNACK else body[-1]
            if code >= FIRST_FAILURE_CODE:
                self._answer.set_exception(LabError(f"{self._name}: refused, code {code:#x}"))
            else:
                self._answer.set_result(None)


def _text(value: str) -> bytes:
    data = value.encode()
    return len(data).to_bytes(2, "big") + data


def _length(value: int) -> bytes:
    """A variable byte integer, MQTT 5 section 1.5.5."""
    encoded = bytearray()
    while True:
        value, low = divmod(value, 128)
        encoded.append(low | (0x80 if value else 0))
        if not value:
            return bytes(encoded)


def _number(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """A variable byte integer, and how many bytes it has; no bytes when it is cut off."""
    value = 0
    for used, byte in enumerate(data[at : at + 4]):
        value |= (byte & 0x7F) << 7 * used
        if byte < 0x80:
            return value, used + 1
    return 0, 0


def _packet(buffer: bytearray) -> tuple[int, int, int] | None:
    """First byte, start and end of the body of the first packet, if it is whole."""
    if len(buffer) < 2:
        return None
    size, used = _number(buffer, 1)
    end = 1 + used + size
    return (buffer[0], 1 + used, end) if used and len(buffer) >= end else None


class _Journal:
    """What an agent remembers of commands, in memory."""

    def __init__(self) -> None:
        self._reports: dict[str, bytes] = {}
        self._highest: dict[tuple[str, str], int] = {}

    def seen(self, command_id: str) -> bool:
        return command_id in self._reports

    def report(self, command_id: str) -> bytes | None:
        return self._reports.get(command_id)

    def highest_sequence(self, issuer: str, vm: str) -> int:
        return self._highest.get((issuer, vm), -1)

    def note(self, command: Command, report: bytes) -> None:
        self._reports[command.id] = report
        self._highest[command.issuer, command.vm] = command.sequence


@dataclass(frozen=True, slots=True)
class Account:
    """A simulated agent: its host's name, its password at the broker, its key."""

    host: str
    password: str
    key: SigningKey


class _Agent:
    """Verifies a command, refuses a replay, and reports three steps, as an agent does."""

    def __init__(self, account: Account, ring: KeyRing) -> None:
        self._account, self._ring, self._journal = account, ring, _Journal()

    def take(self, client: MqttClient, topic: str, payload: bytes) -> None:
        account = self._account
        try:
            command = protocol.decode_command(
                payload,
                self._ring,
                topic=topic,
                audience=account.host,
                now_s=int(time.time()),
                replay=self._journal,
            )
        except Rejected as rejected:
            self._answer_again(client, rejected)
            return
        report_topic = protocol.report_topic(account.host, command.id)
        for state in (ReportState.ACCEPTED, ReportState.STARTED, ReportState.SUCCEEDED):
            report = Report(
                id=new_id(),
                command=command.id,
                host=account.host,
                vm=command.vm,
                action=command.action,
                state=state,
                at_ns=time.time_ns(),
                detail="paused, links down: net0",
                vm_state="paused" if state is ReportState.SUCCEEDED else "",
            )
            envelope = protocol.encode_report(report, account.key)
            client.publish(report_topic, envelope)
        self._journal.note(command, envelope)

    def _answer_again(self, client: MqttClient, rejected: Rejected) -> None:
        """A command that was taken gets its final report, however late it comes again."""
        command = rejected.command
        envelope = self._journal.report(command.id) if command is not None else None
        if command is not None and envelope is not None:
            client.publish(protocol.report_topic(self._account.host, command.id), envelope)


class Fleet:
    """The process of the agents, from the measuring one."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def connect(self, count: int) -> None:
        """Let so many more connect; returns when they have. Raises LabError."""
        self._pipe.send(count)
        if not self._pipe.poll(TIMEOUT_S):
            raise LabError(f"{count} agents did not connect within {TIMEOUT_S:g} s")
        problem = self._pipe.recv()
        if problem:
            raise LabError(problem)


@contextmanager
def fleet(
    port: int, accounts: list[Account], commanders: Mapping[str, SigningKey]
) -> Iterator[Fleet]:
    """A process with these agents, none of them connected yet; ends with the context."""
    ring = KeyRing.of({name: key.public for name, key in commanders.items()}, "control")
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_run, args=(port, accounts, ring, theirs), daemon=True)
    process.start()
    try:
        yield Fleet(ours)
    finally:
        process.terminate()
        process.join()


def _run(port: int, accounts: list[Account], ring: KeyRing, pipe: Connection) -> None:
    asyncio.run(_serve(port, accounts, ring, pipe))


async def _serve(port: int, accounts: list[Account], ring: KeyRing, pipe: Connection) -> None:
    loop = asyncio.get_running_loop()
    left, wanted = deque(accounts), asyncio.Event()
    clients = []
    loop.add_reader(pipe.fileno(), wanted.set)
    while True:
        await wanted.wait()
        wanted.clear()
        problem, count = "", int(pipe.recv())
        try:
            while count and left:
                batch = [left.popleft() for _ in range(min(count, DIALLING, len(left)))]
                count -= len(batch)
                made = [MqttClient(a.host, a.password, _Agent(a, ring).take) for a in batch]
                clients += made
                async with asyncio.TaskGroup() as group:
                    for account, client in zip(batch, made, strict=True):
                        topic = protocol.subscription(protocol.TopicKind.COMMAND, account.host)
                        group.create_task(client.connect(port, topic))
        except* (LabError, OSError, TimeoutError) as errors:
            problem = f"agents cannot connect: {errors.exceptions[0]}"
        pipe.send(problem)
