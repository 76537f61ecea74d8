"""A module's layout and linking, against sizes and bytes worked out by hand.

layout_sections() of kernel/module/main.c, apply_relocate_add() of arch/x86/kernel/module.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest
from package_files import Section, make_elf

from pyscan.approved.unit import Segment, SegmentKind, Slot, SlotKind, TableKind, Unit
from pyscan.compile.module import compile_module
from pyscan.errors import PackageError
from pyscan.kernel.series import SERIES

ALLOC, EXEC, WRITE = 2, 4, 1
PROGBITS, NOBITS = 1, 8
UNDEFINED, ABSOLUTE = 0, 0xFFF1
LOCAL, GLOBAL = 0, 1
NOTYPE, OBJECT, FUNCTION = 0, 1, 2
R_64, R_PC32, R_PLT32, R_32, R_32S, R_PC64 = 1, 2, 4, 10, 11, 24


@dataclass
class Ko:
    """Collects a module's sections, symbols and relocations, and writes its file."""

    sections: list[Section] = field(default_factory=list)
    symbols: list[tuple[str, int, int, int, int]] = field(default_factory=list)
    relocations: dict[int, list[tuple[int, int, int, int]]] = field(default_factory=dict)

    def section(
        self, name: str, flags: int, data: bytes, alignment: int = 1, kind: int = PROGBITS
    ) -> int:
        """Index of a new section."""
        self.sections.append(Section(name, kind, flags, data, alignment=alignment))
        return len(self.sections)

    def symbol(
        self, name: str, section: int, value: int = 0, bind: int = GLOBAL, kind: int = NOTYPE
    ) -> int:
        """Index of a new symbol."""
        self.symbols.append((name, section, value, bind, kind))
        return len(self.symbols)

    def relocate(self, section: int, at: int, kind: int, symbol: int, addend: int) -> None:
        """A row of .rela of that section."""
        self.relocations.setdefault(section, []).append((at, kind, symbol, addend))

    def compile(self) -> Unit:
        """The unit of the file."""
        return compile_module("made", self.file(), SERIES["6.1"])

    def file(self) -> bytes:
        """The file."""
        names = b"\0" + b"".join(name.encode() + b"\0" for name, *_ in self.symbols)
        rows = struct.pack("<IBBHQQ", 0, 0, 0, 0, 0, 0)
        for name, section, value, bind, kind in self.symbols:
            start = names.index(b"\0" + name.encode() + b"\0") + 1
            rows += struct.pack("<IBBHQQ", start, bind << 4 | kind, 0, section, value, 0)
        symtab = len(self.sections) + 1
        extra = [
            Section(".symtab", 2, 0, rows, link=symtab + 1, info=1, entry_size=24),
            Section(".strtab", 3, 0, names),
        ]
        for section, relocations in self.relocations.items():
            data = b"".join(
                struct.pack("<QQq", at, symbol << 32 | kind, addend)
                for at, kind, symbol, addend in relocations
            )
            name = f".rela{self.sections[section - 1].name}"
            extra.append(Section(name, 4, 0x40, data, link=symtab, info=section, entry_size=24))
        return make_elf(*self.sections, *extra)


def test_sections_are_laid_out_by_what_protects_them() -> None:
    ko = Ko()
    ko.section(".data", ALLOC | WRITE, b"D" * 8, 8)
    ko.section(".rodata", ALLOC, b"R" * 3)
    ko.section(".text", ALLOC | EXEC, b"T" * 5, 16)
    ko.section(".init.text", ALLOC | EXEC, b"I" * 4096, 16)
    ko.section(".text.unlikely", ALLOC | EXEC, b"U" * 3, 4)
    ko.section(".data..ro_after_init", ALLOC | WRITE, b"A" * 2)
    ko.section(".rodata.str1.8", ALLOC, b"S" * 2, 8)
    ko.section(".modinfo", ALLOC, b"license=GPL\0")
    ko.section("__versions", ALLOC, bytes(64))
    ko.section(".data..percpu", ALLOC | WRITE, b"P" * 8)
    ko.section(".bss", ALLOC | WRITE, bytes(4096), 32, NOBITS)
    ko.section(".comment", 0, b"gcc\0")
    unit = ko.compile()
    # Text and its padding; read-only data; after-init data; data and bss.
    assert unit.sizes == (4096, 8192, 12288, 20480)
    assert unit.length == 20480
    assert unit.segments == (
        Segment(SegmentKind.TEXT, 0, 4096),
        Segment(SegmentKind.RODATA, 4096, 4096),
        Segment(SegmentKind.RO_AFTER_INIT, 8192, 4096),
    )
    assert [(s.name, s.offset, s.length) for s in unit.sections] == [
        (".text", 0, 5),
        (".text.unlikely", 8, 3),
        (".rodata", 4096, 3),
        (".rodata.str1.8", 4104, 2),
        (".data..ro_after_init", 8192, 2),
    ]
    image = unit.image.tobytes()
    assert len(image) == 12288
    assert image[:16] == b"TTTTT\0\0\0UUU\0\0\0\0\0"
    assert image[4096:4112] == b"RRR\0\0\0\0\0SS\0\0\0\0\0\0"
    assert image[8192:8196] == b"AA\0\0"


