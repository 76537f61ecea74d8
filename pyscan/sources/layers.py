"""Sources that wrap a source: the same interface, changed on the way."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pyscan.records import MemoryMap, PageStatus
from pyscan.sources.base import Frames, Pages, Source, Statuses, poison


class FaultSource(Source):
    """A source whose reads fail as told, for tests and benchmarks.

    `faults` is one status for all pages, or a status per frame. It has no view, since a
    view would show the pages.
    """

    def __init__(self, source: Source, faults: PageStatus | Mapping[int, PageStatus]) -> None:
        self._source = source
        self._faults = faults

    @property
    def uri(self) -> str:
        """The wrapped source's URI."""
        return self._source.uri

    def regions(self) -> MemoryMap:
        """The wrapped source's memory map."""
        return self._source.regions()

    def read(self, frames: Frames, buffer: Pages) -> Statuses:
        """See `Source.read`; a fault hides a page that was read, never a worse status."""
        statuses = self._source.read(frames, buffer)
        if isinstance(self._faults, PageStatus):
            statuses[statuses == PageStatus.OK] = self._faults
        else:
            for frame, fault in self._faults.items():
                statuses[(frames == np.uint64(frame)) & (statuses == PageStatus.OK)] = fault
        poison(buffer, statuses)
        return statuses

    def view(self) -> None:
        """None: reads must come through here."""

    def close(self) -> None:
        """Close the wrapped source."""
        self._source.close()
