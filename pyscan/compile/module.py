"""A kernel module as a unit: its ELF file laid out and linked as the kernel's loader does it.

Sources: layout_sections() and layout_symtab() in kernel/module/main.c (6.1),
apply_relocate_add() in arch/x86/kernel/module.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.approved.check import check_unit
from pyscan.approved.unit import (
    Column,
    Section,
    Segment,
    SegmentKind,
    Slot,
    SlotKind,
    Symbols,
    Table,
    TableKind,
    Unit,
)
from pyscan.compile.draft import Draft, Slots, relocation_column, symbol_columns
from pyscan.compile.sites import THUNKS, SiteReader, trampoline_column
from pyscan.errors import ApprovedFileError, PackageError
from pyscan.kernel.series import Series
from pyscan.package.elf import Elf, ElfSection

_WRITE: Final = 1  # SHF_WRITE
_ALLOC: Final = 2  # SHF_ALLOC
_EXEC: Final = 4  # SHF_EXECINSTR
_RO_AFTER_INIT: Final = 0x0020_0000  # SHF_RO_AFTER_INIT, include/linux/moduleloader.h
_NULL: Final = 0
_NOBITS: Final = 8
_RELA: Final = 4
_UNDEFINED: Final = 0
_ABSOLUTE: Final = 0xFFF1  # SHN_ABS
_GLOBAL: Final = 1  # STB_GLOBAL and above: not local
_PAGE: Final = 4096
_LAYOUT_BYTES_MAX: Final = 64 << 20
#: Sections that the loader does not keep, whatever their flags say (kernel/module/main.c).
_DISCARDED: Final = frozenset({".modinfo", "__versions", ".data..percpu"})
#: (flags that a section must have, flags that it must not have), in the order of the layout.
_PARTS: Final = (
    (_EXEC | _ALLOC, 0),
    (_ALLOC, _WRITE),
    (_RO_AFTER_INIT | _ALLOC, 0),
    (_WRITE | _ALLOC, _RO_AFTER_INIT),
)
#: Relocation types: (width in bytes, relative to the place). R_X86_64_*, psABI 4.4.
_TYPES: Final = {
    1: (8, False),  # R_X86_64_64
    2: (4, True),  # PC32
    4: (4, True),  # PLT32
    10: (4, False),  # 32
    11: (4, False),  # 32S
    24: (8, True),  # PC64
}
_NONE: Final = 0
#: Tables of a module that are sorted or edited when it is loaded (kernel/module/main.c,
#: post_relocation(); kernel/trace/ftrace.c; kernel/static_call_inline.c).
_TABLES: Final = (
    ("__jump_table", TableKind.JUMP_TABLE, 16),
    (".static_call_sites", TableKind.STATIC_CALLS, 8),
    ("__ex_table", TableKind.EXCEPTIONS, 12),
    (".orc_unwind_ip", TableKind.ORC_IP, 4),
    (".orc_unwind", TableKind.ORC_ENTRY, 6),
    ("__mcount_loc", TableKind.MCOUNT, 8),
)


@dataclass(frozen=True, slots=True)
class _Place:
    """What a symbol's value is made of: a slot kind and an addend. A constant has no kind."""

    kind: SlotKind | None
    addend: int
    name: str = ""


def compile_module(name: str, data: bytes, series: Series) -> Unit:
    """Compile one .ko file. Raises PackageError that names the module."""
    try:
        unit = _Linker(name, Elf(data), series).unit()
        check_unit(unit)
    except (PackageError, ApprovedFileError) as error:
        raise PackageError(f"module {name}: {error}") from error
    return unit


