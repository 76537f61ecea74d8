"""ELF files of the kernel: 64-bit, little-endian, x86-64 (System V gABI, chapters 4 and 5).

`vmlinux` out of a boot image is an executable without symbol table, a module is a relocatable
file with one. All that the headers say is checked when the file is opened, so that users of
an `Elf` need not check ranges again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.errors import PackageError

Symbols = NDArray[np.void]  # of SYMBOL
Relocations = NDArray[np.void]  # of RELA

#: Elf64_Sym. `section` is an index, 0 for undefined, or one of the reserved SHN_ values.
SYMBOL: Final = np.dtype(
    [
        ("name", "<u4"),
        ("info", "u1"),
        ("other", "u1"),
        ("section", "<u2"),
        ("value", "<u8"),
        ("size", "<u8"),
    ]
)

#: Elf64_Rela. `info`: index of the symbol << 32 | type.
RELA: Final = np.dtype([("offset", "<u8"), ("info", "<u8"), ("addend", "<i8")])


class ElfKind(IntEnum):
    """e_type."""

    RELOCATABLE = 1
    EXECUTABLE = 2
    DYNAMIC = 3


class SectionKind(IntEnum):
    """sh_type of the sections that matter here; others occur."""

    NULL = 0
    PROGBITS = 1
    SYMTAB = 2
    STRTAB = 3
    RELA = 4
    NOTE = 7
    NOBITS = 8


class SectionFlag(IntFlag):
    """sh_flags."""

    WRITE = 1
    ALLOC = 2
    EXECUTE = 4


#: st_shndx values that are no index (include/uapi/linux/elf.h).
SHN_UNDEF: Final = 0
SHN_LORESERVE: Final = 0xFF00
SHN_ABS: Final = 0xFFF1
SHN_COMMON: Final = 0xFFF2

#: Twice what the kernel takes for a symbol's name (KSYM_NAME_LEN, include/linux/kallsyms.h).
NAME_BYTES_MAX: Final = 1024

_IDENT: Final = b"\x7fELF\x02\x01\x01"  # magic, ELFCLASS64, ELFDATA2LSB, EV_CURRENT
_MACHINE: Final = 62  # EM_X86_64
_FILE: Final = Struct("<16sHHIQQQIHHHHHH")
_SECTION: Final = Struct("<IIQQQQIIQQ")
_SEGMENT: Final = Struct("<IIQQQQQQ")
_ADDRESSES: Final = 1 << 64


@dataclass(frozen=True, slots=True)
class ElfSection:
    """A section header. `kind` is sh_type, `flags` sh_flags; sizes and offsets in bytes."""

    index: int
    name: str
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int  # a power of two, or 0
    entry_size: int


@dataclass(frozen=True, slots=True)
class ElfSegment:
    """A program header. `kind` is p_type; sizes and offsets in bytes."""

    kind: int
    flags: int
    offset: int
    virtual: int
    physical: int
    file_size: int
    memory_size: int
    alignment: int


class Elf:
    """An opened file.

    `sections_end` is the file offset behind the table of section headers. In the payload of
    a boot image that table is the last part of the ELF file, and the relocation lists begin
    there (arch/x86/boot/compressed/Makefile: vmlinux.bin, then vmlinux.relocs).
    """

    def __init__(self, data: bytes | bytearray | memoryview, what: str = "ELF file") -> None:
        """Check all headers; `what` names the file in errors. Raises PackageError."""
        self._data = memoryview(data).cast("B").toreadonly()
        self._what = what
        if len(self._data) < _FILE.size or self._data[: len(_IDENT)].tobytes() != _IDENT:
            raise self._bad("not a 64-bit little-endian ELF file")
        fields = _FILE.unpack_from(self._data)
        kind, machine, self.entry = fields[1], fields[2], fields[4]
        self._tables: tuple[int, ...] = (fields[5], *fields[9:11], fields[6], *fields[11:14])
        if machine != _MACHINE or kind not in list(ElfKind):
            raise self._bad(f"ELF type {kind} for machine {machine}, not code for x86-64")
        self.kind = ElfKind(kind)
        self.segments: tuple[ElfSegment, ...] = tuple(self._read_segments())
        self.sections: tuple[ElfSection, ...] = self._read_sections()
        self.sections_end: int = self._tables[3] + len(self.sections) * _SECTION.size
        self._by_name: dict[str, ElfSection] = {}
        for section in self.sections:
            self._by_name.setdefault(section.name, section)
        self._symtab = self._find_symtab()
        self._symbols = self._read_symbols()

    def section(self, name: str) -> ElfSection | None:
        """The first section of that name."""
        return self._by_name.get(name)

    def content(self, section: ElfSection) -> memoryview:
        """The bytes of a section of this file; empty when it has none in the file."""
        if section.kind in (SectionKind.NULL, SectionKind.NOBITS):
            return self._data[:0]
        return self._data[section.offset : section.offset + section.size]

    def symbols(self) -> Symbols:
        """The symbol table, (n,) of SYMBOL, read-only; empty when the file has none.

        Every `section` is that of a section of the file or one of the reserved values.
        """
        return self._symbols

    def symbol_names(self) -> list[str]:
        """Names of `symbols()`, in the same order. Raises PackageError."""
        if self._symtab is None:
            return []
        strings = bytes(self.content(self.sections[self._symtab.link]))
        return [self._string(strings, start) for start in self._symbols["name"].tolist()]

    def relocations(self, section: ElfSection) -> Relocations:
        """Entries of a section of kind RELA, (n,) of RELA, read-only.

        Every entry names a symbol of `symbols()`, and in a relocatable file a place inside
        the section number `section.info`. Raises PackageError.
        """
        name = section.name
        if section.kind != SectionKind.RELA or section.info >= len(self.sections):
            raise self._bad(f"section {name} holds no relocations")
        rows = self._rows(section, RELA)
        if len(rows) and (self._symtab is None or section.link != self._symtab.index):
            raise self._bad(f"relocations {name} belong to another symbol table")
        if np.any(rows["info"] >> np.uint64(32) >= np.uint64(len(self._symbols))):
            raise self._bad(f"a relocation in {name} names a symbol that is not there")
        if self.kind == ElfKind.RELOCATABLE:
            size = np.uint64(self.sections[section.info].size)
            if np.any(rows["offset"] >= size):
                raise self._bad(f"a relocation in {name} lies outside its section")
        return rows

    def _bad(self, why: str) -> PackageError:
        return PackageError(f"{self._what}: {why}; the file is damaged, get the package again")

    def _headers(
        self, what: str, form: Struct, table: tuple[int, ...]
    ) -> Iterator[tuple[int, ...]]:
        """Entries of a header table at (offset, entry size, count)."""
        offset, entry, count = table
        if not count:
            return
        # PN_XNUM and SHN_XINDEX put greater counts elsewhere; no kernel file has as many.
        if entry != form.size or count >= SHN_LORESERVE:
            raise self._bad(f"{count} {what} headers of {entry} bytes")
        if offset + count * entry > len(self._data):
            raise self._bad(f"the table of {what} headers lies outside the file")
        yield from form.iter_unpack(self._data[offset : offset + count * entry])

    def _read_segments(self) -> Iterator[ElfSegment]:
        for fields in self._headers("program", _SEGMENT, self._tables[:3]):
            segment = ElfSegment(*fields)
            if segment.offset + segment.file_size > len(self._data):
                raise self._bad("a segment lies outside the file")
            if max(segment.virtual, segment.physical) + segment.memory_size > _ADDRESSES:
                raise self._bad("a segment lies outside the address space")
            if segment.file_size > segment.memory_size:
                raise self._bad("a segment is longer in the file than in memory")
            yield segment

    def _read_sections(self) -> tuple[ElfSection, ...]:
        rows = list(self._headers("section", _SECTION, self._tables[3:6]))
        if not rows:
            return ()
        names = self._tables[6]
        if names >= len(rows) or rows[names][1] != SectionKind.STRTAB:
            raise self._bad("it has no section names")
        start, size = rows[names][4:6]
        if start + size > len(self._data):
            raise self._bad("the section names lie outside the file")
        strings = bytes(self._data[start : start + size])
        return tuple(self._make_section(index, row, strings) for index, row in enumerate(rows))

    def _make_section(self, index: int, row: tuple[int, ...], strings: bytes) -> ElfSection:
        name = self._string(strings, row[0])
        section = ElfSection(index, name, *row[1:])
        in_file = section.kind not in (SectionKind.NULL, SectionKind.NOBITS)
        if in_file and section.offset + section.size > len(self._data):
            raise self._bad(f"section {name} lies outside the file")
        if section.address + section.size > _ADDRESSES:
            raise self._bad(f"section {name} lies outside the address space")
        if section.alignment & (section.alignment - 1):
            raise self._bad(f"section {name} has an alignment of {section.alignment}")
        return section

    def _find_symtab(self) -> ElfSection | None:
        found = [section for section in self.sections if section.kind == SectionKind.SYMTAB]
        if len(found) > 1:
            raise self._bad("it has more than one symbol table")
        return found[0] if found else None

    def _read_symbols(self) -> Symbols:
        table = self._symtab
        if table is None:
            return np.empty(0, dtype=SYMBOL)
        if table.link >= len(self.sections):
            raise self._bad("its symbol table has no names")
        strings = self.sections[table.link]
        rows = self._rows(table, SYMBOL)
        if strings.kind != SectionKind.STRTAB or np.any(rows["name"] >= strings.size):
            raise self._bad("the names of its symbols are not there")
        ordinary = rows["section"][rows["section"] < SHN_LORESERVE]
        extended = rows["section"] == SHN_LORESERVE + 0xFF  # SHN_XINDEX
        if np.any(ordinary >= len(self.sections)) or np.any(extended):
            raise self._bad("a symbol lies in a section that is not there")
        return rows

    def _rows(self, section: ElfSection, dtype: np.dtype[np.void]) -> NDArray[np.void]:
        """A section as a table of `dtype`."""
        if section.entry_size != dtype.itemsize or section.size % dtype.itemsize:
            raise self._bad(f"section {section.name} is no table of {dtype.itemsize}-byte entries")
        return np.frombuffer(self.content(section), dtype=dtype)

    def _string(self, strings: bytes, start: int) -> str:
        """The string that begins at `start`."""
        end = strings.find(b"\0", start, start + NAME_BYTES_MAX + 1)
        if start >= len(strings) or end < 0:
            raise self._bad("a name has no end, or is too long")
        name = strings[start:end]
        if not name.isascii():
            raise self._bad("a name is not ASCII")
        return name.decode("ascii")
