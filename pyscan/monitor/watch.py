"""One watched target: open, sweep, judge, tell what changed.

The watch runs as one task of the monitor. Native calls leave the event loop; the loop
only sees results. A target that is out of reach is swept again and again: its verdict is
`undecided` for as long as that lasts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from pyscan.approved import LinuxApproved, Snapshot
from pyscan.digest import Digester
from pyscan.errors import (
    FileFormatError,
    KernelStarting,
    SourceUnavailable,
    TargetUnavailable,
    UsageError,
)
from pyscan.ids import new_id
from pyscan.policy import judge
from pyscan.records import Finding, FindingKind, PageStatus, Sweep, Verdict, VerdictState
from pyscan.runtime import in_thread
from pyscan.scanner import SuspectPage, Sweeper, SweepOptions, SweepResult, open_scanner
from pyscan.sources import Digesting, Source, open_source

log = logging.getLogger(__name__)

#: The page tables are walked with every sweep that finds a difference, and at least this often.
WALK_INTERVAL_S: Final = 1.0
#: A verdict that is not `approved` is published again, with a new id, after this time and then
#: ever more rarely: a broker that is killed may lose what it has confirmed, and a control that
#: was away for long must hear of it while it is fresh.
REFRESH_FIRST_S: Final = 2.0
REFRESH_MAX_S: Final = 300.0
#: Changes of a verdict that are published within CHANGES_WINDOW_S. A target that flips a byte
#: back and forth must not fill outbox and evidence; the latest state is published when the
#: window has moved on.
CHANGES_MAX: Final = 16
CHANGES_WINDOW_S: Final = 60.0
#: Changes of a kernel's state that are logged at a time.
STATE_LOGGED_MAX: Final = 32
#: So long a kernel may say that it is still starting. Then it is judged like any other: who
#: can write all of its memory can make it say so for ever.
STARTING_MAX_S: Final = 600.0
#: Pause before an unreachable target is tried again.
RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """What one watch needs to know."""

    monitor: str
    target: str
    host: str
    vm: str
    source: str
    interval_ms: int
    options: SweepOptions


@dataclass(frozen=True, slots=True)
class Digesters:
    """What pages are digested with: SHA-256, and the keyed digest of those it approved."""

    exact: Digester
    keyed: Digester | None


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict that must be recorded and published, with the pages behind it."""

    verdict: Verdict
    suspects: tuple[SuspectPage, ...]


@dataclass(slots=True)
class WatchCounters:
    """How the sweeps of one target go; read by the heartbeat."""

    sweeps: int = 0
    pages: int = 0
    unreadable: int = 0
    transient: int = 0
    busy_ns: int = 0  # time spent sweeping
    state: VerdictState | None = None