class _Linker:
    """Lays one module out at address 0 and says what remains unknown."""

    def __init__(self, name: str, elf: Elf, series: Series) -> None:
        self._name = name
        self._elf = elf
        self._series = series
        self._slots = Slots()
        self._core, self._sizes = self._layout(init=False)
        self._init, _ = self._layout(init=True)
        self._symbols = elf.symbols()
        self._names = elf.symbol_names()
        self._image = self._load()

    def unit(self) -> Unit:
        """The finished unit."""
        text_size, ro_size, after_init_size, size = self._sizes
        places = [self._place(index) for index in range(len(self._symbols))]
        draft = self._relocate(places)
        sites = SiteReader(draft, self._series, [(0, text_size)]).read(
            self._thunks(), trampoline_column(self._trampolines())
        )
        exports = self._exports(places)  # may need slots that nothing else does
        parts = (
            (SegmentKind.TEXT, 0, text_size),
            (SegmentKind.RODATA, text_size, ro_size),
            (SegmentKind.RO_AFTER_INIT, ro_size, after_init_size),
        )
        return Unit(
            name=self._name,
            link_address=0,
            # Writable data is not watched; its tables have been read.
            image=self._image[:after_init_size].copy(),
            length=size,
            segments=tuple(Segment(kind, a, b - a) for kind, a, b in parts if b > a),
            sections=tuple(s for s in draft.sections if s.offset + s.length <= after_init_size),
            tables=self._tables(after_init_size),
            slots=tuple(draft.slots.rows),
            relocations32=_below(draft.relocations32, after_init_size),
            relocations64=_below(draft.relocations64, after_init_size),
            symbols=self._symbol_columns(places),
            exports=exports,
            sites=sites,
            sizes=self._sizes,
            init_function=self._init_function(places),
        )

    def _flags(self, section: ElfSection) -> int:
        flags = section.flags
        if section.name in _DISCARDED:
            flags &= ~_ALLOC
        if section.name in self._series.module_ro_after_init:
            flags |= _RO_AFTER_INIT
        return flags

    def _layout(self, *, init: bool) -> tuple[dict[int, int], tuple[int, ...]]:
        """Offset of every section by its index, and the sizes after each part."""
        offsets: dict[int, int] = {}
        sizes = []
        size = 0
        for wanted, unwanted in _PARTS:
            for section in self._elf.sections:
                flags = self._flags(section)
                if flags & wanted != wanted or flags & unwanted or section.index in offsets:
                    continue
                if section.name.startswith(".init") != init:
                    continue
                alignment = max(1, section.alignment)
                size = -(-size // alignment) * alignment
                offsets[section.index] = size
                size += section.size
                if size > _LAYOUT_BYTES_MAX:
                    raise PackageError(f"more than {_LAYOUT_BYTES_MAX} bytes in memory")
            size = -(-size // _PAGE) * _PAGE
            sizes.append(size)
        return offsets, tuple(sizes)

    def _load(self) -> NDArray[np.uint8]:
        """All of the core layout; the loader leaves zeros between sections."""
        image = np.zeros(self._sizes[3], dtype=np.uint8)
        for index, offset in self._core.items():
            section = self._elf.sections[index]
            if section.kind not in (_NULL, _NOBITS):
                content = np.frombuffer(self._elf.content(section), dtype=np.uint8)
                image[offset : offset + section.size] = content
        return image

    def _place(self, index: int) -> _Place:
        """What the value of symbol `index` is made of."""
        symbol = self._symbols[index]
        section, value = int(symbol["section"]), int(symbol["value"])
        if section == _UNDEFINED:
            return _Place(SlotKind.SYMBOL, 0, self._names[index])
        if section in self._core:
            return _Place(SlotKind.BASE, self._core[section] + value)
        if section in self._init:
            return _Place(SlotKind.INIT, self._init[section] + value)
        if (
            section < len(self._elf.sections)
            and self._elf.sections[section].name == ".data..percpu"
        ):
            return _Place(SlotKind.PERCPU, value)
        return _Place(None, value)

    def _relocate(self, places: list[_Place]) -> Draft:
        """Apply what is known, and list the rest."""
        rows: dict[int, list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = {4: [], 8: []}
        for section in self._elf.sections:
            offset = self._core.get(section.info)
            if section.kind == _RELA and offset is not None:
                target = self._elf.sections[section.info]
                if target.kind in (_NULL, _NOBITS):
                    continue
                for width, found in self._relocate_section(section, offset, target.size, places):
                    rows[width].append(found)
        columns = [
            relocation_column(
                np.concatenate([offsets for offsets, _ in rows[width]] or [np.empty(0, np.int64)]),
                np.concatenate([slots for _, slots in rows[width]] or [np.empty(0, np.int64)]),
            )
            for width in (4, 8)
        ]
        sections = tuple(
            Section(self._elf.sections[index].name, offset, self._elf.sections[index].size)
            for index, offset in sorted(self._core.items(), key=lambda item: item[1])
        )
        return Draft(self._name, 0, self._image, sections, self._slots, columns[0], columns[1])

    def _relocate_section(
        self, section: ElfSection, offset: int, size: int, places: list[_Place]
    ) -> list[tuple[int, tuple[NDArray[np.int64], NDArray[np.int64]]]]:
        rows = self._elf.relocations(section)
        types = (rows["info"] & np.uint64(0xFFFF_FFFF)).astype(np.int64)
        which = (rows["info"] >> np.uint64(32)).astype(np.int64)
        if len(rows) and int(which.max()) >= len(places):
            raise PackageError(f"{section.name} names a symbol that does not exist")
        found = []
        for kind in np.unique(types).tolist():
            if kind == _NONE:
                continue
            form = _TYPES.get(kind)
            if form is None:
                raise PackageError(f"{section.name}: unknown relocation type {kind}")
            width, relative = form
            same = types == kind
            at = rows["offset"][same].astype(np.int64)
            if len(at) and (at.min() < 0 or at.max() > size - width):
                raise PackageError(f"{section.name}: a relocation lies outside its section")
            at += offset
            slots, addends = self._values(which[same], places, relative)
            with np.errstate(over="ignore"):
                addends += rows["addend"][same]
            if relative:
                addends -= at
            self._put(at, addends, width)
            kept = slots >= 0
            found.append((width, (at[kept], slots[kept])))
        return found

    def _values(
        self, which: NDArray[np.int64], places: list[_Place], relative: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Slot (or -1) and known part of the value of every relocation's symbol."""
        used, inverse = np.unique(which, return_inverse=True)
        slots = [self._slot(places[index], relative) for index in used.tolist()]
        addends = [places[index].addend for index in used.tolist()]
        return (
            np.array(slots, dtype=np.int64)[inverse],
            np.array(addends, dtype=np.uint64).astype(np.int64)[inverse],
        )

    def _slot(self, place: _Place, relative: bool) -> int:
        """The unknown part of a reference, -1 where there is none."""
        if place.kind is None:  # a constant
            return self._slots.index(Slot(SlotKind.NEGATED_BASE)) if relative else -1
        if place.kind is SlotKind.BASE:  # it moves together with the place that refers to it
            return -1 if relative else self._slots.index(Slot(SlotKind.BASE))
        return self._slots.index(Slot(place.kind, place.name, relative=relative))

    def _put(self, at: NDArray[np.int64], values: NDArray[np.int64], width: int) -> None:
        data = values.astype("<i8")[:, None].view(np.uint8)[:, :width]
        self._image[at[:, None] + np.arange(width)] = data

    def _thunks(self) -> dict[tuple[int, int], int]:
        """Register by (slot, addend) of the indirect-branch thunks that the module uses."""
        unknown = np.flatnonzero(self._symbols["section"] == _UNDEFINED).tolist()
        used = {self._names[index] for index in unknown}
        return {
            (self._slots.index(Slot(SlotKind.SYMBOL, thunk)), 0): number
            for number, thunk in enumerate(THUNKS)
            if thunk in used
        }

    def _trampolines(self) -> list[tuple[int, int, int]]:
        """Static call trampolines that the module defines, with their keys."""
        by_name = {self._names[index]: index for index in range(len(self._names))}
        rows = []
        for name, index in by_name.items():
            place = self._place(index)
            if not name.startswith("__SCT__") or place.kind is not SlotKind.BASE:
                continue
            key = by_name.get("__SCK__" + name.removeprefix("__SCT__"))
            where = self._place(key) if key is not None else None
            if where is not None and where.kind is SlotKind.BASE and place.addend < self._sizes[0]:
                rows.append((place.addend, 0, where.addend))
        return sorted(set(rows))

    def _tables(self, end: int) -> tuple[Table, ...]:
        found = []
        for index, offset in self._core.items():
            section = self._elf.sections[index]
            for name, kind, entry in _TABLES:
                if section.name == name and section.size and offset + section.size <= end:
                    found.append(Table(kind, offset, section.size // entry * entry, entry))
        return tuple(sorted(found, key=lambda table: table.offset))

    def _symbol_columns(self, places: list[_Place]) -> Symbols:
        rows = []
        for index, place in enumerate(places):
            name = self._names[index]
            if place.kind is not SlotKind.BASE or not name:
                continue
            section = self._elf.sections[int(self._symbols[index]["section"])]
            kind = int(self._symbols[index]["info"]) & 15
            function = bool(section.flags & _EXEC) and kind in (0, 2)
            rows.append((place.addend, int(function), name))
        return symbol_columns(rows)

    def _exports(self, places: list[_Place]) -> tuple[tuple[str, int, int], ...]:
        names = {}
        for index, place in enumerate(places):
            if int(self._symbols[index]["info"]) >> 4 >= _GLOBAL and place.kind is not None:
                names[self._names[index]] = place
        rows = []
        for name in self._names:
            if name.startswith("__ksymtab_"):
                found = names.get(name.removeprefix("__ksymtab_"))
                if found is not None and found.kind in (SlotKind.BASE, SlotKind.PERCPU):
                    slot = self._slots.index(Slot(found.kind))
                    rows.append((name.removeprefix("__ksymtab_"), slot, found.addend))
        return tuple(sorted(set(rows)))

    def _init_function(self, places: list[_Place]) -> int | None:
        for index, name in enumerate(self._names):
            if name == "init_module" and places[index].kind is SlotKind.INIT:
                return places[index].addend
        return None


def _below(relocations: Column, end: int) -> Column:
    """The rows (sorted by offset) that lie below `end`."""
    return relocations[: int(np.searchsorted(relocations["offset"], end))].copy()
