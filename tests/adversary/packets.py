"""MQTT 5 packets as bytes: as much of them as a broker needs that decides everything itself."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL = 1, 2, 3, 4, 5, 6
SUBSCRIBE, SUBACK, PINGREQ, PINGRESP, DISCONNECT = 8, 9, 12, 13, 14


@dataclass(frozen=True)
class Packet:
    """A packet taken off the wire."""

    kind: int
    flags: int
    body: bytes


@dataclass(frozen=True)
class Published:
    """What a client published."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    packet_id: int


def number(value: int) -> bytes:
    """A variable byte integer (section 1.5.5)."""
    out = bytearray()
    while True:
        value, low = divmod(value, 128)
        out.append(low | (128 if value else 0))
        if not value:
            return bytes(out)


def text(value: bytes) -> bytes:
    return len(value).to_bytes(2) + value


def packet(kind: int, body: bytes, flags: int = 0) -> bytes:
    return bytes([kind << 4 | flags]) + number(len(body)) + body


def publish(
    topic: bytes,
    payload: bytes,
    packet_id: int,
    *,
    qos: int = 1,
    retain: bool = False,
    dup: bool = False,
    properties: bytes = b"",
) -> bytes:
    body = text(topic) + (packet_id.to_bytes(2) if qos else b"")
    body += number(len(properties)) + properties + payload
    return packet(PUBLISH, body, dup << 3 | qos << 1 | retain)


async def read(reader: asyncio.StreamReader) -> Packet:
    """The next packet. Raises asyncio.IncompleteReadError at the end."""
    (first,) = await reader.readexactly(1)
    length = shift = 0
    while True:
        (byte,) = await reader.readexactly(1)
        length |= (byte & 127) << shift
        shift += 7
        if not byte & 128:
            break
    return Packet(first >> 4, first & 15, await reader.readexactly(length))


def take_number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if not byte & 128:
            return value, at


def take_text(data: bytes, at: int) -> tuple[bytes, int]:
    end = at + 2 + int.from_bytes(data[at : at + 2])
    return data[at + 2 : end], end


def client_id(connect: Packet) -> str:
    at = 10  # name, version, flags, keep alive
    length, at = take_number(connect.body, at)
    return take_text(connect.body, at + length)[0].decode()


def published(packet: Packet) -> Published:
    qos = packet.flags >> 1 & 3
    topic, at = take_text(packet.body, 0)
    packet_id = 0
    if qos:
        packet_id, at = int.from_bytes(packet.body[at : at + 2]), at + 2
    length, at = take_number(packet.body, at)
    payload = packet.body[at + length :]
    return Published(topic.decode(), payload, qos, bool(packet.flags & 1), packet_id)


def subscriptions(packet: Packet) -> int:
    """How many filters a SUBSCRIBE has."""
    length, at = take_number(packet.body, 2)
    at, count = at + length, 0
    while at < len(packet.body):
        at = take_text(packet.body, at)[1] + 1
        count += 1
    return count
