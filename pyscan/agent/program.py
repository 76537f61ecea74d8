"""`pyscan agent`: carries signed commands out on this host's virtual machines."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from pathlib import Path
from typing import Final

from pyscan import protocol, runtime
from pyscan.agent.actions import Outcome, VmState
from pyscan.agent.driver import QmpDriver
from pyscan.agent.journal import Entry, Journal
from pyscan.agent.reports import Reporter, SignedReport, StateBoard
from pyscan.agent.worker import Desk, Order, Worker
from pyscan.config import AgentConfig, load_agent
from pyscan.errors import Rejected
from pyscan.evidence import EvidenceLog, message_body
from pyscan.outbox import Outbox, transaction
from pyscan.protocol import RejectReason, TopicKind
from pyscan.records import Action, Command, ReportState
from pyscan.transport import RECEIVE_MAX, Link, Message

log = logging.getLogger(__name__)

NAME: Final = "agent"
#: Rejections that are put on record and reported: so many at once, so many per second.
REJECTIONS_BURST: Final = 32
REJECTIONS_PER_S: Final = 2.0
NS_PER_MINUTE: Final = 60 * 10**9


def run_program(path: Path, check_only: bool) -> int:
    """Run the agent until a signal; returns its exit status."""
    return runtime.run_program(NAME, path, load_agent, run, check_only=check_only)


async def run(config: AgentConfig) -> None:
    """Carry out commands until cancelled."""
    with config.open_state() as (database, evidence):
        await _Agent(config, database, evidence).run()


class _Agent:
    """Intake of commands, and the workers behind it."""

    def __init__(
        self, config: AgentConfig, database: sqlite3.Connection, evidence: EvidenceLog
    ) -> None:
        self._config = config
        self._host = config.identity.name
        self._ring = config.trust.control_ring()
        self._database = database
        self._evidence = evidence
        self._journal = Journal(database)
        self._outbox = Outbox(database)
        self._reporter = Reporter(self._host, config.identity.key, self._outbox, evidence)
        self._board = StateBoard(self._host)
        self._rejections = runtime.RateBound(REJECTIONS_BURST, REJECTIONS_PER_S)
        self._link = Link(
            config.link_settings(NAME),
            [protocol.subscription(TopicKind.COMMAND, self._host)],
            will=self._board.will,
            greeting=self._board.greeting,
        )
        desk = Desk(database, self._journal, self._reporter, self._board, self._link.wake)
        self._workers = {
            vm.id: Worker(vm.id, QmpDriver(vm.qmp, vm.pidfile), desk, RECEIVE_MAX)
            for vm in config.vm
        }

    async def run(self) -> None:
        """All stages; ends only by cancellation or an error."""
        with transaction(self._database):
            self._journal.forget_old(int(time.time()))
        unfinished = self._unfinished()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._link.run(), name="link")
            group.create_task(self._link.pump(self._outbox), name="pump")
            group.create_task(self._board.publish(self._link), name="states")
            group.create_task(self._receive(), name="intake")
            for vm, worker in self._workers.items():
                group.create_task(worker.run(unfinished.get(vm, [])), name=f"worker-{vm}")
            runtime.note_state(NAME, runtime.ProgramState.RUNNING)

    def _unfinished(self) -> dict[str, list[Entry]]:
        """Interrupted commands by machine; those of a machine that is no longer ours fail."""
        by_vm: dict[str, list[Entry]] = {}
        for entry in self._journal.unfinished():
            if entry.command.vm in self._workers:
                by_vm.setdefault(entry.command.vm, []).append(entry)
                continue
            signed = self._refusal(entry.command, RejectReason.UNKNOWN_VM, "not configured")
            with transaction(self._database):
                self._journal.finish(entry.command, signed.envelope)
                self._reporter.post(signed)
        return by_vm

    async def _receive(self) -> None:
        async for message in self._link.messages:
            order = self._admit(message)
            if order is None:
                message.acknowledge()
            else:
                await self._workers[order.command.vm].put(order)

    def _admit(self, message: Message) -> Order | None:
        """Verify a message and journal its command; None when it was refused."""
        try:
            command = protocol.decode_command(
                message.payload,
                self._ring,
                topic=message.topic,
                audience=self._host,
                now_s=int(time.time()),
                replay=self._journal,
            )
        except Rejected as rejected:
            known = self._redelivered(rejected)
            if known is not None:
                return Order(known, message.acknowledge)
            self._reject(rejected, message)
            return None
        refusal = self._policy_refusal(command)
        if refusal is not None:
            self._refuse(command, message, *refusal)
            return None
        self._accept(command, message)
        return Order(command, message.acknowledge)

    def _redelivered(self, rejected: Rejected) -> Command | None:
        """A command that was taken in time is ours to answer, however late it comes again."""
        command = rejected.command
        if command is None or command.vm not in self._workers:
            return None
        late = {RejectReason.DUPLICATE, RejectReason.EXPIRED}
        return command if rejected.reason in late and self._journal.seen(command.id) else None

    def _policy_refusal(self, command: Command) -> tuple[RejectReason, str] | None:
        """What this host forbids even when the order is genuine [wire.md, local policy]."""
        limits = self._config.limits
        if command.vm not in self._workers:
            return RejectReason.UNKNOWN_VM, f"{self._host} has no machine {command.vm}"
        if command.vm in limits.protected and command.action is not Action.QUERY:
            return RejectReason.PROTECTED_VM, f"{command.vm} is protected by its host"
        if command.action is Action.KILL:
            since_ns = time.time_ns() - NS_PER_MINUTE
            if self._journal.accepted_since(Action.KILL, since_ns) >= limits.kills_per_minute:
                return (
                    RejectReason.RATE_LIMITED,
                    f"more than {limits.kills_per_minute} kills a minute",
                )
        return None

    def _accept(self, command: Command, message: Message) -> None:
        with transaction(self._database):
            self._record(command, message)
            self._journal.accept(command, message.payload, time.time_ns())
            self._reporter.post(self._reporter.sign(command, ReportState.ACCEPTED))
        self._link.wake()

    def _refuse(
        self, command: Command, message: Message, reason: RejectReason, detail: str
    ) -> None:
        """Refuse a fresh, genuine command for good."""
        signed = self._refusal(command, reason, detail)
        with transaction(self._database):
            self._record(command, message)
            self._journal.refuse(command, message.payload, signed.envelope)
            self._reporter.post(signed)
        self._link.wake()

    def _reject(self, rejected: Rejected, message: Message) -> None:
        """Put a rejection on record, and report it when its sender is known."""
        if not self._rejections.allow():
            return
        log.warning(
            "command rejected topic=%s problem=%s not_recorded_before=%d",
            message.topic,
            rejected,
            self._rejections.held_back,
        )
        self._evidence.append(
            "rejected",
            {
                "topic": message.topic,
                "reason": str(rejected.reason),
                "envelope": message.payload[: protocol.COMMAND_BYTES_MAX],
            },
        )
        if rejected.command is None:
            return
        with transaction(self._database):
            self._reporter.post(self._refusal(rejected.command, rejected.reason, str(rejected)))
        self._link.wake()

    def _refusal(self, command: Command, reason: str, detail: str) -> SignedReport:
        outcome = Outcome(VmState.UNKNOWN, detail, reason)
        return self._reporter.sign(command, ReportState.REJECTED, outcome)

    def _record(self, command: Command, message: Message) -> None:
        self._evidence.append(
            "command",
            message_body(command.id, message.topic, message.payload),
        )
