"""Small units and approved configurations of kind linux, in which everything occurs once.

`build_unit` gives a unit that satisfies docs/spec/approved.md section 5; arguments replace
single fields, `build_sites` and `build_symbols` what lies inside. `assert_same_unit` compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyscan.approved.linux import Anchor, LinuxApproved, Provenance
from pyscan.approved.unit import (
    ALTERNATIVE,
    ALTERNATIVE_NOT,
    ALTERNATIVE_RUN,
    JUMP_LABEL,
    PARAVIRT,
    RELOCATION,
    RETPOLINE,
    STATIC_CALL,
    TRAMPOLINE,
    VMLINUX,
    Section,
    Segment,
    SegmentKind,
    Sites,
    Slot,
    SlotKind,
    SymbolKind,
    Symbols,
    Table,
    TableKind,
    Unit,
)

LINK_ADDRESS = 0xFFFF_FFFF_8100_0000
#: Of text, read-only data and read-only after init data, and of all that is in memory.
TEXT_BYTES, RODATA_BYTES, AFTER_INIT_BYTES, LENGTH = 0x1000, 0x1000, 0x1000, 0x4000
BANNER = "Linux version 6.1.0-0-test (pyscan) (gcc) #1 SMP PREEMPT_DYNAMIC"
BANNER_OFFSET = 0x1200
KEY_OFFSET = 0x3100  # of a static key in writable data


def rows(dtype: np.dtype[Any], *values: Sequence[int]) -> NDArray[Any]:
    """A column of structured rows."""
    return np.array([tuple(value) for value in values], dtype=dtype)


def offsets(*values: int) -> NDArray[np.uint32]:
    """A column of plain offsets."""
    return np.array(values, dtype="<u4")


def build_symbols(table: Iterable[tuple[int, int, str]]) -> Symbols:
    """Symbols of rows (offset, kind, name), in any order."""
    table = sorted(table)
    starts, names = [], b""
    for _, _, name in table:
        starts.append(len(names))
        names += name.encode() + b"\0"
    return Symbols(
        offsets=np.array([row[0] for row in table], dtype="<i8"),
        kinds=np.array([row[1] for row in table], dtype=np.uint8),
        starts=np.array(starts, dtype="<u4"),
        names=np.frombuffer(names, dtype=np.uint8),
    )


def build_sites(link_address: int = 0, **columns: NDArray[Any]) -> Sites:
    """Two of every class in text, and what `columns` replaces."""
    key = link_address - (1 << 64) + KEY_OFFSET if link_address >> 63 else KEY_OFFSET
    sites = Sites(
        mcount=offsets(0x010, 0x100),
        returns=offsets(0x020, 0x110),
        locks=offsets(0x030, 0x031),
        retpolines=rows(RETPOLINE, (0x040, 0, 0, 5, 0), (0x048, 11, 2, 7, 1)),
        paravirt=rows(PARAVIRT, (0x050, 24, 7), (0x060, 31, 12)),
        alternatives=rows(
            ALTERNATIVE,
            (0x070, 0x200, 9 * 32 + 20, 12, 8, 0, 2),
            # The same place again: the last entry that applies wins.
            (0x070, 0x210, ALTERNATIVE_NOT | 16, 12, 0, 2, 0),
            (0x068, 0x210, 3, 5, 5, 2, 1),
        ),
        alternative_runs=rows(ALTERNATIVE_RUN, (0, 12, 0), (8, 4, 1), (2, 3, 0)),
        jump_labels=rows(JUMP_LABEL, (0x080, 0x090, 0, key, 0, 2), (0x084, 0x300, 2, 8, 1, 5)),
        static_calls=rows(STATIC_CALL, (0x0A0, 0, key, 0, 5, 0), (0x0B0, 2, 0, 1, 6, 1)),
        trampolines=rows(TRAMPOLINE, (0x0C0, 0, key), (0x0C8, 0, key + 16)),
    )
    return replace(sites, **columns)


def build_unit(name: str = VMLINUX, **changes: Any) -> Unit:
    """A unit of one page each of text, read-only data and read-only after init data."""
    link_address = LINK_ADDRESS if name == VMLINUX else 0
    seed = np.random.default_rng(list(name.encode()))
    image = seed.integers(0, 256, TEXT_BYTES + RODATA_BYTES + AFTER_INIT_BYTES, dtype=np.uint8)
    if name == VMLINUX:
        text = BANNER.encode() + b"\n\0"
        image[BANNER_OFFSET : BANNER_OFFSET + len(text)] = np.frombuffer(text, dtype=np.uint8)
    unit = Unit(
        name=name,
        link_address=link_address,
        image=image,
        length=LENGTH,
        segments=(
            Segment(SegmentKind.TEXT, 0, TEXT_BYTES),
            Segment(SegmentKind.RODATA, 0x1000, RODATA_BYTES),
            Segment(SegmentKind.RO_AFTER_INIT, 0x2000, AFTER_INIT_BYTES),
        ),
        sections=(
            Section(".text", 0, TEXT_BYTES),
            Section(".rodata", 0x1000, 0x800),
            Section(".data..ro_after_init", 0x2000, AFTER_INIT_BYTES),
        ),
        tables=(
            Table(TableKind.JUMP_TABLE, 0x1800, 32, 16),
            Table(TableKind.MODULE_ALTERED, 0x1900, 5, 1),
        ),
        slots=(
            Slot(SlotKind.BASE),
            Slot(SlotKind.PERCPU),
            Slot(SlotKind.SYMBOL, "a_key"),
            Slot(SlotKind.SYMBOL, "_printk", relative=True),
        ),
        relocations32=rows(RELOCATION, (0x101, 3), (0x121, 1)),
        relocations64=rows(RELOCATION, (0x1400, 0), (0x1408, 0), (0x2000, 2)),
        symbols=build_symbols(
            [
                (-8, SymbolKind.DATA, "fixed_percpu_data"),
                (0x000, SymbolKind.FUNCTION, "_stext"),
                (0x000, SymbolKind.FUNCTION, f"{name}_start"),
                (0x100, SymbolKind.FUNCTION, f"{name}_call"),
                (0x1400, SymbolKind.DATA, f"{name}_operations"),
                (KEY_OFFSET, SymbolKind.DATA, f"{name}_key"),
            ]
        ),
        exports=((f"{name}_call", 0, 0x100), (f"{name}_far", 2, -8)),
        sites=build_sites(link_address),
        sizes=() if name == VMLINUX else (0x1000, 0x2000, 0x3000, LENGTH),
        init_function=None if name == VMLINUX else 0x10,
    )
    return replace(unit, **changes)


def build_linux(names: Iterable[str] = ("loop", "nf_tables"), **changes: Any) -> LinuxApproved:
    """An approved configuration of a kernel and some modules."""
    vmlinux = build_unit()
    approved = LinuxApproved(
        release="6.1.0-0-test",
        banner=BANNER,
        series="6.1",
        provenance=(
            Provenance(
                package="linux-image-6.1.0-0-test",
                version="6.1.1-1",
                architecture="amd64",
                sha256=hashlib.sha256(b"a package").hexdigest(),
            ),
        ),
        anchors=(
            Anchor("linux_banner", BANNER_OFFSET, BANNER.encode()),
            Anchor("start", 0x1300, vmlinux.image[0x1300:0x1320].tobytes()),
        ),
        offsets={"module": 896, "module.name": 24, "task_struct.mm": 2336},
        vmlinux=vmlinux,
        modules={name: build_unit(name) for name in names},
    )
    return replace(approved, **changes)


def use_unit(unit: Unit) -> None:
    """Index with everything, as validation does."""
    image, sites = unit.image, unit.sites
    for segment in (*unit.segments, *unit.tables):
        assert len(image[segment.offset :][: segment.length]) == segment.length
    for column in (unit.relocations32, unit.relocations64):
        for slot in column["slot"].tolist():
            assert unit.slots[slot]
    for name in ("mcount", "returns", "locks"):
        image[getattr(sites, name)]
    for column in (sites.retpolines, sites.paravirt, sites.alternatives, sites.jump_labels):
        image[(column["offset"] + np.maximum(column["length"], 1) - 1)[column["length"] > 0]]
    for column in (sites.jump_labels, sites.static_calls, sites.trampolines):
        for slot in column["key_slot"].tolist():
            assert unit.slots[slot]
    for row in sites.alternatives.tolist():
        assert len(image[row[1] : row[1] + row[4]]) == row[4]
    names = unit.symbols.names.tobytes()
    for start in unit.symbols.starts.tolist():
        assert names.index(b"\0", start) > start


def assert_same_unit(mine: Unit, other: Unit) -> None:
    """Equal in everything, dtypes included."""
    _assert_same(mine, other, mine.name)


def assert_same_linux(mine: LinuxApproved, other: LinuxApproved) -> None:
    """Equal in everything; loads every module."""
    assert sorted(mine.modules) == list(other.modules)
    for name in other.modules:
        assert_same_unit(mine.modules[name], other.modules[name])
    modules: Mapping[str, Unit] = {}
    _assert_same(replace(mine, modules=modules), replace(other, modules=modules), "linux")


def _assert_same(mine: Any, other: Any, place: str) -> None:
    for field in fields(mine):
        left, right = getattr(mine, field.name), getattr(other, field.name)
        name = f"{place}.{field.name}"
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, name
            assert left.tobytes() == right.tobytes(), name
        elif isinstance(left, Unit | Symbols | Sites):
            _assert_same(left, right, name)
        else:
            assert left == right, name
