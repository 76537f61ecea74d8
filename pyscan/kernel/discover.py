"""Finding a Linux kernel in physical memory by its page tables alone, free of symbols.

The kernel's own top-level table, `init_top_pgt` (arch/x86/kernel/head_64.S), is the only
table in memory with all of these properties:

* its last entry leads - through `level4_kernel_pgt` when there are five levels - to
  `level3_kernel_pgt`, whose entry 510 leads to `level2_kernel_pgt`, which maps the image;
* the table itself and these other tables lie in the image that they map, since all are in
  the kernel's data section. The table of a process has the same last entry but is
  allocated; the user half of a table under page-table isolation leads to tables of its
  own (arch/x86/mm/pti.c); the copy that EFI or the real-mode trampoline uses
  (arch/x86/realmode/init.c) lies in low or allocated memory;
* the image holds a pointer to it at its address in the image (init_mm.pgd,
  mm/init-mm.c). Tables of processes do come to lie in the image, where the kernel has
  freed the gaps between its sections and its init code (free_kernel_image_pages), but are
  known by their address in the direct map;
* its direct map maps the table itself: `early_top_pgt` and `level4_kernel_pgt`, in the
  image too, have no direct map;
* the real-mode trampoline's table below 1 MiB shares its last entry (setup_real_mode).
  Every boot writes that anew, while the kernel of an earlier boot often stays behind in
  memory that nobody has used again, with all the other properties. So this one fails
  from the moment that another kernel has booted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.errors import KernelNotFound
from pyscan.kernel.layout import IMAGE_ALIGN, KERNEL_IMAGE, LAYOUTS, LOW_MEMORY_END, PagingLayout
from pyscan.records import PAGE_SHIFT, PAGE_SIZE, MemoryMap, MemoryRegion, PageStatus, RegionKind
from pyscan.sources.base import Frames, Source, is_ram, populated
from pyscan.translate import EXECUTABLE, PagingFormat, translate, walk

U64 = NDArray[np.uint64]

#: Frames read at a time: bounds memory to a few MiB.
_CHUNK_FRAMES: Final = 1024

#: Different images looked at, and tables inside their own image examined in full. A real
#: machine has one of each; memory made to look like many kernels is refused.
_IMAGES_MAX: Final = 16
_FINALISTS_MAX: Final = 16

_IMAGE_BYTES_MAX: Final = KERNEL_IMAGE.last - KERNEL_IMAGE.first + 1
_GIB_SHIFT: Final = 30  # the direct map starts at a multiple of a 1 GiB entry (PUD_SIZE)
_ADDRESS_MASK: Final = (1 << 64) - 1
_NONE: Final = np.empty(0, dtype=np.uint64)
_LAST: Final = 511
_MM_WORDS: Final = 64  # between two members of struct mm_struct, at most
_NAMES_MAX: Final = 256  # pointers to one table that are looked at, in each part of an image
_IMAGE_ENTRY: Final = 510  # of level3_kernel_pgt: (KERNEL_IMAGE.first >> 30) & 511


@dataclass(frozen=True, slots=True)
class KernelImage:
    """A kernel found in memory; addresses in bytes."""

    root_gpa: int  # init_top_pgt
    paging_levels: int
    virtual_base: int  # lowest mapped address of the image (_text)
    physical_base: int
    image_bytes: int  # up to the end of its highest mapped page


def find_kernel(source: Source) -> KernelImage:
    """Search all RAM for the running kernel.

    Time and memory are bounded whatever the memory holds. Raises KernelNotFound: there is
    none, more than one, or too many look-alikes.
    """
    memory = source.regions()
    _check_access(source)
    search = _Search(source, memory, _trampoline_tables(source))
    for frames in _chunks(populated(source)):
        search.look(frames)
    found = search.kernels()
    unread = f"; {search.unreadable} pages could not be read" if search.unreadable else ""
    if search.overflow:
        raise KernelNotFound(
            f"{source.uri}: too many page tables that look like a kernel's{unread}; "
            "the memory was tampered with, examine it by hand"
        )
    if not found:
        raise KernelNotFound(
            f"{source.uri}: no Linux kernel in the {search.frames} pages searched{unread}; check "
            "the memory map (machine=, size=) and that the machine has booted"
        )
    if len(found) > 1:
        roots = ", ".join(f"{kernel.root_gpa:#x}" for kernel in found)
        raise KernelNotFound(
            f"{source.uri}: more than one kernel, with page tables at {roots}{unread}; "
            "power the machine off and on, so that it starts with clean memory"
        )
    return found[0]


def _check_access(source: Source) -> None:
    """Raise KernelNotFound when low memory, without which no kernel is known, is out of reach.

    A search of all memory that cannot be read would take long and find nothing.
    """
    frames = np.arange(LOW_MEMORY_END >> PAGE_SHIFT, dtype=np.uint64)
    statuses = source.read(frames, np.empty((len(frames), PAGE_SIZE), dtype=np.uint8))
    lost = statuses[~np.isin(statuses, (PageStatus.OK, PageStatus.HOLE))]
    if len(lost) and PageStatus.OK not in statuses:
        status = PageStatus(int(lost[0])).name.lower().replace("_", " ")
        raise KernelNotFound(
            f"{source.uri}: access lost: none of the {len(lost)} pages of low memory could be read "
            f"({status}); check the way to the memory: card, link, IOMMU"
        )


def check_root(source: Source, root_gpa: int, levels: int) -> KernelImage:
    """Validate a known kernel page table as `find_kernel` does, without a search.

    Raises KernelNotFound that says which property it lacks.
    """
    layout = LAYOUTS.get(levels)
    if layout is None:
        raise KernelNotFound(f"{source.uri}: {levels} paging levels; known are 4 and 5")
    if root_gpa & ~layout.form.address:
        raise KernelNotFound(f"{source.uri}: {root_gpa:#x} is no address of a page table")
    try:
        return _judge(source, root_gpa, layout)
    except _NotAKernelError as error:
        raise KernelNotFound(
            f"{source.uri}: the page table at {root_gpa:#x} is not a kernel's: {error}; the "
            "machine was restarted or its page tables were tampered with"
        ) from error


class _NotAKernelError(Exception):
    """What speaks against a table being a kernel's."""