def linked(kind: int, symbol: tuple[str, int, int], addend: int) -> tuple[bytes, list[Slot], Unit]:
    """Bytes at offset 16 of .text after one relocation there, and the slots it needs."""
    ko = Ko()
    text = ko.section(".text", ALLOC | EXEC, bytes(range(64)), 16)
    ko.section(".rodata", ALLOC, bytes(64))
    ko.section(".init.text", ALLOC | EXEC, bytes(16))
    ko.section(".init.data", ALLOC | WRITE, bytes(16))
    ko.section(".data..percpu", ALLOC | WRITE, bytes(16))
    ko.relocate(text, 16, kind, ko.symbol(*symbol), addend)
    unit = ko.compile()
    rows = [*unit.relocations32.tolist(), *unit.relocations64.tolist()]
    assert all(offset == 16 for offset, _ in rows)
    return unit.image[16:24].tobytes(), [unit.slots[slot] for _, slot in rows], unit


KEPT = bytes(range(20, 24))


@pytest.mark.parametrize("kind", [R_PC32, R_PLT32])
def test_a_reference_within_the_module_is_final(kind: int) -> None:
    # S + A - P: .rodata begins at 4096.
    data, slots, _ = linked(kind, ("here", 2, 8), -4)
    assert data == struct.pack("<i", 4096 + 8 - 4 - 16) + KEPT
    assert slots == []


def test_an_address_within_the_module_moves_with_it() -> None:
    for kind in (R_32, R_32S):
        data, slots, _ = linked(kind, ("here", 2, 8), 3)
        assert data == struct.pack("<i", 4096 + 8 + 3) + KEPT
        assert slots == [Slot(SlotKind.BASE)]
    data, slots, _ = linked(R_64, ("here", 2, 8), -1)
    assert data == struct.pack("<q", 4096 + 8 - 1)
    assert slots == [Slot(SlotKind.BASE)]


def test_a_reference_to_another_unit_waits_for_its_address() -> None:
    data, slots, _ = linked(R_PLT32, ("_printk", UNDEFINED, 0), -4)
    assert data == struct.pack("<i", -4 - 16) + KEPT
    assert slots == [Slot(SlotKind.SYMBOL, "_printk", relative=True)]
    data, slots, _ = linked(R_64, ("_printk", UNDEFINED, 0), 7)
    assert data == struct.pack("<q", 7)
    assert slots == [Slot(SlotKind.SYMBOL, "_printk")]
    data, slots, _ = linked(R_PC64, ("_printk", UNDEFINED, 0), 0)
    assert data == struct.pack("<q", -16)
    assert slots == [Slot(SlotKind.SYMBOL, "_printk", relative=True)]


def test_init_sections_have_a_layout_of_their_own() -> None:
    # Of .init.*: text first, one page, then data.
    data, slots, _ = linked(R_64, ("cold", 4, 5), 0)
    assert data == struct.pack("<q", 4096 + 5)
    assert slots == [Slot(SlotKind.INIT)]
    data, slots, _ = linked(R_PC32, ("cold", 3, 5), -4)
    assert data == struct.pack("<i", 5 - 4 - 16) + KEPT
    assert slots == [Slot(SlotKind.INIT, relative=True)]


def test_per_cpu_data_has_an_area_of_its_own() -> None:
    data, slots, _ = linked(R_32S, ("counter", 5, 8), 1)
    assert data == struct.pack("<i", 9) + KEPT
    assert slots == [Slot(SlotKind.PERCPU)]


def test_constants() -> None:
    data, slots, _ = linked(R_64, ("constant", ABSOLUTE, 77), 1)
    assert data == struct.pack("<q", 78)
    assert slots == []


