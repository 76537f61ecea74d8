"""Sources that wrap a source: the same interface, changed or watched on the way.

They stack in any order. None has a view: reads must come through here.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import numpy as np

from pyscan.records import PAGE_SIZE, MemoryMap, PageStatus
from pyscan.sources.base import Frames, Pages, Source, Statuses, poison

#: What fails: one status for all pages, or a status per frame ({}: nothing).
Faults = PageStatus | Mapping[int, PageStatus]


class Clock(Protocol):
    """Where a layer takes its time from; the module `time` is one."""

    def monotonic(self) -> float:
        """Seconds since some moment."""

    def sleep(self, seconds: float, /) -> None:
        """Wait."""


class _Layer(Source):
    """What all layers pass on unchanged."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def uri(self) -> str:
        """The wrapped source's URI."""
        return self._source.uri

    def regions(self) -> MemoryMap:
        """The wrapped source's memory map."""
        return self._source.regions()

    def view(self) -> None:
        """None: reads must come through here."""

    def close(self) -> None:
        """Close the wrapped source."""
        self._source.close()


class FaultSource(_Layer):
    """A source whose reads fail as told, for tests and benchmarks.

    `faults` may also be a function that says, once a read, what fails from now on: a link
    that goes and comes back.
    """

    def __init__(self, source: Source, faults: Faults | Callable[[], Faults]) -> None:
        super().__init__(source)
        self._faults = faults

    def read(self, frames: Frames, buffer: Pages) -> Statuses:
        """See `Source.read`; a fault hides a page that was read, never a worse status."""
        statuses = self._source.read(frames, buffer)
        faults = self._faults() if callable(self._faults) else self._faults
        if isinstance(faults, PageStatus):
            statuses[statuses == PageStatus.OK] = faults
        else:
            for frame, fault in faults.items():
                statuses[(frames == np.uint64(frame)) & (statuses == PageStatus.OK)] = fault
        poison(buffer, statuses)
        return statuses


class DelaySource(_Layer):
    """A source behind a slow link, such as PCIe.

    A read takes `latency_s`, and up to `jitter_s` more; its pages then follow each other at
    `bytes_per_s`. Latencies of concurrent reads overlap, their bytes do not: there is one
    link. Pages outside the memory map never reach it. The jitter is the same in every run.
    """

    def __init__(
        self,
        source: Source,
        *,
        latency_s: float = 0.0,
        bytes_per_s: float = math.inf,
        jitter_s: float = 0.0,
        clock: Clock = time,
    ) -> None:
        super().__init__(source)
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        self._jitter_s = jitter_s
        self._clock = clock
        self._lock = Lock()
        self._free_at = -math.inf  # when the link has carried all that was asked so far
        self._random = random.Random(0)  # noqa: S311 - a delay, not a secret

    def read(self, frames: Frames, buffer: Pages) -> Statuses:
        """See `Source.read`."""
        asked_at = self._clock.monotonic()
        statuses = self._source.read(frames, buffer)
        pages = int(np.count_nonzero(statuses != PageStatus.HOLE))
        if pages:
            wait_s = self._due(asked_at, pages * PAGE_SIZE) - self._clock.monotonic()
            if wait_s > 0:
                self._clock.sleep(wait_s)
        return statuses

    def _due(self, asked_at: float, count: int) -> float:
        """When a read of `count` bytes is complete; the link is taken until then."""
        with self._lock:
            latency_s = self._latency_s + self._random.uniform(0, self._jitter_s)
            starts_at = max(asked_at + latency_s, self._free_at)
            self._free_at = starts_at + count / self._bytes_per_s
            return self._free_at


@dataclass(frozen=True, slots=True)
class ReadCounts:
    """What went through a CountingSource so far."""

    reads: int  # calls
    pages: Mapping[PageStatus, int]  # of every status, also of those that never came
    seconds: float  # inside reads, summed over all threads

    @property
    def bytes_read(self) -> int:
        """Bytes of the pages that came."""
        return self.pages[PageStatus.OK] * PAGE_SIZE


class CountingSource(_Layer):
    """A source that counts what is read through it. A read of a wrong shape does not count."""

    def __init__(self, source: Source, *, clock: Clock = time) -> None:
        super().__init__(source)
        self._clock = clock
        self._lock = Lock()
        self._reads = 0
        self._pages = np.zeros(len(PageStatus), dtype=np.int64)
        self._seconds = 0.0

    def read(self, frames: Frames, buffer: Pages) -> Statuses:
        """See `Source.read`."""
        started = self._clock.monotonic()
        statuses = self._source.read(frames, buffer)
        seconds = self._clock.monotonic() - started
        pages = np.bincount(statuses, minlength=len(PageStatus))
        with self._lock:
            self._reads += 1
            self._pages += pages
            self._seconds += seconds
        return statuses

    def counts(self) -> ReadCounts:
        """The counts of one moment: reads that are under way are not in any of them."""
        with self._lock:
            pages = {status: int(self._pages[status]) for status in PageStatus}
            return ReadCounts(self._reads, pages, self._seconds)