@dataclass(slots=True)
class _Search:
    """State of one search."""

    source: Source
    memory: MemoryMap
    trampolines: U64  # see _trampoline_tables
    frames: int = 0
    unreadable: int = 0
    overflow: bool = False
    named: dict[tuple[int, int], U64] = field(default_factory=dict)
    finalists: list[tuple[int, PagingLayout]] = field(default_factory=list)
    buffer: NDArray[np.uint8] = field(
        default_factory=lambda: np.empty((_CHUNK_FRAMES, PAGE_SIZE), dtype=np.uint8)
    )

    def look(self, frames: Frames) -> None:
        """Make finalists of the pages among `frames` that may be a kernel's top table."""
        pages = self.buffer[: len(frames)]
        good = self.source.read(frames, pages) == PageStatus.OK
        self.frames += len(frames)
        self.unreadable += int((~good).sum())
        roots = frames[good] << np.uint64(PAGE_SHIFT)
        entries = pages.view("<u8")[good, _LAST]
        for layout in LAYOUTS.values():
            self.follow(layout, roots, entries)

    def follow(self, layout: PagingLayout, roots: U64, entries: U64) -> None:
        """Follow the last entry of each root down to the image; cheapest tests first."""
        address = np.uint64(layout.form.address)
        kept = self.leads(layout.form, roots, entries)
        kept &= np.isin(entries & address, self.trampolines)
        roots, below = roots[kept], entries[kept] & address
        table = below
        for index in _path(layout.form)[1:]:
            unique, which = np.unique(table, return_inverse=True)
            entries = _read_tables(self.source, unique)[which, index]
            kept = self.leads(layout.form, roots, entries)
            roots, below, table = roots[kept], below[kept], entries[kept] & address
        for shared in np.unique(below):  # all processes share the kernel's
            self.admit(layout, roots[below == shared], int(shared))

    def leads(self, form: PagingFormat, roots: U64, entries: U64) -> NDArray[np.bool_]:
        """Which entries lead to a table in RAM that can be in one image with its root."""
        bits = np.uint64(form.present | form.large)
        kept: NDArray[np.bool_] = (entries & bits) == np.uint64(form.present)
        table = entries & np.uint64(form.address)
        kept &= (np.maximum(roots, table) - np.minimum(roots, table)) < np.uint64(_IMAGE_BYTES_MAX)
        kept[kept] = is_ram(self.memory, table[kept] >> np.uint64(PAGE_SHIFT))
        return kept

    def admit(self, layout: PagingLayout, roots: U64, below: int) -> None:
        """Make finalists of the roots that the image, mapped through `below`, has a name for."""
        key = (len(layout.form.levels), below)
        if key not in self.named:
            if len(self.named) == _IMAGES_MAX:
                self.overflow = True
                return
            try:
                kernel = _map_image(self.source, int(roots[0]), layout)
                self.named[key] = _named_pages(self.source, kernel)
            except _NotAKernelError:
                self.named[key] = _NONE
        for root in roots[np.isin(roots, self.named[key])].tolist():
            if len(self.finalists) == _FINALISTS_MAX:
                self.overflow = True
                return
            self.finalists.append((root, layout))

    def kernels(self) -> list[KernelImage]:
        """The finalists that have every property of a kernel's top-level table.

        Where several share one image, the others are tables of processes, alive or freed, in
        freed parts of the image whose address happens to be stored in it (__init_begin).
        """
        found = []
        for root, layout in self.finalists:
            with suppress(_NotAKernelError):
                found.append(_judge(self.source, root, layout))
        images: dict[tuple[int, int], list[KernelImage]] = {}
        for kernel in found:
            images.setdefault((kernel.virtual_base, kernel.physical_base), []).append(kernel)
        kept = []
        for same in images.values():
            own = same if len(same) == 1 else [k for k in same if _is_init_mm(self.source, k)]
            kept += own or same
        return kept


