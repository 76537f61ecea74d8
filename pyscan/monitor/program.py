"""`pyscan monitor`: watches all configured targets and publishes what it finds.

Order of events for a verdict: the suspect pages and the findings are in the evidence,
then the verdict is in evidence and outbox, and only then it leaves. A broker that is away
delays a verdict; it cannot lose it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import msgspec

from pyscan import protocol, runtime
from pyscan.approved import LinuxApproved, Snapshot, load_approved
from pyscan.config import MonitorConfig, SweepTable, Target, load_monitor
from pyscan.digest import DigestKey, open_digester
from pyscan.errors import TransportError
from pyscan.evidence import EvidenceLog, message_body
from pyscan.keys import KeyRing
from pyscan.monitor.watch import Digesters, Judgement, Watch, WatchSettings
from pyscan.outbox import Outbox, transaction
from pyscan.records import PAGE_SIZE, VerdictState
from pyscan.scanner import SweepOptions, check_approved
from pyscan.sources.uri import parse_uri
from pyscan.transport import Link, Publication
from pyscan.trust import Keeper, Role

log = logging.getLogger(__name__)

NAME: Final = "monitor"


@dataclass(frozen=True, slots=True)
class _Approved:
    """One approved configuration, and who signed it."""

    path: Path
    content: Snapshot | LinuxApproved
    approver: str


@dataclass(frozen=True, slots=True)
class _Plan:
    """A configuration with what its targets' files hold."""

    config: MonitorConfig
    keeper: Keeper
    targets: tuple[tuple[Target, tuple[_Approved, ...]], ...]


def run_program(path: Path, check_only: bool) -> int:
    """Run the monitor until a signal; returns its exit status."""
    return runtime.run_program(NAME, path, _load, _run, check_only=check_only)


def _load(path: Path) -> _Plan:
    """Everything that can be checked without broker and target. Raises PyscanError."""
    config = load_monitor(path)
    keeper = config.keeper()
    ring = keeper.ring(Role.APPROVER)
    targets = []
    files: dict[Path, _Approved] = {}
    for target in config.target:
        parse_uri(target.source)
        targets.append((target, tuple(_load_once(path, ring, files) for path in target.approved)))
        check_approved([each.content for each in targets[-1][1]])
    return _Plan(config, keeper, tuple(targets))


def _load_once(path: Path, ring: KeyRing, files: dict[Path, _Approved]) -> _Approved:
    """One file for all targets that share it: a kernel's holds tens of megabytes."""
    found = files.get(path)
    if found is None:
        found = files[path] = _Approved(path, *load_approved(path, ring))
    return found


async def _run(plan: _Plan) -> None:
    """Watch every target until cancelled. Raises PyscanError for what cannot be started."""
    with (
        plan.config.open_state() as (database, evidence),
        _open_digesters(plan.config.sweep) as digesters,
    ):
        await _Monitor(plan, database, evidence, digesters).run()


@contextlib.contextmanager
def _open_digesters(table: SweepTable) -> Iterator[Digesters]:
    """What all targets are swept with; the key lives as long as the monitor, and only here."""
    exact = open_digester(table.backend, threads=table.threads)
    if table.digest == "sha256":
        yield Digesters(exact, None)
        return
    with DigestKey.generate(table.digest) as key:
        yield Digesters(exact, open_digester(table.backend, table.digest, key, table.threads))


