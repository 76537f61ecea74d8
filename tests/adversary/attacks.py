"""What a broker can do to an agent, each way many times; `expected` effects are the right ones."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from site_parts import CONTROL, HOST, VM

from adversary import packets
from adversary.arena import Arena
from pyscan import protocol
from pyscan.cose import encode_cbor
from pyscan.records import Action

OTHER_HOST = "host-2"


@dataclass(frozen=True)
class Attack:
    """`run` returns how often it tried, and how many effects it should have had."""

    name: str
    run: Callable[[Arena, random.Random], Awaitable[tuple[int, int]]]
    #: Reason codes that may be the answer; nothing else may be.
    reasons: frozenset[str] = frozenset()


def _mutated(data: bytes, chance: random.Random) -> bytes:
    out = bytearray(data)
    at = chance.randrange(len(out))
    match chance.randrange(6):
        case 0 | 1:
            out[at] ^= 1 << chance.randrange(8)
        case 2:
            del out[at:]
        case 3:
            out += chance.randbytes(chance.randint(1, 40))
        case 4:
            del out[at : at + chance.randint(1, 8)]
        case _:
            out[at:at] = chance.randbytes(chance.randint(1, 8))
    return bytes(out)


async def _edited(arena: Arena, chance: random.Random) -> tuple[int, int]:
    tries = 0
    for _ in range(1000):
        original = arena.fresh()
        edited = _mutated(original, chance)
        if edited != original:
            await arena.deliver(edited)
            tries += 1
    return tries, 0


async def _spliced(arena: Arena, chance: random.Random) -> tuple[int, int]:
    """The payload of one genuine message in the envelope of another, at every offset."""
    one, two = arena.fresh(Action.QUERY), arena.fresh(Action.KILL)
    del chance
    mixed = {one[:at] + two[at:] for at in range(min(len(one), len(two)))} - {one, two}
    for each in mixed:
        await arena.deliver(each)
    return len(mixed), 0


async def _garbage(arena: Arena, chance: random.Random) -> tuple[int, int]:
    for n in range(2000):
        data = chance.randbytes(chance.randrange(600))
        if n % 2:
            parts = [chance.randbytes(chance.randrange(40)) for _ in range(4)]
            data = b"\xd2" + encode_cbor([parts[0], {}, parts[2], parts[3]])
        await arena.deliver(data)
    return 2000, 0


async def _moved(arena: Arena, chance: random.Random) -> tuple[int, int]:
    """To another VM, from another host, to another kind of topic, to no topic of ours."""
    topics = [
        protocol.command_topic(HOST, "web-2"),
        protocol.command_topic(OTHER_HOST, VM),
        protocol.approval_topic(HOST, VM),
        protocol.state_topic(HOST, VM),
        "a",
        "pyscan/v1/hosts/" + "x" * 300,
    ]
    for n in range(300):
        changes: dict[str, object] = {} if n % 3 else {"audience": OTHER_HOST}
        changes |= {"vm": "web-2"} if n % 5 == 0 else {}
        command = arena.command(**changes)  # type: ignore[arg-type]
        right = protocol.command_topic(HOST, VM)
        topic = right if changes else topics[chance.randrange(len(topics))]
        await arena.deliver(arena.sign(command), topic)
    return 300, 0


async def _foreign(arena: Arena, chance: random.Random) -> tuple[int, int]:
    """Well made, by somebody whose key does not command: a stranger, a monitor, the agent."""
    for _ in range(300):
        signer = chance.choice(["stranger", "card-1", HOST])
        await arena.deliver(arena.sign(arena.command(), signer))
    return 300, 0


async def _posing(arena: Arena, chance: random.Random) -> tuple[int, int]:
    """An operator's key under control's name."""
    del chance
    for _ in range(100):
        await arena.deliver(arena.sign(arena.command(issuer=CONTROL), "operator-1"))
    return 100, 0


async def _delayed(arena: Arena, chance: random.Random) -> tuple[int, int]:
    """Held back until after their time, by a little and by much; and from the future."""
    for _ in range(200):
        now_s = int(time.time())
        late_s = chance.randint(32, 5000)
        issued_s = now_s - late_s - chance.randint(1, 100)
        if chance.random() < 0.2:
            issued_s, late_s = now_s + 100, -150
        await arena.deliver(arena.fresh(issued_s=issued_s, expires_s=now_s - late_s))
    return 200, 0


async def _duplicated(arena: Arena, chance: random.Random) -> tuple[int, int]:
    """Genuine ones, each eight times at once: new packet ids, the DUP flag, retained."""
    for _ in range(25):
        envelope = arena.fresh()
        for _ in range(8):
            dup, retain = chance.random() < 0.5, chance.random() < 0.5
            await arena.deliver(envelope, dup=dup, retain=retain)
    return 200, 25


async def _replayed(arena: Arena, chance: random.Random) -> tuple[int, int]:
    """Genuine ones, carried out once, and then again and again in any order."""
    envelopes = [arena.fresh() for _ in range(20)]
    for envelope in envelopes:
        await arena.deliver(envelope)
    await arena.settle()
    for _ in range(1000):
        await arena.deliver(chance.choice(envelopes), dup=chance.random() < 0.5)
    return 1000, 20


async def _reordered(arena: Arena, chance: random.Random) -> tuple[int, int]:
    """Of commands that come out of order, those that others overtook are never carried out."""
    expected = 0
    for _ in range(15):
        commands = [arena.command() for _ in range(8)]
        chance.shuffle(commands)
        highest = 0
        for command in commands:
            expected += command.sequence > highest
            highest = max(highest, command.sequence)
            await arena.deliver(arena.sign(command))
    return 120, expected


async def _unconfirmed(arena: Arena, chance: random.Random) -> tuple[int, int]:
    """QoS 0 is outside of what the agent can hold back or acknowledge."""
    del chance
    for _ in range(200):
        await arena.deliver(arena.fresh(), qos=0)
    return 200, 0


async def _oversized(arena: Arena, chance: random.Random) -> tuple[int, int]:
    for _ in range(60):
        await arena.deliver(arena.fresh() + bytes(chance.randint(16_384, 100_000)))
    return 60, 0


async def _dressed_up(arena: Arena, chance: random.Random) -> tuple[int, int]:
    """Genuine ones with lying properties: other response topic, expiry, type, correlation."""
    lies = [
        b"\x08" + packets.text(protocol.command_topic(OTHER_HOST, VM).encode()),
        b"\x09" + packets.text(b"01ARZ3NDEKTSV4RRFFQ69G5FAV"),
        b"\x02" + (1).to_bytes(4),
        b"\x03" + packets.text(b"application/vnd.pyscan.report+cbor"),
        b"\x26" + packets.text(b"act") + packets.text(b"kill"),
        b"\x01\x01",
    ]
    for _ in range(30):
        chosen = chance.sample(lies, chance.randint(1, len(lies)))
        await arena.deliver(arena.fresh(), properties=b"".join(chosen))
    return 30, 30


NOT_AUTHENTIC = {"malformed", "unknown_key", "wrong_algorithm", "wrong_content_type"}
NOT_AUTHENTIC |= {"bad_signature", "too_large"}

ATTACKS = (
    Attack("bytes edited", _edited, frozenset(NOT_AUTHENTIC)),
    Attack("two messages spliced", _spliced, frozenset(NOT_AUTHENTIC)),
    Attack("garbage", _garbage, frozenset(NOT_AUTHENTIC)),
    Attack(
        "re-addressed",
        _moved,
        frozenset({"bad_signature", "wrong_topic", "wrong_audience", "wrong_content_type"}),
    ),
    Attack("signed by others", _foreign, frozenset({"unknown_key"})),
    Attack("under another's name", _posing, frozenset({"wrong_issuer"})),
    Attack("held back or early", _delayed, frozenset({"expired", "not_yet_valid"})),
    Attack("duplicated", _duplicated),
    Attack("replayed", _replayed),
    Attack("reordered", _reordered, frozenset({"replayed"})),
    Attack("QoS 0", _unconfirmed),
    Attack("oversized", _oversized, frozenset({"too_large"})),
    Attack("lying properties", _dressed_up),
)
