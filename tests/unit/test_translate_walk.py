"""Page-table walks over tables that are right, wrong and hostile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import LARGE, NX, PRESENT, TABLE, USER, WRITE, Memory

from pyscan.records import PageStatus
from pyscan.sources.layers import FaultSource
from pyscan.translate import (
    EXECUTABLE,
    WRITABLE,
    X86_64,
    X86_64_4_LEVEL,
    AnomalyKind,
    Span,
    WalkLimits,
    WalkResult,
    translate,
    walk,
)
from pyscan.translate import USER as USER_PAGE

MIB = 1 << 20
KERNEL = Span(0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_FFFF_FFFF)
EVERYTHING = Span(0, 0xFFFF_FFFF_FFFF_FFFF)
BASE = KERNEL.first


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "ram", 16 * MIB)


def rows(result: WalkResult) -> list[tuple[int, int, int, int]]:
    leaves = result.leaves
    columns = (leaves.address, leaves.gpa, leaves.size, leaves.flags)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("levels", X86_64)
def test_pages_of_every_size(memory: Memory, levels: int) -> None:
    form, root = X86_64[levels], memory.table()
    memory.map(form, root, BASE, 0x20_0000, PRESENT, shift=21)
    memory.map(form, root, BASE + 0x20_0000, 0x5000, PRESENT | WRITE | NX)
    memory.map(form, root, BASE + (1 << 30), 0x4000_0000, PRESENT | WRITE | NX, shift=30)
    memory.map(form, root, 0x7000, 0x9000, PRESENT | USER | NX)  # user half: not asked for
    with memory.source() as source:
        result = walk(source, root, form, [KERNEL])
    assert rows(result) == [
        (BASE, 0x20_0000, 2 * MIB, EXECUTABLE),
        (BASE + 0x20_0000, 0x5000, 4096, WRITABLE),
        (BASE + (1 << 30), 0x4000_0000, 1 << 30, WRITABLE),
    ]
    assert result.complete
    assert result.anomalies == ()
    assert result.tables_read == levels


def test_rights_are_combined_over_the_levels(memory: Memory) -> None:
    form, root = X86_64_4_LEVEL, memory.table()
    memory.map(form, root, BASE, 0x5000, PRESENT | WRITE | USER)
    with memory.source() as source:
        assert rows(walk(source, root, form, [KERNEL]))[0][3] == WRITABLE | EXECUTABLE
        top = memory.read_entry(root, 511)
        memory.set_entry(root, 511, (top & ~WRITE) | NX | USER)
        assert rows(walk(source, root, form, [KERNEL]))[0][3] == 0
        tables = [root]
        for index in (511, 510, 0):
            entry = memory.read_entry(tables[-1], index)
            memory.set_entry(tables[-1], index, (entry | USER) & ~NX)
            tables.append(entry & form.address)
        assert rows(walk(source, root, form, [KERNEL]))[0][3] == EXECUTABLE | USER_PAGE


@pytest.mark.parametrize("levels", X86_64)
def test_only_what_meets_the_ranges(memory: Memory, levels: int) -> None:
    form, root = X86_64[levels], memory.table()
    for page in range(8):
        memory.map(form, root, BASE + page * 4096, 0x5000 + page * 4096)
    ranges = [Span(BASE + 0x1FFF, BASE + 0x2000), Span(BASE + 0x7FFF, EVERYTHING.last)]
    with memory.source() as source:
        found = walk(source, root, form, ranges).leaves.address.tolist()
    assert found == [BASE + 0x1000, BASE + 0x2000, BASE + 0x7000]


def test_tables_above_4_gib(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "ram", MIB, above_4g=MIB, next_table=4 << 30)
    root = memory.table()
    memory.map(X86_64_4_LEVEL, root, BASE, (4 << 30) + 0x8000)
    with memory.source() as source:
        assert translate(source, root, X86_64_4_LEVEL, BASE + 0x123).gpa == (4 << 30) + 0x8123


def break_top(memory: Memory, root: int) -> None:
    memory.set_entry(root, 511, memory.read_entry(root, 511) | LARGE)


def break_2m(memory: Memory, root: int) -> None:
    memory.map(X86_64_4_LEVEL, root, BASE, 0x20_0000 | 1 << 13, shift=21)


def break_1g(memory: Memory, root: int) -> None:
    memory.map(X86_64_4_LEVEL, root, BASE, 1 << 29, shift=30)


def point_outside(memory: Memory, root: int) -> None:
    memory.set_entry(root, 511, 0x3F_0000_0000 | TABLE)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (break_top, AnomalyKind.RESERVED_BIT),
        (break_2m, AnomalyKind.RESERVED_BIT),
        (break_1g, AnomalyKind.RESERVED_BIT),
        (point_outside, AnomalyKind.TABLE_OUTSIDE_RAM),
    ],
)
def test_damage_is_an_anomaly_and_maps_nothing(
    memory: Memory, damage: Callable[[Memory, int], None], kind: AnomalyKind
) -> None:
    root = memory.table()
    memory.map(X86_64_4_LEVEL, root, BASE, 0x5000)
    damage(memory, root)
    with memory.source() as source:
        result = walk(source, root, X86_64_4_LEVEL, [KERNEL])
        assert translate(source, root, X86_64_4_LEVEL, BASE).reason == kind
    assert [anomaly.kind for anomaly in result.anomalies] == [kind]
    assert len(result.leaves) == 0


def test_a_leaf_outside_ram_is_kept(memory: Memory) -> None:
    root = memory.table()
    memory.map(X86_64_4_LEVEL, root, BASE, 0xFEE0_0000, PRESENT | WRITE | NX)
    with memory.source() as source:
        result = walk(source, root, X86_64_4_LEVEL, [KERNEL])
    assert rows(result) == [(BASE, 0xFEE0_0000, 4096, WRITABLE)]
    assert result.anomalies == ()


@pytest.mark.parametrize("status", [status for status in PageStatus if status is not PageStatus.OK])
def test_an_unreadable_table_makes_the_walk_incomplete(memory: Memory, status: PageStatus) -> None:
    root = memory.table()
    memory.map(X86_64_4_LEVEL, root, BASE, 0x5000)
    last_table = memory.next_table - 4096
    with FaultSource(memory.source(), {last_table >> 12: status}) as source:
        result = walk(source, root, X86_64_4_LEVEL, [KERNEL])
    assert not result.complete
    assert [str(anomaly.kind) for anomaly in result.anomalies] == ["table-unreadable"]
    assert len(result.leaves) == 0


@pytest.mark.parametrize("levels", X86_64)
def test_a_table_of_512_references_to_itself_ends_at_the_limits(
    memory: Memory, levels: int
) -> None:
    """512**levels leaves by the format; the walk reads and keeps no more than allowed."""
    root = memory.table()
    memory.write(root, (root | TABLE).to_bytes(8, "little") * 512)
    limits = WalkLimits(tables_max=600, leaves_max=1000, anomalies_max=5)
    with memory.source() as source:
        result = walk(source, root, X86_64[levels], [EVERYTHING], limits)
    assert not result.complete
    assert result.tables_read == 600
    assert len(result.leaves) <= 1000
    assert len(result.anomalies) == 5
    assert result.anomalies_total > 5
    assert {anomaly.kind for anomaly in result.anomalies} == {AnomalyKind.LIMIT}


def test_leaves_end_at_their_limit(memory: Memory) -> None:
    root = memory.table()
    for page in range(10):
        memory.map(X86_64_4_LEVEL, root, BASE + page * 4096, page * 4096)
    with memory.source() as source:
        result = walk(source, root, X86_64_4_LEVEL, [KERNEL], WalkLimits(leaves_max=4))
    assert len(result.leaves) == 4
    assert result.anomalies_total == 6
    assert not result.complete


@pytest.mark.parametrize("root", [0x3F_0000_0000, 16 * MIB, (1 << 52) - 4096])
def test_a_root_outside_ram(memory: Memory, root: int) -> None:
    with memory.source() as source:
        result = walk(source, root, X86_64_4_LEVEL, [EVERYTHING])
    assert [anomaly.kind for anomaly in result.anomalies] == [AnomalyKind.TABLE_OUTSIDE_RAM]
    assert result.tables_read == 0


@pytest.mark.parametrize(
    ("levels", "address", "reason"),
    [
        (4, 0x0000_8000_0000_0000, "not canonical"),
        (4, 0xFFFF_7FFF_FFFF_FFFF, "not canonical"),
        (5, 0x0100_0000_0000_0000, "not canonical"),
        (4, 0xFFFF_8000_0000_0000, "not present"),
        (5, 0x0000_8000_0000_0000, "not present"),
    ],
)
def test_addresses_that_lead_nowhere(
    memory: Memory, levels: int, address: int, reason: str
) -> None:
    with memory.source() as source:
        found = translate(source, memory.table(), X86_64[levels], address)
    assert (found.gpa, found.reason) == (None, reason)


@settings(max_examples=40, deadline=None)
@given(
    levels=st.sampled_from(sorted(X86_64)),
    pages=st.dictionaries(st.integers(0, (1 << 35) - 1), st.integers(0, 4095), max_size=12),
    high=st.booleans(),
)
def test_walk_and_translate_agree_with_what_was_mapped(
    tmp_path_factory: pytest.TempPathFactory, levels: int, pages: dict[int, int], high: bool
) -> None:
    form = X86_64[levels]
    memory = Memory(tmp_path_factory.mktemp("walk") / "ram", 16 * MIB)
    root = memory.table()
    half = (1 << 64) - (1 << (form.address_bits - 1)) if high else 0
    wanted = {half + (page << 12): frame << 12 for page, frame in pages.items()}
    for address, gpa in wanted.items():
        memory.map(form, root, address, gpa)
    with memory.source() as source:
        leaves = walk(source, root, form, [EVERYTHING]).leaves
        assert dict(zip(leaves.address.tolist(), leaves.gpa.tolist(), strict=True)) == wanted
        assert np.all(np.diff(leaves.address.astype(object)) > 0)
        for address, gpa in wanted.items():
            assert translate(source, root, form, address + 0xABC).gpa == gpa + 0xABC


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_random_memory_never_breaks_a_walk(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes of the attacker's choice: any result, but no exception and within the limits."""
    memory = Memory(tmp_path_factory.mktemp("noise") / "ram", 8 * 4096)
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    entries = generator.integers(0, 1 << 64, 8 * 512, dtype=np.uint64)
    if data.draw(st.booleans()):  # most entries lead to tables that exist
        entries = (entries & np.uint64(0x8000_0000_0000_7067)) | np.uint64(PRESENT)
    memory.write(0, entries.tobytes())
    limits = WalkLimits(tables_max=50, leaves_max=500, anomalies_max=7)
    with memory.source() as source:
        for form in X86_64.values():
            result = walk(source, 0, form, [EVERYTHING], limits)
            assert result.tables_read <= 50
            assert len(result.leaves) <= 500
            assert len(result.anomalies) == min(7, result.anomalies_total)
