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
from pyscan.scanner.compare import Comparer, open_comparer
from pyscan.scanner.mapping import FINDINGS_MAX, check_mapping
from pyscan.scanner.pulse import Pulse
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

#: Validations at most. What two in a row find is believed: one alone may have read half of an
#: update of a list.
_TRIES: Final = 6
#: Pages of text that differ and are believed at once. What is left of a kernel after a reset
#: is written over by far more at a time.
_FEW_PAGES: Final = 32
#: So long is waited for the pulse of a kernel in which anything else is found.
PULSE_S: Final = 10.0
_PAUSE_S: Final = 0.05


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
    that is still starting is judged only with `judge_starting`. `live`: the target runs, so
    that findings in a kernel whose clock stands still may be those of one that was reset;
    they are held back until PULSE_S have passed. The other arguments are those of `Scanner`.
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
        live: bool = False,
    ) -> None:
        self._source = source
        self._candidates = tuple(candidates)
        self._digester = digester
        self._keyed = keyed
        self._audit_percent = audit_percent
        self._target = target
        self._rules = rules
        self._judge_starting = judge_starting
        self._live = live
        self._alarmed = False
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
        result = self._sweep(_Timer(), walk_tables=walk_tables)
        if self._live and not self._alarmed and _far_reaching(result.sweep):
            result = self._feel_pulse(result)
        self._alarmed = bool(result.sweep.findings_total)
        return result

    def _sweep(self, timer: _Timer, *, walk_tables: bool) -> SweepResult:
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
        known = self._boot.report.validation.attached.kernel if self._boot is not None else None
        self.close()
        validation, bad = self._validate_settled(self._attach(known))
        attached = validation.attached
        snapshot = baseline(validation, self._digester, time.time_ns())
        unreadable = sum(int((e.statuses != PageStatus.OK).sum()) for e in validation.extents)
        vector = state_vector(validation)
        judged = judge_state(self._rules, self._pin(attached.kernel, vector), vector)
        mapping = check_mapping(timer.sweep_id, snapshot, self._source)
        boot = _Boot(
            snapshot,
            open_comparer(self._source, snapshot, self._digester, self._keyed, self._audit_percent),
            KernelReport(attached.approved, validation, vector, judged.reports),
            mapping.unlisted_executable,
            _rows_of(validation, snapshot),
            judged,
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

    def _feel_pulse(self, result: SweepResult) -> SweepResult:
        """Believe a result once the kernel is seen to run, or nothing else comes up.

        Raises KernelNotFound, KernelStarting: it is history.
        """
        boot = self._boot
        if boot is None:
            return result
        pulse = Pulse.of(boot.report.validation.attached)
        deadline_s = time.monotonic() + PULSE_S
        while not pulse.beats() and time.monotonic() < deadline_s:
            time.sleep(_PAUSE_S)
            if self._attach(None).kernel != boot.report.validation.attached.kernel:
                return self._validate_all(_Timer())
        return result

    def _validate_settled(self, attached: Attached) -> tuple[Validation, int]:
        """Validate until what is found stays; also the number of pages that differ.

        Raises SourceUnavailable.
        """
        try:
            validation = validate(attached)
            for _ in range(_TRIES):
                before = validation.lasting()
                if not before:
                    break
                validation = validate(self._attach(validation.attached.kernel))
                if before & validation.lasting():
                    _keep_only(validation, before)
                    break
            bad = 0
            if validation.text.pages:
                settled = settle(validation, validation.text.pages)
                take_over(validation, settled)
                bad = settled.pages_differing
        except AccessFailed as error:
            raise self._unreadable_state(error) from error
        return validation, bad + len(validation.rodata.code.pages)

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
        changed = take_over(validation, settled)
        boot.take_over(settled, pages, self._digester)
        if changed:
            vector = state_vector(validation)
            pinned = self._pin(validation.attached.kernel, vector)
            boot.judged = judge_state(self._rules, pinned, vector)
            boot.report = replace(boot.report, vector=vector, reports=boot.judged.reports)
        judged = boot.judged
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
    """

    snapshot: Snapshot
    comparer: Comparer
    report: KernelReport
    unlisted: int | None
    rows: NDArray[np.int64]
    judged: Judged

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


def _far_reaching(sweep: Sweep) -> bool:
    """Whether more is found than a few pages of code."""
    few = sweep.mismatched <= _FEW_PAGES and not sweep.unreadable
    code = all(finding.kind is FindingKind.CODE for finding in sweep.findings)
    return bool(sweep.findings) and not (few and code)


def _keep_only(validation: Validation, lasting: frozenset[tuple[str, int]]) -> None:
    """Drop problems that a validation before did not see: the kernel was at work."""
    problems = validation.problems
    kept = [each for each in problems.kept if (str(each.kind), each.address) in lasting]
    problems.total -= len(problems.kept) - len(kept)
    problems.kept = kept


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
