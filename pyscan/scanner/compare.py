"""Which approved pages differ now: exactly, or by a keyed baseline that was made exactly.

Both comparers answer the same question with the same `Comparison`; `BaselineComparer` is
the fast one for sweeps that go on for ever (docs/spec/digest.md, docs/adr/keyed-digests.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pyscan.approved import Snapshot
from pyscan.digest import Comparison, CopiedSweep, Digester
from pyscan.records import PAGE_SIZE, PageStatus
from pyscan.sources import Source

#: Mismatching pages that a comparison lists; more than that is no transient.
LISTED_MAX: Final = 4096
#: Pages of one copied-in batch (256 KiB, held for each target).
CHUNK_PAGES: Final = 64

Rows = NDArray[np.intp]


class Comparer(Protocol):
    """Holds all approved pages of one target against what they should be."""

    def compare(self) -> Comparison:
        """One pass over all pages; lists at most LISTED_MAX of those that differ."""

    def distrust(self, row: int) -> None:
        """Page `row` was listed and then found to be as approved: forget what made it differ."""

    def close(self) -> None:
        """Release what the comparer holds. Idempotent."""


class ExactComparer:
    """Every page by SHA-256 against the approved digests."""

    def __init__(self, source: Source, snapshot: Snapshot, digester: Digester) -> None:
        self._source = source
        self._snapshot = snapshot
        self._digester = digester
        self._copied = CopiedSweep(digester, source.read)

    def compare(self) -> Comparison:
        """See `Comparer.compare`. Zero-copy where the source has a view, else copied in."""
        snapshot = self._snapshot
        view = self._source.view()
        if view is not None:
            offsets = view.offsets(snapshot.frames)
            return self._digester.compare_view(view.data, offsets, snapshot.digests, LISTED_MAX)
        return self._copied.compare(snapshot.frames, snapshot.digests, LISTED_MAX)

    def distrust(self, row: int) -> None:
        """Nothing was remembered."""

    def close(self) -> None:
        """See `Comparer.close`."""
        self._copied.close()


class BaselineComparer:
    """Every page by a keyed digest that was made when SHA-256 had approved the same bytes.

    A page without such a digest (not read or not approved so far) is compared exactly, and
    so is a rotating share of the others: `audit_percent` of them a sweep. It covers the loss
    of the key.
    """

    def __init__(
        self,
        source: Source,
        snapshot: Snapshot,
        digester: Digester,
        keyed: Digester,
        audit_percent: float,
    ) -> None:
        self._source = source
        self._snapshot = snapshot
        self._digester = digester
        self._keyed = keyed
        self._copied = CopiedSweep(keyed, source.read)
        self._chunks = _Chunks(source, snapshot)
        self._baseline = np.zeros((snapshot.pages, keyed.digest_bytes), dtype=np.uint8)
        self._known = np.zeros(snapshot.pages, dtype=bool)
        self._audited = min(snapshot.pages, math.ceil(snapshot.pages * audit_percent / 100))
        self._next = 0

    def compare(self) -> Comparison:
        """See `Comparer.compare`."""
        found = _Found(self._snapshot.pages)
        known = np.flatnonzero(self._known)
        self._compare_keyed(known, found)
        exact = ~self._known
        exact[self._audit_rows()] = True
        self._compare_exact(np.flatnonzero(exact), found)
        return found.comparison()

    def distrust(self, row: int) -> None:
        """Make the page's keyed digest anew, from bytes that SHA-256 approves."""
        self._known[row] = False

    def close(self) -> None:
        """See `Comparer.close`."""
        self._copied.close()

    def _audit_rows(self) -> Rows:
        rows = (self._next + np.arange(self._audited)) % self._snapshot.pages
        self._next = (self._next + self._audited) % self._snapshot.pages
        return rows

    def _compare_keyed(self, rows: Rows, found: _Found) -> None:
        everything = len(rows) == self._snapshot.pages
        frames = self._snapshot.frames if everything else self._snapshot.frames[rows]
        baseline = self._baseline if everything else self._baseline[rows]
        view = self._source.view()
        if view is not None:
            compared = self._keyed.compare_view(
                view.data, view.offsets(frames), baseline, len(rows), frames=frames
            )
        else:
            compared = self._copied.compare(frames, baseline, len(rows))
        found.statuses[rows] = compared.statuses
        found.different[rows[compared.indices.astype(np.intp)]] = True

    def _compare_exact(self, rows: Rows, found: _Found) -> None:
        """Compare by SHA-256; pages that are approved and not known get their keyed digest."""
        for part, pages, statuses in self._chunks.read(rows):
            compared = self._digester.compare_pages(pages, self._snapshot.digests[part], len(part))
            good = statuses == PageStatus.OK
            good[compared.indices.astype(np.intp)] = False
            found.different[part[~good]] = True
            found.statuses[part] = np.maximum(found.statuses[part], statuses)
            new = np.flatnonzero(good & ~self._known[part])
            if len(new):
                learnt, frames = part[new], self._snapshot.frames[part[new]]
                self._baseline[learnt] = self._keyed.hash_pages(pages[new], frames=frames)[0]
                self._known[learnt] = True


class _Chunks:
    """Reads pages into one buffer that is used again and again."""

    def __init__(self, source: Source, snapshot: Snapshot) -> None:
        self._source = source
        self._frames = snapshot.frames
        self._buffer = np.empty((CHUNK_PAGES, PAGE_SIZE), dtype=np.uint8)

    def read(self, rows: Rows) -> Iterator[tuple[Rows, NDArray[np.uint8], NDArray[np.uint8]]]:
        """Parts of `rows` with their pages and statuses; the pages are valid until the next."""
        for start in range(0, len(rows), CHUNK_PAGES):
            part = rows[start : start + CHUNK_PAGES]
            pages = self._buffer[: len(part)]
            yield part, pages, self._source.read(self._frames[part], pages)


class _Found:
    """What a pass has found so far, by row."""

    def __init__(self, pages: int) -> None:
        self.statuses = np.zeros(pages, dtype=np.uint8)
        self.different = np.zeros(pages, dtype=bool)

    def comparison(self) -> Comparison:
        """As a `Comparison`; a page that was not read is not counted as different."""
        unread = self.statuses != PageStatus.OK
        listed = np.flatnonzero(self.different | unread)
        unreadable = int(unread.sum())
        return Comparison(
            statuses=self.statuses,
            indices=listed[:LISTED_MAX].astype(np.uint64),
            ok=len(self.statuses) - len(listed),
            mismatched=len(listed) - unreadable,
            unreadable=unreadable,
        )