def test_a_kind_of_relocation_that_the_loader_does_not_know_is_refused() -> None:
    with pytest.raises(PackageError, match="module made: "):
        linked(9, ("here", 2, 8), 0)  # R_X86_64_GOTPCREL


@pytest.mark.parametrize("at", [61, 64, 1 << 40])
def test_a_relocation_outside_its_section_is_refused(at: int) -> None:
    ko = Ko()
    text = ko.section(".text", ALLOC | EXEC, bytes(64), 16)
    ko.relocate(text, at, R_PC32, ko.symbol("here", text), 0)
    with pytest.raises(PackageError, match="module made: "):
        ko.compile()


def test_exports_symbols_and_the_init_function() -> None:
    ko = Ko()
    text = ko.section(".text", ALLOC | EXEC, bytes(64), 16)
    strings = ko.section("__ksymtab_strings", ALLOC, b"shared\0")
    init = ko.section(".init.text", ALLOC | EXEC, bytes(64), 16)
    percpu = ko.section(".data..percpu", ALLOC | WRITE, bytes(16))
    ko.symbol("local", text, 8, LOCAL, FUNCTION)
    ko.symbol("shared", text, 16, GLOBAL, FUNCTION)
    ko.symbol("counter", percpu, 8, GLOBAL, OBJECT)
    ko.symbol("__ksymtab_shared", strings, 0, LOCAL)
    ko.symbol("__ksymtab_counter", strings, 0, LOCAL)
    ko.symbol("__ksymtab_local", strings, 0, LOCAL)
    ko.symbol("init_module", init, 32, GLOBAL, FUNCTION)
    unit = ko.compile()
    exports = [(name, unit.slots[slot].kind, addend) for name, slot, addend in unit.exports]
    assert exports == [("counter", SlotKind.PERCPU, 8), ("shared", SlotKind.BASE, 16)]
    assert unit.init_function == 32
    names = unit.symbols.names.tobytes().split(b"\0")[:-1]
    rows = zip(unit.symbols.offsets.tolist(), unit.symbols.kinds.tolist(), names, strict=True)
    assert [row for row in rows if row[0] < 4096] == [(8, 1, b"local"), (16, 1, b"shared")]


def test_without_an_init_function() -> None:
    ko = Ko()
    ko.section(".text", ALLOC | EXEC, bytes(64), 16)
    assert ko.compile().init_function is None


def test_tables_that_are_sorted_in_place() -> None:
    ko = Ko()
    ko.section(".text", ALLOC | EXEC, bytes(64), 16)
    ko.section("__ex_table", ALLOC, bytes(24), 4)
    ko.section(".orc_unwind_ip", ALLOC, bytes(12), 4)
    ko.section(".orc_unwind", ALLOC, bytes(18), 2)
    ko.section("__mcount_loc", ALLOC, bytes(16), 8)
    ko.section("__jump_table", ALLOC | WRITE, bytes(16), 8)
    unit = ko.compile()
    assert [(t.kind, t.offset, t.length, t.entry) for t in unit.tables] == [
        (TableKind.EXCEPTIONS, 4096, 24, 12),
        (TableKind.ORC_IP, 4120, 12, 4),
        (TableKind.ORC_ENTRY, 4132, 18, 6),
        (TableKind.MCOUNT, 4152, 16, 8),
        # Protected only once the module is initialised.
        (TableKind.JUMP_TABLE, 8192, 16, 16),
    ]


def test_trampolines_belong_to_keys_of_the_same_module() -> None:
    ko = Ko()
    text = ko.section(".static_call.text", ALLOC | EXEC, bytes(64), 16)
    data = ko.section(".data", ALLOC | WRITE, bytes(64), 8)
    ko.symbol("__SCT__mine", text, 8, GLOBAL, FUNCTION)
    ko.symbol("__SCK__mine", data, 24, GLOBAL, OBJECT)
    ko.symbol("__SCT__other", UNDEFINED)
    ko.symbol("__SCT__keyless", text, 16, GLOBAL, FUNCTION)
    unit = ko.compile()
    # Pages: text, no read-only data, none after init, then data.
    assert unit.sites.trampolines.tolist() == [(8, 0, 4096 + 24)]
    assert unit.sizes == (4096, 4096, 4096, 8192)


def test_a_damaged_file_is_refused_with_the_modules_name() -> None:
    with pytest.raises(PackageError, match="module made: "):
        compile_module("made", b"\x7fELF" + bytes(60), SERIES["6.1"])
