"""What a control remembers: verdicts taken, incidents, and commands with their answers.

The store does not commit: callers wrap its changes in `pyscan.outbox.transaction`.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, replace
from typing import Final

from pyscan.errors import InternalError
from pyscan.protocol import SKEW_S, VERDICT_AGE_S_MAX
from pyscan.records import (
    Action,
    Command,
    Incident,
    IncidentState,
    Report,
    ReportState,
    Verdict,
)

#: Verdict ids are kept for longer than a verdict may be old.
VERDICTS_KEPT_S: Final = 2 * (VERDICT_AGE_S_MAX + SKEW_S)
#: Later pauses between attempts are at most this many command lifetimes.
PAUSE_LIFETIMES_MAX: Final = 10

_INCIDENT_COLUMNS: Final = 9

#: How far a command is, by its latest report. A report never takes a command back.
_RANK: Final = {
    "": 0,
    ReportState.ACCEPTED: 1,
    ReportState.STARTED: 2,
    ReportState.SUCCEEDED: 3,
    ReportState.FAILED: 3,
    ReportState.REJECTED: 3,
}

#: Reasons that another attempt may overcome; the others wait for a person.
RETRYABLE: Final = frozenset({"expired", "unreachable", "timeout", "refused", "link",
                              "rate_limited", "not_yet_valid", "replayed"})  # fmt: skip

_SCHEMA: Final = (
    "CREATE TABLE IF NOT EXISTS verdicts (id TEXT PRIMARY KEY, decided_ns INTEGER NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS incidents ("
    " id TEXT PRIMARY KEY, verdict TEXT NOT NULL, target TEXT NOT NULL, host TEXT NOT NULL,"
    " vm TEXT NOT NULL, state TEXT NOT NULL, opened_ns INTEGER NOT NULL, action TEXT,"
    " command TEXT NOT NULL) STRICT",
    # One incident at a time for a target.
    "CREATE UNIQUE INDEX IF NOT EXISTS incidents_open ON incidents (target)"
    " WHERE state <> 'released'",
    "CREATE TABLE IF NOT EXISTS sequences ("
    " host TEXT, vm TEXT, highest INTEGER NOT NULL, PRIMARY KEY (host, vm)) STRICT",
    "CREATE TABLE IF NOT EXISTS commands ("
    " id TEXT PRIMARY KEY, incident TEXT NOT NULL REFERENCES incidents (id),"
    " finding TEXT NOT NULL, verdict TEXT NOT NULL, attempt INTEGER NOT NULL,"
    " issued_s INTEGER NOT NULL, expires_s INTEGER NOT NULL, envelope BLOB NOT NULL,"
    " state TEXT NOT NULL, reason TEXT NOT NULL, report TEXT NOT NULL) STRICT",
)


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The latest command of an open incident that has no successful report."""

    incident: Incident
    command_id: str
    finding: str
    verdict: str
    attempt: int  # from 1
    expires_s: int
    lifetime_s: int
    state: str  # of its latest report; empty: none
    reason: str

    @property
    def final(self) -> bool:
        """Whether the agent is done with it."""
        return _RANK[self.state] == _RANK[ReportState.FAILED]

    @property
    def due_s(self) -> int:
        """When another attempt may be made: this one can have no effect any more."""
        pause_s = self.lifetime_s * min(self.attempt - 1, PAUSE_LIFETIMES_MAX)
        return self.expires_s + pause_s + (0 if self.final else SKEW_S)

    @property
    def hopeless(self) -> bool:
        """Whether the agent gave an answer that another attempt would not change."""
        return self.final and self.reason not in RETRYABLE


