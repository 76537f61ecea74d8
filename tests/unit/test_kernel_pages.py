"""Which pages are watched, and what they are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_kernel import MIB, FakeKernel
from tables import NX, PRESENT, TABLE, WRITE, Memory

from pyscan.kernel import (
    EXECUTABLE,
    WRITABLE,
    KernelImage,
    mapped_pages,
    place,
    watched_pages,
)
from pyscan.kernel.layout import MODULES, READ_ONLY_IDT
from pyscan.records import PAGE_SIZE, PageStatus
from pyscan.sources.layers import FaultSource
from pyscan.translate import AnomalyKind


@pytest.fixture(params=[4, 5])
def kernel(request: pytest.FixtureRequest, tmp_path: Path) -> FakeKernel:
    return FakeKernel(Memory(tmp_path / "ram", 64 * MIB), levels=request.param)


def map_module(kernel: FakeKernel, page: int, gpa: int, bits: int) -> int:
    address = MODULES.first + page * PAGE_SIZE
    kernel.memory.map(kernel.form, kernel.root, address, gpa, bits)
    return address


def test_text_and_read_only_data_in_small_pages(kernel: FakeKernel) -> None:
    with kernel.memory.source() as source:
        watched = watched_pages(source, kernel.image)
    pages = np.arange(1024, dtype=np.uint64)  # the data is writable: not watched
    assert (watched.addresses == np.uint64(kernel.virtual) + pages * np.uint64(PAGE_SIZE)).all()
    assert (watched.frames == np.uint64(kernel.physical // PAGE_SIZE) + pages).all()
    assert watched.flags.tolist() == [EXECUTABLE] * 512 + [0] * 512
    assert (watched.anomalies, watched.anomalies_total) == ((), 0)


def small_rodata(kernel: FakeKernel) -> None:
    """Map the read-only data, in the image and in the direct map, by 4 KiB pages."""
    memory, form = kernel.memory, kernel.form
    for base in (kernel.address(kernel.rodata), kernel.direct(kernel.rodata)):
        memory.map(form, kernel.root, base, memory.table(), TABLE, shift=21, large=False)
        for page in range(512):
            offset = page * PAGE_SIZE
            memory.map(form, kernel.root, base + offset, kernel.rodata + offset, PRESENT | NX)


def test_the_image_s_read_only_data_ends_where_somebody_else_s_pages_begin(
    kernel: FakeKernel,
) -> None:
    small_rodata(kernel)
    freed = kernel.rodata + 300 * PAGE_SIZE  # still read-only in the image, writable elsewhere
    kernel.memory.map(kernel.form, kernel.root, kernel.direct(freed), freed, PRESENT | WRITE | NX)
    with kernel.memory.source() as source:
        watched = watched_pages(source, kernel.image)
        assert len(mapped_pages(source, kernel.image)) == 1024
    assert len(watched) == 512 + 300


def test_a_page_that_a_module_uses_is_not_the_image_s(kernel: FakeKernel) -> None:
    small_rodata(kernel)
    address = map_module(kernel, 0, kernel.rodata + 200 * PAGE_SIZE, PRESENT | NX)
    with kernel.memory.source() as source:
        watched = watched_pages(source, kernel.image)
    assert len(watched) == 512 + 200 + 1
    assert int(watched.addresses[-1]) == address


def test_a_page_that_the_kernel_maps_a_third_time_is_not_the_image_s(kernel: FakeKernel) -> None:
    small_rodata(kernel)
    vmalloc = kernel.direct(0) + (8 << 30)
    gpa = kernel.rodata + 100 * PAGE_SIZE
    kernel.memory.map(kernel.form, kernel.root, vmalloc, gpa, PRESENT | NX)
    with kernel.memory.source() as source:
        assert len(watched_pages(source, kernel.image)) == 512 + 100


def test_the_interrupt_table_is_watched_wherever_it_is(kernel: FakeKernel) -> None:
    memory, table = kernel.memory, kernel.data + 0x2_0000
    base = kernel.address(kernel.data)
    memory.map(kernel.form, kernel.root, base, memory.table(), TABLE, shift=21, large=False)
    for page in range(512):
        gpa = kernel.data + page * PAGE_SIZE
        bits = PRESENT | NX if gpa in (table, table + 0x3000) else PRESENT | WRITE | NX
        memory.map(kernel.form, kernel.root, base + page * PAGE_SIZE, gpa, bits)
    memory.map(kernel.form, kernel.root, READ_ONLY_IDT, table, PRESENT | NX)
    with memory.source() as source:
        watched = watched_pages(source, kernel.image)
    assert len(watched) == 1024 + 1
    assert int(watched.frames[-1]) == table // PAGE_SIZE


def test_modules(kernel: FakeKernel) -> None:
    text = map_module(kernel, 0, 0x7000, PRESENT)
    rodata = map_module(kernel, 2, 0x3000, PRESENT | NX)
    map_module(kernel, 3, 0x4000, PRESENT | WRITE | NX)
    with kernel.memory.source() as source:
        watched = watched_pages(source, kernel.image)
    assert watched.addresses[1024:].tolist() == [text, rodata]
    assert watched.frames[1024:].tolist() == [7, 3]
    assert watched.flags[1024:].tolist() == [EXECUTABLE, 0]


def test_writable_and_executable_is_watched_and_an_anomaly(kernel: FakeKernel) -> None:
    addresses = [map_module(kernel, page, 0x7000, PRESENT | WRITE) for page in range(100)]
    with kernel.memory.source() as source:
        watched = watched_pages(source, kernel.image)
    assert watched.addresses[1024:].tolist() == addresses
    assert set(watched.flags[1024:].tolist()) == {EXECUTABLE | WRITABLE}
    assert watched.anomalies_total == 100
    assert len(watched.anomalies) == 64
    assert {anomaly.kind for anomaly in watched.anomalies} == {AnomalyKind.WRITABLE_EXECUTABLE}
    assert f"{MODULES.first:#x}" in str(watched.anomalies[0])


def test_a_page_outside_ram_keeps_its_frame_and_reads_as_a_hole(kernel: FakeKernel) -> None:
    map_module(kernel, 0, 0xFEE0_0000, PRESENT)
    with kernel.memory.source() as source:
        watched = watched_pages(source, kernel.image)
        assert watched.frames[-1] == 0xFEE00
        page = np.zeros((1, PAGE_SIZE), dtype=np.uint8)
        assert source.read(watched.frames[-1:], page).tolist() == [PageStatus.HOLE]


def test_anomalies_of_the_tables_are_passed_on(kernel: FakeKernel) -> None:
    kernel.memory.set_entry(kernel.level3, 511, 0x3F_0000_0000 | TABLE)
    with kernel.memory.source() as source:
        watched = watched_pages(source, kernel.image)
    assert [anomaly.kind for anomaly in watched.anomalies] == [AnomalyKind.TABLE_OUTSIDE_RAM]
    assert len(watched) == 1024


def test_unreadable_tables_are_anomalies(kernel: FakeKernel) -> None:
    with FaultSource(kernel.memory.source(), PageStatus.LINK_DOWN) as source:
        watched = watched_pages(source, kernel.image)
    assert len(watched) == 0
    assert [anomaly.kind for anomaly in watched.anomalies] == [AnomalyKind.TABLE_UNREADABLE]


@pytest.mark.parametrize(
    ("address", "flags", "name"),
    [
        (0xFFFF_FFFF_9A1F_5000, EXECUTABLE, "kernel text +0x1f5000"),
        (0xFFFF_FFFF_9A00_0000, EXECUTABLE | WRITABLE, "kernel text +0x0"),
        (0xFFFF_FFFF_9B00_1000, 0, "kernel rodata +0x1001000"),
        (0xFFFF_FFFF_C000_3000, EXECUTABLE, "module text +0x3000"),
        (0xFFFF_FFFF_FEFF_F000, 0, "module rodata +0x3efff000"),
        (0xFFFF_FFFF_8000_0000, 0, "kernel rodata -0x1a000000"),
    ],
)
def test_places(address: int, flags: int, name: str) -> None:
    kernel = KernelImage(0, 4, 0xFFFF_FFFF_9A00_0000, 0, 6 * MIB)
    assert place(address, flags, kernel) == name
