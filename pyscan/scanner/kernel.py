"""Sweeps of a target whose kernel is known by its package.

The kernel is validated strictly once a boot; from then on its pages are swept by digests of
what they may hold. A page that differs is predicted anew under the state of that moment:
legal content is taken over, anything else is a finding. A change of the page tables, of the
list of modules or of anything else beyond pages leads to a strict validation of everything;
what that has found stays a finding of every sweep until another one finds it gone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from pyscan.approved import LinuxApproved, Snapshot
from pyscan.digest import Comparison, Digester
from pyscan.errors import KernelStarting, SourceUnavailable
from pyscan.ids import new_id
from pyscan.kernel import KernelImage
from pyscan.records import PAGE_SIZE, Finding, FindingKind, PageStatus, Sweep
from pyscan.scanner.compare import BaselineComparer, Comparer, ExactComparer
from pyscan.scanner.mapping import FINDINGS_MAX, check_mapping
from pyscan.scanner.sweep import SuspectPage, SweepResult
from pyscan.sources import Source
from pyscan.validate import (
    AccessFailed,
    Attached,
    Judged,
    Page,
    Settled,
    StateChange,
    StateRules,
    StateVector,
    Validation,
    attach,
    baseline,
    count_findings,
    findings,
    is_starting,
    judge_state,
    recheck,
    settle,
    state_vector,
    take_over,
    validate,
)

#: Validations in a row that must agree before what they find is believed: the first one may
#: have read half of an update.
_TRIES: Final = 3
#: Pages of text that differ when it is not for an attack alone to say why: a reset machine
#: loads its next kernel over this one.
RAVAGED_PAGES: Final = 32
#: So long they must be the same ones' number before they are believed to be an attack; and
#: so long is waited for that.
RAVAGED_S: Final = 2.0
RAVAGED_MAX_S: Final = 20.0
_PAUSE_S: Final = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class KernelReport:
    """What is known of the running kernel. `unverified` counts bytes by what they are."""

    approved: LinuxApproved
    validation: Validation
    vector: StateVector
    reports: tuple[StateChange, ...]  # changes of state that the policy wants told


class KernelScanner:
    """Sweeps one target against the approved configurations of kernels. Not thread-safe.

    Of `candidates` the one that fits the running kernel is chosen at every attach. A kernel
    that is still starting is judged only with `judge_starting`. Digesters and the other
    arguments are those of `Scanner`.
    """

    def __init__(
        self,
        source: Source,
        candidates: Sequence[LinuxApproved],
        digester: Digester,
        *,
        target: str,
        rules: StateRules,
        keyed: Digester | None = None,
        audit_percent: float = 1.0,
        judge_starting: bool = False,
    ) -> None:
        self._source = source
        self._candidates = tuple(candidates)
        self._digester = digester
        self._keyed = keyed
        self._audit_percent = audit_percent
        self._target = target
        self._rules = rules
        self._judge_starting = judge_starting
        self._number = 0
        self._boot: _Boot | None = None
        self._pinned: tuple[KernelImage, StateVector] | None = None

    @property
    def report(self) -> KernelReport | None:
        """The kernel as of the last validation; None before the first."""
        return self._boot.report if self._boot is not None else None

    def close(self) -> None:
        """Release what the scanner holds; the source stays open. Idempotent."""
        if self._boot is not None:
            self._boot.comparer.close()
            self._boot = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def sweep(self, *, walk_tables: bool = True) -> SweepResult:
        """One pass; the first one attaches and validates.

        Raises TargetUnavailable: out of reach, or no kernel that an approved configuration
        fits; KernelStarting when it is not up yet.
        """
        self._number += 1
        self._source.regions()  # raises when the way to the target is gone
        timer = _Timer()
        boot = self._boot
        if boot is None:
            return self._validate_all(timer)
        comparison = boot.comparer.compare()
        if walk_tables and self._beyond_pages_changed(boot, timer.sweep_id):
            return self._validate_all(timer)
        if not len(comparison.indices):
            return self._result(boot, timer, boot.unchanged(timer, comparison), walked=walk_tables)
        return self._settle(boot, timer, comparison, walked=walk_tables)

    def _beyond_pages_changed(self, boot: _Boot, sweep_id: str) -> bool:
        """Whether page tables lead elsewhere, or lists, tables and handlers changed."""
        mapping = check_mapping(sweep_id, boot.snapshot, self._source)
        if mapping.findings or mapping.unlisted_executable != boot.unlisted:
            return True
        return recheck(boot.report.validation)

    def _validate_all(self, timer: _Timer) -> SweepResult:
        """Attach anew, validate everything, and start a baseline of what is legal."""
        before = self._boot
        known = before.report.validation.attached.kernel if before is not None else None
        self.close()
        validation, bad = self._validate_settled(self._attach(known))
        if bad > RAVAGED_PAGES and not (before is not None and before.ravaged):
            validation, bad = self._outwait_reset(validation, bad)
        attached = validation.attached
        snapshot = baseline(validation, self._digester, time.time_ns())
        unreadable = sum(int((e.statuses != PageStatus.OK).sum()) for e in validation.extents)
        vector = state_vector(validation)
        judged = judge_state(self._rules, self._pin(attached.kernel, vector), vector)
        mapping = check_mapping(timer.sweep_id, snapshot, self._source)
        boot = _Boot(
            snapshot,
            self._comparer(snapshot),
            KernelReport(attached.approved, validation, vector, judged.reports),
            mapping.unlisted_executable,
            _rows_of(validation, snapshot),
            judged,
            ravaged=bad > RAVAGED_PAGES,
        )
        self._boot = boot
        found = findings(validation, timer.sweep_id, judged)
        outcome = _Outcome(
            ok=max(0, snapshot.pages - bad - unreadable),
            mismatched=min(bad, snapshot.pages - unreadable),
            unreadable=unreadable,
            findings=found,
            findings_total=count_findings(validation, judged),
            suspects=boot.suspects(found, self._source),
        )
        # What is legal is kept as digests: the bytes would be 30 MB for each target.
        validation.extents.clear()
        validation.target.memory.forget()
        return self._result(boot, timer, outcome, walked=True)

    def _pin(self, kernel: KernelImage, vector: StateVector) -> StateVector:
        """The state that this boot was first seen in.

        It outlives a validation that fails: who hides for a moment must not be looked at with
        fresh eyes.
        """
        if self._pinned is None or self._pinned[0] != kernel:
            self._pinned = (kernel, vector)
        return self._pinned[1]

    def _attach(self, known: KernelImage | None) -> Attached:
        """Find the kernel, first where it was. Raises KernelNotFound, KernelStarting."""
        attached = attach(self._source, self._candidates, known)
        if not self._judge_starting and is_starting(attached):
            raise KernelStarting(
                f"{self._source.uri}: the kernel is still starting; sweep again when it is up"
            )
        return attached

    def _outwait_reset(self, validation: Validation, bad: int) -> tuple[Validation, int]:
        """Validate until it is clear whether this kernel is tampered with, or history.

        It is history when another one is found, or none: raises KernelNotFound,
        KernelStarting.
        """
        started = since = time.monotonic()
        while bad > RAVAGED_PAGES and time.monotonic() - started < RAVAGED_MAX_S:
            time.sleep(_PAUSE_S)
            before = bad
            validation, bad = self._validate_settled(self._attach(None))
            if bad != before:
                since = time.monotonic()
            elif time.monotonic() - since >= RAVAGED_S:
                break
        return validation, bad

    def _validate_settled(self, attached: Attached) -> tuple[Validation, int]:
        """Validate until what is found stays; also the number of pages that differ.

        Raises SourceUnavailable.
        """
        try:
            validation = validate(attached)
            for _ in range(_TRIES):
                if not validation.lasting():
                    break
                before = validation.lasting()
                attached = self._attach(attached.kernel)
                validation = validate(attached)
                if validation.lasting() == before:
                    break
            bad = 0
            if validation.text.pages:
                settled = settle(validation, validation.text.pages)
                take_over(validation, settled)
                bad = settled.pages_differing
        except AccessFailed as error:
            raise self._unreadable_state(error) from error
        return validation, bad + len(validation.rodata.code.pages)

    def _comparer(self, snapshot: Snapshot) -> Comparer:
        if self._keyed is None:
            return ExactComparer(self._source, snapshot, self._digester)
        return BaselineComparer(
            self._source, snapshot, self._digester, self._keyed, self._audit_percent
        )

    def _unreadable_state(self, error: AccessFailed) -> SourceUnavailable:
        return SourceUnavailable(f"{self._source.uri}: the kernel's state cannot be read: {error}")

    def _settle(
        self, boot: _Boot, timer: _Timer, comparison: Comparison, *, walked: bool
    ) -> SweepResult:
        """Predict the pages that differ under the state of this moment."""
        rows = comparison.indices.astype(np.intp)
        listed_all = len(rows) == comparison.mismatched + comparison.unreadable
        read = comparison.statuses[rows] == PageStatus.OK
        pages = boot.text_pages(rows[read])
        if not listed_all or pages is None:
            return self._validate_all(timer)
        validation = boot.report.validation
        try:
            settled = settle(validation, pages.values())
        except AccessFailed as error:
            raise self._unreadable_state(error) from error
        bad, lost = settled.pages_differing, len(settled.unreadable)
        if bad > RAVAGED_PAGES and not boot.ravaged:
            return self._validate_all(timer)
        take_over(validation, settled)
        boot.take_over(settled, pages, self._digester)
        vector = state_vector(validation)
        pinned = self._pin(validation.attached.kernel, vector)
        boot.judged = judged = judge_state(self._rules, pinned, vector)
        boot.report = replace(boot.report, vector=vector, reports=judged.reports)
        found = findings(validation, timer.sweep_id, judged)
        unread = boot.unread(timer.sweep_id, comparison)
        outcome = _Outcome(
            ok=comparison.ok + len(pages) - bad - lost,
            mismatched=bad,
            unreadable=comparison.unreadable + lost,
            transient=len(pages) - bad - lost,
            findings=(*found, *unread),
            findings_total=count_findings(validation, judged) + comparison.unreadable + lost,
            suspects=boot.suspects(found, self._source),
        )
        return self._result(boot, timer, outcome, walked=walked)

    def _result(
        self, boot: _Boot, timer: _Timer, outcome: _Outcome, *, walked: bool
    ) -> SweepResult:
        sweep = Sweep(
            id=timer.sweep_id,
            target=self._target,
            number=self._number,
            started_ns=timer.started_ns,
            duration_ns=time.monotonic_ns() - timer.clock_ns,
            watched=boot.snapshot.pages,
            ok=outcome.ok,
            mismatched=outcome.mismatched,
            unreadable=outcome.unreadable,
            transient=outcome.transient,
            findings=outcome.findings[:FINDINGS_MAX],
            findings_total=outcome.findings_total,
        )
        return SweepResult(sweep, outcome.suspects, boot.unlisted, walked_tables=walked)


@dataclass(slots=True)
class _Timer:
    """When a sweep began, and its identifier."""

    sweep_id: str = field(default_factory=new_id)
    started_ns: int = field(default_factory=time.time_ns)
    clock_ns: int = field(default_factory=time.monotonic_ns)


@dataclass(frozen=True, slots=True)
class _Outcome:
    ok: int
    mismatched: int = 0
    unreadable: int = 0
    transient: int = 0
    findings: tuple[Finding, ...] = ()
    findings_total: int = 0
    suspects: tuple[SuspectPage, ...] = ()


@dataclass(slots=True, eq=False)
class _Boot:
    """One boot of the target: its baseline, and what is known of its kernel.

    `rows` (n,): for each row of the snapshot (index of the unit, offset of the page), with
    unit -1 for a page that is no text. `judged`: what the rules make of the last state.
    `ravaged`: so many pages differ that it was waited whether they are those of a reset.
    """

    snapshot: Snapshot
    comparer: Comparer
    report: KernelReport
    unlisted: int | None
    rows: NDArray[np.int64]
    judged: Judged
    ravaged: bool

    def unchanged(self, timer: _Timer, comparison: Comparison) -> _Outcome:
        """Every page is as it may be; what was found beyond pages is there still."""
        validation = self.report.validation
        validation.text.differences, validation.text.total = [], 0
        validation.text.pages = set()
        return _Outcome(
            ok=comparison.ok,
            findings=findings(validation, timer.sweep_id, self.judged),
            findings_total=count_findings(validation, self.judged),
        )

    def text_pages(self, rows: NDArray[np.intp]) -> dict[int, Page] | None:
        """Pages of text by their row; None when a row is another kind of page."""
        units = self.report.validation.units.all
        found = {}
        for row in rows.tolist():
            unit, offset = self.rows[row].tolist()
            if unit < 0:
                return None
            found[row] = (units[unit].unit.name, offset)
        return found

    def take_over(self, settled: Settled, pages: dict[int, Page], digester: Digester) -> None:
        """From now on, expect what has settled."""
        for row, page in pages.items():
            content = settled.legal.get(page)
            if content is not None:
                digest = digester.hash_pages(content.reshape(1, PAGE_SIZE))[0][0]
                self.snapshot.digests[row] = digest
            self.comparer.distrust(row)

    def unread(self, sweep_id: str, comparison: Comparison) -> tuple[Finding, ...]:
        """A finding for each listed page that was not read."""
        rows = comparison.indices.astype(np.intp)
        rows = rows[comparison.statuses[rows] != PageStatus.OK][:FINDINGS_MAX]
        return tuple(
            Finding(
                id=new_id(),
                sweep=sweep_id,
                kind=FindingKind.UNREADABLE,
                status=PageStatus(int(comparison.statuses[row])),
                address=int(self.snapshot.addresses[row]),
                frame=int(self.snapshot.frames[row]),
                place=self.report.validation.target.place(int(self.snapshot.addresses[row])),
                expected=self.snapshot.digests[row].tobytes().hex(),
            )
            for row in rows.tolist()
        )

    def suspects(self, found: Sequence[Finding], source: Source) -> tuple[SuspectPage, ...]:
        """The pages behind findings that name a frame, as they are now."""
        kept = [f for f in found[:FINDINGS_MAX] if f.frame is not None]
        frames = np.array([f.frame for f in kept], dtype=np.uint64)
        pages = np.empty((len(kept), PAGE_SIZE), dtype=np.uint8)
        statuses = source.read(frames, pages)
        return tuple(
            SuspectPage(finding.id, int(frame), page.tobytes())
            for finding, frame, page, status in zip(kept, frames, pages, statuses, strict=True)
            if status == PageStatus.OK
        )


def _rows_of(validation: Validation, snapshot: Snapshot) -> NDArray[np.int64]:
    """See `_Boot.rows`."""
    rows = np.full((snapshot.pages, 2), -1, dtype=np.int64)
    index = {id(placed): number for number, placed in enumerate(validation.units.all)}
    for extent in validation.extents:
        if not extent.executable:
            continue
        start = extent.placed.address + extent.offset
        first, last = np.searchsorted(
            snapshot.addresses, np.array([start, start + len(extent.legal)], dtype=np.uint64)
        )
        rows[first:last, 0] = index[id(extent.placed)]
        offsets = snapshot.addresses[first:last] - np.uint64(extent.placed.address)
        rows[first:last, 1] = offsets.astype(np.int64)
    return rows
