"""The interface of a source: a way to read a target's physical memory.

A source has a memory map and scatter reads with one status per page; a zero-copy view
is optional. Everything else wraps these (style: a source has two or three methods).
Sources are opened read-only and are thread-safe for reads.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from pyscan.records import MemoryMap

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
        """The memory map. It may change between calls (memory hotplug, link loss)."""

    def read(self, frames: Frames, buffer: Pages) -> Statuses:
        """Read page `frames[i]` into `buffer[i]`.

        Returns one PageStatus per page. A page whose status is not OK is filled with
        POISON. A frame outside the memory map is HOLE and is never looked up. Raises
        ValueError when the buffer's shape does not fit; never raises for a page.
        """

    def view(self) -> View | None:
        """A zero-copy view, or None where the backend has none."""

    def close(self) -> None:
        """Release everything. Idempotent; a later read gives LINK_DOWN for every page."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
