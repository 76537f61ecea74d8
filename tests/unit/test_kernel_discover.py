"""Finding a kernel in synthetic memory: right, wrong, stale and hostile."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_kernel import DIRECT_MAP, MIB, TRAMPOLINE, FakeKernel
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import LARGE, NX, PRESENT, TABLE, WRITE, Memory

from pyscan.errors import KernelNotFound, SourceUnavailable
from pyscan.kernel import check_root, find_kernel
from pyscan.records import PAGE_SIZE, PageStatus
from pyscan.sources.layers import FaultSource

SIZE = 64 * MIB


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "ram", SIZE)


@pytest.fixture(params=[4, 5])
def kernel(request: pytest.FixtureRequest, memory: Memory) -> FakeKernel:
    return FakeKernel(memory, levels=request.param)


def assert_not_found(memory: Memory, match: str) -> None:
    with memory.source() as source, pytest.raises(KernelNotFound, match=match) as caught:
        find_kernel(source)
    assert "\n" not in str(caught.value)


@settings(max_examples=25, deadline=None)
@given(
    levels=st.sampled_from([4, 5]),
    virtual=st.integers(0, 500),
    physical=st.integers(1, 28),
)
def test_found_wherever_it_was_placed(
    tmp_path_factory: pytest.TempPathFactory,
    levels: int,
    virtual: int,
    physical: int,
) -> None:
    memory = Memory(tmp_path_factory.mktemp("kaslr") / "ram", SIZE)
    memory.next_table = 62 * MIB
    base = 0xFFFF_FFFF_8000_0000 + virtual * 2 * MIB
    kernel = FakeKernel(memory, levels, base, physical * 2 * MIB)
    with memory.source() as source:
        assert find_kernel(source) == kernel.image
        assert check_root(source, kernel.root, levels) == kernel.image


def test_processes_and_copies_are_not_taken_for_it(kernel: FakeKernel) -> None:
    memory = kernel.memory
    for table in (8 * MIB, 40 * MIB, kernel.rodata + 0x5000, kernel.root - 0x1000):
        kernel.process(table)  # the last two lie in gaps of the image that were freed
    user_half = kernel.root + 0x1000  # of page-table isolation: leads to tables of its own
    memory.map(kernel.form, user_half, kernel.address(kernel.text), kernel.text, PRESENT)
    with memory.source() as source:
        assert find_kernel(source) == kernel.image


def test_a_freed_table_whose_address_the_image_holds(kernel: FakeKernel) -> None:
    """A process's table came to lie at __init_begin, and the image names that address."""
    stale = kernel.data + 0x18_0000
    kernel.process(stale)
    kernel.memory.write(kernel.data + 0x300 * 8, struct.pack("<Q", kernel.address(stale)))
    with pytest.raises(KernelNotFound, match="more than one kernel"):
        find_kernel(kernel.memory.source())
    # init_mm.pgd, and start_code behind it, which is _text.
    kernel.memory.write(kernel.pointer + 0x20 * 8, struct.pack("<Q", kernel.virtual))
    assert find_kernel(kernel.memory.source()) == kernel.image


def test_the_kernel_of_an_earlier_boot_is_not_taken_for_the_running_one(memory: Memory) -> None:
    first = FakeKernel(memory, physical=16 * MIB)
    second = FakeKernel(memory, virtual=0xFFFF_FFFF_8120_0000, physical=32 * MIB)
    for running, stale in ((second, first), (first, second)):
        running.boot()
        with memory.source() as source:
            assert find_kernel(source) == running.image
            with pytest.raises(KernelNotFound, match="trampoline does not belong to it"):
                check_root(source, stale.root, stale.levels)


def test_two_kernels_of_equal_standing_are_refused(memory: Memory) -> None:
    first = FakeKernel(memory, physical=16 * MIB)
    second = FakeKernel(memory, physical=32 * MIB)
    memory.set_entry(TRAMPOLINE + PAGE_SIZE, 511, first.below | TABLE)
    assert_not_found(memory, f"more than one kernel.*{first.root:#x}, {second.root:#x}")


def test_many_earlier_boots(tmp_path: Path) -> None:
    """More kernels than a search would look at, if it looked at those that do not run."""
    memory = Memory(tmp_path / "ram", 256 * MIB)
    kernels = [FakeKernel(memory, physical=(2 + number) * 8 * MIB) for number in range(20)]
    kernels[7].boot()
    with memory.source() as source:
        assert find_kernel(source) == kernels[7].image


