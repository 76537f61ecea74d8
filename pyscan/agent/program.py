"""`pyscan agent`: carries signed commands out on this host's virtual machines."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyscan import protocol, runtime
from pyscan.agent.actions import Means, Outcome, VmState, read_arguments
from pyscan.agent.approvals import Approvals
from pyscan.agent.discovery import Discovery, Found, Place
from pyscan.agent.drivers.base import Throttle
from pyscan.agent.journal import Entry, Journal
from pyscan.agent.reports import Reporter, SignedReport, StateBoard
from pyscan.agent.worker import Desk, Order, Worker
from pyscan.config import AgentConfig, load_agent
from pyscan.errors import Rejected, UsageError
from pyscan.evidence import EvidenceLog, message_body
from pyscan.keys import KeyRing
from pyscan.outbox import Outbox, transaction
from pyscan.protocol import RejectReason, Topic, TopicKind
from pyscan.records import Action, Command, ReportState
from pyscan.transport import RECEIVE_MAX, Link, Message
from pyscan.trust import Role

log = logging.getLogger(__name__)

NAME: Final = "agent"
#: Rejections that are put on record and reported: so many at once, so many per second.
REJECTIONS_BURST: Final = 32
REJECTIONS_PER_S: Final = 0.5
#: What is kept as evidence of a message that is refused; a command has some hundred bytes.
REJECTED_BYTES_MAX: Final = 2048
#: How often commands that wait for an approval are looked at.
OVERDUE_INTERVAL_S: Final = 1.0
#: Reason of a report: accepted, and nothing is done before a second person approves.
WAITING: Final = "waiting_approval"
NS_PER_MINUTE: Final = 60 * 10**9
#: A machine that nobody has found for so long is no longer this host's.
FORGOTTEN_S: Final = 3600.0


def run_program(path: Path, check_only: bool) -> int:
    """Run the agent until a signal; returns its exit status."""
    return runtime.run_program(NAME, path, load_agent, run, check_only=check_only)


async def run(config: AgentConfig) -> None:
    """Carry out commands until cancelled."""
    if config.libvirt is not None and importlib.util.find_spec("libvirt") is None:
        raise UsageError("[libvirt] needs libvirt-python: install pyscan[libvirt]")
    with config.open_state() as (database, evidence):
        await _Agent(config, database, evidence).run()


@dataclass(slots=True)
class _Post:
    """A machine's worker, and where the machine was found last."""

    worker: Worker
    task: asyncio.Task[None]
    place: Place
    seen_s: float


