"""Walks over page tables that an attacker may have written.

A walk reads all tables of a level in one batch. Its cost is bounded by `WalkLimits`
whatever the tables say: a table that is reached twice counts twice, so cycles and shared
tables end at the limit. What is wrong with the tables is an `Anomaly`, not an exception.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.records import PAGE_SHIFT, PAGE_SIZE, PageStatus
from pyscan.sources.base import Source, is_ram
from pyscan.translate.paging import ENTRIES, Level, PagingFormat

U64 = NDArray[np.uint64]

EXECUTABLE: Final = 1
WRITABLE: Final = 2
USER: Final = 4

_NONE: Final = np.empty(0, dtype=np.uint64)
_ADDRESS_MASK: Final = (1 << 64) - 1


class AnomalyKind(StrEnum):
    """What is wrong with a page table."""

    RESERVED_BIT = "reserved-bit"  # a bit is set that the format requires to be zero
    TABLE_OUTSIDE_RAM = "table-outside-ram"
    TABLE_UNREADABLE = "table-unreadable"
    LIMIT = "limit"  # the walk was cut short by WalkLimits
    WRITABLE_EXECUTABLE = "writable-executable"  # for users of a walk; tables allow it


@dataclass(frozen=True, slots=True)
class Anomaly:
    """Something wrong at one virtual address."""

    kind: AnomalyKind
    address: int
    gpa: int  # of the table (of the page, for writable-executable)
    index: int = 0  # of the table's entry, where it is about one

    def __str__(self) -> str:
        return f"{self.kind} at {self.address:#x} (physical {self.gpa:#x}, entry {self.index})"


@dataclass(frozen=True, slots=True)
class Span:
    """A range of virtual addresses, both ends included (so it can reach the top)."""

    first: int
    last: int

    def __contains__(self, address: int) -> bool:
        return self.first <= address <= self.last


@dataclass(frozen=True, slots=True)
class WalkLimits:
    """Bounds of one walk. The defaults hold almost 4 GiB mapped by 4 KiB pages alone."""

    tables_max: int = 2048
    leaves_max: int = 2048 * ENTRIES
    anomalies_max: int = 64


@dataclass(frozen=True, slots=True)
class Leaves:
    """Mapped pages as columns of one length, ascending by `address`."""

    address: U64  # virtual
    gpa: U64
    size: U64  # bytes
    flags: NDArray[np.uint8]  # WRITABLE | EXECUTABLE | USER, combined over the levels

    def __len__(self) -> int:
        return len(self.address)


@dataclass(frozen=True, slots=True)
class WalkResult:
    """What the tables map.

    `anomalies` is bounded, `anomalies_total` counts all. `complete` is False when a table
    could not be read or a limit was hit: more may be mapped than is listed.
    """

    leaves: Leaves
    anomalies: tuple[Anomaly, ...]
    anomalies_total: int
    tables_read: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Translation:
    """Where a virtual address leads; `gpa` is None when nowhere, and `reason` says why."""

    gpa: int | None
    reason: str = ""


@dataclass(slots=True)
class _Tables:
    """Tables of one level that a walk has reached."""

    gpa: U64
    address: U64  # first virtual address that the table maps
    flags: NDArray[np.uint8]

    def take(self, which: NDArray[np.bool_] | slice) -> _Tables:
        return _Tables(self.gpa[which], self.address[which], self.flags[which])


@dataclass(slots=True)
class _Walk:
    """State of one walk."""

    source: Source
    form: PagingFormat
    ranges: Sequence[Span]
    limits: WalkLimits
    leaves: list[Leaves] = field(default_factory=list)
    leaves_count: int = 0
    anomalies: list[Anomaly] = field(default_factory=list)
    seen: Counter[AnomalyKind] = field(default_factory=Counter)
    tables_read: int = 0

    def run(self, root_gpa: int) -> WalkResult:
        tables = _Tables(
            np.array([root_gpa & self.form.address], dtype=np.uint64),
            np.zeros(1, dtype=np.uint64),
            np.array([WRITABLE | EXECUTABLE | USER], dtype=np.uint8),
        )
        for level in self.form.levels:
            tables, pages = self.read(tables)
            if not len(tables.gpa):
                break
            tables = self.descend(level, tables, pages)
        incomplete = (AnomalyKind.LIMIT, AnomalyKind.TABLE_UNREADABLE)
        return WalkResult(
            leaves=_sorted(self.leaves),
            anomalies=tuple(self.anomalies),
            anomalies_total=self.seen.total(),
            tables_read=self.tables_read,
            complete=not any(self.seen[kind] for kind in incomplete),
        )

    def read(self, tables: _Tables) -> tuple[_Tables, U64]:
        """Read tables: those that could be read, and their entries, shape (n, ENTRIES)."""
        frames = tables.gpa >> np.uint64(PAGE_SHIFT)
        ram = is_ram(self.source.regions(), frames)
        self.note(AnomalyKind.TABLE_OUTSIDE_RAM, tables.take(~ram))
        tables = tables.take(ram)
        room = self.limits.tables_max - self.tables_read
        self.note(AnomalyKind.LIMIT, tables.take(slice(room, None)))
        tables = tables.take(slice(room))
        self.tables_read += len(tables.gpa)
        pages = np.empty((len(tables.gpa), PAGE_SIZE), dtype=np.uint8)
        good = self.source.read(tables.gpa >> np.uint64(PAGE_SHIFT), pages) == PageStatus.OK
        self.note(AnomalyKind.TABLE_UNREADABLE, tables.take(~good))
        return tables.take(good), pages[good].view("<u8")

    def descend(self, level: Level, tables: _Tables, pages: U64) -> _Tables:
        """Sort out the entries of one level: leaves are kept, tables returned."""
        form = self.form
        steps = np.arange(ENTRIES, dtype=np.uint64) << np.uint64(level.shift)
        address = _canonical(tables.address[:, None] + steps, form)
        wanted = _meets(address, level, self.ranges) & ((pages & np.uint64(form.present)) != 0)
        table, index = np.nonzero(wanted)
        entry, address = pages[table, index], address[table, index]
        flags = tables.flags[table] & _flags(entry, form)
        leaf = np.full(len(entry), level.leaf == "always")
        if level.leaf == "large":
            leaf = (entry & np.uint64(form.large)) != 0
        reserved = np.where(leaf, np.uint64(level.leaf_reserved), np.uint64(level.reserved))
        bad = (entry & reserved) != 0
        parent = _Tables(tables.gpa[table], address, flags)
        self.note(AnomalyKind.RESERVED_BIT, parent.take(bad), index[bad])
        self.keep(level, entry, parent, index, leaf & ~bad)
        down = ~leaf & ~bad
        return _Tables(entry[down] & np.uint64(form.address), address[down], flags[down])

    def keep(
        self,
        level: Level,
        entry: U64,
        parent: _Tables,
        index: NDArray[np.intp],
        leaf: NDArray[np.bool_],
    ) -> None:
        """Keep the leaves that there is room for."""
        found = np.flatnonzero(leaf)
        room = self.limits.leaves_max - self.leaves_count
        if len(found) > room:
            cut = np.zeros_like(leaf)
            cut[found[room:]] = True
            self.note(AnomalyKind.LIMIT, parent.take(cut), index[cut])
            leaf = leaf & ~cut
        gpa = entry[leaf] & np.uint64(self.form.address & ~(level.span - 1))
        size = np.full(len(gpa), level.span, dtype=np.uint64)
        self.leaves.append(Leaves(parent.address[leaf], gpa, size, parent.flags[leaf]))
        self.leaves_count += len(gpa)

    def note(
        self, kind: AnomalyKind, where: _Tables, index: NDArray[np.intp] | None = None
    ) -> None:
        """Record one anomaly for every row of `where`."""
        self.seen[kind] += len(where.gpa)
        for row in range(min(len(where.gpa), self.limits.anomalies_max - len(self.anomalies))):
            entry = int(index[row]) if index is not None else 0
            self.anomalies.append(
                Anomaly(kind, int(where.address[row]), int(where.gpa[row]), entry)
            )


def walk(
    source: Source,
    root_gpa: int,
    form: PagingFormat,
    ranges: Iterable[Span],
    limits: WalkLimits | None = None,
) -> WalkResult:
    """All leaf mappings that meet one of `ranges`, from the top-level table at `root_gpa`.

    A page of the target that cannot be read, or is no RAM, is an anomaly. A leaf may lead
    outside RAM: device memory is mapped so.
    """
    return _Walk(source, form, tuple(ranges), limits or WalkLimits()).run(root_gpa)


def translate(source: Source, root_gpa: int, form: PagingFormat, address: int) -> Translation:
    """Guest-physical address of one virtual address."""
    extension = address >> (form.address_bits - 1)
    if extension not in (0, _ADDRESS_MASK >> (form.address_bits - 1)):
        return Translation(None, "not canonical")
    found = walk(source, root_gpa, form, [Span(address, address)])
    if len(found.leaves):
        offset = address - int(found.leaves.address[0])
        return Translation(int(found.leaves.gpa[0]) + offset)
    return Translation(None, str(found.anomalies[0].kind) if found.anomalies else "not present")


def _canonical(address: U64, form: PagingFormat) -> U64:
    """Repeat the top translated bit upwards (Intel SDM vol. 1, 3.3.7.1)."""
    top = np.uint64(1 << (form.address_bits - 1))
    masked = address & np.uint64((1 << form.address_bits) - 1)
    return (masked ^ top) - top


def _meets(address: U64, level: Level, ranges: Sequence[Span]) -> NDArray[np.bool_]:
    last = address | np.uint64(level.span - 1)
    meets = np.zeros(address.shape, dtype=bool)
    for span in ranges:
        meets |= (address <= np.uint64(span.last)) & (last >= np.uint64(span.first))
    return meets


def _flags(entry: U64, form: PagingFormat) -> NDArray[np.uint8]:
    writable = (entry & np.uint64(form.writable)) != 0
    user = (entry & np.uint64(form.user)) != 0
    executable = (entry & np.uint64(form.no_execute)) == 0
    flags: NDArray[np.uint8] = (
        writable * np.uint8(WRITABLE) | executable * np.uint8(EXECUTABLE) | user * np.uint8(USER)
    )
    return flags


def _sorted(parts: Sequence[Leaves]) -> Leaves:
    address = np.concatenate([_NONE, *(part.address for part in parts)])
    order = np.argsort(address, kind="stable")
    return Leaves(
        address[order],
        np.concatenate([_NONE, *(part.gpa for part in parts)])[order],
        np.concatenate([_NONE, *(part.size for part in parts)])[order],
        np.concatenate([np.empty(0, np.uint8), *(part.flags for part in parts)])[order],
    )