def drop_pointer(kernel: FakeKernel) -> None:
    kernel.memory.write(kernel.pointer, struct.pack("<Q", DIRECT_MAP[4] + kernel.root))


def drop_direct_map(kernel: FakeKernel) -> None:
    kernel.memory.write(kernel.root + 256 * 8, bytes(8 * 255))


def shift_direct_map(kernel: FakeKernel) -> None:
    direct = DIRECT_MAP[kernel.levels] + (kernel.root & ~(2 * MIB - 1))
    kernel.memory.map(kernel.form, kernel.root, direct, 2 * MIB, PRESENT | WRITE | NX, shift=21)


def move_level2(kernel: FakeKernel) -> None:
    outside = 48 * MIB
    for index in range(512):
        entry = kernel.memory.read_entry(kernel.level2, index)
        if entry:
            kernel.memory.set_entry(outside, index, entry)
    kernel.memory.set_entry(kernel.level3, 510, outside | TABLE)


def map_text(kernel: FakeKernel, gpa: int, bits: int) -> None:
    address = kernel.address(kernel.text)
    kernel.memory.map(kernel.form, kernel.root, address, gpa, bits, shift=21)


def forbid_execution(kernel: FakeKernel) -> None:
    map_text(kernel, kernel.text, PRESENT | NX)


def scatter(kernel: FakeKernel) -> None:
    map_text(kernel, 2 * MIB, PRESENT)
    address = kernel.address(kernel.rodata)
    kernel.memory.map(kernel.form, kernel.root, address, 40 * MIB, PRESENT | NX, shift=21)


def forget_trampoline(kernel: FakeKernel) -> None:
    kernel.memory.write(TRAMPOLINE, bytes(PAGE_SIZE))


def large_table(kernel: FakeKernel) -> None:
    kernel.memory.set_entry(kernel.root, 511, kernel.below | TABLE | LARGE)


def empty_image(kernel: FakeKernel) -> None:
    kernel.memory.write(kernel.level2, bytes(PAGE_SIZE))


def wild_table(kernel: FakeKernel) -> None:
    kernel.memory.set_entry(kernel.level3, 510, 0x3F_0000_0000 | TABLE)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (drop_pointer, "no pointer to it"),
        (drop_direct_map, "no direct map"),
        (shift_direct_map, "does not lead to itself"),
        (move_level2, "outside the image"),
        (forbid_execution, "executable"),
        (scatter, "scattered"),
        (forget_trampoline, "trampoline"),
        (large_table, "no kernel image"),
        (empty_image, "no kernel image"),
        (wild_table, "no kernel image"),
    ],
)
def test_without_one_of_its_properties_it_is_no_kernel(
    kernel: FakeKernel, damage: Callable[[FakeKernel], None], reason: str
) -> None:
    damage(kernel)
    assert_not_found(kernel.memory, "no Linux kernel")
    with kernel.memory.source() as source, pytest.raises(KernelNotFound, match=reason):
        check_root(source, kernel.root, kernel.levels)


def test_an_image_that_is_not_aligned(memory: Memory) -> None:
    kernel = FakeKernel(memory)
    table = memory.table()
    for page in range(512):  # the text, in small pages, a page further up
        memory.set_entry(table, page, (kernel.text + page * PAGE_SIZE) | PRESENT)
    index = (kernel.virtual >> 21) & 511
    memory.set_entry(table, 0, 0)
    memory.set_entry(kernel.level2, index, table | TABLE)
    assert_not_found(memory, "no Linux kernel")
    with memory.source() as source, pytest.raises(KernelNotFound, match="not aligned"):
        check_root(source, kernel.root, 4)


def test_one_page_led_elsewhere_does_not_hide_the_kernel(kernel: FakeKernel) -> None:
    table = kernel.memory.table()
    for page in range(512):
        kernel.memory.set_entry(table, page, (kernel.text + page * PAGE_SIZE) | PRESENT)
    kernel.memory.set_entry(table, 7, 50 * MIB | PRESENT)
    kernel.memory.set_entry(kernel.level2, (kernel.virtual >> 21) & 511, table | TABLE)
    with kernel.memory.source() as source:
        assert find_kernel(source) == kernel.image


