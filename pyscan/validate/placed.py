"""A unit at its place in one target's memory: slots have values, and bytes follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from pyscan.approved.unit import Slot, SlotKind, Unit

U64 = NDArray[np.uint64]
RowT = TypeVar("RowT", bound=np.generic)
_MASK: Final = (1 << 64) - 1
#: Columns whose rows reach over the edge of a range are looked at so many bytes around it: the
#: longest alternative.
EDGE: Final = 256


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A unit and where it lies. `values` (n,) uint64 holds one value for each slot and
    `known` (n,) bool whether there is one."""

    unit: Unit
    address: int  # virtual, of the image's first byte
    values: U64
    known: NDArray[np.bool_]

    @property
    def end(self) -> int:
        """First virtual address behind the unit."""
        return self.address + self.unit.length

    def resolve(self, slots: NDArray[np.uint32], addends: NDArray[np.int64]) -> U64:
        """Virtual addresses of references, shape (n,); 0 where a slot has no value."""
        found = self.values[slots] + addends.astype(np.uint64)
        found[~self.known[slots]] = 0
        return found

    def relocated(self, start: int, end: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The bytes from offset `start` to `end` before any patching, and which are unknown.

        Unknown are references to what is gone, such as the init sections of a module.
        """
        low, high = max(0, start - EDGE), end + EDGE
        image = self.unit.image[low : min(high, len(self.unit.image))]
        out = np.zeros(high - low, dtype=np.uint8)
        out[: len(image)] = image
        unknown = np.zeros(high - low, dtype=bool)
        for width, form, column in (
            (4, "<u4", self.unit.relocations32),
            (8, "<u8", self.unit.relocations64),
        ):
            rows = within(column, column["offset"], low, high - width)
            at = (rows["offset"].astype(np.int64) - low)[:, None] + np.arange(width)
            words = out[at].view(form)[:, 0] + self.values[rows["slot"]].astype(form)
            out[at] = words[:, None].view(np.uint8)
            unknown[at[~self.known[rows["slot"]]]] = True
        kept = slice(start - low, end - low)
        return out[kept], unknown[kept]


def place(unit: Unit, address: int, value: Callable[[Slot], int | None]) -> Placed:
    """Place a unit; `value` gives what a slot stands for, None where it cannot be known."""
    values = np.zeros(len(unit.slots), dtype=np.uint64)
    known = np.ones(len(unit.slots), dtype=bool)
    base = address - unit.link_address
    for index, slot in enumerate(unit.slots):
        found: int | None
        if slot.kind is SlotKind.BASE:
            found = base
        elif slot.kind is SlotKind.NEGATED_BASE:
            found = -base
        else:
            found = value(slot)
        if found is None:
            known[index] = False
        else:
            values[index] = (found - (address if slot.relative else 0)) & _MASK
    return Placed(unit, address, values, known)


def within(
    column: NDArray[RowT], offsets: NDArray[np.uint32], low: int, high: int
) -> NDArray[RowT]:
    """The rows of an ascending column whose offset is in `low` to `high`, both included."""
    first, last = np.searchsorted(offsets, [max(0, low), max(0, high + 1)])
    return column[first:last] if high >= low else column[:0]
