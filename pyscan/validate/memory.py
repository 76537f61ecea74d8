"""Reading a running kernel's memory by virtual address, with nothing of it trusted.

Addresses are translated through the leaves of one walk of the kernel's own page tables, so
one validation sees one state of them, and a table that is written meanwhile cannot lead a
read astray. An address that leads nowhere (`WildPointer`) is something else than a page
that could not be read (`Unreadable`): the first is a fault of the kernel's, the second of
the way to it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.errors import TargetUnavailable
from pyscan.kernel.discover import KernelImage
from pyscan.kernel.layout import LAYOUTS
from pyscan.records import PAGE_SHIFT, PAGE_SIZE, POISON, PageStatus
from pyscan.sources.base import Source
from pyscan.translate import Leaves, Span, WalkLimits, WalkResult, walk

U64 = NDArray[np.uint64]

#: Pages that one `VirtualMemory` keeps (16 MiB).
CACHED_PAGES_MAX: Final = 4096

#: Longest range that is read at once, in bytes.
RANGE_MAX: Final = 256 << 20

#: Pages read from the source at a time: bounds memory to 1 MiB a batch.
_BATCH_PAGES: Final = 256

#: Bounds of a walk of the kernel half. They hold the clones of the stacks that espfix maps
#: (arch/x86/kernel/espfix_64.c: 2048 tables, 65536 leaves a page of them), and 16 GiB that
#: are mapped by 4 KiB pages. A walk takes up to 32 KiB of memory a table.
KERNEL_WALK: Final = WalkLimits(tables_max=1 << 14, leaves_max=1 << 22)

_ADDRESS_MASK: Final = (1 << 64) - 1
_OFFSET_MASK: Final = PAGE_SIZE - 1


class AccessFailed(TargetUnavailable):
    """An address that could not be read; `reason` is a few words."""

    def __init__(self, address: int, reason: str) -> None:
        super().__init__(f"{address:#x}: {reason}")
        self.address = address
        self.reason = reason


class WildPointer(AccessFailed):
    """The address leads to no memory of the target: a finding, where a kernel holds it."""


class Unreadable(AccessFailed):
    """The address leads to memory that could not be read: nothing is known."""


def kernel_half(levels: int) -> Span:
    """The virtual addresses that all page tables share, of 4 or 5 paging levels."""
    bits = LAYOUTS[levels].form.address_bits
    return Span(_ADDRESS_MASK - (1 << (bits - 1)) + 1, _ADDRESS_MASK)


def walk_kernel(
    source: Source, kernel: KernelImage, limits: WalkLimits = KERNEL_WALK
) -> WalkResult:
    """All leaf mappings of the kernel half, from the kernel's own top-level table."""
    form = LAYOUTS[kernel.paging_levels].form
    return walk(source, kernel.root_gpa, form, [kernel_half(kernel.paging_levels)], limits)


