"""A unit while it is being compiled: its bytes, and what is still unknown about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.approved.unit import RELOCATION, Section, Slot, SlotKind, SymbolKind, Symbols
from pyscan.errors import PackageError

I64 = NDArray[np.int64]
#: Stands in a column of slots for a place that lies in the unit itself.
OWN: Final = -1


@dataclass(slots=True)
class Slots:
    """The slots of a unit by what they are; slot 0 is BASE."""

    rows: list[Slot] = field(default_factory=lambda: [Slot(SlotKind.BASE)])
    _index: dict[Slot, int] = field(default_factory=lambda: {Slot(SlotKind.BASE): 0})

    def index(self, slot: Slot) -> int:
        """Number of a slot, which is made when it is new."""
        found = self._index.get(slot)
        if found is None:
            found = self._index[slot] = len(self.rows)
            self.rows.append(slot)
        return found

    def absolute(self, index: int) -> int:
        """Number of the slot that gives the same address, not relative to the unit."""
        slot = self.rows[index]
        return self.index(Slot(slot.kind, slot.name)) if slot.relative else index


@dataclass(slots=True, eq=False)
class Draft:
    """Bytes with relocations, and the sections in them.

    A place that refers to the unit itself relative to the place is final in `image`; every
    other reference has a row in `relocations32` or `relocations64` (type RELOCATION, sorted
    by offset), and `image` holds its addend.
    """

    name: str
    link_address: int
    image: NDArray[np.uint8]
    sections: tuple[Section, ...]
    slots: Slots
    relocations32: NDArray[np.void]
    relocations64: NDArray[np.void]

    def section(self, name: str) -> Section | None:
        """The first section of that name; None when it is not there or empty."""
        return next((s for s in self.sections if s.name == name and s.length), None)

    def rows(self, name: str, entry: int, fields: Mapping[str, tuple[int, str]]) -> Rows:
        """A table of `entry` bytes a row. Raises PackageError when it lies outside the image."""
        section = self.section(name)
        return self.rows_at(section, entry, fields) if section else Rows.empty(fields)

    def rows_at(self, table: Section, entry: int, fields: Mapping[str, tuple[int, str]]) -> Rows:
        """Like `rows`, of a table that has no section of its own."""
        if table.offset < 0 or table.offset + table.length > len(self.image):
            raise PackageError(f"{self.name}: table {table.name} lies outside the image")
        count = table.length // entry
        data = self.image[table.offset : table.offset + count * entry].reshape(count, entry)
        columns = {}
        for key, (start, form) in fields.items():
            width = np.dtype(form).itemsize
            columns[key] = data[:, start : start + width].copy().view(form)[:, 0]
        return Rows(table.offset + entry * np.arange(count, dtype=np.int64), columns)

    def relative(self, rows: Rows, key: str, start: int) -> tuple[I64, I64]:
        """Where a self-relative field leads: (offset or addend, slot or OWN)."""
        places = rows.places + start
        width = rows.columns[key].dtype.itemsize
        targets = rows.columns[key].astype(np.int64) + places
        slots = self._slots_at(places, width)
        for slot in np.unique(slots[slots != OWN]).tolist():
            slots[slots == slot] = self.slots.absolute(slot)
        return targets, slots

    def absolute(self, rows: Rows, key: str, start: int) -> tuple[I64, I64]:
        """Where a field of 64 bits that holds an address leads; as `relative`."""
        targets = rows.columns[key].astype(np.int64)
        slots = self._slots_at(rows.places + start, 8)
        own = slots == 0
        targets[own] -= np.array(self.link_address, dtype=np.uint64).astype(np.int64)
        slots[slots == OWN] = -2  # a constant: no address at all
        slots[own] = OWN
        return targets, slots

    def _slots_at(self, places: I64, width: int) -> I64:
        table = self.relocations32 if width == 4 else self.relocations64
        found = np.full(len(places), OWN, dtype=np.int64)
        if len(table):
            offsets = table["offset"].astype(np.int64)
            at = np.minimum(np.searchsorted(offsets, places), len(offsets) - 1)
            same = offsets[at] == places
            found[same] = table["slot"][at[same]]
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A table's rows: where each begins in the image, and its fields as columns."""

    places: I64
    columns: dict[str, NDArray[np.generic]]

    @classmethod
    def empty(cls, fields: Mapping[str, tuple[int, str]]) -> Rows:
        """No rows."""
        columns: dict[str, NDArray[np.generic]] = {
            key: np.empty(0, dtype=form) for key, (_, form) in fields.items()
        }
        return cls(np.empty(0, dtype=np.int64), columns)

    def __len__(self) -> int:
        return len(self.places)


def relocation_column(offsets: Iterable[int] | I64, slots: Iterable[int] | I64) -> NDArray[np.void]:
    """Rows of RELOCATION, sorted by offset."""
    offsets, slots = np.asarray(offsets, dtype=np.int64), np.asarray(slots, dtype=np.int64)
    column = np.empty(len(offsets), dtype=RELOCATION)
    order = np.argsort(offsets, kind="stable")
    column["offset"], column["slot"] = offsets[order], slots[order]
    return column


def symbol_columns(rows: list[tuple[int, int, str]]) -> Symbols:
    """Symbols of rows (offset, is a function, name). Raises PackageError for an absurd offset."""
    if any(offset >> 62 for offset, _, _ in rows):
        raise PackageError("a symbol lies beyond every image")
    rows = sorted(rows)
    blob = b"".join(name.encode("ascii", "replace") + b"\0" for _, _, name in rows)
    lengths = np.array([len(name) + 1 for _, _, name in rows], dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1])) if rows else lengths
    kind = {0: SymbolKind.DATA, 1: SymbolKind.FUNCTION}
    return Symbols(
        offsets=np.array([offset for offset, _, _ in rows], dtype=np.int64),
        kinds=np.array([kind[function] for _, function, _ in rows], dtype=np.uint8),
        starts=starts.astype(np.uint32),
        names=np.frombuffer(blob, dtype=np.uint8),
    )
