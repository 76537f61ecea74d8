"""Verdicts and reports, batch by batch: what is recorded, opened and commanded.

A verdict, the incident that it opens, the sequence number and the command that answers it
are one transaction. Evidence is on the disk before the commit: a kill destroys what it was
based on.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from pyscan import protocol
from pyscan.control.store import Books, Fleet, Note, Store, Waiting
from pyscan.evidence import EvidenceLog, message_body
from pyscan.ids import new_id
from pyscan.keys import SigningKey
from pyscan.policy import Decision, Policy, Situation, Track, decide, follow
from pyscan.records import (
    Action,
    Cause,
    Command,
    Incident,
    IncidentState,
    Report,
    ReportState,
    Verdict,
    VerdictState,
)

log = logging.getLogger(__name__)

#: What the limits of a policy count actions over.
MINUTE_S: Final = 60


@dataclass(frozen=True, slots=True)
class Heard:
    """A verified verdict or report, as it arrived."""

    content: Verdict | Report
    topic: str
    envelope: bytes


@dataclass(frozen=True, slots=True)
class Office:
    """Who commands, and how."""

    name: str
    key: SigningKey
    policy: Policy
    command_lifetime_s: int


@dataclass(slots=True)
class _Page:
    """What one transaction leads to, besides its changes to the store."""

    books: Books
    now_ns: int
    evidence: list[tuple[str, Mapping[str, object]]] = field(default_factory=list)
    messages: list[Waiting] = field(default_factory=list)
    #: Held still by its lock from the first wanted action on, so it is looked at once.
    fleet: Fleet | None = None
    actions: Counter[str] = field(default_factory=Counter)  # of the last minute, by tenant


class Clerk:
    """Answers what is heard. Blocks: runs in the store's thread."""

    def __init__(self, office: Office, store: Store, evidence: EvidenceLog) -> None:
        self._office = office
        self._policy = office.policy
        self._store = store
        self._evidence = evidence

    def take(self, heard: Sequence[Heard]) -> list[Waiting]:
        """Record a batch and answer it; the messages that are to be published.

        Raises StoreUnavailable, when nothing has happened or all of it, and the same batch
        may be given again.
        """
        verdicts = {h.content.id: h for h in heard if isinstance(h.content, Verdict)}
        reports = [h for h in heard if isinstance(h.content, Report)]
        with self._store.transaction() as books:
            page = _Page(books, time.time_ns())
            about = books.targets_of([h.content for h in reports if isinstance(h.content, Report)])
            asked = [h.content for h in verdicts.values() if isinstance(h.content, Verdict)]
            tracks = books.lock(about | {verdict.target for verdict in asked})
            fresh = books.take_verdicts(asked)
            for verdict in fresh:
                original = verdicts[verdict.id]
                body = message_body(verdict.id, original.topic, original.envelope)
                page.evidence.append(("verdict", body))
            self._answer_all(page, fresh, tracks)
            for each in reports:
                self._take_report(page, each)
            self._evidence.append_all(page.evidence)
        return page.messages

    def _answer_all(
        self, page: _Page, verdicts: Sequence[Verdict], tracks: dict[str, Track]
    ) -> None:
        alarms: list[tuple[Verdict, Track]] = []
        changed: dict[str, Track] = {}
        for verdict in verdicts:
            track = follow(tracks.get(verdict.target), verdict)
            tracks[verdict.target] = changed[verdict.target] = track
            if verdict.state is VerdictState.APPROVED:
                self._log(verdict, Decision(False, None, "approved"))
            else:
                alarms.append((verdict, track))
        # The fleet as it is after the whole batch is what a limit is held against.
        page.books.put_tracks(changed.values())
        if not alarms:
            return
        incidents = page.books.open_incidents(verdict.target for verdict, _ in alarms)
        for verdict, track in alarms:
            incident = self._answer(page, verdict, track, incidents.get(verdict.target))
            if incident is not None:
                incidents[verdict.target] = incident

    def _answer(
        self, page: _Page, verdict: Verdict, track: Track, incident: Incident | None
    ) -> Incident | None:
        """Answer a verdict that is not approved; the target's incident afterwards."""
        tenant = self._policy.tenant(verdict.target)
        decision = self._decide(page, verdict, track, tenant, incident)
        self._log(verdict, decision)
        if decision.trips:
            self._trip(page, decision.reason)
        if decision.incident_wanted:
            incident = self._open_incident(page, verdict)
        if decision.action is not None and incident is not None:
            finding = verdict.findings[0].id if verdict.findings else ""
            cause = Cause(incident.id, finding, verdict.id)
            page.actions[tenant] += 1
            incident = self._command(page, incident, decision.action, cause, attempt=1)
        return incident

    def _decide(
        self,
        page: _Page,
        verdict: Verdict,
        track: Track,
        tenant: str,
        incident: Incident | None,
    ) -> Decision:
        """Ask the policy; for an action, once more with the fleet held still."""
        situation = Situation(
            now_ns=page.now_ns, unapproved=track.unapproved, undecided=track.undecided
        )
        decision = decide(verdict, self._policy, incident, situation)
        if decision.action is None:
            return decision
        if page.fleet is None:
            page.fleet = page.books.lock_fleet()
            page.actions = page.books.actions_since(page.now_ns // 10**9 - MINUTE_S)
        fleet = page.fleet
        situation = replace(
            situation,
            actions=page.actions.total(),
            tenant_actions=page.actions[tenant] if tenant else 0,
            fleet=fleet.targets,
            fleet_unapproved=fleet.unapproved,
            fleet_undecided=fleet.undecided,
            tripped=bool(fleet.tripped),
        )
        return decide(verdict, self._policy, incident, situation)

    def _log(self, verdict: Verdict, decision: Decision) -> None:
        log.info(
            "verdict id=%s target=%s state=%s action=%s reason=%s decision=%s%s",
            verdict.id,
            verdict.target,
            verdict.state,
            decision.action or "none",
            verdict.reason,
            decision.reason,
            f" validated={decision.validated}" if decision.validated else "",
        )

    def _trip(self, page: _Page, reason: str) -> None:
        page.books.set_breaker(page.now_ns, reason)
        if page.fleet is not None:
            page.fleet = replace(page.fleet, tripped=reason)
        page.evidence.append(("alarm", {"alarm": "circuit_breaker", "detail": reason}))
        log.error(
            "circuit breaker opened, nothing is done any more: a person is needed reason=%s;"
            " then `pyscan incidents resume`",
            reason,
        )

    def _open_incident(self, page: _Page, verdict: Verdict) -> Incident:
        incident = Incident(
            id=new_id(),
            verdict=verdict.id,
            target=verdict.target,
            host=verdict.host,
            vm=verdict.vm,
            state=IncidentState.OPEN,
            opened_ns=page.now_ns,
        )
        page.books.put_incident(incident, verdict.reason)
        self._note_incident(page, incident, verdict.reason)
        return incident

    def _command(
        self, page: _Page, incident: Incident, action: Action, cause: Cause, attempt: int
    ) -> Incident:
        """Sign a command and put it into the outbox; its incident afterwards."""
        office, now_ns = self._office, time.time_ns()
        now_s = now_ns // 10**9
        command = Command(
            id=new_id(),
            issuer=office.name,
            audience=incident.host,
            sequence=page.books.next_sequence(incident.host, incident.vm, now_ns),
            issued_s=now_s,
            expires_s=now_s + office.command_lifetime_s,
            action=action,
            vm=incident.vm,
            cause=cause,
        )
        envelope = protocol.encode_command(command, office.key)
        topic = protocol.command_topic(command.audience, command.vm)
        page.evidence.append(("command", message_body(command.id, topic, envelope)))
        tenant = self._policy.tenant(incident.target)
        page.books.put_command(command, envelope, attempt, worker=office.name, tenant=tenant)
        incident = replace(
            incident, state=IncidentState.OPEN, action=command.action, command=command.id
        )
        page.books.change_incident(incident)
        page.messages.append(
            page.books.put_message(office.name, command.id, topic, envelope, command.expires_s)
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
        return incident

    def retry(self, incident: Incident, cause: Cause, attempt: int) -> list[Waiting]:
        """Order an incident's action anew.

        Not when the incident has moved on, and not while the circuit breaker is open.
        """
        with self._store.transaction() as books:
            page = _Page(books, time.time_ns())
            books.lock([incident.target])
            current = books.incident(incident.id)
            if (
                current == incident
                and incident.action is not None
                and not books.lock_fleet().tripped
            ):
                self._command(page, incident, incident.action, cause, attempt)
                self._evidence.append_all(page.evidence)
        return page.messages

    def take_notes(self, notes: Sequence[Note]) -> None:
        """Put on record what operators did to the store."""
        for note in notes:
            log.warning(
                "operator=%s incident=%s note=%s", note.operator, note.incident or "-", note.text
            )
        self._evidence.append_all(
            (
                "operator",
                {
                    "id": note.id,
                    "at_ns": note.at_ns,
                    "operator": note.operator,
                    "incident": note.incident,
                    "text": note.text,
                },
            )
            for note in notes
        )

    def _take_report(self, page: _Page, heard: Heard) -> None:
        """Record a report and what it means for its incident."""
        report = heard.content
        if not isinstance(report, Report):
            return
        incident = page.books.take_report(report)
        if incident is None:
            return
        page.evidence.append(("report", message_body(report.id, heard.topic, heard.envelope)))
        if incident.state is not IncidentState.OPEN:
            self._note_incident(page, incident, report.detail)
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

    def _note_incident(self, page: _Page, incident: Incident, detail: str) -> None:
        page.evidence.append(
            (
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
        )
        log.warning(
            "incident state=%s id=%s target=%s", incident.state, incident.id, incident.target
        )