class _Agent:
    """Intake of commands, and the workers behind it."""

    def __init__(
        self, config: AgentConfig, database: sqlite3.Connection, evidence: EvidenceLog
    ) -> None:
        self._config = config
        self._host = config.identity.name
        self._keeper = config.keeper()
        self._database = database
        self._evidence = evidence
        self._journal = Journal(database)
        self._approvals = Approvals(database, self._journal, config.limits.two_person)
        self._outbox = Outbox(database)
        self._reporter = Reporter(self._host, config.identity.key, self._outbox, evidence)
        self._board = StateBoard(self._host)
        self._rejections = runtime.RateBound(REJECTIONS_BURST, REJECTIONS_PER_S)
        self._link = Link(
            config.link_settings(NAME),
            [
                protocol.subscription(TopicKind.COMMAND, self._host),
                protocol.subscription(TopicKind.APPROVAL, self._host),
            ],
            will=self._board.will,
            greeting=self._board.greeting,
        )
        limits = config.sandbox
        means = Means(
            host=self._host,
            key=config.identity.key,
            overlays=limits.overlays or config.state.directory / "overlays",
            captures=config.capture.directory or config.state.directory / "captures",
            evidence=evidence,
            envelope=self._journal.envelope,
            throttle=Throttle(iops=limits.disk_iops, bps=limits.disk_bytes_per_s),
            revoke=limits.revoke,
            revoke_timeout_s=limits.revoke_timeout_s,
        )
        self._desk = Desk(
            database,
            self._journal,
            self._approvals,
            self._reporter,
            self._board,
            self._link.wake,
            means,
            config.discovery.interval_s,
        )
        self._discovery = Discovery(config)
        self._posts: dict[str, _Post] = {}
        self._unfinished: dict[str, list[Entry]] = {}

    async def run(self) -> None:
        """All stages; ends only by cancellation or an error."""
        with transaction(self._database):
            self._journal.forget_old(int(time.time()))
        for entry in self._journal.unfinished():
            self._unfinished.setdefault(entry.command.vm, []).append(entry)
        async with asyncio.TaskGroup() as group:
            self._post(await self._discovery.look(), group)
            self._forget_ended()
            group.create_task(self._link.run(), name="link")
            group.create_task(self._link.pump(self._outbox), name="pump")
            group.create_task(self._board.publish(self._link), name="states")
            group.create_task(self._board.publish_counters(self._link), name="counters")
            group.create_task(self._keeper.watch(), name="keys")
            group.create_task(self._receive(), name="intake")
            group.create_task(self._end_overdue(), name="overdue")
            if self._config.discovers:
                group.create_task(self._discover(group), name="discovery")
            runtime.note_state(NAME, runtime.ProgramState.RUNNING)

    async def _discover(self, group: asyncio.TaskGroup) -> None:
        while True:
            await asyncio.sleep(self._config.discovery.interval_s)
            self._post(await self._discovery.look(), group)

    def _post(self, found: Found, group: asyncio.TaskGroup) -> None:
        """Give every machine a worker, and take away those of machines long gone."""
        now_s = time.monotonic()
        for vm, place in found.machines.items():
            post = self._posts.get(vm)
            if post is None:
                log.info("machine found vm=%s by=%s at=%s", vm, place.kind, place.where)
                driver = self._discovery.driver(vm, place)
                worker = Worker(vm, driver, self._desk, RECEIVE_MAX)
                unfinished = self._unfinished.pop(vm, [])
                task = group.create_task(worker.run(unfinished), name=f"worker-{vm}")
                self._posts[vm] = _Post(worker, task, place, now_s)
                continue
            post.seen_s = now_s
            if post.place != place:
                log.info("machine moved vm=%s to=%s", vm, place.where)
                post.place = place
                post.worker.redirect(self._discovery.driver(vm, place))
        for vm, post in list(self._posts.items()):
            if now_s - post.seen_s > FORGOTTEN_S and self._journal.containment(vm) is None:
                post.task.cancel()
                del self._posts[vm]
                self._forget(vm)
        if found.complete:
            self._give_up_unfinished()

    def _forget_ended(self) -> None:
        """Machines that ended while this program did not run are no longer this host's."""
        for vm in set(self._journal.machines()) - set(self._posts):
            process = self._journal.process(vm)
            ended = process is not None and not process.alive()
            if ended or self._journal.containment(vm) is None:
                self._forget(vm)

    def _forget(self, vm: str) -> None:
        log.info("machine forgotten vm=%s", vm)
        with transaction(self._database):
            self._journal.forget_machine(vm)
        self._board.forget(vm)

    def _give_up_unfinished(self) -> None:
        """Interrupted commands on machines that are no longer ours fail."""
        for entries in self._unfinished.values():
            for entry in entries:
                signed = self._refusal(entry.command, RejectReason.UNKNOWN_VM, "not found")
                with transaction(self._database):
                    self._journal.finish(entry.command, signed.envelope)
                    self._reporter.post(signed)
        self._unfinished.clear()

    async def _receive(self) -> None:
        async for message in self._link.messages:
            order = self._take(message)
            if order is None:
                message.acknowledge()
            else:
                await self._posts[order.command.vm].worker.put(order)

    def _take(self, message: Message) -> Order | None:
        """What a message leads to; None when it is done with."""
        try:
            kind = Topic.parse(message.topic).kind
        except Rejected as rejected:
            self._reject(rejected, message)
            return None
        return self._approve(message) if kind is TopicKind.APPROVAL else self._admit(message)

    def _approve(self, message: Message) -> Order | None:
        """Verify an approval; None when no command goes ahead by it."""
        try:
            approval = protocol.decode_approval(
                message.payload,
                self._commanders(),
                topic=message.topic,
                audience=self._host,
                now_s=int(time.time()),
            )
            with transaction(self._database):
                command = self._approvals.take(approval)
                self._record("approval", approval.id, message)
        except Rejected as rejected:
            self._reject(rejected, message)
            return None
        log.info("command approved id=%s by=%s", approval.command, approval.issuer)
        if command is None or command.vm not in self._posts:
            return None
        return Order(command, message.acknowledge)

    async def _end_overdue(self) -> None:
        """Refuse commands that nobody approved in time, for ever."""
        while True:
            await asyncio.sleep(OVERDUE_INTERVAL_S)
            for command in self._approvals.overdue():
                signed = self._refusal(command, RejectReason.EXPIRED, "not approved in time")
                with transaction(self._database):
                    self._journal.finish(command, signed.envelope)
                    self._reporter.post(signed)
                self._link.wake()

    def _commanders(self) -> KeyRing:
        return self._keeper.ring(Role.CONTROL, Role.OPERATOR)

    def _admit(self, message: Message) -> Order | None:
        """Verify a message and journal its command; None when it was refused, or has to wait."""
        try:
            command = protocol.decode_command(
                message.payload,
                self._commanders(),
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
        waits = self._accept(command, message)
        return None if waits else Order(command, message.acknowledge)

    def _redelivered(self, rejected: Rejected) -> Command | None:
        """A command that was taken in time is ours to answer, however late it comes again."""
        command = rejected.command
        if command is None or command.vm not in self._posts:
            return None
        late = {RejectReason.DUPLICATE, RejectReason.EXPIRED}
        return command if rejected.reason in late and self._journal.seen(command.id) else None

    def _policy_refusal(self, command: Command) -> tuple[RejectReason, str] | None:
        """What this host forbids even when the order is genuine [wire.md, local policy]."""
        limits = self._config.limits
        if command.vm not in self._posts:
            return RejectReason.UNKNOWN_VM, f"{self._host} has no machine {command.vm}"
        if command.vm in limits.protected and command.action is not Action.QUERY:
            return RejectReason.PROTECTED_VM, f"{command.vm} is protected by its host"
        try:
            read_arguments(command)
        except ValueError as error:
            return RejectReason.UNSUPPORTED_ACTION, str(error)
        if command.action is Action.KILL:
            since_ns = time.time_ns() - NS_PER_MINUTE
            if self._journal.accepted_since(Action.KILL, since_ns) >= limits.kills_per_minute:
                return (
                    RejectReason.RATE_LIMITED,
                    f"more than {limits.kills_per_minute} kills a minute",
                )
        return None

    def _accept(self, command: Command, message: Message) -> bool:
        """Journal a command; tells whether it has to wait for an approval."""
        with transaction(self._database):
            self._record("command", command.id, message)
            self._journal.accept(command, message.payload, time.time_ns())
            waits = self._approvals.missing(command)
            digest = protocol.command_digest(message.payload)
            outcome = Outcome(VmState.UNKNOWN, f"digest {digest}", WAITING) if waits else None
            self._reporter.post(self._reporter.sign(command, ReportState.ACCEPTED, outcome))
        self._link.wake()
        return waits

    def _refuse(
        self, command: Command, message: Message, reason: RejectReason, detail: str
    ) -> None:
        """Refuse a fresh, genuine command for good."""
        signed = self._refusal(command, reason, detail)
        with transaction(self._database):
            self._record("command", command.id, message)
            self._journal.refuse(command, message.payload, signed.envelope)
            self._reporter.post(signed)
        self._link.wake()

    def _reject(self, rejected: Rejected, message: Message) -> None:
        """Put a rejection on record, and report it when its sender is known."""
        self._board.count_rejection(rejected.reason)
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
                "envelope": message.payload[:REJECTED_BYTES_MAX],
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

    def _record(self, kind: str, message_id: str, message: Message) -> None:
        self._evidence.append(kind, message_body(message_id, message.topic, message.payload))
