"""Sweeps of memory that must be copied in: one buffer is read while the other is digested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self

import numpy as np

from pyscan.digest import base
from pyscan.digest.base import Bytes, Comparison, Digester, Frames
from pyscan.records import PAGE_SIZE, PageStatus

#: Reads pages into a buffer, as `Source.read` does: one status per page, never an exception.
Read = Callable[[Frames, Bytes], Bytes]

#: Pages of each buffer unless told otherwise, 1 MiB: large enough for a read to be cheap, and
#: small enough for both buffers to stay in the cache between the reader and the digester.
CHUNK_PAGES: Final = 256


class CopiedSweep:
    """Compares pages that `read` copies in, with two buffers that are made once, when needed.

    A thread of its own reads a chunk while the caller's digests the one before it. For one
    caller at a time.
    """

    def __init__(self, digester: Digester, read: Read, chunk_pages: int = CHUNK_PAGES) -> None:
        if chunk_pages < 1:
            raise ValueError(f"chunk_pages: {chunk_pages} is not at least 1")
        self._digester = digester
        self._read = read
        self._chunk_pages = chunk_pages
        self._buffers: list[Bytes] = []
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pyscan-reader")

    def compare(
        self, frames: Frames, expected: Bytes, indices_max: int = base.INDICES_MAX
    ) -> Comparison:
        """Hold the pages in `frames`, shape (n,), against `expected`, shape (n, digest_bytes).

        A page that could not be read has the status that the reader gave, and is never held
        against anything. Raises what `read` raises, and ValueError where shapes do not fit.
        """
        kind = base.digest_kind(self._digester.digest)
        expected = base.as_expected(expected, kind, len(frames))
        statuses = np.empty(len(frames), dtype=np.uint8)
        unequal = np.zeros(len(frames), dtype=bool)
        for part, pages, read_statuses in self._chunks(frames):
            compared = self._digester.compare_pages(
                pages, expected[part], len(pages), frames=frames[part]
            )
            statuses[part] = np.where(read_statuses, read_statuses, compared.statuses)
            unequal[part][compared.indices] = True
        unread = statuses != PageStatus.OK
        unreadable, listed = int(unread.sum()), np.flatnonzero(unequal | unread)
        return Comparison(
            statuses=statuses,
            indices=listed[: base.as_indices_max(indices_max, len(frames))].astype(np.uint64),
            ok=len(frames) - len(listed),
            mismatched=len(listed) - unreadable,
            unreadable=unreadable,
        )

    def _chunks(self, frames: Frames) -> Iterator[tuple[slice, Bytes, Bytes]]:
        """Every chunk with its pages and statuses; while one is in use the next is read."""
        chunk_pages = self._chunk_pages
        if not self._buffers:
            self._buffers = [np.empty((chunk_pages, PAGE_SIZE), dtype=np.uint8) for _ in range(2)]
        parts = [
            slice(start, min(start + chunk_pages, len(frames)))
            for start in range(0, len(frames), chunk_pages)
        ]
        pending = [self._start_reading(frames, part, 0) for part in parts[:1]]
        for number, part in enumerate(parts):
            read_statuses = pending.pop().result()
            for following in parts[number + 1 : number + 2]:
                pending.append(self._start_reading(frames, following, (number + 1) % 2))
            yield part, self._buffers[number % 2][: part.stop - part.start], read_statuses

    def _start_reading(self, frames: Frames, part: slice, buffer: int) -> Future[Bytes]:
        pages = self._buffers[buffer][: part.stop - part.start]
        return self._reader.submit(self._read, frames[part], pages)

    def close(self) -> None:
        """End the reading thread, after the read that it is in. Idempotent."""
        self._reader.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
