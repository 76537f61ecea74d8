"""The kernel pages that are watched: what is executable, and what must not be written.

Executable pages of the image and of the module range are all watched, and so are the
read-only pages of the module range. Of the image's read-only pages only its own are:

* its read-only data, which begins at the first 2 MiB boundary behind its text
  (X86_ALIGN_RODATA_BEGIN in arch/x86/kernel/vmlinux.lds.S), and
* the interrupt descriptor table, known by its read-only alias.

The others are leftovers. The kernel gives the gaps behind text and read-only data and its
init sections to the page allocator (arch/x86/mm/init.c, free_kernel_image_pages); when a
module or a BPF program lives there for a while, its page is made read-only in the image's
mapping too (cpa_process_alias in arch/x86/mm/pat/set_memory.c), and stays so after the
page went to somebody who writes it through the direct map.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyscan.kernel.discover import KernelImage
from pyscan.kernel.layout import IMAGE_ALIGN, KERNEL_IMAGE, LAYOUTS, MODULES, READ_ONLY_IDT
from pyscan.records import PAGE_SHIFT, PAGE_SIZE
from pyscan.sources.base import Frames, Source
from pyscan.translate import (
    EXECUTABLE,
    WRITABLE,
    Anomaly,
    AnomalyKind,
    Leaves,
    WalkLimits,
    translate,
    walk,
)


@dataclass(frozen=True, slots=True)
class WatchedPages:
    """4 KiB pages as columns of one length, ascending by `addresses`.

    A page may lead outside RAM: it keeps its frame, and reading it gives HOLE.
    `anomalies` is bounded; `anomalies_total` counts all of them.
    """

    addresses: NDArray[np.uint64]  # virtual
    frames: Frames
    flags: NDArray[np.uint8]  # EXECUTABLE | WRITABLE
    anomalies: tuple[Anomaly, ...]
    anomalies_total: int

    def __len__(self) -> int:
        return len(self.addresses)


def watched_pages(source: Source, kernel: KernelImage) -> WatchedPages:
    """The pages of a running kernel whose content must not change, as this module tells."""
    mapped = mapped_pages(source, kernel)
    executable = (mapped.flags & EXECUTABLE) != 0
    image = mapped.addresses <= np.uint64(KERNEL_IMAGE.last)
    kept = executable | ~image
    loose = np.flatnonzero(~kept)
    kept[loose] = _own_data(source, kernel, mapped, loose)
    return WatchedPages(
        addresses=mapped.addresses[kept],
        frames=mapped.frames[kept],
        flags=mapped.flags[kept],
        anomalies=mapped.anomalies,
        anomalies_total=mapped.anomalies_total,
    )


def mapped_pages(source: Source, kernel: KernelImage) -> WatchedPages:
    """All pages of the kernel image and of the module range that are executable or read-only.

    A mapping that is writable and executable is watched too, and an anomaly besides. Large
    pages are listed as 4 KiB pages.
    """
    limits = WalkLimits()
    form = LAYOUTS[kernel.paging_levels].form
    found = walk(source, kernel.root_gpa, form, [KERNEL_IMAGE, MODULES], limits)
    leaves = found.leaves
    executable = (leaves.flags & EXECUTABLE) != 0
    writable = (leaves.flags & WRITABLE) != 0
    both = np.flatnonzero(executable & writable)
    room = limits.anomalies_max - len(found.anomalies)
    rogue = tuple(_writable_executable(leaves, int(row)) for row in both[:room])
    addresses, frames, flags = _small_pages(leaves, executable | ~writable)
    return WatchedPages(
        addresses=addresses,
        frames=frames,
        flags=flags & np.uint8(EXECUTABLE | WRITABLE),
        anomalies=found.anomalies + rogue,
        anomalies_total=found.anomalies_total + len(both),
    )


def _own_data(
    source: Source, kernel: KernelImage, mapped: WatchedPages, rows: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Which of the image's read-only pages (`rows` of `mapped`) are the image's own."""
    addresses, frames = mapped.addresses[rows], mapped.frames[rows]
    form = LAYOUTS[kernel.paging_levels].form
    table = translate(source, kernel.root_gpa, form, READ_ONLY_IDT).gpa
    own = np.zeros(len(rows), dtype=bool)
    if table is not None:
        own |= frames == np.uint64(table >> PAGE_SHIFT)
    aligned = np.flatnonzero(addresses % np.uint64(IMAGE_ALIGN) == 0)
    if not len(aligned):
        return own
    first = int(aligned[0])
    step = np.arange(len(rows) - first, dtype=np.uint64) * np.uint64(PAGE_SIZE)
    run = addresses[first:] == addresses[first] + step
    run &= ~_used_elsewhere(source, kernel, frames[first:])
    run &= ~np.isin(frames[first:], mapped.frames[mapped.addresses >= np.uint64(MODULES.first)])
    length = int(np.argmin(run)) if not run.all() else len(run)
    own[first : first + length] = True
    return own


def _used_elsewhere(source: Source, kernel: KernelImage, frames: Frames) -> NDArray[np.bool_]:
    """Which frames somebody else may write or owns, by the mappings outside the image.

    The image's own data is read-only in the direct map, and mapped nowhere else.
    """
    layout = LAYOUTS[kernel.paging_levels]
    limits = WalkLimits(tables_max=1 << 16, leaves_max=1 << 25)
    leaves = walk(source, kernel.root_gpa, layout.form, [layout.direct_map], limits).leaves
    used = np.zeros(len(frames), dtype=bool)
    if not len(leaves):
        return used
    which = np.unique(leaves.address - leaves.gpa, return_inverse=True)[1]
    direct = which == np.bincount(which, weights=leaves.size).argmax()
    owned = ~direct | ((leaves.flags & WRITABLE) != 0)
    first = leaves.gpa[owned] >> np.uint64(PAGE_SHIFT)
    count = leaves.size[owned] >> np.uint64(PAGE_SHIFT)
    low, high = frames.min(), frames.max()
    near = (first <= high) & (first + count > low)
    for start, pages in zip(first[near], count[near], strict=True):
        used |= (frames >= start) & (frames < start + pages)
    return used


def place(address: int, flags: int, kernel: KernelImage) -> str:
    """Where an address is, free of symbols: "kernel text +0x1f5000", "module rodata +0x3000".

    The offset counts from the image's virtual base, or from the start of the module range;
    `flags` are those of WatchedPages.
    """
    area, base = ("kernel", kernel.virtual_base)
    if address in MODULES:
        area, base = ("module", MODULES.first)
    content = "text" if flags & EXECUTABLE else "rodata"
    return f"{area} {content} {address - base:+#x}"


def _small_pages(
    leaves: Leaves, kept: NDArray[np.bool_]
) -> tuple[NDArray[np.uint64], Frames, NDArray[np.uint8]]:
    """Address, frame and flags of every 4 KiB page of the leaves that are `kept`."""
    counts = (leaves.size[kept] >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    starts = np.cumsum(counts) - counts
    inside = (np.arange(counts.sum()) - np.repeat(starts, counts)).astype(np.uint64)
    addresses = np.repeat(leaves.address[kept], counts) + inside * np.uint64(PAGE_SIZE)
    frames = np.repeat(leaves.gpa[kept] >> np.uint64(PAGE_SHIFT), counts) + inside
    return addresses, frames, np.repeat(leaves.flags[kept], counts)


def _writable_executable(leaves: Leaves, row: int) -> Anomaly:
    return Anomaly(AnomalyKind.WRITABLE_EXECUTABLE, int(leaves.address[row]), int(leaves.gpa[row]))
