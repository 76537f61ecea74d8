"""The kernel itself as a unit: from the payload of a bzImage.

The payload is the stripped vmlinux with relocations behind it. What lies in memory after boot
is what the decompressor's parse_elf() leaves (arch/x86/boot/compressed/misc.c): it moves the
segments down inside the buffer that holds the payload, so the gaps between them keep the
payload's own bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.approved.check import check_unit
from pyscan.approved.unit import (
    VMLINUX,
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
from pyscan.compile.draft import OWN, Draft, Slots, relocation_column, symbol_columns
from pyscan.compile.sites import (
    BOUNDED_TABLES,
    THUNKS,
    SiteReader,
    table_between,
    trampoline_column,
)
from pyscan.errors import ApprovedFileError, PackageError
from pyscan.kernel.series import Series, series_of
from pyscan.kernel.symbols import KernelSymbols, parse_kallsyms
from pyscan.package.bzimage import Relocations, relocation_lists
from pyscan.package.elf import Elf

#: Where x86-64 kernels are linked (__START_KERNEL with CONFIG_PHYSICAL_START 16 MiB,
#: arch/x86/include/asm/page_types.h).
LINK_ADDRESS: Final = 0xFFFF_FFFF_8100_0000
_LOAD: Final = 1  # PT_LOAD
_ALLOC: Final = 2  # SHF_ALLOC
_IMAGE_BYTES_MAX: Final = 256 << 20


@dataclass(frozen=True, slots=True, eq=False)
class CompiledKernel:
    """The kernel's unit, and what modules are compiled against."""

    unit: Unit
    series: Series
    banner: str
    symbols: KernelSymbols
    btf: bytes


def compile_vmlinux(payload: bytes) -> CompiledKernel:
    """Compile the decompressed payload of a bzImage.

    Raises PackageError: damaged, not an x86-64 Linux kernel, or of an unknown series.
    """
    elf = Elf(payload)
    image = _loaded_image(elf, payload)
    sections = tuple(
        Section(section.name, section.address - LINK_ADDRESS, section.size)
        for section in elf.sections
        if section.flags & _ALLOC and LINK_ADDRESS <= section.address < LINK_ADDRESS + len(image)
    )
    rodata = _named(sections, ".rodata")
    symbols = parse_kallsyms(_cut(image, rodata), LINK_ADDRESS + rodata.offset, LINK_ADDRESS)
    kernel = _KernelLayout(image, sections, symbols)
    banner = kernel.banner()
    series = series_of(banner)
    draft = kernel.draft(relocation_lists(payload, elf.sections_end))
    replaced = _named(sections, ".altinstr_replacement")
    text = (0, kernel.at("_etext"))
    reader = SiteReader(draft, series, [text, (replaced.offset, replaced.offset + replaced.length)])
    sites = reader.read(kernel.thunks(), trampoline_column(kernel.trampolines()))
    unit = Unit(
        name=VMLINUX,
        link_address=LINK_ADDRESS,
        image=image,
        length=kernel.at("_end"),
        segments=kernel.segments(),
        sections=sections,
        tables=kernel.tables(),
        slots=tuple(draft.slots.rows),
        relocations32=draft.relocations32,
        relocations64=draft.relocations64,
        symbols=kernel.symbol_columns(),
        exports=kernel.exports(),
        sites=sites,
        sizes=(),
        init_function=None,
    )
    try:
        check_unit(unit)
    except ApprovedFileError as error:
        raise PackageError(f"vmlinux: {error}") from error
    return CompiledKernel(unit, series, banner, symbols, _cut(image, _named(sections, ".BTF")))


def _loaded_image(elf: Elf, payload: bytes) -> NDArray[np.uint8]:
    """What parse_elf() leaves in memory, from the first byte of text on."""
    loads = [s for s in elf.segments if s.kind == _LOAD and s.file_size]
    if not loads:
        raise PackageError("vmlinux: no segment to load")
    first = min(s.physical for s in loads)
    length = max(len(payload), *(s.physical - first + s.file_size for s in loads))
    if length > _IMAGE_BYTES_MAX:
        raise PackageError(f"vmlinux: {length} bytes; at most {_IMAGE_BYTES_MAX} are expected")
    raw = np.frombuffer(payload, dtype=np.uint8)
    image = np.zeros(length, dtype=np.uint8)
    image[: len(raw)] = raw
    for segment in loads:
        start = segment.physical - first
        image[start : start + segment.file_size] = raw[
            segment.offset : segment.offset + segment.file_size
        ]
    end = max(s.physical - first + s.file_size for s in loads)
    return image[:end]


def _named(sections: tuple[Section, ...], name: str) -> Section:
    for section in sections:
        if section.name == name and section.length:
            return section
    raise PackageError(f"vmlinux: no section {name}; not a kernel of a supported build")


def _cut(image: NDArray[np.uint8], section: Section) -> bytes:
    if section.offset + section.length > len(image):
        raise PackageError(f"vmlinux: section {section.name} lies outside the image")
    return image[section.offset : section.offset + section.length].tobytes()


