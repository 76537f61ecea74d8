"""A source with some bytes of its own over those of another: an edited copy of its memory."""

from __future__ import annotations

import numpy as np

from pyscan.records import PAGE_SHIFT, PAGE_SIZE, MemoryMap, PageStatus
from pyscan.sources.base import Frames, Pages, Source, Statuses


class OverlaySource(Source):
    """Reads of `source` with what `write` put over it. It has no view, and closes nothing."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pages: dict[int, Pages] = {}  # frame -> shape (PAGE_SIZE,)

    @property
    def uri(self) -> str:
        """The wrapped source's URI."""
        return self._source.uri

    def regions(self) -> MemoryMap:
        """The wrapped source's memory map."""
        return self._source.regions()

    def write(self, gpa: int, data: bytes) -> None:
        """Put bytes over physical memory from `gpa` on. Raises ValueError where there is none."""
        while data:
            frame, offset = gpa >> PAGE_SHIFT, gpa % PAGE_SIZE
            part, data = data[: PAGE_SIZE - offset], data[PAGE_SIZE - offset :]
            if frame not in self._pages:
                page = np.empty((1, PAGE_SIZE), dtype=np.uint8)
                status = self._source.read(np.array([frame], dtype=np.uint64), page)[0]
                if status != PageStatus.OK:
                    raise ValueError(f"{gpa:#x} cannot be read: {PageStatus(int(status)).name}")
                self._pages[frame] = page[0]
            self._pages[frame][offset : offset + len(part)] = np.frombuffer(part, dtype=np.uint8)
            gpa += len(part)

    def clear(self) -> None:
        """Take all edits back."""
        self._pages.clear()

    def read(self, frames: Frames, buffer: Pages) -> Statuses:
        """See `Source.read`."""
        statuses = self._source.read(frames, buffer)
        if self._pages:
            edited = np.fromiter(self._pages, dtype=np.uint64)
            for row in np.flatnonzero(np.isin(frames, edited)).tolist():
                if statuses[row] == PageStatus.OK:
                    buffer[row] = self._pages[int(frames[row])]
        return statuses

    def view(self) -> None:
        """None: reads must come through here."""

    def close(self) -> None:
        """Nothing: the wrapped source is another's."""
