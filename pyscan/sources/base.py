"""The interface of a source: a way to read a target's physical memory.

A source has a memory map and scatter reads with one status per page; a zero-copy view
is optional. Everything else wraps these (style: a source has two or three methods).
Sources are opened read-only and are thread-safe for reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pyscan.records import PAGE_SHIFT, PAGE_SIZE, POISON, MemoryMap, PageStatus, RegionKind

Frames = NDArray[np.uint64]  # shape (n,): frame numbers
Pages = NDArray[np.uint8]  # shape (n, PAGE_SIZE): caller's buffer
Statuses = NDArray[np.uint8]  # shape (n,): PageStatus values
Offsets = NDArray[np.uint64]  # shape (n,): byte offsets into a view


class View(Protocol):
    """A read-only zero-copy view of all RAM of a source, for the native core.

    `data` is one contiguous read-only buffer (typically a mapping). The backing may
    shrink or vanish while it is mapped: only the native core, which guards its loads,
    may dereference it.
    """

    @property
    def data(self) -> memoryview:
        """The whole mapping."""

    def offsets(self, frames: Frames) -> Offsets:
        """Byte offset in `data` of each frame; `NO_OFFSET` where the frame is not RAM."""


#: Offset of a frame that the view does not hold; the native core reports it as HOLE.
NO_OFFSET = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


class Source(Protocol):
    """A target's physical memory, read-only."""

    @property
    def uri(self) -> str:
        """The URI that names this source."""

    def regions(self) -> MemoryMap:
        """The memory map. It may change between calls (memory hotplug).

        Raises SourceUnavailable when the way to the target is known to be gone.
        """

    def read(self, frames: Frames, buffer: Pages) -> Statuses:
        """Read page `frames[i]` into `buffer[i]`.

        Returns one PageStatus per page. A page whose status is not OK is filled with
        POISON. A frame outside the memory map is HOLE and is never looked up. Raises
        ValueError when the buffer's shape does not fit; never raises for a page.
        """

    def view(self) -> View | None:
        """A zero-copy view, or None where the backend has none."""

    def close(self) -> None:
        """Release everything. Idempotent; a later read gives LINK_DOWN for every page.

        May be called while other threads read: their pages come back whole or as
        LINK_DOWN.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


@runtime_checkable
class Sparse(Protocol):
    """A source that knows which of its pages were ever written."""

    def populated(self) -> MemoryMap:
        """The parts of the memory map that may hold anything but zeros.

        A scan of all memory may skip the rest: it reads as zeros, and reading it would
        cost time for nothing.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Digested:
    """Pages that were digested where they are.

    `digests` has an array of shape (n, size) for each digest that was asked for, POISON where
    the status is not OK. `key` names the key of the keyed ones: digests under different keys
    say nothing of each other.
    """

    statuses: Statuses
    digests: tuple[NDArray[np.uint8], ...]
    key: int


@runtime_checkable
class Digesting(Protocol):
    """A source that digests pages where they are, under a key of its own."""

    def digest_pages(self, frames: Frames, digests: tuple[str, ...]) -> Digested:
        """Digest each page of `frames` by every one of `digests` ("sha256", "nh4aes").

        All digests of a page are made of the same bytes. Statuses as those of `Source.read`.
        Raises ValueError for an unknown digest; never raises for a page.
        """


def populated(source: Source) -> MemoryMap:
    """What a scan of all memory must read: everything, unless the source knows better."""
    return source.populated() if isinstance(source, Sparse) else source.regions()


def check_request(frames: Frames, buffer: Pages) -> None:
    """Raise ValueError unless `frames` and `buffer` are a request that `Source.read` takes.

    `frames` is uint64 of shape (n,); `buffer` is uint8 of shape (n, PAGE_SIZE), writable,
    rows one behind the other.
    """
    if frames.dtype != np.uint64 or frames.ndim != 1:
        raise ValueError(f"frames must be uint64 of shape (n,), not {frames.dtype} {frames.shape}")
    if buffer.dtype != np.uint8 or buffer.shape != (len(frames), PAGE_SIZE):
        raise ValueError(
            f"buffer must be uint8 of shape ({len(frames)}, {PAGE_SIZE}), "
            f"not {buffer.dtype} {buffer.shape}"
        )
    if not (buffer.flags.c_contiguous and buffer.flags.writeable):
        raise ValueError("buffer must be writable and contiguous")


def poison(buffer: Pages, statuses: Statuses) -> None:
    """Fill every page of `buffer` whose status is not OK with POISON."""
    buffer[statuses != PageStatus.OK] = POISON


def find_regions(memory_map: MemoryMap, frames: Frames) -> NDArray[np.int64]:
    """Index of the region that holds each frame; -1 where none does. Shape (n,)."""
    if not memory_map.regions:
        return np.full(len(frames), -1, dtype=np.int64)
    starts = np.array([region.gpa >> PAGE_SHIFT for region in memory_map], dtype=np.uint64)
    ends = np.array([region.end >> PAGE_SHIFT for region in memory_map], dtype=np.uint64)
    index = np.searchsorted(starts, frames, side="right") - 1
    found: NDArray[np.int64] = np.where((index >= 0) & (frames < ends[index]), index, -1)
    return found


def is_ram(memory_map: MemoryMap, frames: Frames) -> NDArray[np.bool_]:
    """Which frames are RAM (a region of kind ROM is not). Shape (n,)."""
    # The last entry stands for index -1: no region.
    kinds = np.array([region.kind is RegionKind.RAM for region in memory_map] + [False])
    ram: NDArray[np.bool_] = kinds[find_regions(memory_map, frames)]
    return ram