def _judge(source: Source, root_gpa: int, layout: PagingLayout) -> KernelImage:
    """The kernel whose top-level table is at `root_gpa`. Raises _NotAKernelError."""
    kernel = _map_image(source, root_gpa, layout)
    tables = [root_gpa]
    for index in _path(layout.form):
        entries = _read_tables(source, np.array(tables[-1:], dtype=np.uint64))
        tables.append(int(entries[0, index]) & layout.form.address)
    for table in tables:
        if not kernel.physical_base <= table < kernel.physical_base + kernel.image_bytes:
            raise _NotAKernelError(f"the table at {table:#x} lies outside the image that it maps")
    if tables[1] not in _trampoline_tables(source):
        raise _NotAKernelError("the real-mode trampoline does not belong to it")
    if not _is_named(source, kernel, root_gpa):
        raise _NotAKernelError("its own kernel has no pointer to it")
    base = _direct_map_base(source, root_gpa, layout)
    found = translate(source, root_gpa, layout.form, base + root_gpa)
    if found.gpa != root_gpa:
        why = found.reason or "it leads to another page"
        raise _NotAKernelError(f"its direct map does not lead to itself ({why})")
    return kernel


def _map_image(source: Source, root_gpa: int, layout: PagingLayout) -> KernelImage:
    """The image that a table maps. Raises _NotAKernelError.

    The image is linear: one distance between virtual and physical addresses. A minority
    of pages may deviate: that is a finding for a sweep, not a reason to lose the kernel.
    """
    found = walk(source, root_gpa, layout.form, [KERNEL_IMAGE])
    leaves = found.leaves
    if not found.complete:
        raise _NotAKernelError(f"its image cannot be walked ({found.anomalies[0]})")
    if not len(leaves):
        raise _NotAKernelError("it maps no kernel image")
    which = np.unique(leaves.gpa - leaves.address, return_inverse=True)[1]
    sizes = np.bincount(which, weights=leaves.size)
    if sizes.max() * 2 <= sizes.sum():
        raise _NotAKernelError("its image is scattered over physical memory")
    first, last = np.flatnonzero(which == sizes.argmax())[[0, -1]]
    kernel = KernelImage(
        root_gpa=root_gpa,
        paging_levels=len(layout.form.levels),
        virtual_base=int(leaves.address[first]),
        physical_base=int(leaves.gpa[first]),
        image_bytes=int(leaves.address[last] - leaves.address[first] + leaves.size[last]),
    )
    if (kernel.virtual_base | kernel.physical_base) % IMAGE_ALIGN:
        raise _NotAKernelError("its image is not aligned")
    if not leaves.flags[first] & EXECUTABLE:
        raise _NotAKernelError("its image does not start with executable pages")
    return kernel


