"""ELF files: a real kernel's and module's, and what damage does to a hand-made one."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from package_files import Section, edited, make_elf, make_module, one_line

from pyscan.errors import PackageError
from pyscan.package.bzimage import kernel_payload
from pyscan.package.elf import Elf, ElfKind, SectionFlag, SectionKind

LINK = 0xFFFF_FFFF_8100_0000
EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=6)


@pytest.fixture(scope="module")
def vmlinux(guest_dir: Path) -> Elf:
    return Elf(kernel_payload((guest_dir / "vmlinuz").read_bytes()), "vmlinux")


@pytest.fixture(scope="module")
def tamper(guest_dir: Path) -> Elf:
    return Elf((guest_dir / "tamper.ko").read_bytes(), "tamper.ko")


def test_a_stripped_kernel(vmlinux: Elf) -> None:
    assert vmlinux.kind == ElfKind.EXECUTABLE
    text, rodata = vmlinux.section(".text"), vmlinux.section(".rodata")
    assert text is not None
    assert rodata is not None
    assert text.address == LINK
    assert text.flags == SectionFlag.ALLOC | SectionFlag.EXECUTE
    assert b"Linux version 6.1.0-56-cloud-amd64" in bytes(vmlinux.content(rodata))
    assert len(vmlinux.symbols()) == 0
    assert vmlinux.symbol_names() == []
    present = {section.name for section in vmlinux.sections}
    assert present >= {
        ".altinstructions",
        ".retpoline_sites",
        ".return_sites",
        ".smp_locks",
        ".BTF",
    }


def test_segments_hold_the_sections(vmlinux: Elf) -> None:
    loaded = [segment for segment in vmlinux.segments if segment.kind == 1]
    for section in vmlinux.sections:
        if section.flags & SectionFlag.ALLOC and section.kind == SectionKind.PROGBITS:
            inside = [
                segment
                for segment in loaded
                if segment.offset <= section.offset
                and section.offset + section.size <= segment.offset + segment.file_size
                and section.address - segment.virtual == section.offset - segment.offset
            ]
            assert inside, section


def test_a_real_module(tamper: Elf) -> None:
    assert tamper.kind == ElfKind.RELOCATABLE
    names = tamper.symbol_names()
    symbols = tamper.symbols()
    assert len(names) == len(symbols)
    functions = {
        name: symbol
        for name, symbol in zip(names, symbols, strict=True)
        if symbol["info"] & 15 == 2 and symbol["section"]
    }
    section = tamper.sections[int(functions["init_module"]["section"])]
    assert section.flags & SectionFlag.EXECUTE
    assert functions["init_module"]["size"] <= section.size
    relocations = tamper.section(".rela.gnu.linkonce.this_module")
    assert relocations is not None
    assert tamper.sections[relocations.info].name == ".gnu.linkonce.this_module"
    used = {names[int(info) >> 32] for info in tamper.relocations(relocations)["info"]}
    assert "init_module" in used


def test_content(tamper: Elf) -> None:
    whole = make_module()
    elf = Elf(bytearray(whole))
    text, bss = elf.section(".text"), elf.section(".bss")
    assert text is not None
    assert bss is not None
    assert bytes(elf.content(text)) == bytes(range(32))
    assert len(elf.content(bss)) == 0
    assert elf.section(".data") is None
    assert elf.sections_end == len(whole)
    assert elf.symbol_names() == ["", "here", "there"]
    assert elf.symbols()["value"].tolist() == [0, 16, 0]
    rela = elf.sections[4]
    assert elf.relocations(rela).tolist() == [(5, 2 << 32 | 4, -4)]
    with pytest.raises(PackageError, match="holds no relocations"):
        elf.relocations(text)


def test_what_is_handed_out_cannot_be_written() -> None:
    data = bytearray(make_module())
    elf = Elf(data)
    with pytest.raises(TypeError):
        elf.content(elf.sections[1])[0] = 1
    assert not elf.symbols().flags.writeable


@pytest.mark.parametrize("size", [0, 1, 16, 63])
def test_short_files(size: int) -> None:
    with pytest.raises(PackageError, match="not a 64-bit little-endian ELF file"):
        Elf(make_module()[:size])


def test_the_error_names_the_file() -> None:
    with pytest.raises(PackageError, match=r"^net/e1000\.ko: "):
        Elf(b"", "net/e1000.ko")


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (4, b"\x01", "not a 64-bit"),
        (16, b"\x04", "type 4"),
        (18, b"\xb7", "machine 183"),
        (40, struct.pack("<Q", 1 << 63), "outside the file"),
        (58, b"\x20", "headers of 32 bytes"),
        (60, b"\xff\xff", "65535 section headers"),
        (62, b"\x01", "no section names"),
        (62, b"\x40", "no section names"),
    ],
)
def test_a_damaged_header(offset: int, value: bytes, reason: str) -> None:
    data = bytearray(make_module())
    data[offset : offset + len(value)] = value
    with pytest.raises(PackageError, match=reason):
        Elf(data)


@pytest.mark.parametrize(
    ("section", "field", "value", "reason"),
    [
        (1, 0, 4000, "name has no end"),
        (1, 16, (1 << 64) - 16, "outside the address space"),
        (1, 24, 1 << 40, r"\.text lies outside the file"),
        (1, 32, (1 << 64) - 1, r"\.text lies outside the file"),
        (1, 48, 24, "alignment of 24"),
        (2, 32, 71, "no table of 24-byte entries"),
        (2, 56, 0, "no table of 24-byte entries"),
        (2, 40, 99, "has no names"),
        (2, 40, 1, "names of its symbols are not there"),
        (3, 32, 5, "names of its symbols are not there"),
        (1, 4, 2, "more than one symbol table"),
    ],
)
def test_a_damaged_section_header(section: int, field: int, value: int, reason: str) -> None:
    data = bytearray(make_module())
    start = Elf(data).sections_end - 7 * 64 + section * 64 + field
    size = 4 if field in (0, 4, 40, 44) else 8
    data[start : start + size] = value.to_bytes(size, "little")
    with pytest.raises(PackageError, match=reason):
        Elf(data)


def test_a_symbol_without_a_section() -> None:
    for section in (7, 0xFFFF):
        symbol = struct.pack("<IBBHQQ", 0, 0, 0, section, 0, 0)
        table = Section(".symtab", 2, 0, symbol, link=2, entry_size=24)
        data = make_elf(table, Section(".strtab", 3, 0, b"\0"))
        with pytest.raises(PackageError, match="section that is not there"):
            Elf(data)


def test_a_name_without_end() -> None:
    symbol = struct.pack("<IBBHQQ", 1, 0, 0, 0xFFF1, 0, 0)
    table = Section(".symtab", 2, 0, symbol, link=2, entry_size=24)
    for strings in (b"\0name", b"\0" + b"n" * 2000 + b"\0", b"\0\xc3\xa4\0"):
        elf = Elf(make_elf(table, Section(".strtab", 3, 0, strings)))
        with pytest.raises(PackageError, match="a name"):
            elf.symbol_names()


@pytest.mark.parametrize(
    ("row", "info", "link", "reason"),
    [
        ((32, 4), 1, 2, "outside its section"),
        ((1 << 63, 4), 1, 2, "outside its section"),
        ((0, 3 << 32), 1, 2, "symbol that is not there"),
        ((0, (1 << 64) - 1), 1, 2, "symbol that is not there"),
        ((0, 4), 99, 2, "holds no relocations"),
        ((0, 4), 1, 3, "another symbol table"),
    ],
)
def test_damaged_relocations(row: tuple[int, int], info: int, link: int, reason: str) -> None:
    symbols = struct.pack("<IBBHQQ", 0, 0, 0, 0, 0, 0) * 3
    elf = Elf(
        make_elf(
            Section(".text", 1, 6, bytes(32)),
            Section(".symtab", 2, 0, symbols, link=3, entry_size=24),
            Section(".strtab", 3, 0, b"\0"),
            Section(".rela", 4, 0, struct.pack("<QQq", *row, 0), 0, link, info, 8, 24),
        )
    )
    with pytest.raises(PackageError, match=reason):
        elf.relocations(elf.sections[4])


@pytest.mark.parametrize(
    ("segment", "reason"),
    [
        ((1, 5, 64, 0, 0, 1 << 40, 1 << 40, 1), "outside the file"),
        ((1, 5, 0, (1 << 64) - 8, 0, 16, 16, 1), "outside the address space"),
        ((1, 5, 0, 0, 0, 64, 63, 1), "longer in the file"),
    ],
)
def test_damaged_segments(segment: tuple[int, ...], reason: str) -> None:
    with pytest.raises(PackageError, match=reason):
        Elf(make_elf(Section(".text", 1, 6, bytes(32)), kind=2, segments=(segment,)))


def read_all(data: bytes) -> None:
    """Use everything that an Elf has."""
    elf = Elf(data)
    elf.symbol_names()
    for section in elf.sections:
        assert len(elf.content(section)) in (0, section.size)
        if section.kind == SectionKind.RELA:
            rows = elf.relocations(section)
            assert np.all(rows["info"] >> np.uint64(32) < len(elf.symbols()))


@settings(max_examples=300, deadline=None)
@given(edits=EDITS, cut=st.floats(0.5, 1))
def test_any_damage(edits: list[tuple[float, bytes]], cut: float) -> None:
    try:
        read_all(edited(make_module(), edits, cut))
    except PackageError as error:
        one_line(error)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=512), kind=st.sampled_from([1, 2, 3]))
def test_noise_behind_a_header(data: bytes, kind: int) -> None:
    try:
        read_all(b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", kind, 62) + data)
    except PackageError as error:
        one_line(error)
