"""kallsyms: a real kernel's against its own export tables, and hand-made and damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from package_files import LINK, NAMES, edited, make_kallsyms, one_line

from pyscan.errors import PackageError
from pyscan.kernel.symbols import KernelSymbols, parse_kallsyms
from pyscan.package.bzimage import kernel_payload
from pyscan.package.elf import Elf

ADDRESS = 0xFFFF_FFFF_81E0_0000
EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4)


@pytest.fixture(scope="module")
def vmlinux(guest_dir: Path) -> Elf:
    return Elf(kernel_payload((guest_dir / "vmlinuz").read_bytes()), "vmlinux")


@pytest.fixture(scope="module")
def real(vmlinux: Elf) -> KernelSymbols:
    rodata = vmlinux.section(".rodata")
    assert rodata is not None
    return parse_kallsyms(bytes(vmlinux.content(rodata)), rodata.address, LINK)


def test_a_real_kernel(real: KernelSymbols) -> None:
    assert len(real) == 87347
    assert len(real.addresses) == len(real.kinds) == len(real.names)
    assert np.all(np.diff(real.addresses.astype(object)) >= 0)
    assert real.find("_text") == LINK
    assert real.find("no_such_symbol") is None
    assert set(map(chr, np.unique(real.kinds))) <= set("AaBbDdRrTtVvWw")


def test_every_export_has_its_address(vmlinux: Elf, real: KernelSymbols) -> None:
    """__ksymtab (struct kernel_symbol, include/linux/export.h) knows names and addresses, too."""
    by_place = {section.name: section for section in vmlinux.sections}
    strings = by_place["__ksymtab_strings"]
    text = bytes(vmlinux.content(strings))
    checked = 0
    for name in ("__ksymtab", "__ksymtab_gpl"):
        section = by_place[name]
        rows = struct.iter_unpack("<iii", vmlinux.content(section))
        for index, (value, name_offset, _) in enumerate(rows):
            place = section.address + 12 * index
            start = place + 4 + name_offset - strings.address
            exported = text[start : text.index(b"\0", start)].decode()
            # Per-CPU symbols are linked at 0: their references wrap.
            address = (place + value) % (1 << 64)
            assert real.find(exported) == address, exported
            checked += 1
    assert checked > 5000


def test_sections_begin_and_end_at_symbols(vmlinux: Elf, real: KernelSymbols) -> None:
    for name, start, stop in (
        ("__ksymtab", "__start___ksymtab", "__stop___ksymtab"),
        (".retpoline_sites", "__retpoline_sites", "__retpoline_sites_end"),
        (".BTF", "__start_BTF", "__stop_BTF"),
    ):
        section = vmlinux.section(name)
        assert section is not None
        assert real.find(start) == section.address
        assert real.find(stop) == section.address + section.size
    rodata = vmlinux.section(".rodata")
    assert rodata is not None
    assert real.find("__start_rodata") == rodata.address
    banner = (real.find("linux_banner") or 0) - rodata.address
    assert bytes(vmlinux.content(rodata)[banner:])[:21] == b"Linux version 6.1.0-5"


def test_names_of_addresses(real: KernelSymbols) -> None:
    schedule = real.find("schedule")
    assert schedule is not None
    assert real.at(schedule) == "schedule"
    assert real.at(schedule + 5) == "schedule+0x5"
    assert real.at((1 << 64) - 1).startswith("__brk_limit+0x") or "+0x" in real.at((1 << 64) - 1)


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("absolute_percpu", [False, True])
def test_every_order(new_order: bool, absolute_percpu: bool) -> None:
    found = parse_kallsyms(make_kallsyms(new_order, absolute_percpu), ADDRESS, LINK)
    lowest = 0 if absolute_percpu else LINK
    expected = sorted((max(where, lowest), kind, name) for where, kind, name in NAMES)
    rows = zip(found.addresses.tolist(), map(chr, found.kinds.tolist()), found.names, strict=True)
    assert sorted(rows) == expected
    assert found.addresses.tolist() == [where for where, _, _ in expected]


def test_find_and_at() -> None:
    found = parse_kallsyms(make_kallsyms(), ADDRESS, LINK)
    assert found.find("function_7") == LINK + 7 * 64  # the lower of two
    assert found.at(LINK + 7 * 64) == "function_7"
    assert found.at(LINK + 7 * 64 + 63) == "function_7+0x3f"
    assert found.at(LINK + 0x10_0000) == "data"  # the first of two names
    assert found.at(LINK + 0x10_0004) == "data+0x4"
    assert found.at(0x10) == "__per_cpu_start+0x10"
    empty = KernelSymbols(np.empty(0, np.uint64), np.empty(0, np.uint8), [])
    assert empty.at(0x1234) == "0x1234"
    assert empty.find("x") is None


def test_digits_that_are_no_token_table() -> None:
    decoys = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00".ljust(24, b"\0") * 20
    assert len(parse_kallsyms(decoys + make_kallsyms(), ADDRESS, LINK)) == len(NAMES)
    with pytest.raises(PackageError, match="no symbol table"):
        parse_kallsyms(decoys * 1000, ADDRESS, LINK)


@pytest.mark.parametrize("new_order", [False, True])
def test_another_base(new_order: bool) -> None:
    with pytest.raises(PackageError, match="no symbol table"):
        parse_kallsyms(make_kallsyms(new_order), ADDRESS, LINK + 0x1000)


def test_unaligned() -> None:
    with pytest.raises(PackageError, match="not aligned"):
        parse_kallsyms(make_kallsyms(), ADDRESS + 1, LINK)


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("part", ["marker", "name", "count", "token"])
def test_tables_that_disagree(new_order: bool, part: str) -> None:
    data = make_kallsyms(new_order)
    count = struct.pack("<Q", len(NAMES))
    match part:
        case "marker":
            place = data.rindex(b"\0", 0, data.index(b"\0!\0")) - 12
            place = data.index(struct.pack("<I", 0), place - 16) + 4
        case "name":
            place = data.index(b"Tfunction") if b"Tfunction" in data else data.index(b"T\xc8")
            place -= 1
        case "count":
            place = data.rindex(count)
        case _:
            place = data.index(b"A\0B\0C\0") + 1
    changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    with pytest.raises(PackageError, match="no symbol table"):
        parse_kallsyms(changed, ADDRESS, LINK)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"0\x001\x00" * 100, bytes(1 << 16)])
def test_nothing(data: bytes) -> None:
    with pytest.raises(PackageError, match="no symbol table"):
        parse_kallsyms(data, ADDRESS, LINK)


def test_a_great_many_bases() -> None:
    """Every word looks like the base in front of a table."""
    tables = make_kallsyms()
    words = struct.pack("<QQ", LINK, 1000) * 100_000
    with pytest.raises(PackageError, match="no symbol table"):
        parse_kallsyms(words + tables, ADDRESS, LINK)


@settings(max_examples=200, deadline=None)
@given(edits=EDITS, cut=st.floats(0.3, 1), new_order=st.booleans())
def test_any_damage(edits: list[tuple[float, bytes]], cut: float, new_order: bool) -> None:
    try:
        found = parse_kallsyms(edited(make_kallsyms(new_order), edits, cut), ADDRESS, LINK)
    except PackageError as error:
        one_line(error)
        return
    assert len(found) == len(found.kinds) == len(found.addresses) == len(NAMES)
    assert np.all(found.addresses[1:] >= found.addresses[:-1])