def _named_pages(source: Source, kernel: KernelImage) -> U64:
    """Physical addresses of the pages that the image points to at their image address."""
    found = [_NONE]
    for words in _image_words(source, kernel):
        offsets = words - np.uint64(kernel.virtual_base)  # wraps below the image
        inside = offsets[offsets < np.uint64(kernel.image_bytes)]
        found.append(np.unique(inside[inside % np.uint64(PAGE_SIZE) == 0]))
    return np.unique(np.concatenate(found)) + np.uint64(kernel.physical_base)


def _is_named(source: Source, kernel: KernelImage, gpa: int) -> bool:
    """Whether `gpa` is one of the `_named_pages`."""
    name = np.uint64(kernel.virtual_base + gpa - kernel.physical_base)
    return any((words == name).any() for words in _image_words(source, kernel))


def _image_words(source: Source, kernel: KernelImage) -> Iterator[U64]:
    """The image's content as 64-bit words, in parts; pages that cannot be read are zeros."""
    for frames in _chunks([MemoryRegion(kernel.physical_base, kernel.image_bytes)]):
        yield _read_tables(source, frames << np.uint64(PAGE_SHIFT))


def _direct_map_base(source: Source, root_gpa: int, layout: PagingLayout) -> int:
    """Virtual address of physical address 0: the first 1 GiB entry of the direct map.

    Raises _NotAKernelError.
    """
    form, span = layout.form, layout.direct_map
    table, address = root_gpa, -1 << form.address_bits
    for level in form.levels:
        entries = _read_tables(source, np.array([table], dtype=np.uint64))[0]
        for index in np.flatnonzero(entries & np.uint64(form.present)).tolist():
            mapped = (address + (index << level.shift)) & _ADDRESS_MASK
            if mapped + level.span - 1 >= span.first and mapped <= span.last:
                break
        else:
            break
        if level.shift == _GIB_SHIFT:
            return mapped
        table, address = int(entries[index]) & form.address, mapped
    raise _NotAKernelError("it has no direct map")


def _trampoline_tables(source: Source) -> U64:
    """Tables that the last entries of the pages below 1 MiB lead to."""
    low = np.arange(LOW_MEMORY_END >> PAGE_SHIFT, dtype=np.uint64) << np.uint64(PAGE_SHIFT)
    entries = _read_tables(source, low)[:, _LAST]
    form = LAYOUTS[4].form  # entries are the same in both formats
    present = (entries & np.uint64(form.present)) != 0
    return np.unique(entries[present] & np.uint64(form.address))


def _is_init_mm(source: Source, kernel: KernelImage) -> bool:
    """Whether the image's pointer to the table is init_mm.pgd.

    In struct mm_struct (include/linux/mm_types.h) start_code follows within _MM_WORDS words,
    and that of init_mm is _text, the first byte of the image (setup_initial_init_mm).
    """
    name = np.uint64(kernel.virtual_base + kernel.root_gpa - kernel.physical_base)
    before = _NONE
    for part in _image_words(source, kernel):
        words = np.concatenate((before, part.reshape(-1)))
        for place in np.flatnonzero(words == name)[:_NAMES_MAX].tolist():
            if (words[place + 1 : place + _MM_WORDS] == np.uint64(kernel.virtual_base)).any():
                return True
        before = words[-_MM_WORDS:]
    return False


def _path(form: PagingFormat) -> tuple[int, ...]:
    """Entries to follow from the top-level table to the one that maps the image."""
    return (*(_LAST,) * (len(form.levels) - 3), _IMAGE_ENTRY)


def _read_tables(source: Source, gpas: U64) -> U64:
    """Entries of tables, shape (n, 512); nothing is present in one that cannot be read."""
    pages = np.empty((len(gpas), PAGE_SIZE), dtype=np.uint8)
    statuses = source.read(gpas >> np.uint64(PAGE_SHIFT), pages)
    pages[statuses != PageStatus.OK] = 0
    return pages.view("<u8")


def _chunks(memory: Iterable[MemoryRegion]) -> Iterator[Frames]:
    for region in memory:
        if region.kind is not RegionKind.RAM:
            continue
        end = region.end >> PAGE_SHIFT
        for start in range(region.gpa >> PAGE_SHIFT, end, _CHUNK_FRAMES):
            yield np.arange(start, min(start + _CHUNK_FRAMES, end), dtype=np.uint64)