def test_an_image_that_cannot_be_walked_to_the_end(kernel: FakeKernel) -> None:
    """Pages that are not seen may be mapped anyhow: no kernel may be concluded from the rest."""
    table = kernel.memory.table()
    kernel.memory.set_entry(kernel.level2, 511, table | TABLE)
    with FaultSource(kernel.memory.source(), {table >> 12: PageStatus.TORN}) as source:
        with pytest.raises(KernelNotFound, match=r"cannot be walked.*table-unreadable"):
            check_root(source, kernel.root, kernel.levels)
        with pytest.raises(KernelNotFound, match="; 1 pages could not be read"):
            find_kernel(source)


@pytest.mark.parametrize(
    ("root", "levels"),
    [(0, 4), (0x123, 4), (SIZE, 5), (1 << 51, 4), (1 << 70, 4), (-4096, 5), (0, 3)],
)
def test_check_root_of_anything(memory: Memory, root: int, levels: int) -> None:
    with memory.source() as source, pytest.raises(KernelNotFound):
        check_root(source, root, levels)


def test_check_root_with_the_wrong_number_of_levels(kernel: FakeKernel) -> None:
    with kernel.memory.source() as source, pytest.raises(KernelNotFound, match="not a kernel's"):
        check_root(source, kernel.root, 9 - kernel.levels)


def test_memory_that_is_out_of_reach(kernel: FakeKernel) -> None:
    with FaultSource(kernel.memory.source(), PageStatus.BLOCKED) as source:
        with pytest.raises(KernelNotFound, match=r"access lost: .* could be read \(blocked\)"):
            find_kernel(source)
        with pytest.raises(KernelNotFound):
            check_root(source, kernel.root, kernel.levels)


@pytest.mark.parametrize("table", ["root", "level3", "level2"])
def test_an_unreadable_table(kernel: FakeKernel, table: str) -> None:
    frame = getattr(kernel, table) >> 12
    with (
        FaultSource(kernel.memory.source(), {frame: PageStatus.TIMEOUT}) as source,
        pytest.raises(KernelNotFound, match="; 1 pages could not be read"),
    ):
        find_kernel(source)


def test_a_closed_source(kernel: FakeKernel) -> None:
    source = kernel.memory.source()
    source.close()
    with pytest.raises(SourceUnavailable):
        find_kernel(source)


def test_every_page_maps_itself(memory: Memory) -> None:
    """All memory looks like top-level tables of as many kernels."""
    entries = np.zeros((SIZE // PAGE_SIZE, 512), dtype=np.uint64)
    frames = np.arange(len(entries), dtype=np.uint64)
    entries[:, :] = ((frames << np.uint64(12)) | np.uint64(TABLE))[:, None]
    memory.write(0, entries.tobytes())
    assert_not_found(memory, "too many page tables that look like a kernel's")


def test_every_page_claims_one_kernel(memory: Memory) -> None:
    """All memory looks like processes of a kernel that does not exist."""
    entries = np.zeros((SIZE // PAGE_SIZE, 512), dtype=np.uint64)
    entries[:, 510:] = 0x1000 | TABLE
    memory.write(0, entries.tobytes())
    assert_not_found(memory, "no Linux kernel in the 16384 pages")


def test_an_image_that_names_all_its_pages(memory: Memory) -> None:
    kernel = FakeKernel(memory)
    names = np.arange(512, dtype=np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(kernel.virtual)
    memory.write(kernel.text, names.tobytes())
    for page in range(40):
        kernel.process(kernel.text + (page + 1) * PAGE_SIZE)
    assert_not_found(memory, "too many page tables that look like a kernel's")


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), mask=st.sampled_from([(1 << 64) - 1, 0x8000_0000_00FF_F067]))
def test_noise(tmp_path_factory: pytest.TempPathFactory, seed: int, mask: int) -> None:
    memory = Memory(tmp_path_factory.mktemp("noise") / "ram", 1 * MIB)
    noise = np.random.default_rng(seed).integers(0, 1 << 64, 512 * 256, dtype=np.uint64)
    memory.write(0, (noise & np.uint64(mask) | np.uint64(PRESENT)).tobytes())
    assert_not_found(memory, "no Linux kernel|too many")
