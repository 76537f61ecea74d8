"""`pyscan control`: answers verdicts by policy, with signed commands to the agents.

A verdict, the incident that it opens, the sequence number and the command that answers it
are one transaction; the outbox brings the command out, over crashes and broker restarts.

A command is published until the broker has it, and again, the same bytes, at growing
intervals until its agent has answered: a broker that is killed may lose what it has
confirmed, or the agent's session. The agent knows the command by its id.

A command that expires without a final report, or fails for a reason that may pass, is
followed by a *new* command (fresh id, sequence and signature) while its incident is open.
That cannot double an effect: the old one is refused by its `exp` by then, and actions name
a state.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from pathlib import Path
from typing import Final

from pyscan import protocol, runtime
from pyscan.config import ControlConfig, PolicyTable, load_control
from pyscan.control.store import Store, Unanswered
from pyscan.errors import Rejected, TransportError
from pyscan.evidence import EvidenceLog, message_body
from pyscan.ids import new_id
from pyscan.outbox import Outbox, transaction
from pyscan.policy import Policy, decide
from pyscan.protocol import Topic, TopicKind
from pyscan.records import (
    Action,
    Cause,
    Command,
    Incident,
    IncidentState,
    Report,
    ReportState,
    Verdict,
)
from pyscan.transport import Link, LinkState, Message, Publication

log = logging.getLogger(__name__)

NAME: Final = "control"
#: How often unanswered commands are looked at.
REVIEW_INTERVAL_S: Final = 0.5
#: Pause before a command without a final report is published again; it doubles each time.
REPEAT_FIRST_S: Final = 1.0
REJECTIONS_BURST: Final = 32
REJECTIONS_PER_S: Final = 2.0


def run_program(path: Path, check_only: bool) -> int:
    """Run the control until a signal; returns its exit status."""
    return runtime.run_program(NAME, path, load_control, run, check_only=check_only)


async def run(config: ControlConfig) -> None:
    """Answer verdicts until cancelled."""
    with config.open_state() as (database, evidence):
        await _Control(config, database, evidence).run()


def policy_of(table: PolicyTable) -> Policy:
    """The policy that a configuration asks for."""
    return Policy(
        enforce=table.enforce,
        unapproved=table.unapproved,
        undecided=table.undecided,
        protected_vms=frozenset(table.protected),
    )


class _Control:
    """Verdicts in, commands out, reports in."""

    def __init__(
        self, config: ControlConfig, database: sqlite3.Connection, evidence: EvidenceLog
    ) -> None:
        self._config = config
        self._name = config.identity.name
        self._policy = policy_of(config.policy)
        self._monitors = config.trust.monitor_ring()
        self._agents = config.trust.agent_ring()
        self._database = database
        self._evidence = evidence
        self._store = Store(database)
        self._outbox = Outbox(database)
        self._rejections = runtime.RateBound(REJECTIONS_BURST, REJECTIONS_PER_S)
        self._repeats: dict[str, tuple[float, float]] = {}  # command -> when next, pause after
        self._link = Link(
            config.link_settings(NAME),
            [
                protocol.subscription(TopicKind.VERDICT),
                protocol.subscription(TopicKind.REPORT),
            ],
        )

    async def run(self) -> None:
        """All stages; ends only by cancellation or an error."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._link.run(), name="link")
            group.create_task(self._link.pump(self._outbox), name="pump")
            group.create_task(self._receive(), name="intake")
            group.create_task(self._review(), name="review")
            runtime.note_state(NAME, runtime.ProgramState.RUNNING)
            log.info(
                "policy enforce=%s unapproved=%s undecided=%s protected=%d",
                self._policy.enforce,
                self._policy.unapproved,
                self._policy.undecided or "alarm",
                len(self._policy.protected_vms),
            )

    async def _receive(self) -> None:
        async for message in self._link.messages:
            try:
                if Topic.parse(message.topic).kind is TopicKind.VERDICT:
                    self._take_verdict(message)
                else:
                    self._take_report(message)
            except Rejected as rejected:
                self._reject(rejected, message)
            except TransportError as error:
                # Not acknowledged: it comes again, when there is room for an answer.
                log.error("message put back topic=%s problem=%s", message.topic, error)  # noqa: TRY400 - expected, one line
                continue
            message.acknowledge()

    def _take_verdict(self, message: Message) -> None:
        """Record a verdict and answer it. Raises Rejected."""
        now_ns = time.time_ns()
        verdict = protocol.decode_verdict(
            message.payload, self._monitors, topic=message.topic, now_ns=now_ns
        )
        with transaction(self._database):
            if not self._store.take_verdict(verdict):
                return
            # Evidence comes before the commit: a kill destroys what it was based on.
            self._evidence.append(
                "verdict", message_body(verdict.id, message.topic, message.payload)
            )
            self._answer(verdict, now_ns)
        self._link.wake()

    def _answer(self, verdict: Verdict, now_ns: int) -> None:
        incident = self._store.open_incident(verdict.target)
        decision = decide(verdict, self._policy, incident)
        log.info(
            "verdict id=%s target=%s state=%s action=%s reason=%s decision=%s",
            verdict.id,
            verdict.target,
            verdict.state,
            decision.action or "none",
            verdict.reason,
            decision.reason,
        )
        if decision.incident_wanted:
            incident = self._open_incident(verdict, now_ns)
        if decision.action is not None and incident is not None:
            finding = verdict.findings[0].id if verdict.findings else ""
            cause = Cause(incident.id, finding, verdict.id)
            self._command(incident, decision.action, cause, attempt=1)

    def _open_incident(self, verdict: Verdict, now_ns: int) -> Incident:
        incident = Incident(
            id=new_id(),
            verdict=verdict.id,
            target=verdict.target,
            host=verdict.host,
            vm=verdict.vm,
            state=IncidentState.OPEN,
            opened_ns=now_ns,
        )
        self._store.put_incident(incident)
        self._note_incident(incident, verdict.reason)
        return incident

    def _command(self, incident: Incident, action: Action, cause: Cause, attempt: int) -> None:
        """Sign a command and put it into the outbox, inside a transaction."""
        now_ns = time.time_ns()
        now_s = now_ns // 10**9
        command = Command(
            id=new_id(),
            issuer=self._name,
            audience=incident.host,
            sequence=self._store.next_sequence(incident.host, incident.vm, now_ns),
            issued_s=now_s,
            expires_s=now_s + self._config.command_lifetime_s,
            action=action,
            vm=incident.vm,
            cause=cause,
        )
        envelope = protocol.encode_command(command, self._config.identity.key)
        topic = protocol.command_topic(command.audience, command.vm)
        self._evidence.append("command", message_body(command.id, topic, envelope))
        self._store.put_command(command, envelope, attempt)
        self._outbox.put(
            topic,
            envelope,
            message_id=command.id,
            expires_s=command.expires_s,
            correlation=command.id.encode("ascii"),
        )
        log.info(
            "command id=%s action=%s host=%s vm=%s incident=%s attempt=%d",
            command.id,
            action,
            command.audience,
            command.vm,
            incident.id,
            attempt,
        )

    def _take_report(self, message: Message) -> None:
        """Record a report and what it means for its incident. Raises Rejected."""
        report = protocol.decode_report(message.payload, self._agents, topic=message.topic)
        with transaction(self._database):
            incident = self._store.take_report(report)
            if incident is None:
                return
            self._evidence.append("report", message_body(report.id, message.topic, message.payload))
            if incident.state is IncidentState.ANSWERED:
                self._note_incident(incident, report.detail)
        self._log_report(report, incident)

    def _log_report(self, report: Report, incident: Incident) -> None:
        bad = report.state in {ReportState.FAILED, ReportState.REJECTED}
        log.log(
            logging.WARNING if bad else logging.INFO,
            "report state=%s command=%s action=%s vm=%s vm_state=%s incident=%s"
            " reason=%s detail=%s",
            report.state,
            report.command,
            report.action,
            report.vm,
            report.vm_state or "-",
            incident.id,
            report.reason or "-",
            report.detail or "-",
        )

    async def _review(self) -> None:
        """Follow up on commands that were not answered, for ever."""
        hopeless: set[str] = set()
        while True:
            unanswered_now = self._store.unanswered()
            waiting = {unanswered.command_id for unanswered in unanswered_now}
            self._repeats = {key: due for key, due in self._repeats.items() if key in waiting}
            for unanswered in unanswered_now:
                if unanswered.hopeless:
                    if unanswered.command_id not in hopeless:
                        hopeless.add(unanswered.command_id)
                        self._log_hopeless(unanswered)
                elif self._may_retry(unanswered):
                    self._retry(unanswered)
                else:
                    await self._repeat(unanswered)
            await asyncio.sleep(REVIEW_INTERVAL_S)

    async def _repeat(self, unanswered: Unanswered) -> None:
        """Publish the same command again when its answer is overdue."""
        command_id, now = unanswered.command_id, time.monotonic()
        if (
            unanswered.final
            or time.time() >= unanswered.expires_s
            or not self._may_send(command_id)
        ):
            return
        if command_id not in self._repeats:
            self._repeats[command_id] = (now + REPEAT_FIRST_S, REPEAT_FIRST_S)
            return
        due, pause_s = self._repeats[command_id]
        if now < due:
            return
        self._repeats[command_id] = (now + 2 * pause_s, 2 * pause_s)
        incident = unanswered.incident
        topic = protocol.command_topic(incident.host, incident.vm)
        log.info("command repeated id=%s host=%s vm=%s", command_id, incident.host, incident.vm)
        with contextlib.suppress(TransportError):
            await self._link.publish(Publication(topic, self._store.envelope(command_id)))

    def _may_send(self, command_id: str) -> bool:
        """Whether the broker is there and has taken the command before."""
        return self._link.state is LinkState.ONLINE and all(
            entry.message_id != command_id for entry in self._outbox.pending()
        )

    def _may_retry(self, unanswered: Unanswered) -> bool:
        """Not before the last attempt is void and has left: no pile of commands behind a broker."""
        return (
            self._policy.enforce
            and time.time() > unanswered.due_s
            and self._may_send(unanswered.command_id)
        )

    def _retry(self, unanswered: Unanswered) -> None:
        incident = unanswered.incident
        if incident.action is None:
            return
        cause = Cause(incident.id, unanswered.finding, unanswered.verdict)
        try:
            with transaction(self._database):
                self._command(incident, incident.action, cause, unanswered.attempt + 1)
        except TransportError as error:
            log.warning("command not repeated incident=%s problem=%s", incident.id, error)
            return
        self._link.wake()

    def _log_hopeless(self, unanswered: Unanswered) -> None:
        log.error(
            "incident needs a person id=%s target=%s command=%s state=%s reason=%s",
            unanswered.incident.id,
            unanswered.incident.target,
            unanswered.command_id,
            unanswered.state,
            unanswered.reason,
        )

    def _note_incident(self, incident: Incident, detail: str) -> None:
        self._evidence.append(
            "incident",
            {
                "id": incident.id,
                "verdict": incident.verdict,
                "target": incident.target,
                "state": incident.state.value,
                "command": incident.command,
                "detail": detail,
            },
        )
        log.warning(
            "incident state=%s id=%s target=%s", incident.state, incident.id, incident.target
        )

    def _reject(self, rejected: Rejected, message: Message) -> None:
        if not self._rejections.allow():
            return
        log.warning(
            "message rejected topic=%s problem=%s not_recorded_before=%d",
            message.topic,
            rejected,
            self._rejections.held_back,
        )
        self._evidence.append(
            "rejected",
            {
                "topic": message.topic,
                "reason": str(rejected.reason),
                "envelope": message.payload[: protocol.VERDICT_BYTES_MAX],
            },
        )
