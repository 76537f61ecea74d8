"""Names of addresses in a target's text objects, for reports and for policy.

A name is that of the symbol at or ahead of an address, with the distance: `commit_creds`,
`commit_creds+0x10`, in a module with the module's name before it: `ext4:ext4_fill_super`.
It is the same in every boot of a kernel, wherever KASLR has put it.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

from pyscan.approved.unit import VMLINUX, Section
from pyscan.validate.context import names_of
from pyscan.validate.placed import Placed
from pyscan.validate.units import PlacedUnits

#: Longest name of a place, in characters: a finding's place must hold it.
NAME_MAX: Final = 96


@dataclass(frozen=True, slots=True)
class Named:
    """A place in a unit: the symbol at or ahead of it ("" for none) and the distance to it."""

    unit: str
    symbol: str
    distance: int
    section: str  # of the package's file; "" between sections

    def __str__(self) -> str:
        text = self.symbol or self.section
        if self.distance or not text:
            text += f"+{self.distance:#x}"
        if self.unit != VMLINUX:
            text = f"{self.unit}:{text}"
        return text[:NAME_MAX]


class PlaceNames:
    """Names of what lies in the units of one target; a unit's symbols are read when needed."""

    def __init__(self, units: PlacedUnits) -> None:
        self._placed = sorted(units.all, key=lambda placed: placed.address)
        self._starts = [placed.address for placed in self._placed]
        self._sections: dict[str, tuple[list[int], list[Section]]] = {}

    def find(self, address: int) -> Named | None:
        """What an address is, or None when it lies in no unit."""
        placed = self.unit_at(address)
        if placed is None:
            return None
        unit = placed.unit
        offset = address - placed.address
        near = names_of(unit.symbols).near(offset)
        section = self._section(placed, offset)
        if near is not None and near[0]:
            return Named(unit.name, near[0], near[1], section.name if section else "")
        if section is not None:
            return Named(unit.name, "", offset - section.offset, section.name)
        return Named(unit.name, "", offset, "")

    def text(self, address: int) -> str:
        """The name of an address; hexadecimal when it lies in no unit."""
        found = self.find(address)
        return f"{address:#x}" if found is None else str(found)

    def key(self, address: int) -> str:
        """A name that no other address has: with the offset in the unit (`x@0x1230`) where
        several static symbols of the unit share the name.
        """
        found = self.find(address)
        placed = self.unit_at(address)
        if found is None or placed is None:
            return f"{address:#x}"
        text = str(found)
        if names_of(placed.unit.symbols).is_shared(found.symbol):
            text = f"{found}@{address - placed.address:#x}"
        return sys.intern(text)  # thousands of them, the same in every target

    def unit_at(self, address: int) -> Placed | None:
        """The unit that holds an address, or None."""
        row = bisect_right(self._starts, address) - 1
        if row >= 0 and address < self._placed[row].end:
            return self._placed[row]
        return None

    def _section(self, placed: Placed, offset: int) -> Section | None:
        unit = placed.unit
        if unit.name not in self._sections:
            ordered = sorted(unit.sections, key=lambda section: section.offset)
            self._sections[unit.name] = ([section.offset for section in ordered], ordered)
        starts, ordered = self._sections[unit.name]
        row = bisect_right(starts, offset) - 1
        if row >= 0 and offset < ordered[row].offset + ordered[row].length:
            return ordered[row]
        return None