class _Monitor:
    """The stages of a running monitor: one watch per target, a link, an outbox pump."""

    def __init__(
        self,
        plan: _Plan,
        database: sqlite3.Connection,
        evidence: EvidenceLog,
        digesters: Digesters,
    ) -> None:
        self._config = config = plan.config
        self._keeper = plan.keeper
        self._database = database
        self._evidence = evidence
        self._outbox = Outbox(database)
        self._watches = {
            target.name: self._watch(target, approved, digesters)
            for target, approved in plan.targets
        }
        self._link = Link(
            config.link_settings(NAME),
            will=lambda: self._status("offline"),
            greeting=lambda: [self._status("online")],
        )

    async def run(self) -> None:
        """Run all stages until one fails or the program is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._link.run(), name="link")
            group.create_task(self._link.pump(self._outbox), name="outbox")
            group.create_task(self._heartbeat(), name="heartbeat")
            group.create_task(self._keeper.watch(), name="keys")
            for name, watch in self._watches.items():
                group.create_task(watch.run(), name=f"watch {name}")
            runtime.note_state(NAME, runtime.ProgramState.RUNNING)

    def _watch(
        self, target: Target, approved: tuple[_Approved, ...], digesters: Digesters
    ) -> Watch:
        for each in approved:
            log.info(
                "target=%s source=%s approved=%s approver=%s content=%s digest=%s",
                target.name,
                target.source,
                each.path,
                each.approver,
                _content_text(each.content),
                (digesters.keyed or digesters.exact).form,
            )
        sweep = self._config.sweep
        settings = WatchSettings(
            monitor=self._config.identity.name,
            target=target.name,
            host=target.host,
            vm=target.vm,
            source=target.source,
            interval_ms=sweep.interval_ms,
            options=SweepOptions(
                sweep.rereads, sweep.audit_percent, self._config.kernel_state.rules()
            ),
        )
        return Watch(settings, [each.content for each in approved], digesters, self._publish)

    async def _publish(self, judgement: Judgement) -> None:
        """Make a verdict durable, then let it go."""
        verdict = judgement.verdict
        pages = {suspect.finding: suspect for suspect in judgement.suspects}
        for finding in verdict.findings:
            body: dict[str, object] = {**asdict(finding), "status": finding.status.name.lower()}
            if suspect := pages.get(finding.id):
                body["page"] = self._evidence.attach(suspect.data)
            self._evidence.append("finding", body)
        envelope = protocol.encode_verdict(verdict, self._config.identity.key)
        topic = protocol.verdict_topic(verdict.monitor, verdict.target)
        self._evidence.append("verdict", message_body(verdict.id, topic, envelope))
        with transaction(self._database):
            self._outbox.put(topic, envelope, message_id=verdict.id)
        self._link.wake()
        level = logging.INFO if verdict.state is VerdictState.APPROVED else logging.WARNING
        log.log(
            level,
            "target=%s verdict=%s id=%s findings=%d reason=%s",
            verdict.target,
            verdict.state,
            verdict.id,
            verdict.findings_total,
            verdict.reason,
        )

    async def _heartbeat(self) -> None:
        """Tell how the sweeps go. Information only: nothing decides by it, so it may be lost."""
        topic = protocol.sweep_topic(self._config.identity.name)
        while True:
            await asyncio.sleep(self._config.sweep.heartbeat_ms / 1e3)
            payload = msgspec.json.encode({"v": 1, "at": time.time_ns(), "targets": self._counts()})
            with contextlib.suppress(TransportError):
                await self._link.publish(Publication(topic, payload, retain=True))

    def _counts(self) -> Iterable[dict[str, object]]:
        return [
            {
                "target": name,
                "state": watch.counters.state,
                "sweeps": watch.counters.sweeps,
                "bytes": watch.counters.pages * PAGE_SIZE,
                "unreadable": watch.counters.unreadable,
                "transient": watch.counters.transient,
                "busy_ns": watch.counters.busy_ns,
                "pages": watch.pages,
            }
            for name, watch in self._watches.items()
        ]

    def _status(self, state: str) -> Publication:
        payload = msgspec.json.encode({"v": 1, "state": state, "at": time.time_ns()})
        topic = protocol.monitor_status_topic(self._config.identity.name)
        return Publication(topic, payload, retain=True)


def _content_text(approved: Snapshot | LinuxApproved) -> str:
    if isinstance(approved, Snapshot):
        return f"snapshot pages={approved.pages}"
    return f"linux release={approved.release} modules={len(approved.modules)}"
