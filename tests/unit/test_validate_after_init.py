"""Data that is read-only after init: what the boot may write, and what it may not."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_kernel import MIB
from fake_target import DATA, SYMBOLS
from fake_validation import RO_AFTER_INIT, RO_AFTER_INIT_BYTES, FakeValidation, state
from tables import Memory

from pyscan.errors import ApprovedFileError
from pyscan.kernel.after_init import AfterInit
from pyscan.kernel.series import SERIES
from pyscan.validate.after_init import AfterInitComparer, AfterInitResult
from pyscan.validate.patch import nops
from pyscan.validate.rodata import InitRange, RodataComparer, RodataResult
from pyscan.validate.vdso import patched_vdso

FIRST = RO_AFTER_INIT + 0x1000

#: Variables of the list of 6.1, and one that is on none.
LAYOUT = {
    "kmalloc_caches": FIRST,
    "size_index": FIRST + 0x200,
    "ptmx_fops": FIRST + 0x300,
    "apic": FIRST + 0x500,
    "apic_flat": FIRST + 0x600,
    "cr_pinning": FIRST + 0x800,
    "capability_hooks": FIRST + 0x900,
    "__per_cpu_offset": FIRST + 0xA00,
    "__ia32_enabled": FIRST + 0xB00,
    "apic_verbosity": FIRST + 0xB80,
    "mptcp_genl_family": FIRST + 0xD00,
    "behind_families": FIRST + 0xE00,
    "__start___jump_table": FIRST + 0xC00,
    "__stop___jump_table": FIRST + 0xC40,
    "raw_data": FIRST + 0x1000,
    "behind": FIRST + 0x2000,
}

Compare = Callable[[], tuple[RodataResult, AfterInitResult, np.ndarray]]


@pytest.fixture
def fake(tmp_path: Path) -> FakeValidation:
    found = FakeValidation(Memory(tmp_path / "ram", 64 * MIB), symbols=dict(LAYOUT))
    found.pointer(LAYOUT["apic"], "apic_flat")
    found.pointer(LAYOUT["apic_flat"] + 8, "kernel_function")
    found.pointer(LAYOUT["capability_hooks"] + 24, "kernel_function")
    found.package(LAYOUT["size_index"], bytes(range(24)))
    return found


@pytest.fixture
def compare(fake: FakeValidation) -> Iterator[Compare]:
    with fake.memory.source() as source:

        def run(unread: bool = False) -> tuple[RodataResult, AfterInitResult, np.ndarray]:
            validation = fake.validation(source)
            target, placed = validation.target, validation.units.vmlinux
            rodata = RodataComparer(placed, InitRange(), lambda key: key)
            comparer = AfterInitComparer(target, placed, rodata, state())
            start = placed.address + RO_AFTER_INIT
            actual, _ = target.memory.read_range(start, RO_AFTER_INIT_BYTES)
            result, counts = RodataResult(), AfterInitResult()
            gaps = np.full(len(actual), unread)
            legal = comparer.compare(RO_AFTER_INIT, actual, gaps, result, counts)
            return result, counts, legal == actual

        yield run


def test_as_packaged_all_is_verified(fake: FakeValidation, compare: Compare) -> None:
    result, counts, same = compare()
    known = {d.offset for d in result.code.differences}
    # What a FakeTarget links of security hooks is in no package, and small_hooks on no list.
    assert known <= set(range(SYMBOLS["small_hooks"], SYMBOLS["small_hooks"] + 80))
    assert counts.unverified == 0
    assert counts.verified + counts.typed + int((~same).sum()) == RO_AFTER_INIT_BYTES


#: What is written where, by the name of the variable and the offset in it; the value is a number or
#: the name of a symbol and a distance to it.
LEGAL = [
    ("kmalloc_caches", 8, 0xFFFF_8A40_0010_0000),  # allocated memory
    ("apic_verbosity", 0, 0x1234),
    ("mptcp_genl_family", 0x20, 7),  # mcgrp_offset
    ("ptmx_fops", 0, ("other_function", 0)),
    ("ptmx_fops", 8, 77),
    ("apic", 0, ("kmalloc_caches", 0)),  # other data of the image
    ("apic_flat", 8, ("other_function", 0)),
    ("cr_pinning", 0, 1),
    ("cr_pinning", 8, ("__start___jump_table", 16 + 1)),
    ("capability_hooks", 0, ("capability_hooks", 40)),
    ("__per_cpu_offset", 0, 0xFFFF_8A40_0020_0000),
    ("__ia32_enabled", 0, 1),
]
ILLEGAL = [
    ("kmalloc_caches", 8, ("kernel_function", 0)),  # data that leads into code
    ("kmalloc_caches", 16, 0x1234),  # no address
    ("kmalloc_caches", 16, 0xFFFF_8A40_0010_0004),  # not aligned
    ("kmalloc_caches", 16, 0xFFFF_C900_0000_0000),  # leads to no memory
    ("kmalloc_caches", 448, 0xFFFF_8A40_0010_0000),  # behind the variable
    ("mptcp_genl_family", 0x10, 7),  # a member that is not set
    ("apic_verbosity", 0, ("kernel_function", 0)),
    ("size_index", 0, 0x0706_0504_0302_0101),  # on no list
    ("ptmx_fops", 0, ("other_function", 1)),  # no entry of a function
    ("apic", 0, ("kernel_function", 0)),
    ("apic", 0, 0xFFFF_8A40_0010_0000),  # a driver outside the image
    ("apic_flat", 8, ("other_function", 4)),
    ("apic_flat", 8, 0xFFFF_8A40_0010_0000),  # a function of the package, replaced by data
    ("cr_pinning", 8, ("kmalloc_caches", 0)),  # no jump entries
    ("capability_hooks", 0, 0xFFFF_8A40_0010_0000),  # a hook outside the image
    ("capability_hooks", 0, ("_text", DATA)),  # a hook in writable data
    ("capability_hooks", 24, ("other_function", 0)),  # a hook's function is the package's
    ("__per_cpu_offset", 0, ("kernel_function", 0)),
    ("__per_cpu_offset", 0, ("_text", DATA)),  # no allocated memory
    ("__per_cpu_offset", 8, 0xFFFF_8A40_0020_0008),
    ("__ia32_enabled", 8, 1),  # the gap behind a variable
]


def put(fake: FakeValidation, name: str, at: int, value: int | tuple[str, int]) -> int:
    offset = LAYOUT[name] + at
    number = value if isinstance(value, int) else fake.address(value[0]) + value[1]
    fake.word(offset, number)
    return offset


@pytest.mark.parametrize("case", LEGAL, ids=lambda case: f"{case[0]}+{case[1]}-{case[2]}")
def test_what_the_boot_may_write(
    fake: FakeValidation, compare: Compare, case: tuple[str, int, int | tuple[str, int]]
) -> None:
    before, counts_before, _ = compare()
    offset = put(fake, *case)
    result, counts, same = compare()
    assert result.code.total == before.code.total
    assert same[offset - RO_AFTER_INIT : offset - RO_AFTER_INIT + 8].all()
    assert counts.verified < counts_before.verified
    assert counts.bytes == counts_before.bytes


@pytest.mark.parametrize("case", ILLEGAL, ids=lambda case: f"{case[0]}+{case[1]}-{case[2]}")
def test_what_it_may_not(
    fake: FakeValidation, compare: Compare, case: tuple[str, int, int | tuple[str, int]]
) -> None:
    before, _, _ = compare()
    offset = put(fake, *case)
    result, _, same = compare()
    assert result.code.total == before.code.total + 1
    found = [d for d in result.code.differences if offset <= d.offset < offset + 8]
    assert len(found) == 1
    assert not same[found[0].offset - RO_AFTER_INIT]


def test_unread_bytes_are_no_difference(fake: FakeValidation, compare: Compare) -> None:
    put(fake, "size_index", 0, 1)
    result, counts, _ = compare(unread=True)
    assert result.code.total == 0
    assert counts.bytes == result.code.bytes == 0


def test_unknown_series(fake: FakeValidation) -> None:
    with fake.memory.source() as source:
        validation = fake.validation(source)
        target = replace(
            validation.target, approved=replace(validation.target.approved, series="1.0")
        )
        placed = validation.units.vmlinux
        rodata = RodataComparer(placed, InitRange(), lambda key: key)
        with pytest.raises(ApprovedFileError, match=r"1\.0"):
            AfterInitComparer(target, placed, rodata, state())


@pytest.mark.parametrize("series", sorted(SERIES))
def test_lists_are_plausible(series: str) -> None:
    listed = SERIES[series].after_init
    assert len(listed) > 200
    for name, parts in listed.items():
        assert name.isidentifier()
        end = 0
        for part in parts:
            assert part.offset >= end
            end = part.offset + part.length
            assert (part.length == 0) is (part.kind in (AfterInit.HOOKS, AfterInit.VDSO))
            if part.kind in (AfterInit.POINTER, AfterInit.OBJECT, AfterInit.FUNCTIONS):
                assert (part.offset | part.length) % 8 == 0
        assert end <= 1 << 16


# The vDSO


def vdso(entries: list[tuple[int, int, int, int, int]], wide: bool = True) -> bytes:
    """An ELF image: code at 0x100, replacements at 0x200, alternatives at 0x300."""
    image = bytearray(0x600)
    image[:7] = b"\x7fELF" + bytes([2 if wide else 1, 1, 1])
    image[0x100:0x110] = bytes(range(0x10, 0x20))
    image[0x200:0x204] = b"\x0f\x01\xf9\xc3"
    for number, (site, source, feature, length, copied) in enumerate(entries):
        at = 0x300 + 12 * number
        struct.pack_into("<iiHBB", image, at, site - at, source - at - 4, feature, length, copied)
    names = b"\0.altinstructions\0.shstrtab\0"
    image[0x400 : 0x400 + len(names)] = names
    headers = [(0, 0, 0), (1, 0x300, 12 * len(entries)), (18, 0x400, len(names))]
    if wide:
        struct.pack_into("<Q", image, 40, 0x480)
        struct.pack_into("<HHH", image, 58, 64, 3, 2)
    else:
        struct.pack_into("<I", image, 32, 0x480)
        struct.pack_into("<HHH", image, 46, 40, 3, 2)
    for number, (label, start, size) in enumerate(headers):
        form, step = ("<IIQQQQ", 64) if wide else ("<IIIIII", 40)
        struct.pack_into(form, image, 0x480 + step * number, label, 1, 2, start, start, size)
    return bytes(image)


@pytest.mark.parametrize("wide", [True, False], ids=["64", "32"])
def test_vdso_is_patched_by_features(wide: bool) -> None:
    image = vdso([(0x100, 0x200, 5, 6, 3), (0x108, 0x200, 1 << 15 | 6, 4, 4)], wide)
    off = patched_vdso(image, state(6))
    assert off == image
    on = patched_vdso(image, state(5))
    assert on[0x100:0x106] == b"\x0f\x01\xf9" + nops(3)
    assert on[0x108:0x10C] == b"\x0f\x01\xf9\xc3"
    assert on[0x106:0x108] == image[0x106:0x108]


@pytest.mark.parametrize(
    "entry",
    [(-5, 0x200, 5, 4, 4), (0x5FE, 0x200, 5, 4, 4), (0x100, 0x5FF, 5, 4, 4), (0x100, -9, 5, 4, 4)],
)
def test_alternatives_outside_the_image_are_left_out(entry: tuple[int, int, int, int, int]) -> None:
    image = vdso([entry])
    assert patched_vdso(image, state(5)) == image


def test_what_is_no_image_stays() -> None:
    for junk in (b"", b"\x7fELF", bytes(100), b"\x7fELF\x02\x01\x01" + b"\xff" * 200):
        assert patched_vdso(junk, state(5)) == junk


def test_vdso_in_memory(fake: FakeValidation, compare: Compare) -> None:
    image = vdso([(0x100, 0x200, 1 << 15 | 6, 4, 4)])
    fake.package(LAYOUT["raw_data"], image)
    before, _, _ = compare()  # not patched: as in the package, so no difference
    fake.write(LAYOUT["raw_data"], patched_vdso(image, state()))
    result, counts, _ = compare()
    assert result.code.total == before.code.total
    assert counts.unverified == 0
    fake.write(LAYOUT["raw_data"] + 0x101, b"\xcc")
    result, _, _ = compare()
    assert result.code.total == before.code.total + 1
