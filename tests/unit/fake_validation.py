"""A small kernel in synthetic memory that is validated by parts, without its package."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from fake_target import FUNCTIONS, LINK, SYMBOLS, FakeTarget, empty_sites
from tables import Memory

from pyscan.approved.unit import (
    RELOCATION,
    Section,
    Segment,
    SegmentKind,
    Sites,
    SymbolKind,
    Symbols,
    Table,
    Unit,
)
from pyscan.sources.base import Source
from pyscan.translate import walk
from pyscan.validate.attach import Attached
from pyscan.validate.context import Target
from pyscan.validate.memory import VirtualMemory, kernel_half
from pyscan.validate.objects import Structures
from pyscan.validate.problem import Problems
from pyscan.validate.reader import KeyReader
from pyscan.validate.state import PatchState
from pyscan.validate.units import PlacedUnits, place_units
from pyscan.validate.validation import Validation

FEATURES = 24 * 32
RO_AFTER_INIT = 0x30_0000  # offset of the data that is read-only after init
RO_AFTER_INIT_BYTES = 0x1_0000


def symbol_table(names: Mapping[str, int]) -> Symbols:
    ordered = sorted(names.items(), key=lambda item: item[1])
    encoded = [name.encode() + b"\0" for name, _ in ordered]
    starts = np.cumsum([0] + [len(name) for name in encoded[:-1]])
    return Symbols(
        offsets=np.array([offset for _, offset in ordered], dtype=np.int64),
        kinds=np.array(
            [SymbolKind.FUNCTION if n in FUNCTIONS else SymbolKind.DATA for n, _ in ordered],
            dtype=np.uint8,
        ),
        starts=starts.astype(np.uint32),
        names=np.frombuffer(b"".join(encoded), dtype=np.uint8),
    )


def state(*features: int, return_thunk: int = 0) -> PatchState:
    bits = np.zeros(FEATURES, dtype=bool)
    bits[list(features)] = True
    return PatchState(
        features=bits,
        indirect_its=False,
        return_thunk=return_thunk,
        its_return_thunk=0,
        static_call_return=0,
        static_call_return0=0,
        uniprocessor=False,
        paravirt=np.zeros(0, dtype=np.uint64),
        paravirt_nop=0,
        paravirt_bug=0,
    )


def structures(**fields: tuple[object, ...]) -> Structures:
    empty = Structures((), (), (), (), (), (), (), 0, Problems())
    return replace(empty, **fields)


@dataclass
class FakeValidation:
    """`symbols` are added to those of a FakeTarget; `pointers`: offset -> name, relocated."""

    memory: Memory
    symbols: dict[str, int] = field(default_factory=dict)
    sections: tuple[Section, ...] = ()
    tables: tuple[Table, ...] = ()
    sites: Sites = field(default_factory=empty_sites)

    def __post_init__(self) -> None:
        self.fake = FakeTarget(self.memory)
        self.base = self.fake.kernel.virtual

    def address(self, name: str) -> int:
        return self.base + {**SYMBOLS, **self.symbols}[name]

    def package(self, offset: int, data: bytes) -> None:
        """Bytes of the package, which are in memory, too."""
        self.fake.image[offset : offset + len(data)] = data
        self.fake.write(self.base + offset, data)

    def pointer(self, offset: int, name: str) -> None:
        """A pointer of the package, which is relocated, and in memory."""
        target = {**SYMBOLS, **self.symbols}[name]
        struct.pack_into("<Q", self.fake.image, offset, LINK + target)
        self.fake.pointers.append(offset)
        self.fake.write(self.base + offset, struct.pack("<Q", self.base + target))

    def write(self, offset: int, data: bytes) -> None:
        """Bytes in memory only."""
        self.fake.write(self.base + offset, data)

    def word(self, offset: int, value: int) -> None:
        self.write(offset, struct.pack("<Q", value & ((1 << 64) - 1)))

    def unit(self, unit: Unit) -> Unit:
        """`unit`, that of the FakeTarget, with what is added here."""
        rows = [(offset, 0) for offset in sorted(set(self.fake.pointers))]
        return replace(
            unit,
            symbols=symbol_table({**SYMBOLS, **self.symbols}),
            relocations64=np.array(rows, dtype=RELOCATION),
            segments=(
                Segment(SegmentKind.TEXT, 0, 0x20_0000),
                Segment(SegmentKind.RODATA, 0x20_0000, RO_AFTER_INIT - 0x20_0000),
                Segment(SegmentKind.RO_AFTER_INIT, RO_AFTER_INIT, RO_AFTER_INIT_BYTES),
            ),
            sections=self.sections,
            tables=self.tables,
            sites=self.sites,
        )

    def target(self, source: Source) -> Target:
        kernel = self.fake.kernel.image
        found = walk(source, kernel.root_gpa, self.fake.kernel.form, [kernel_half(4)])
        approved = self.fake.approved()
        approved = replace(approved, vmlinux=self.unit(approved.vmlinux))
        return Target.of(VirtualMemory(source, kernel, found.leaves), approved, kernel)

    def validation(
        self,
        source: Source,
        patching: PatchState | None = None,
        objects: Structures | None = None,
    ) -> Validation:
        """A validation that has found nothing yet."""
        target = self.target(source)
        problems = Problems()
        units: PlacedUnits = place_units(target, problems)
        kernel = self.fake.kernel.image
        found = walk(source, kernel.root_gpa, self.fake.kernel.form, [kernel_half(4)])
        return Validation(
            attached=Attached(source, kernel, target.approved, found, target, ()),
            target=target,
            units=units,
            structures=objects or structures(),
            state=patching or state(),
            keys=KeyReader(target, units.keys, problems),
            problems=problems,
        )
