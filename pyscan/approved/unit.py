"""A unit: one text object of a kernel (vmlinux or one module) as its package has it.

A unit is position-independent knowledge: bytes, relocations, symbols, and every place where
the kernel is known to patch itself, as columns. `pyscan.compile` makes units of packages,
`pyscan.validate` predicts from them what a running kernel holds. All offsets are bytes from
the first byte of the unit's image, all integers little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.void]  # a structured array of one of the types below
Offsets = NDArray[np.uint32]
Bytes = NDArray[np.uint8]

#: Name of the unit that is the kernel itself.
VMLINUX: Final = "vmlinux"


class SlotKind(StrEnum):
    """What a slot's value is when the unit is in memory."""

    BASE = "base"  # address of the image less the address it is linked at (0 for a module)
    NEGATED_BASE = "negated-base"  # what is subtracted from per-CPU references of vmlinux
    PERCPU = "percpu"  # module.percpu
    INIT = "init"  # where the module's init sections were; often unknown
    SYMBOL = "symbol"  # an address that another unit exports


@dataclass(frozen=True, slots=True)
class Slot:
    """One unknown of a unit; `relative`: less the unit's own address (PC-relative use)."""

    kind: SlotKind
    name: str = ""  # of a SYMBOL
    relative: bool = False


class SegmentKind(StrEnum):
    """How a part of the image is protected and what may become of it."""

    TEXT = "text"
    RODATA = "rodata"
    RO_AFTER_INIT = "ro_after_init"


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the image that is watched."""

    kind: SegmentKind
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the package's ELF file that lies in the image; for reports."""

    name: str
    offset: int
    length: int


class SymbolKind(IntEnum):
    """What a symbol names."""

    DATA = 0
    FUNCTION = 1


class TableKind(StrEnum):
    """Tables inside read-only data that the kernel sorts or edits in place."""

    JUMP_TABLE = "jump-table"  # struct jump_entry: sorted by key, init bit set
    STATIC_CALLS = "static-calls"  # struct static_call_site: sorted by key, init bit set
    EXCEPTIONS = "exceptions"  # struct exception_table_entry: sorted by instruction
    ORC_IP = "orc-ip"  # int32 relative addresses: sorted together with ORC_ENTRY
    ORC_ENTRY = "orc-entry"
    MCOUNT = "mcount"  # 64-bit addresses: sorted
    MODULE_ALTERED = "module-altered"  # bytes that the module loader may write; see compile


@dataclass(frozen=True, slots=True)
class Table:
    """One such table."""

    kind: TableKind
    offset: int
    length: int
    entry: int  # bytes of an entry


#: The value of 4 or 8 bytes at `offset` grows by the value of slot number `slot`, modulo
#: 2^32 or 2^64; the image holds the addend.
RELOCATION: Final = np.dtype([("offset", "<u4"), ("slot", "<u4")])

#: .retpoline_sites: `form` 0 call, 1 jmp, 2 conditional jump; `length` bytes with prefix.
RETPOLINE: Final = np.dtype(
    [("offset", "<u4"), ("register", "u1"), ("form", "u1"), ("length", "u1"), ("prefix", "u1")]
)

#: .parainstructions: `index` is the entry of pv_ops, in words.
PARAVIRT: Final = np.dtype([("offset", "<u4"), ("index", "u1"), ("length", "u1")])

#: .altinstructions in their order. `feature` has ALTERNATIVE_NOT set for a feature that must
#: be absent. The next `runs` rows of ALTERNATIVE_RUN from `first_run` on belong to it.
ALTERNATIVE: Final = np.dtype(
    [
        ("offset", "<u4"),
        ("replacement", "<u4"),
        ("feature", "<u2"),
        ("length", "u1"),
        ("replacement_length", "u1"),
        ("first_run", "<u4"),
        ("runs", "<u4"),
    ]
)
ALTERNATIVE_NOT: Final = 1 << 15

#: Two or more one-byte nops in a row, which the kernel merges: in the original instructions
#: (`replaced` 0) or in the padded replacement (`replaced` 1); `start` from the site on.
ALTERNATIVE_RUN: Final = np.dtype([("start", "u1"), ("length", "u1"), ("replaced", "u1")])

#: Where a key lies: value of slot `key_slot` plus `key_addend`.
#: `target`: where the jump goes; `branch`: jumps when the key is off; `length` 2 or 5.
JUMP_LABEL: Final = np.dtype(
    [
        ("offset", "<u4"),
        ("target", "<u4"),
        ("key_slot", "<u4"),
        ("key_addend", "<i8"),
        ("branch", "u1"),
        ("length", "u1"),
    ]
)

#: A static call site; `tail` for a jump, `length` 6 for a conditional one, else 5. The key's
#: address may be that of a module's view of it, the trampoline (`trampoline` 1).
STATIC_CALL: Final = np.dtype(
    [
        ("offset", "<u4"),
        ("key_slot", "<u4"),
        ("key_addend", "<i8"),
        ("tail", "u1"),
        ("length", "u1"),
        ("trampoline", "u1"),
    ]
)

#: A static call's trampoline of 8 bytes.
TRAMPOLINE: Final = np.dtype([("offset", "<u4"), ("key_slot", "<u4"), ("key_addend", "<i8")])


@dataclass(frozen=True, slots=True, eq=False)
class Symbols:
    """Names of a unit, ascending by offset; offsets beyond the image are allowed.

    `offsets` (n,) int64, relative to the image (vmlinux: address less the link address);
    `kinds` (n,) uint8 of SymbolKind; `names` holds all names with a NUL behind each, and
    `starts` (n,) uint32 where each begins.
    """

    offsets: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    starts: NDArray[np.uint32]
    names: Bytes


@dataclass(frozen=True, slots=True, eq=False)
class Sites:
    """Where the kernel patches itself, by class; every column ascending by offset.

    (ALTERNATIVE keeps the order of its table: the last entry that applies wins.)
    """

    mcount: Offsets  # 5 bytes each
    returns: Offsets  # 5 bytes each
    locks: Offsets  # 1 byte each
    retpolines: Column
    paravirt: Column
    alternatives: Column
    alternative_runs: Column
    jump_labels: Column
    static_calls: Column
    trampolines: Column


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """One text object. Parent: an approved configuration."""

    name: str
    link_address: int  # of the image's first byte; 0 for a module
    image: Bytes  # (n,) uint8: all of it that is watched, or copied from when patching
    length: int  # bytes in memory (a module's core layout; vmlinux: up to _end)
    segments: tuple[Segment, ...]
    sections: tuple[Section, ...]
    tables: tuple[Table, ...]
    slots: tuple[Slot, ...]  # slot 0 is always BASE
    relocations32: Column
    relocations64: Column
    symbols: Symbols
    exports: tuple[tuple[str, int, int], ...]  # name, slot, addend
    sites: Sites
    sizes: tuple[int, ...]  # of a module's layout: text, read-only, after init, all
    init_function: int | None  # offset of init_module in the init layout