class Watch:
    """Sweeps one target until it is cancelled and hands every changed verdict to `publish`."""

    def __init__(
        self,
        settings: WatchSettings,
        approved: Sequence[Snapshot | LinuxApproved],
        digesters: Digesters,
        publish: Callable[[Judgement], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._approved = tuple(approved)
        self._pages = sum(each.pages for each in approved if isinstance(each, Snapshot))
        self._told: tuple[str, ...] = ()
        self._digesters = digesters
        self._publish = publish
        self._published: tuple[object, ...] = ()
        self._published_at = float("-inf")
        self._refresh_s = REFRESH_FIRST_S
        self._changes: deque[float] = deque(maxlen=CHANGES_MAX)
        self._walked_at = float("-inf")
        self._opened = False
        self._starting_since: float | None = None
        self.counters = WatchCounters()

    @property
    def pages(self) -> int:
        """Number of watched pages; 0 as long as the kernel was not found."""
        return self._pages

    async def run(self) -> None:
        """Open the target, sweep it, and open it again whenever it was lost.

        Raises UsageError when the target's URI turns out to be wrong at the first opening.
        """
        while True:
            try:
                source = await self._open()
                try:
                    await self._sweep_until_lost(source)
                finally:
                    source.close()
            except TargetUnavailable as error:
                if isinstance(error, KernelStarting) and self._starting_since is None:
                    self._starting_since = time.monotonic()
                await self._judge(self._lost(error))
            await asyncio.sleep(RETRY_S)

    async def _open(self) -> Source:
        """Open the target. Once it was open, whatever keeps it from opening is a loss.

        A virtual machine that comes back with other memory must not end the watching of
        all others.
        """
        try:
            source = await in_thread(partial(open_source, self._settings.source))
        except (FileFormatError, UsageError) as error:
            if isinstance(error, UsageError) and not self._opened:
                raise
            raise SourceUnavailable(str(error)) from error
        if isinstance(source, Digesting) and not self._opened:
            log.info(
                "target=%s the source digests pages by itself, under its own key",
                self._settings.target,
            )
        self._opened = True
        return source

    async def _sweep_until_lost(self, source: Source) -> None:
        """Sweep until the source is gone, or nothing can be read through it any more."""
        with open_scanner(
            source,
            self._approved,
            self._digesters.exact,
            target=self._settings.target,
            keyed=self._digesters.keyed,
            options=replace(
                self._settings.options, judge_starting=self._started_long_ago(), live=True
            ),
        ) as scanner:
            await self._sweep_with(scanner)

    def _started_long_ago(self) -> bool:
        since = self._starting_since
        return since is not None and time.monotonic() - since >= STARTING_MAX_S

    async def _sweep_with(self, scanner: Sweeper) -> None:
        interval_s = self._settings.interval_ms / 1e3
        while True:
            started = time.monotonic()
            # A finding in the page tables is seen only by a walk: keep walking until it is gone.
            suspicious = self.counters.state is not VerdictState.APPROVED
            walk = suspicious or started - self._walked_at >= WALK_INTERVAL_S
            result = await in_thread(partial(scanner.sweep, walk_tables=walk))
            if result.walked_tables:
                self._walked_at = started
            self._pages = result.sweep.watched
            if self.counters.state is VerdictState.APPROVED:
                self._starting_since = None
            self._count(result.sweep)
            self._tell(scanner)
            await self._judge(result)
            if result.sweep.unreadable == result.sweep.watched:
                return
            await asyncio.sleep(max(0.0, interval_s - (time.monotonic() - started)))

    def _tell(self, scanner: Sweeper) -> None:
        """Log the kernel that was found, and each change of its state once."""
        report = scanner.report
        if report is None:
            return
        kernel = report.validation.attached.kernel
        told = (
            f"kernel={report.approved.release} base={kernel.virtual_base:#x}",
            *(f"state {change}" for change in report.reports[:STATE_LOGGED_MAX]),
        )
        for line in told:
            if line not in self._told:
                log.info("target=%s %s", self._settings.target, line)
        self._told = told

    async def _judge(self, result: SweepResult) -> None:
        """Publish the verdict of a sweep if it is news, or old enough to be said again."""
        state, reason = judge(result.sweep)
        self.counters.state = state
        now = time.monotonic()
        content = (state, *((f.kind, f.address, f.frame) for f in result.sweep.findings))
        changed = content != self._published
        due = now - self._published_at >= self._refresh_s
        refresh = due and state is not VerdictState.APPROVED
        if not (changed or refresh):
            return
        first_alarm = state is VerdictState.UNAPPROVED and self._published[:1] != (state,)
        if not first_alarm and not self._may_change(now):
            return
        self._changes.append(now)
        self._refresh_s = REFRESH_FIRST_S if changed else min(2 * self._refresh_s, REFRESH_MAX_S)
        self._published, self._published_at = content, now
        verdict = self._verdict(result.sweep, state, reason)
        await self._publish(Judgement(verdict, result.suspects))

    def _may_change(self, now: float) -> bool:
        full = len(self._changes) == CHANGES_MAX
        return not full or now - self._changes[0] >= CHANGES_WINDOW_S

    def _verdict(self, sweep: Sweep, state: VerdictState, reason: str) -> Verdict:
        settings = self._settings
        return Verdict(
            id=new_id(),
            sweep=sweep.id,
            monitor=settings.monitor,
            target=settings.target,
            host=settings.host,
            vm=settings.vm,
            state=state,
            reason=reason,
            decided_ns=time.time_ns(),
            watched=sweep.watched,
            ok=sweep.ok,
            unreadable=sweep.unreadable,
            findings=sweep.findings,
            findings_total=sweep.findings_total,
        )

    def _lost(self, error: TargetUnavailable) -> SweepResult:
        """The sweep of a target that gave no sweep: every page unread, one finding says why.

        Its status is OK when the target was read, and not understood.
        """
        out_of_reach = isinstance(error, SourceUnavailable)
        sweep_id = new_id()
        finding = Finding(
            id=new_id(),
            sweep=sweep_id,
            kind=FindingKind.UNREADABLE,
            status=PageStatus.LINK_DOWN if out_of_reach else PageStatus.OK,
            place="target",
            actual=str(error),
        )
        watched = self._pages
        sweep = Sweep(
            id=sweep_id,
            target=self._settings.target,
            number=0,
            started_ns=time.time_ns(),
            duration_ns=0,
            watched=watched,
            ok=0,
            mismatched=0,
            unreadable=watched,
            findings=(finding,),
            findings_total=max(1, watched),
        )
        self._count(sweep)
        return SweepResult(sweep, (), None, walked_tables=True)

    def _count(self, sweep: Sweep) -> None:
        counters = self.counters
        counters.sweeps += 1
        counters.pages += sweep.watched
        counters.unreadable += sweep.unreadable
        counters.transient += sweep.transient
        counters.busy_ns += sweep.duration_ns
