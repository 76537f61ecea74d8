"""Reading by virtual address: right, wild, unreadable and bounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_kernel import MIB
from fake_target import FakeTarget
from tables import NX, PRESENT, WRITE, Memory

from pyscan.records import PAGE_SIZE, POISON, PageStatus
from pyscan.sources.base import Source
from pyscan.sources.layers import FaultSource
from pyscan.translate import AnomalyKind, WalkLimits
from pyscan.validate.memory import (
    CACHED_PAGES_MAX,
    Unreadable,
    VirtualMemory,
    WildPointer,
    kernel_half,
    walk_kernel,
)

TOP = (1 << 64) - 1
BROKEN = 0xFFFF_C900_0000_0000  # two pages of vmalloc: one of RAM, one of a device


@pytest.fixture
def fake(tmp_path: Path) -> FakeTarget:
    fake = FakeTarget(Memory(tmp_path / "ram", 64 * MIB))
    fake.map(BROKEN, 40 * MIB, PRESENT | WRITE | NX)
    fake.map(BROKEN + PAGE_SIZE, 0xFEB0_0000, PRESENT | WRITE | NX)
    fake.map(BROKEN + 2 * PAGE_SIZE, 50 * MIB, PRESENT | WRITE | NX)
    return fake


@pytest.fixture
def memory(fake: FakeTarget) -> Iterator[VirtualMemory]:
    with fake.memory.source() as source:
        yield make(fake, source)


def make(fake: FakeTarget, source: Source) -> VirtualMemory:
    return VirtualMemory(source, fake.kernel.image, walk_kernel(source, fake.kernel.image).leaves)


def test_kernel_half() -> None:
    assert kernel_half(4).first == 0xFFFF_8000_0000_0000
    assert kernel_half(5).first == 0xFF00_0000_0000_0000
    assert kernel_half(4).last == TOP


def test_a_read_over_pages_that_lie_apart(fake: FakeTarget, memory: VirtualMemory) -> None:
    table = fake.scratch(0)
    fake.memory.write(fake.gpa(table) + PAGE_SIZE - 3, b"abcdef")
    assert memory.read(table + PAGE_SIZE - 3, 6) == b"abcdef"
    assert memory.read(table, 0) == b""
    assert memory.u32(table + PAGE_SIZE - 3) == int.from_bytes(b"abcd", "little")
    assert memory.u64(table + PAGE_SIZE - 3) == int.from_bytes(b"abcdef\0\0", "little")
    assert memory.frame(table) == fake.gpa(table) // PAGE_SIZE


@pytest.mark.parametrize(
    ("address", "length", "reason"),
    [
        (0, 8, "not mapped"),
        (0x7FFF_FFFF_F000, 8, "not mapped"),
        (0x0000_8000_0000_0000, 8, "not mapped"),  # not canonical
        (TOP - 3, 8, "can lie there"),
        (-8, 8, "can lie there"),
        (1 << 64, 8, "can lie there"),
        (BROKEN, 1 << 40, "can lie there"),
        (BROKEN + PAGE_SIZE, 8, "leads to physical 0xfeb00000, no RAM"),
        (BROKEN + PAGE_SIZE - 4, 8, "no RAM"),
    ],
)
def test_wild_pointers(memory: VirtualMemory, address: int, length: int, reason: str) -> None:
    with pytest.raises(WildPointer, match=reason) as caught:
        memory.read(address, length)
    assert "\n" not in str(caught.value)


def test_unreadable_is_not_wild(fake: FakeTarget) -> None:
    with FaultSource(fake.memory.source(), {(40 * MIB) >> 12: PageStatus.TIMEOUT}) as source:
        memory = make(fake, source)
        with pytest.raises(Unreadable, match="timeout"):
            memory.u64(BROKEN)
        addresses = np.array([BROKEN, BROKEN + 2 * PAGE_SIZE, 0], dtype=np.uint64)
        assert memory.read_array(addresses, 8)[1].tolist() == [False, True, False]
        assert memory.frames(addresses)[1].tolist() == [True, True, False]


def test_strings(fake: FakeTarget, memory: VirtualMemory) -> None:
    fake.write(fake.scratch(0), b"ext4\0rest")
    fake.write(fake.scratch(1), b"bad\n\x1b[2J\xff\0")
    fake.write(fake.scratch(2), b"x" * 64)
    fake.memory.write(40 * MIB + PAGE_SIZE - 2, b"ab")
    assert memory.string(fake.scratch(0), 56) == "ext4"
    assert memory.string(fake.scratch(1), 56) == "bad\\x0a\\x1b[2J\\xff"
    with pytest.raises(WildPointer, match="more than 55 bytes"):
        memory.string(fake.scratch(2), 56)
    with pytest.raises(WildPointer, match="no RAM"):
        memory.string(BROKEN + PAGE_SIZE - 2, 56)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_arrays_are_what_single_reads_give(
    fake: FakeTarget, memory: VirtualMemory, size: int
) -> None:
    rng = np.random.default_rng(size)
    fake.write(fake.scratch(0), rng.bytes(4 * PAGE_SIZE))
    offsets = rng.integers(0, 4 * PAGE_SIZE - 8, 500).astype(np.uint64)
    addresses = np.uint64(fake.scratch(0)) + offsets
    values, good = memory.read_array(addresses, size)
    assert good.all()
    expected = [int.from_bytes(memory.read(int(a), size), "little") for a in addresses]
    assert values.tolist() == expected


def test_arrays_of_wild_addresses(memory: VirtualMemory) -> None:
    addresses = np.array(
        [0, TOP, TOP - 7, BROKEN, BROKEN + PAGE_SIZE, BROKEN + PAGE_SIZE - 4], dtype=np.uint64
    )
    values, good = memory.read_array(addresses, 8)
    assert good.tolist() == [False, False, False, True, False, False]
    assert not values.any()
    assert memory.read_array(np.zeros(0, dtype=np.uint64), 8)[0].shape == (0,)


def test_ranges_tell_of_every_page(fake: FakeTarget, memory: VirtualMemory) -> None:
    fake.memory.write(40 * MIB, b"first")
    fake.memory.write(50 * MIB, b"third")
    data, statuses = memory.read_range(BROKEN, 4 * PAGE_SIZE)
    ok, hole = PageStatus.OK, PageStatus.HOLE
    assert statuses.tolist() == [ok, hole, ok, hole]
    assert data[:5].tobytes() == b"first"
    assert data[2 * PAGE_SIZE :][:5].tobytes() == b"third"
    assert (data[PAGE_SIZE : 2 * PAGE_SIZE] == POISON).all()
    part, statuses = memory.read_range(BROKEN + 1, 3)
    assert (part.tobytes(), statuses.tolist()) == (b"irs", [ok])
    assert memory.read_range(BROKEN, 0)[0].shape == (0,)
    for start, length in ((BROKEN, 1 << 40), (TOP, 8), (-1, 8)):
        with pytest.raises(WildPointer):
            memory.read_range(start, length)


def test_the_cache_is_bounded_and_can_be_dropped(fake: FakeTarget, memory: VirtualMemory) -> None:
    place = fake.scratch(0)
    assert memory.u64(place) == 0
    fake.write(place, b"\1")
    assert memory.u64(place) == 0
    memory.forget()
    assert memory.u64(place) == 1
    direct = fake.kernel.direct(0)
    for page in range(CACHED_PAGES_MAX + 1):
        memory.u8(direct + page * PAGE_SIZE)
    fake.write(place, b"\2")
    assert memory.u64(place) == 2  # it was dropped for others


def test_nothing_is_mapped(fake: FakeTarget) -> None:
    fake.memory.write(fake.kernel.root, bytes(PAGE_SIZE))
    with fake.memory.source() as source:
        memory = make(fake, source)
        assert not len(memory.leaves)
        with pytest.raises(WildPointer):
            memory.u64(fake.scratch(0))
        assert memory.frame(fake.scratch(0)) is None
        assert not memory.read_array(np.array([BROKEN], dtype=np.uint64), 4)[1].any()


def test_tables_that_map_themselves_end_the_walk(fake: FakeTarget) -> None:
    for index in range(256, 511):
        fake.memory.set_entry(fake.kernel.root, index, fake.kernel.root | PRESENT | WRITE)
    with fake.memory.source() as source:
        found = walk_kernel(source, fake.kernel.image, WalkLimits(tables_max=512, leaves_max=9999))
        assert not found.complete
        assert any(anomaly.kind is AnomalyKind.LIMIT for anomaly in found.anomalies)
        memory = VirtualMemory(source, fake.kernel.image, found.leaves)
        memory.read_array(np.arange(0, TOP, 1 << 50, dtype=np.uint64), 8)