class VirtualMemory:
    """A kernel's memory by virtual address. For one thread and one validation."""

    def __init__(self, source: Source, kernel: KernelImage, leaves: Leaves) -> None:
        self.source = source
        self.kernel = kernel
        self.leaves = leaves
        self._pages: OrderedDict[int, bytes] = OrderedDict()  # by virtual page number

    def forget(self) -> None:
        """Drop cached pages, so that what is read next is read anew."""
        self._pages.clear()

    # One place

    def read(self, address: int, length: int) -> bytes:
        """`length` bytes from `address` on.

        Raises WildPointer and Unreadable for the first page that fails.
        """
        if not 0 <= address <= address + length <= _ADDRESS_MASK + 1 or length > RANGE_MAX:
            raise WildPointer(address, f"no {length} bytes can lie there")
        parts = []
        end = address + length
        while address < end:
            offset = address & _OFFSET_MASK
            count = min(PAGE_SIZE - offset, end - address)
            parts.append(self._page(address >> PAGE_SHIFT)[offset : offset + count])
            address += count
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def u64(self, address: int) -> int:
        """Unsigned 64-bit integer. Raises WildPointer, Unreadable."""
        return int.from_bytes(self.read(address, 8), "little")

    def u32(self, address: int) -> int:
        """Unsigned 32-bit integer. Raises WildPointer, Unreadable."""
        return int.from_bytes(self.read(address, 4), "little")

    def u8(self, address: int) -> int:
        """One byte. Raises WildPointer, Unreadable."""
        return self.read(address, 1)[0]

    def string(self, address: int, maximum: int) -> str:
        """A NUL-terminated string of at most `maximum` bytes with its NUL, fit for a report.

        Bytes that are not printable ASCII become escapes. Raises WildPointer - also when
        there is no NUL - and Unreadable.
        """
        data = bytearray()
        while len(data) < maximum:
            here = address + len(data)
            step = min(PAGE_SIZE - (here & _OFFSET_MASK), maximum - len(data))
            part = self.read(here, step)
            end = part.find(0)
            if end >= 0:
                data += part[:end]
                return "".join(chr(b) if 0x20 < b < 0x7F else f"\\x{b:02x}" for b in data)
            data += part
        raise WildPointer(address, f"a string of more than {maximum - 1} bytes")

    def frame(self, address: int) -> int | None:
        """Frame number that an address leads to, or None."""
        if not 0 <= address <= _ADDRESS_MASK:
            return None
        gpas, mapped = self.translate(np.array([address], dtype=np.uint64))
        return int(gpas[0]) >> PAGE_SHIFT if mapped[0] else None

    # Many places

    def translate(self, addresses: U64) -> tuple[U64, NDArray[np.bool_]]:
        """Physical address of each virtual one, and which of them are mapped. Shape (n,)."""
        leaves = self.leaves
        if not len(leaves):
            return np.zeros(len(addresses), dtype=np.uint64), np.zeros(len(addresses), dtype=bool)
        row = np.searchsorted(leaves.address, addresses, side="right") - 1
        mapped = row >= 0
        row = np.maximum(row, 0)
        offsets = addresses - leaves.address[row]
        mapped &= offsets < leaves.size[row]
        return leaves.gpa[row] + offsets, mapped

    def frames(self, addresses: U64) -> tuple[U64, NDArray[np.bool_]]:
        """Frame number of each address, and which of them are mapped. Shape (n,)."""
        gpas, mapped = self.translate(addresses)
        return gpas >> np.uint64(PAGE_SHIFT), mapped

    def read_array(self, addresses: U64, size: int) -> tuple[U64, NDArray[np.bool_]]:
        """The integer of `size` bytes (1, 2, 4 or 8) at each address, and which are good.

        Not good: wild, or not readable (then `frames` says that it is mapped); the value
        is 0. Every page is read once.
        """
        values = np.zeros(len(addresses), dtype=np.uint64)
        good = np.zeros(len(addresses), dtype=bool)
        gpas, mapped = self.translate(addresses)
        offsets = (addresses & np.uint64(_OFFSET_MASK)).astype(np.int64)
        whole = offsets <= PAGE_SIZE - size
        for rows, pages, places in self._gather(gpas >> np.uint64(PAGE_SHIFT), mapped & whole):
            good[rows] = True
            for byte in range(size):
                part = pages[places, offsets[rows] + byte].astype(np.uint64)
                values[rows] |= part << np.uint64(8 * byte)
        for row in np.flatnonzero(mapped & ~whole).tolist():
            try:
                values[row] = int.from_bytes(self.read(int(addresses[row]), size), "little")
                good[row] = True
            except AccessFailed:
                continue
        return values, good

    def read_range(self, start: int, length: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """`length` bytes from `start` on, and a PageStatus for every page that they touch.

        A page that is mapped nowhere is HOLE; one that was not read is filled with POISON.
        Raises WildPointer when no such range can exist, or it is longer than RANGE_MAX.
        """
        if not 0 <= start <= start + length <= _ADDRESS_MASK + 1 or length > RANGE_MAX:
            raise WildPointer(start, f"no range of {length} bytes can lie there")
        skip = start & _OFFSET_MASK
        count = (skip + length + _OFFSET_MASK) >> PAGE_SHIFT
        steps = np.arange(count, dtype=np.uint64) << np.uint64(PAGE_SHIFT)
        pages, statuses = self.read_pages(np.uint64(start - skip) + steps)
        return pages.reshape(-1)[skip : skip + length], statuses

    def read_pages(self, addresses: U64) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Whole pages: content of shape (n, PAGE_SIZE), and a PageStatus each, as above."""
        frames, mapped = self.frames(addresses)
        pages = np.full((len(addresses), PAGE_SIZE), POISON, dtype=np.uint8)
        statuses = np.full(len(addresses), PageStatus.HOLE, dtype=np.uint8)
        rows = np.flatnonzero(mapped)
        for start in range(0, len(rows), _BATCH_PAGES):
            part = rows[start : start + _BATCH_PAGES]
            buffer = np.empty((len(part), PAGE_SIZE), dtype=np.uint8)
            statuses[part] = self.source.read(frames[part], buffer)
            pages[part] = buffer
        return pages, statuses

    def _gather(
        self, frames: U64, wanted: NDArray[np.bool_]
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.uint8], NDArray[np.intp]]]:
        """Read the `wanted` frames, each once, in batches.

        Yields rows of `frames` that were read, a batch of pages, and the place of each
        row's page in it.
        """
        rows = np.flatnonzero(wanted)
        unique, which = np.unique(frames[rows], return_inverse=True)
        order = np.argsort(which, kind="stable")
        rows, which = rows[order], which[order]
        for start in range(0, len(unique), _BATCH_PAGES):
            part = unique[start : start + _BATCH_PAGES]
            pages = np.empty((len(part), PAGE_SIZE), dtype=np.uint8)
            good = self.source.read(part, pages) == PageStatus.OK
            first, last = np.searchsorted(which, [start, start + len(part)])
            places = which[first:last] - start
            kept = good[places]
            yield rows[first:last][kept], pages, places[kept]

    def _page(self, page: int) -> bytes:
        """Content of one virtual page. Raises WildPointer, Unreadable."""
        content = self._pages.get(page)
        if content is not None:
            self._pages.move_to_end(page)
            return content
        address = page << PAGE_SHIFT
        frame = self.frame(address)
        if frame is None:
            raise WildPointer(address, "not mapped")
        buffer = np.empty((1, PAGE_SIZE), dtype=np.uint8)
        status = PageStatus(int(self.source.read(np.array([frame], dtype=np.uint64), buffer)[0]))
        if status is PageStatus.HOLE:
            raise WildPointer(address, f"leads to physical {frame << PAGE_SHIFT:#x}, no RAM")
        if status is not PageStatus.OK:
            raise Unreadable(address, f"could not be read ({status.name.lower()})")
        content = buffer.tobytes()
        self._pages[page] = content
        if len(self._pages) > CACHED_PAGES_MAX:
            self._pages.popitem(last=False)
        return content