class _KernelLayout:
    """Where things are in the image, by the kernel's own symbols."""

    def __init__(
        self, image: NDArray[np.uint8], sections: tuple[Section, ...], symbols: KernelSymbols
    ) -> None:
        self._image = image
        self._sections = sections
        self._symbols = symbols

    def at(self, name: str) -> int:
        """Offset of a symbol. Raises PackageError when it is not there."""
        address = self._symbols.find(name)
        if address is None or address < LINK_ADDRESS:
            raise PackageError(f"vmlinux: no symbol {name}; not a kernel of a supported build")
        return address - LINK_ADDRESS

    def banner(self) -> str:
        """linux_banner (init/version.c), without its newline."""
        start = self.at("linux_banner")
        text = self._image[start : start + 512].tobytes().split(b"\0")[0]
        return text.decode("ascii", "replace").rstrip("\n")

    def draft(self, relocations: Relocations) -> Draft:
        """The image with its relocations, and tables without a section of their own."""
        slots = Slots()
        negated = slots.index(Slot(SlotKind.NEGATED_BASE))
        columns = []
        for width, lists in (
            (4, ((relocations.absolute32, 0), (relocations.inverse32, negated))),
            (8, ((relocations.absolute64, 0),)),
        ):
            offsets = np.concatenate([addresses - _signed(LINK_ADDRESS) for addresses, _ in lists])
            which = np.concatenate([np.full(len(rows), slot) for rows, slot in lists])
            kept = (offsets >= 0) & (offsets <= len(self._image) - width)
            columns.append(relocation_column(offsets[kept], which[kept]))
        bounded = (
            table_between(name, self.at(first), self.at(last))
            for name, (first, last) in BOUNDED_TABLES.items()
        )
        return Draft(
            VMLINUX,
            LINK_ADDRESS,
            self._image,
            (*self._sections, *bounded),
            slots,
            columns[0],
            columns[1],
        )

    def thunks(self) -> dict[tuple[int, int], int]:
        """Register by (slot, offset) of its indirect-branch thunk (arch/x86/lib/retpoline.S)."""
        found = {}
        for number, name in enumerate(THUNKS):
            address = self._symbols.find(name)
            if address is not None:
                found[OWN, address - LINK_ADDRESS] = number
        return found

    def trampolines(self) -> list[tuple[int, int, int]]:
        """Static call trampolines in text, with the address of their key."""
        rows = []
        end = self.at("_etext")
        for address, name in zip(
            self._symbols.addresses.tolist(), self._symbols.names, strict=True
        ):
            if not name.startswith("__SCT__") or not 0 <= address - LINK_ADDRESS < end:
                continue
            key = self._symbols.find("__SCK__" + name.removeprefix("__SCT__"))
            if key is not None:
                rows.append((address - LINK_ADDRESS, 0, _signed(key)))
        return sorted(set(rows))

    def segments(self) -> tuple[Segment, ...]:
        """What is protected after boot (mark_rodata_ro in arch/x86/mm/init_64.c)."""
        text_end = _page_up(self.at("_etext"))
        ro, ro_end = self.at("__start_rodata"), _page_up(self.at("__end_rodata"))
        init, init_end = self.at("__start_ro_after_init"), self.at("__end_ro_after_init")
        jump, calls = self.at("__start___jump_table"), self.at("__stop_static_call_sites")
        if not ro <= init <= jump <= calls <= init_end <= ro_end:
            raise PackageError("vmlinux: read-only data is laid out in an unknown way")
        parts = [
            (SegmentKind.TEXT, 0, text_end),
            (SegmentKind.RODATA, ro, init),
            (SegmentKind.RO_AFTER_INIT, init, jump),
            (SegmentKind.RODATA, jump, calls),
            (SegmentKind.RO_AFTER_INIT, calls, init_end),
            (SegmentKind.RODATA, init_end, ro_end),
        ]
        return tuple(Segment(kind, a, b - a) for kind, a, b in parts if b > a)

    def tables(self) -> tuple[Table, ...]:
        """Tables that the kernel sorts or edits at boot."""
        kinds = (
            ("__jump_table", TableKind.JUMP_TABLE, 16),
            (".static_call_sites", TableKind.STATIC_CALLS, 8),
        )
        rows = []
        for name, kind, entry in kinds:
            first, last = BOUNDED_TABLES[name]
            start = self.at(first)
            rows.append(Table(kind, start, self.at(last) - start, entry))
        return tuple(rows)

    def symbol_columns(self) -> Symbols:
        """All symbols of the image, as columns."""
        addresses = self._symbols.addresses
        kept = np.flatnonzero(addresses >= np.uint64(LINK_ADDRESS))
        functions = np.isin(self._symbols.kinds, np.frombuffer(b"tTwW", dtype=np.uint8))
        return symbol_columns(
            [
                (int(addresses[i]) - LINK_ADDRESS, int(functions[i]), self._symbols.names[i])
                for i in kept.tolist()
            ]
        )

    def exports(self) -> tuple[tuple[str, int, int], ...]:
        """What modules may refer to: __ksymtab and __ksymtab_gpl (struct kernel_symbol)."""
        rows: dict[str, int] = {}
        for name in ("__ksymtab", "__ksymtab_gpl"):
            table = _named(self._sections, name)
            words = np.frombuffer(_cut(self._image, table), dtype="<i4")
            words = words[: len(words) // 3 * 3].reshape(-1, 3).astype(np.int64)
            places = table.offset + 12 * np.arange(len(words), dtype=np.int64)
            values, names = places + words[:, 0], places + 4 + words[:, 1]
            for value, start in zip(values.tolist(), names.tolist(), strict=True):
                if not 0 <= start < len(self._image):
                    raise PackageError(f"vmlinux: an entry of {name} has no name")
                text = self._image[start : start + 512].tobytes().split(b"\0")[0]
                rows[text.decode("ascii", "replace")] = _signed(LINK_ADDRESS) + value
        return tuple((name, 0, addend) for name, addend in sorted(rows.items()))


def _page_up(offset: int) -> int:
    return (offset + 4095) & ~4095


def _signed(address: int) -> int:
    return address - (1 << 64) if address >> 63 else address