class Store:
    """The control's tables."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        for statement in _SCHEMA:
            connection.execute(statement)

    def take_verdict(self, verdict: Verdict) -> bool:
        """Note a verdict; False when it was taken before. Forgets those too old to come again."""
        self._connection.execute(
            "DELETE FROM verdicts WHERE decided_ns < ?",
            (verdict.decided_ns - VERDICTS_KEPT_S * 10**9,),
        )
        cursor = self._connection.execute(
            "INSERT OR IGNORE INTO verdicts VALUES (?, ?)", (verdict.id, verdict.decided_ns)
        )
        return cursor.rowcount == 1

    def open_incident(self, target: str) -> Incident | None:
        """The target's incident that is not released yet."""
        row = self._connection.execute(
            "SELECT * FROM incidents WHERE target = ? AND state <> 'released'", (target,)
        ).fetchone()
        return _incident(row) if row else None

    def incident(self, incident_id: str) -> Incident:
        """An incident by its id. Raises InternalError."""
        row = self._connection.execute(
            "SELECT * FROM incidents WHERE id = ?", (incident_id,)
        ).fetchone()
        if row is None:
            raise InternalError(f"incident {incident_id} is missing from the database")
        return _incident(row)

    def put_incident(self, incident: Incident) -> None:
        """Add an incident, or replace it."""
        self._connection.execute(
            "INSERT INTO incidents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE"
            " SET state = excluded.state, action = excluded.action, command = excluded.command",
            (
                incident.id,
                incident.verdict,
                incident.target,
                incident.host,
                incident.vm,
                incident.state,
                incident.opened_ns,
                incident.action,
                incident.command,
            ),
        )

    def next_sequence(self, host: str, vm: str, now_ns: int) -> int:
        """Allocate the sequence number of a command: rising, also after this store was lost.

        It is the time in milliseconds where that is higher than the number before, so a
        control that starts afresh is not taken for a replay.
        """
        row = self._connection.execute(
            "INSERT INTO sequences VALUES (?, ?, ?) ON CONFLICT DO UPDATE"
            " SET highest = max(highest + 1, excluded.highest) RETURNING highest",
            (host, vm, now_ns // 10**6),
        ).fetchone()
        return int(row[0])

    def put_command(self, command: Command, envelope: bytes, attempt: int) -> None:
        """Add a command and make it the current one of its incident."""
        cause = command.cause
        self._connection.execute(
            "INSERT INTO commands VALUES (?, ?, ?, ?, ?, ?, ?, ?, '', '', '')",
            (
                command.id,
                cause.incident,
                cause.finding,
                cause.verdict,
                attempt,
                command.issued_s,
                command.expires_s,
                envelope,
            ),
        )
        incident = self.incident(cause.incident)
        self.put_incident(
            replace(incident, state=IncidentState.OPEN, action=command.action, command=command.id)
        )

    def envelope(self, command_id: str) -> bytes:
        """The signed bytes of a command. Raises InternalError."""
        row = self._connection.execute(
            "SELECT envelope FROM commands WHERE id = ?", (command_id,)
        ).fetchone()
        if row is None:
            raise InternalError(f"command {command_id} is missing from the database")
        return bytes(row[0])

    def take_report(self, report: Report) -> Incident | None:
        """Note a report about one of our commands; the incident it belongs to.

        None when there is nothing new in it: an unknown command, another host's word for
        it, or a step that the command has left behind.
        """
        row = self._connection.execute(
            "SELECT c.incident, c.state, i.host, i.vm FROM commands c"
            " JOIN incidents i ON i.id = c.incident WHERE c.id = ?",
            (report.command,),
        ).fetchone()
        if row is None:
            return None
        incident_id, state, host, vm = row
        if (report.host, report.vm) != (host, vm) or _RANK[report.state] <= _RANK[state]:
            return None
        self._connection.execute(
            "UPDATE commands SET state = ?, reason = ?, report = ? WHERE id = ?",
            (report.state, report.reason, report.id, report.command),
        )
        incident = self.incident(incident_id)
        if report.state is ReportState.SUCCEEDED and incident.command == report.command:
            incident = replace(incident, state=IncidentState.ANSWERED)
            self.put_incident(incident)
        return incident

    def unanswered(self) -> list[Unanswered]:
        """The commands of open incidents that still wait for success."""
        rows = self._connection.execute(
            "SELECT i.*, c.id, c.finding, c.verdict, c.attempt, c.expires_s,"
            " c.expires_s - c.issued_s, c.state, c.reason FROM incidents i"
            " JOIN commands c ON c.id = i.command WHERE i.state = 'open'"
        )
        return [Unanswered(_incident(row[:_INCIDENT_COLUMNS]), *row[_INCIDENT_COLUMNS:])
                for row in rows]  # fmt: skip


def _incident(row: tuple[str, str, str, str, str, str, int, str | None, str]) -> Incident:
    """An incident from its row, in the order of the table."""
    identifier, verdict, target, host, vm, state, opened_ns, action, command = row
    return Incident(
        id=identifier,
        verdict=verdict,
        target=target,
        host=host,
        vm=vm,
        state=IncidentState(state),
        opened_ns=opened_ns,
        action=Action(action) if action else None,
        command=command,
    )
