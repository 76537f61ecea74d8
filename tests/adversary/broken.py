"""Packets that break MQTT 5, made by hand and by chance."""

from __future__ import annotations

import random
from collections.abc import Iterator

from adversary import packets
from adversary.packets import packet, publish, text

TOPIC = b"pyscan/v1/hosts/host-1/cmd/web-1"


def by_hand() -> Iterator[bytes]:
    """Each breaks another rule; section 3 of the standard in this order."""
    yield packet(0, b"")  # reserved type
    yield packet(15, b"\x18\0")  # AUTH that nobody asked for
    yield packet(packets.CONNACK, b"\0\0\0")  # a second one
    yield packet(packets.CONNACK, b"\0\x87\0")
    yield packet(packets.CONNACK, b"")
    yield publish(TOPIC, b"x", 0)  # packet id 0
    yield publish(b"", b"x", 1)  # no topic and no alias
    yield publish(b"", b"x", 1, properties=b"\x23\0\x01")  # an alias never given
    yield publish(b"\xff\xfe", b"x", 1)  # not UTF-8
    yield publish(b"a\0b", b"x", 1)
    yield publish(b"pyscan/v1/hosts/+/cmd/#", b"x", 1)
    yield publish(TOPIC, b"x", 1, qos=3)
    yield publish(TOPIC, b"x", 1, properties=b"\x26\0\x01a")  # cut off
    yield publish(TOPIC, b"x", 1, properties=b"\x01\x01\x01\x01")  # twice
    yield publish(TOPIC, b"x", 1, properties=b"\x7f")  # unknown
    yield packet(packets.PUBLISH, text(TOPIC)[:9], 2)
    yield packet(packets.PUBLISH, text(TOPIC) + b"\0\x01\xff\xff\xff\xff\x7f", 2)
    yield packet(packets.PUBACK, b"\0")
    yield packet(packets.PUBACK, b"\xff\xff")  # of nothing
    yield packet(packets.PUBACK, b"\0\x01\x87\x05x")
    yield packet(packets.PUBREC, b"\0\x01")
    yield packet(packets.PUBREL, b"\0\x01", 2)
    yield packet(7, b"\0\x01")  # PUBCOMP
    yield packet(packets.SUBACK, b"\0\x09\0")  # without codes
    yield packet(packets.SUBACK, b"\0\x01\0" + b"\x87" * 300)
    yield packet(11, b"\0\x01\0")  # UNSUBACK
    yield packet(packets.PINGRESP, b"abc")
    yield packet(packets.DISCONNECT, b"\x8e\0")
    yield packet(packets.DISCONNECT, b"\xff\xff\xff")
    yield packet(packets.CONNECT, b"\0\x04MQTT\x05\0\0\0\0\0\0")
    yield b"\x30\xff\xff\xff\xff\x7f"  # a length of five bytes
    yield b"\x32"


def by_chance(count: int, chance: random.Random) -> Iterator[bytes]:
    """A good packet in which a few bytes are others, or none but noise."""
    for n in range(count):
        if n % 4 == 0:
            yield chance.randbytes(chance.randint(1, 60))
            continue
        good = bytearray(publish(TOPIC, b"payload", 7, properties=b"\x03\0\x01a"))
        for _ in range(chance.randint(1, 4)):
            good[chance.randrange(len(good))] = chance.randrange(256)
        yield bytes(good)


def unasked() -> dict[str, bytes]:
    """What must end the connection before it costs memory; some of it goes on for ever."""
    qos_2 = b"".join(publish(TOPIC, bytes(60_000), n, qos=2) for n in range(1, 200))
    unheld = b"".join(publish(TOPIC, bytes(60_000), n) for n in range(1, 200))
    return {
        "200 MB announced": b"\x32" + packets.number(200_000_000) + bytes(8 << 20),
        "QoS 2, never released": qos_2,
        "more than ReceiveMaximum": unheld,
        "a topic with wildcards": publish(b"pyscan/v1/#", b"x", 1) * 100,
    }
