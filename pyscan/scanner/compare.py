"""Which approved pages differ now: exactly, or by a keyed baseline that was made exactly.

Both comparers answer the same question with the same `Comparison`; `BaselineComparer` is
the fast one for sweeps that go on for ever (docs/spec/digest.md, docs/adr/keyed-digests.md).
"""

from __future__ import annotations

import math
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pyscan.approved import Snapshot
from pyscan.digest import Comparison, Digester
from pyscan.records import PageStatus
from pyscan.scanner.digests import (
    ExactDigests,
    ExactHere,
    ExactThere,
    KeyedDigests,
    KeyedHere,
    KeyedThere,
    comparison,
    differ,
)
from pyscan.sources import Digesting, Source

#: Mismatching pages that a comparison lists; more than that is no transient.
LISTED_MAX: Final = 4096

Rows = NDArray[np.intp]


class Comparer(Protocol):
    """Holds all approved pages of one target against what they should be."""

    def compare(self) -> Comparison:
        """One pass over all pages; lists at most LISTED_MAX of those that differ."""

    def distrust(self, row: int) -> None:
        """Page `row` was listed and then found to be as approved: forget what made it differ."""

    def close(self) -> None:
        """Release what the comparer holds. Idempotent."""


def open_comparer(
    source: Source,
    snapshot: Snapshot,
    digester: Digester,
    keyed: Digester | None,
    audit_percent: float,
) -> Comparer:
    """The comparer for a target: by a baseline with `keyed`, exact without.

    A source that digests by itself does so under its own key; it needs neither digester.
    """
    there = source if isinstance(source, Digesting) else None
    if keyed is None:
        return ExactComparer(ExactThere(there) if there else ExactHere(source, digester), snapshot)
    digests = KeyedThere(there) if there else KeyedHere(source, digester, keyed)
    return BaselineComparer(digests, snapshot, audit_percent)


class ExactComparer(Comparer):
    """Every page by SHA-256 against the approved digests."""

    def __init__(self, digests: ExactDigests, snapshot: Snapshot) -> None:
        self._digests = digests
        self._snapshot = snapshot

    def compare(self) -> Comparison:
        """See `Comparer.compare`."""
        snapshot = self._snapshot
        return self._digests.compare(snapshot.frames, snapshot.digests, LISTED_MAX)

    def distrust(self, row: int) -> None:
        """Nothing was remembered."""

    def close(self) -> None:
        """See `Comparer.close`."""
        self._digests.close()


class BaselineComparer(Comparer):
    """Every page by a keyed digest that was made when SHA-256 had approved the same bytes.

    A page without such a digest (not read or not approved so far) is compared exactly, and
    so is a rotating share of the others: `audit_percent` of them a sweep. It covers the loss
    of the key. Under another key, no page has such a digest.
    """

    def __init__(self, digests: KeyedDigests, snapshot: Snapshot, audit_percent: float) -> None:
        self._digests = digests
        self._snapshot = snapshot
        self._baseline = np.zeros((snapshot.pages, digests.size), dtype=np.uint8)
        self._known = np.zeros(snapshot.pages, dtype=bool)
        self._key: int | None = None
        self._audited = min(snapshot.pages, math.ceil(snapshot.pages * audit_percent / 100))
        self._next = 0

    def compare(self) -> Comparison:
        """See `Comparer.compare`."""
        found = _Found(self._snapshot.pages)
        self._compare_keyed(np.flatnonzero(self._known), found)
        exact = ~self._known
        exact[self._audit_rows()] = True
        self._compare_exact(np.flatnonzero(exact), found)
        return comparison(found.statuses, found.different, LISTED_MAX)

    def distrust(self, row: int) -> None:
        """Make the page's keyed digest anew, from bytes that SHA-256 approves."""
        self._known[row] = False

    def close(self) -> None:
        """See `Comparer.close`."""
        self._digests.close()

    def _audit_rows(self) -> Rows:
        rows = (self._next + np.arange(self._audited)) % self._snapshot.pages
        self._next = (self._next + self._audited) % self._snapshot.pages
        return rows

    def _compare_keyed(self, rows: Rows, found: _Found) -> None:
        if not len(rows):
            return
        everything = len(rows) == self._snapshot.pages
        frames = self._snapshot.frames if everything else self._snapshot.frames[rows]
        baseline = self._baseline if everything else self._baseline[rows]
        compared, key = self._digests.compare(frames, baseline)
        if self._is_other(key):
            return
        found.statuses[rows] = compared.statuses
        found.different[rows[compared.indices.astype(np.intp)]] = True

    def _compare_exact(self, rows: Rows, found: _Found) -> None:
        """Compare by SHA-256; pages that are approved and not known get their keyed digest."""
        for learnt in self._digests.learn(self._snapshot.frames[rows]):
            part = rows[learnt.part]
            self._is_other(learnt.key)
            good = learnt.statuses == PageStatus.OK
            good &= ~differ(learnt.exact, self._snapshot.digests[part])
            found.different[part[~good]] = True
            found.statuses[part] = np.maximum(found.statuses[part], learnt.statuses)
            new = good & ~self._known[part]
            self._baseline[part[new]] = learnt.keyed[new]
            self._known[part[new]] = True

    def _is_other(self, key: int) -> bool:
        """Whether this is another key than that of the baseline, which is then forgotten."""
        if key == self._key:
            return False
        self._key = key
        self._known[:] = False
        return True


class _Found:
    """What a pass has found so far, by row."""

    def __init__(self, pages: int) -> None:
        self.statuses = np.zeros(pages, dtype=np.uint8)
        self.different = np.zeros(pages, dtype=bool)
