"""The mailbox between the card and its host program, byte by byte (docs/spec/card-link.md).

`firmware/ps_link.h` is the same in C, and a test holds the two together. Nothing here does I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

VERSION: Final = 1
SLOTS: Final = 16  # commands that can be under way
PAGES_MAX: Final = 4096  # frames of one DIGEST
READ_MAX: Final = 48  # frames of one READ
REGIONS_MAX: Final = 512  # regions of one MAP
LOCAL_MAX: Final = 1 << 20  # pages of one LOCAL
SEQUENCE_MAX: Final = (1 << 32) - 1
LOG_BYTES: Final = 8192

CARD_MAGIC: Final = int.from_bytes(b"PSCARD01", "little")
HOST_MAGIC: Final = int.from_bytes(b"PSHOST01", "little")

#: Where things lie in the mailbox; bytes.
HOST_AT: Final = 0x0000
CARD_AT: Final = 0x1000
SUBMISSIONS_AT: Final = 0x2000
COMPLETIONS_AT: Final = 0x3000
BUS_REQUEST_AT: Final = 0x4000
BUS_REPLY_AT: Final = 0x5000
LOG_AT: Final = 0x6000
DATA_AT: Final = 0x100000
SLOT_BYTES: Final = 0x40000
STATUSES_IN_SLOT: Final = 0x08000
RESULTS_IN_SLOT: Final = 0x10000
MAILBOX_BYTES: Final = 0x800000

#: Flag of a submission: frames are `first`, `first` + 1, ...; none are in the slot.
RANGE: Final = 1

#: The engine's registers that may be asked for over the emulated bus; bytes.
BUS_BYTES: Final = 0x2000
BUS_READ: Final = 1
BUS_WRITE: Final = 2


class Op(IntEnum):
    """What a command asks for."""

    NOP = 1
    MAP = 2
    DIGEST = 3
    READ = 4
    LOCAL = 5


class Result(IntEnum):
    """What became of a command as a whole; values that are none of these are the card's fault."""

    OK = 0
    TORN = 1
    BAD_OP = 2
    BAD_COUNT = 3
    BAD_ARGUMENT = 4
    FAILED = 5


class CardState(IntEnum):
    """How the card is."""

    STARTING = 0
    READY = 1
    FAULT = 2


class Engine(IntEnum):
    """What reads the target's memory."""

    NONE = 0
    DMA = 1
    WINDOW = 2


@dataclass(frozen=True, slots=True)
class Kind:
    """A digest that the card makes: its bit in `kinds`, and its size in bytes."""

    bit: int
    size: int


#: By name, in the order in which they stand in a page's result (5.1).
KINDS: Final[Mapping[str, Kind]] = {"sha256": Kind(1, 32), "nh4aes": Kind(2, 16)}


@dataclass(frozen=True, slots=True)
class HostPage:
    """What the host says of itself (3.1)."""

    magic: int
    version: int
    heartbeat: int
    session: int
    submitted: int


@dataclass(frozen=True, slots=True)
class CardPage:
    """What the card says of itself (3.2)."""

    magic: int
    version_min: int
    version_max: int
    boot: int
    session: int
    refused: int
    completed: int
    heartbeat: int
    state: int
    engine: int
    log_end: int
    firmware: int
    pages: int
    unread: int
    torn: int
    resets: int


@dataclass(frozen=True, slots=True)
class Submission:
    """A command (4.2)."""

    sequence: int
    op: int
    flags: int
    count: int
    kinds: int
    session: int
    first: int


@dataclass(frozen=True, slots=True)
class Completion:
    """Its answer (4.2)."""

    sequence: int
    op: int
    result: int
    count: int
    ok: int
    session: int
    boot: int
    elapsed_us: int
    gathers: int


@dataclass(frozen=True, slots=True)
class Region:
    """A range of the target's memory; bytes (4, MAP)."""

    gpa: int
    length: int
    offset: int


@dataclass(frozen=True, slots=True)
class BusRequest:
    """An access to the engine's registers (7)."""

    sequence: int
    op: int
    width: int
    offset: int
    value: int


@dataclass(frozen=True, slots=True)
class BusReply:
    """Its answer (7)."""

    sequence: int
    up: int
    value: int
    engine_memory: int
    generation: int


Record = TypeVar("Record", bound="DataclassInstance")

_CHECK = struct.Struct("<I")


class Structure(Generic[Record]):
    """How a record lies in the mailbox: little-endian, zeros behind its fields.

    `codes` has one letter of `struct` a field. A sealed one ends with the CRC-32C of the bytes
    before it.
    """

    def __init__(self, make: type[Record], codes: str, size: int, *, sealed: bool = False) -> None:
        self._make = make
        self._names = [field.name for field in fields(make)]
        self._codes = codes
        self.size = size
        self._sealed = sealed
        padding = size - struct.calcsize(f"<{codes}") - (_CHECK.size if sealed else 0)
        self._body = struct.Struct(f"<{codes}{padding}x")

    def encode(self, record: Record) -> bytes:
        """The bytes of a record, with its check."""
        body = self._body.pack(*(getattr(record, name) for name in self._names))
        return body + _CHECK.pack(crc32c(body)) if self._sealed else body

    def decode(self, data: bytes) -> Record:
        """The record in `data`, which has `size` bytes; its check is not looked at."""
        return self._make(*self._body.unpack(data[: self._body.size]))

    def unseal(self, data: bytes) -> Record | None:
        """The record in `data`; None when its check does not fit."""
        body, check = data[: self._body.size], data[self._body.size :]
        return self.decode(data) if _CHECK.pack(crc32c(body)) == check else None

    def places(self) -> dict[str, tuple[int, int]]:
        """Offset and size of every field, in order, the check last."""
        found = {
            name: (struct.calcsize(f"<{self._codes[:index]}"), struct.calcsize(f"<{code}"))
            for index, (name, code) in enumerate(zip(self._names, self._codes, strict=True))
        }
        return found | ({"check": (self._body.size, _CHECK.size)} if self._sealed else {})


HOST_PAGE: Final = Structure(HostPage, "QIIQI", 64)
CARD_PAGE: Final = Structure(CardPage, "QIIQQQIIIIIIQQQQ", 128)
SUBMISSION: Final = Structure(Submission, "IHHIIQQ", 64, sealed=True)
COMPLETION: Final = Structure(Completion, "IHHIIQQII", 64, sealed=True)
REGION: Final = Structure(Region, "QQQ", 24)
BUS_REQUEST: Final = Structure(BusRequest, "IHHQQ", 24)
BUS_REPLY: Final = Structure(BusReply, "IIQQI", 32)


def slot_of(sequence: int) -> int:
    """The slot of a command (4.1)."""
    return (sequence - 1) % SLOTS


def data_at(sequence: int) -> int:
    """Where the data of a command begins (2)."""
    return DATA_AT + slot_of(sequence) * SLOT_BYTES


def width(op: Op, kinds: int) -> int:
    """Bytes of one page's result (5)."""
    if op is Op.READ:
        return 4096
    return sum(kind.size for kind in KINDS.values() if kinds & kind.bit)


def firmware_text(version: int) -> str:
    """The firmware's version as people write it."""
    return f"{version >> 16}.{version & 0xFFFF}"


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_CRC_TABLE: Final = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli, reflected polynomial 0x82F63B78), RFC 3720, B.4."""
    crc = 0xFFFF_FFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFF_FFFF
