"""One pass over all approved pages of a target."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Self

import numpy as np

from pyscan.approved import Snapshot
from pyscan.digest import Comparison, Digester
from pyscan.ids import new_id
from pyscan.kernel import place
from pyscan.records import PAGE_SIZE, Finding, FindingKind, PageStatus, Sweep
from pyscan.scanner.compare import open_comparer
from pyscan.scanner.mapping import FINDINGS_MAX, MappingCheck, check_mapping
from pyscan.sources import Source


@dataclass(frozen=True, slots=True)
class SuspectPage:
    """The bytes of a page behind a finding, for the evidence. Parent: a finding."""

    finding: str
    frame: int
    data: bytes


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A sweep, the suspect pages behind its findings, and what it did not judge.

    `unlisted_executable` counts executable kernel pages that the approved configuration
    does not list (a snapshot cannot judge them); None when page tables were not walked.
    """

    sweep: Sweep
    suspects: tuple[SuspectPage, ...]
    unlisted_executable: int | None
    walked_tables: bool


class Scanner:
    """Sweeps one target against one approved configuration. Not thread-safe.

    With `keyed`, pages that `digester` (SHA-256) has approved are compared by their keyed
    digests from then on, and `audit_percent` of the pages exactly with every sweep.
    """

    def __init__(
        self,
        source: Source,
        snapshot: Snapshot,
        digester: Digester,
        *,
        target: str,
        rereads: int = 3,
        keyed: Digester | None = None,
        audit_percent: float = 1.0,
    ) -> None:
        self._source = source
        self._snapshot = snapshot
        self._digester = digester
        self._target = target
        self._rereads = rereads
        self._number = 0
        self._page = np.empty((1, PAGE_SIZE), dtype=np.uint8)
        self._comparer = open_comparer(source, snapshot, digester, keyed, audit_percent)

    @property
    def report(self) -> None:
        """A snapshot knows nothing of a kernel but its pages."""

    def close(self) -> None:
        """Release what the scanner holds; the source stays open. Idempotent."""
        self._comparer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def sweep(self, *, walk_tables: bool = True) -> SweepResult:
        """One pass over all approved pages.

        With `walk_tables`, and whenever a page differs, the kernel's page tables are
        walked too, and an approved address that leads to another frame is a finding:
        digests alone would go on approving the old frames after the kernel was moved away
        from under them. Raises SourceUnavailable when the target is out of reach.
        """
        self._number += 1
        sweep_id, started_ns, clock_ns = new_id(), time.time_ns(), time.monotonic_ns()
        self._source.regions()  # raises when the way to the target is gone
        comparison = self._comparer.compare()
        examined = self._examine(sweep_id, comparison)
        mapping = MappingCheck((), 0, None)
        walk_tables = walk_tables or bool(examined.different or examined.unread)
        if walk_tables:
            mapping = check_mapping(sweep_id, self._snapshot, self._source)
        watched = self._snapshot.pages
        ok = comparison.ok + examined.transient
        unreadable = comparison.unreadable + examined.lost
        findings = _listed(mapping.findings, examined)
        ids = {finding.id for finding in findings}
        sweep = Sweep(
            id=sweep_id,
            target=self._target,
            number=self._number,
            started_ns=started_ns,
            duration_ns=time.monotonic_ns() - clock_ns,
            watched=watched,
            ok=ok,
            mismatched=watched - ok - unreadable,
            unreadable=unreadable,
            transient=examined.transient,
            findings=findings,
            findings_total=watched - ok + mapping.findings_total,
        )
        suspects = tuple(suspect for suspect in examined.suspects if suspect.finding in ids)
        return SweepResult(sweep, suspects, mapping.unlisted_executable, walked_tables=walk_tables)

    def _examine(self, sweep_id: str, comparison: Comparison) -> _Examined:
        """Read every listed page again; what settles as approved was a transient."""
        different: list[Finding] = []
        unread: list[Finding] = []
        suspects: list[SuspectPage] = []
        transient = lost = 0
        for index in comparison.indices.tolist():
            status = PageStatus(int(comparison.statuses[index]))
            digest: bytes | None = None
            if status is PageStatus.OK:
                digest, status = self._reread(index)
                lost += digest is None
            if digest == self._snapshot.digests[index].tobytes():
                transient += 1
                self._comparer.distrust(index)
            elif digest is None and len(unread) < FINDINGS_MAX:
                unread.append(self._finding(sweep_id, index, status, None))
            elif digest is not None and len(different) < FINDINGS_MAX:
                finding = self._finding(sweep_id, index, status, digest)
                different.append(finding)
                frame = int(self._snapshot.frames[index])
                suspects.append(SuspectPage(finding.id, frame, self._page.tobytes()))
        return _Examined(tuple(different), tuple(unread), tuple(suspects), transient, lost)

    def _reread(self, index: int) -> tuple[bytes | None, PageStatus]:
        """Read one page up to `rereads` times.

        Stops as soon as it is as approved. A page that gives another digest at every try
        is TORN. When the last try cannot be read the digest is None.
        """
        expected = self._snapshot.digests[index].tobytes()
        frames = self._snapshot.frames[index : index + 1]
        seen: list[bytes] = []
        for _ in range(max(1, self._rereads)):
            status = PageStatus(int(self._source.read(frames, self._page)[0]))
            if status is not PageStatus.OK:
                return None, status
            digest = self._digester.hash_pages(self._page)[0][0].tobytes()
            if digest == expected:
                return digest, PageStatus.OK
            seen.append(digest)
        torn = len(seen) > 1 and len(set(seen)) == len(seen)
        return seen[-1], PageStatus.TORN if torn else PageStatus.OK

    def _finding(
        self, sweep_id: str, index: int, status: PageStatus, actual: bytes | None
    ) -> Finding:
        snapshot = self._snapshot
        address = int(snapshot.addresses[index])
        return Finding(
            id=new_id(),
            sweep=sweep_id,
            kind=FindingKind.UNREADABLE if actual is None else FindingKind.DIGEST,
            status=status,
            address=address,
            frame=int(snapshot.frames[index]),
            place=place(address, int(snapshot.flags[index]), snapshot.kernel),
            expected=snapshot.digests[index].tobytes().hex(),
            actual=actual.hex() if actual is not None else "",
        )


@dataclass(frozen=True, slots=True)
class _Examined:
    different: tuple[Finding, ...]
    unread: tuple[Finding, ...]
    suspects: tuple[SuspectPage, ...]  # of `different`
    transient: int  # as approved when read again
    lost: int  # read at first, unreadable when read again


def _listed(mappings: tuple[Finding, ...], examined: _Examined) -> tuple[Finding, ...]:
    """The findings that a sweep lists: facts before gaps, and a fair share of both facts."""
    room = FINDINGS_MAX - min(len(examined.different), FINDINGS_MAX // 2)
    return (*mappings[:room], *examined.different, *examined.unread)[:FINDINGS_MAX]
