"""What a control remembers: verdicts taken, incidents, and commands with their answers.

All changes of one `Store.transaction` happen together or not at all. Several workers may
share a store: whoever changes what belongs to a target holds the lock of its row, and
takes such locks in the order of names; the fleet's lock comes after them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from sqlalchemy import (
    Connection,
    Engine,
    Row,
    Table,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from pyscan.control.database import (
    BREAKER,
    COMMANDS,
    INCIDENTS,
    NOTES,
    OUTBOX,
    REPORTS,
    SEQUENCES,
    TARGETS,
    VERDICTS,
    WORKERS,
    guarded,
)
from pyscan.errors import InternalError, UsageError
from pyscan.ids import new_id
from pyscan.policy import Track
from pyscan.protocol import SKEW_S, VERDICT_AGE_S_MAX
from pyscan.records import (
    Action,
    Command,
    Incident,
    IncidentState,
    Report,
    ReportState,
    Verdict,
    VerdictState,
)

#: Verdict ids are kept for longer than a verdict may be old.
VERDICTS_KEPT_S: Final = 2 * (VERDICT_AGE_S_MAX + SKEW_S)
#: Later pauses between attempts are at most this many command lifetimes.
PAUSE_LIFETIMES_MAX: Final = 10
#: A worker that was not seen for so long has its work done by others.
WORKER_DEAD_S: Final = 10
#: How many rows a list shows.
LISTED_MAX: Final = 1000
_FLEET: Final = "fleet"

#: How far a command is, by its latest report. A report never takes a command back.
_RANK: Final = {
    "": 0,
    ReportState.ACCEPTED: 1,
    ReportState.STARTED: 2,
    ReportState.PROGRESS: 3,  # may repeat
    ReportState.SUCCEEDED: 4,
    ReportState.FAILED: 4,
    ReportState.REJECTED: 4,
}

#: Reasons that another attempt may overcome; the others wait for a person.
RETRYABLE: Final = frozenset({"expired", "unreachable", "timeout", "refused", "link",
                              "rate_limited", "not_yet_valid", "replayed"})  # fmt: skip


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


@dataclass(frozen=True, slots=True)
class Waiting:
    """A message in the outbox."""

    number: int
    message_id: str
    topic: str
    payload: bytes
    expires_s: int


@dataclass(frozen=True, slots=True)
class Fleet:
    """The targets that are known, by state, and the circuit breaker."""

    targets: int
    unapproved: int
    undecided: int
    tripped: str  # why; empty while it is closed


@dataclass(frozen=True, slots=True)
class Note:
    """What an operator did to an incident, or to the breaker when `incident` is empty."""

    id: str
    at_ns: int
    operator: str
    incident: str
    text: str


class Store:
    """The control's memory behind an engine of `open_engine`. One thread at a time uses it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Books]:
        """All changes of the block or none. Raises InternalError, StoreUnavailable."""
        with guarded(self._engine), self._engine.begin() as connection:
            yield Books(connection)

    def close(self) -> None:
        """Let go of the database. Idempotent."""
        self._engine.dispose()


class Books:
    """The tables, inside one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._is_file = connection.dialect.name == "sqlite"

    def _upsert(self, table: Table) -> Any:
        """An INSERT that may have ON CONFLICT. Compiled anew each time: not for hot paths."""
        return sqlite.insert(table) if self._is_file else postgresql.insert(table)

    # ------------------------------------------------------------------ verdicts, targets

    def lock(self, targets: Iterable[str]) -> dict[str, Track]:
        """Take the locks of targets; what is remembered of those that had a verdict."""
        names = sorted(set(targets))
        rows = self._locked(names)
        missing = [name for name in names if name not in rows]
        if missing:
            blank = {"host": "", "vm": "", "state": "", "decided_ns": 0,
                     "unapproved": 0, "undecided": 0}  # fmt: skip
            self._connection.execute(
                self._upsert(TARGETS).on_conflict_do_nothing(),
                [{"target": name, **blank} for name in missing],
            )
            rows |= self._locked(missing)
        return {name: _track(row) for name, row in rows.items() if row.state}

    def _locked(self, names: Sequence[str]) -> dict[str, Row[Any]]:
        query = select(TARGETS).where(TARGETS.c.target.in_(names)).order_by(TARGETS.c.target)
        return {row.target: row for row in self._connection.execute(query.with_for_update())}

    def put_tracks(self, tracks: Iterable[Track]) -> None:
        """Remember these of their targets, whose locks are held."""
        rows = [{f"new_{key}": value for key, value in asdict(track).items()} for track in tracks]
        if not rows:
            return
        columns = [column.name for column in TARGETS.c if not column.primary_key]
        statement = (
            update(TARGETS)
            .where(TARGETS.c.target == bindparam("new_target"))
            .values({name: bindparam(f"new_{name}") for name in columns})
        )
        self._connection.execute(statement, rows)

    def take_verdicts(self, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """Note verdicts; those that were not taken before. The locks of their targets are held."""
        fresh = {verdict.id: verdict for verdict in reversed(verdicts)}
        query = select(VERDICTS.c.id).where(VERDICTS.c.id.in_(fresh))
        for known in self._connection.scalars(query):
            del fresh[known]
        new = [verdict for verdict in verdicts if fresh.pop(verdict.id, None) is not None]
        if new:
            self._connection.execute(
                insert(VERDICTS),
                [{"id": each.id, "decided_ns": each.decided_ns} for each in new],
            )
        return new

    def forget_verdicts(self, now_ns: int) -> None:
        """Forget ids of verdicts that are too old to come again."""
        before_ns = now_ns - VERDICTS_KEPT_S * 10**9
        self._connection.execute(delete(VERDICTS).where(VERDICTS.c.decided_ns < before_ns))

    # ---------------------------------------------------------------------------- fleet

    def lock_fleet(self) -> Fleet:
        """Hold everybody else's actions up until the end of this transaction."""
        query = select(BREAKER).where(BREAKER.c.name == _FLEET).with_for_update()
        row = self._connection.execute(query).one_or_none()
        if row is None:
            blank = {"name": _FLEET, "tripped_ns": 0, "reason": ""}
            self._connection.execute(self._upsert(BREAKER).on_conflict_do_nothing(), blank)
            row = self._connection.execute(query).one()
        query_counts = (
            select(TARGETS.c.state, func.count())
            .where(TARGETS.c.state != "")
            .group_by(TARGETS.c.state)
        )
        counts = {row[0]: int(row[1]) for row in self._connection.execute(query_counts)}
        return Fleet(
            targets=sum(counts.values()),
            unapproved=counts.get(VerdictState.UNAPPROVED, 0),
            undecided=counts.get(VerdictState.UNDECIDED, 0),
            tripped=row.reason if row.tripped_ns else "",
        )

    def set_breaker(self, tripped_ns: int, reason: str) -> None:
        """Open the circuit breaker, or close it (0)."""
        self._connection.execute(
            update(BREAKER)
            .where(BREAKER.c.name == _FLEET)
            .values(tripped_ns=tripped_ns, reason=reason)
        )

    def actions_since(self, since_s: int) -> Counter[str]:
        """First attempts since then, by tenant."""
        query = (
            select(COMMANDS.c.tenant, func.count())
            .where(COMMANDS.c.issued_s > since_s, COMMANDS.c.attempt == 1)
            .group_by(COMMANDS.c.tenant)
        )
        return Counter({row[0]: int(row[1]) for row in self._connection.execute(query)})

    # ------------------------------------------------------------------------ incidents

    def open_incidents(self, targets: Iterable[str]) -> dict[str, Incident]:
        """The incidents of targets that are not released yet."""
        query = select(INCIDENTS).where(
            INCIDENTS.c.target.in_(sorted(set(targets))), INCIDENTS.c.state != "released"
        )
        return {row.target: _incident(row) for row in self._connection.execute(query)}

    def incident(self, incident_id: str) -> Incident:
        """An incident by its id. Raises UsageError."""
        query = select(INCIDENTS).where(INCIDENTS.c.id == incident_id)
        row = self._connection.execute(query).one_or_none()
        if row is None:
            raise UsageError(f"no incident {incident_id}; `pyscan incidents` lists them")
        return _incident(row)

    def incidents(self, *, released: bool = False) -> list[tuple[Incident, str]]:
        """The latest incidents and why each was opened; released ones only when wanted."""
        query = select(INCIDENTS).order_by(INCIDENTS.c.opened_ns.desc()).limit(LISTED_MAX)
        if not released:
            query = query.where(INCIDENTS.c.state != "released")
        return [(_incident(row), row.reason) for row in self._connection.execute(query)]

    def reason(self, incident_id: str) -> str:
        """Why an incident was opened."""
        query = select(INCIDENTS.c.reason).where(INCIDENTS.c.id == incident_id)
        return str(self._connection.execute(query).scalar_one())

    def put_incident(self, incident: Incident, reason: str) -> None:
        """Add an incident. Raises sqlalchemy's IntegrityError for a target's second open one."""
        self._connection.execute(insert(INCIDENTS), {**asdict(incident), "reason": reason})

    def change_incident(self, incident: Incident) -> None:
        """Note how far an incident is: its state, action and command."""
        self._connection.execute(
            update(INCIDENTS)
            .where(INCIDENTS.c.id == incident.id)
            .values(state=incident.state, action=incident.action, command=incident.command)
        )

    def release(self, incident: Incident, operator: str, text: str, now_ns: int) -> None:
        """Close an incident by hand, and tell the control."""
        self.change_incident(replace(incident, state=IncidentState.RELEASED))
        self.put_note(Note(new_id(), now_ns, operator, incident.id, text))

    def put_note(self, note: Note) -> None:
        """Tell the control what an operator did."""
        self._connection.execute(insert(NOTES), asdict(note))

    def take_notes(self) -> list[Note]:
        """What operators did; each is given to one worker."""
        query = select(NOTES).order_by(NOTES.c.id).limit(LISTED_MAX)
        notes = [
            Note(**row._mapping)
            for row in self._connection.execute(query.with_for_update(skip_locked=True))
        ]
        if notes:
            taken = [note.id for note in notes]
            self._connection.execute(delete(NOTES).where(NOTES.c.id.in_(taken)))
        return notes

    # ------------------------------------------------------------------------- commands

    def next_sequence(self, host: str, vm: str, now_ns: int) -> int:
        """Allocate the sequence number of a command: rising, also after this store was lost.

        It is the time in milliseconds where that is higher than the number before, so a
        control that starts afresh is not taken for a replay.
        """
        key = {"host": host, "vm": vm}
        now_ms = now_ns // 10**6
        column, greatest = SEQUENCES.c.highest, func.max if self._is_file else func.greatest
        following = (
            update(SEQUENCES)
            .where(SEQUENCES.c.host == host, SEQUENCES.c.vm == vm)
            .values(highest=greatest(column + 1, now_ms))
            .returning(column)
        )
        taken = self._connection.execute(following).scalar_one_or_none()
        if taken is None:
            # Another worker may be the first at the same time.
            first = self._upsert(SEQUENCES).on_conflict_do_nothing().returning(column)
            row = {**key, "highest": now_ms}
            taken = self._connection.execute(first, row).scalar_one_or_none()
        if taken is None:
            taken = self._connection.execute(following).scalar_one()
        return int(taken)

    def put_command(
        self, command: Command, envelope: bytes, attempt: int, *, worker: str, tenant: str = ""
    ) -> None:
        """Add a command; the caller makes it the current one of its incident."""
        cause = command.cause
        self._connection.execute(
            insert(COMMANDS),
            {
                "id": command.id,
                "incident": cause.incident,
                "finding": cause.finding,
                "verdict": cause.verdict,
                "issuer": command.issuer,
                "action": command.action,
                "tenant": tenant,
                "worker": worker,
                "attempt": attempt,
                "issued_s": command.issued_s,
                "expires_s": command.expires_s,
                "envelope": envelope,
                "state": "",
                "reason": "",
            },
        )

    def envelope(self, command_id: str) -> bytes:
        """The signed bytes of a command. Raises InternalError."""
        query = select(COMMANDS.c.envelope).where(COMMANDS.c.id == command_id)
        envelope = self._connection.execute(query).scalar_one_or_none()
        if envelope is None:
            raise InternalError(f"command {command_id} is missing from the database")
        return bytes(envelope)

    def unanswered(self, worker: str) -> list[Unanswered]:
        """A worker's commands of open incidents that still wait for success."""
        query = (
            select(INCIDENTS, COMMANDS)
            .join(COMMANDS, COMMANDS.c.id == INCIDENTS.c.command)
            .where(INCIDENTS.c.state == "open", COMMANDS.c.worker == worker)
        )
        return [
            Unanswered(
                incident=_incident(row, INCIDENTS),
                command_id=row[COMMANDS.c.id],
                finding=row[COMMANDS.c.finding],
                verdict=row[COMMANDS.c.verdict],
                attempt=row[COMMANDS.c.attempt],
                expires_s=row[COMMANDS.c.expires_s],
                lifetime_s=row[COMMANDS.c.expires_s] - row[COMMANDS.c.issued_s],
                state=row[COMMANDS.c.state],
                reason=row[COMMANDS.c.reason],
            )
            for row in (found._mapping for found in self._connection.execute(query))
        ]

    def history(self, incident_id: str) -> list[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
        """The commands of an incident in their order, each with its reports."""
        query = select(COMMANDS).where(COMMANDS.c.incident == incident_id)
        commands = self._connection.execute(query.order_by(COMMANDS.c.issued_s, COMMANDS.c.attempt))
        listed: list[tuple[Mapping[str, Any], list[Mapping[str, Any]]]] = []
        for command in commands.all():
            reports = self._connection.execute(
                select(REPORTS).where(REPORTS.c.command == command.id).order_by(REPORTS.c.at_ns)
            )
            listed.append((dict(command._mapping), [dict(each._mapping) for each in reports]))
        return listed

    # -------------------------------------------------------------------------- reports

    def targets_of(self, reports: Sequence[Report]) -> set[str]:
        """The targets that reports are about, as far as they are of an incident."""
        ids = [report.command for report in reports]
        query = (
            select(INCIDENTS.c.target)
            .join(COMMANDS, COMMANDS.c.incident == INCIDENTS.c.id)
            .where(COMMANDS.c.id.in_(ids))
        )
        found = set(self._connection.scalars(query))
        for report in reports:
            if report.action is Action.RELEASE:
                found |= {incident.target for incident in self._of_machine(report)}
        return found

    def _of_machine(self, report: Report) -> list[Incident]:
        query = select(INCIDENTS).where(
            INCIDENTS.c.host == report.host,
            INCIDENTS.c.vm == report.vm,
            INCIDENTS.c.state != "released",
        )
        return [_incident(row) for row in self._connection.execute(query)]

    def take_report(self, report: Report) -> Incident | None:
        """Note a report; the incident that it belongs to, with what the report made of it.

        None when there is nothing new in it: an unknown command, another host's word for
        it, or a step that the command has left behind. A machine that was released, by
        whomever, has no open incident any more.
        """
        query = (
            select(COMMANDS.c.incident, COMMANDS.c.state, INCIDENTS.c.host, INCIDENTS.c.vm)
            .join(INCIDENTS, INCIDENTS.c.id == COMMANDS.c.incident)
            .where(COMMANDS.c.id == report.command)
        )
        row = self._connection.execute(query).one_or_none()
        if row is None:
            return self._take_release(report)
        if (report.host, report.vm) != (row.host, row.vm):
            return None
        progress = report.state is ReportState.PROGRESS
        if _RANK[report.state] + progress <= _RANK[row.state] or not self._put_report(report):
            return None
        self._connection.execute(
            update(COMMANDS)
            .where(COMMANDS.c.id == report.command)
            .values(state=report.state, reason=report.reason)
        )
        incident = self.incident(row.incident)
        if report.state is ReportState.SUCCEEDED and incident.command == report.command:
            incident = replace(incident, state=IncidentState.ANSWERED)
            self.change_incident(incident)
        return incident

    def _take_release(self, report: Report) -> Incident | None:
        """An operator's command, or one that ended by itself, let a machine go."""
        if report.action is not Action.RELEASE or report.state is not ReportState.SUCCEEDED:
            return None
        incidents = self._of_machine(report)
        if not incidents or not self._put_report(report):
            return None
        incident = replace(incidents[0], state=IncidentState.RELEASED)
        self.change_incident(incident)
        return incident

    def _put_report(self, report: Report) -> bool:
        row = {
            "id": report.id,
            "command": report.command,
            "state": report.state,
            "reason": report.reason,
            "detail": report.detail,
            "vm_state": report.vm_state,
            "at_ns": report.at_ns,
        }
        statement = self._upsert(REPORTS).on_conflict_do_nothing().returning(REPORTS.c.id)
        return self._connection.execute(statement, row).one_or_none() is not None

    # ------------------------------------------------------------------ outbox, workers

    def put_message(
        self, worker: str, message_id: str, topic: str, payload: bytes, expires_s: int
    ) -> Waiting:
        """Add a message that `worker` publishes after this transaction."""
        row = {
            "message_id": message_id,
            "worker": worker,
            "topic": topic,
            "payload": payload,
            "expires_s": expires_s,
        }
        statement = insert(OUTBOX).returning(OUTBOX.c.number)
        number = int(self._connection.execute(statement, row).scalar_one())
        return Waiting(number, message_id, topic, payload, expires_s)

    def waiting(self, worker: str) -> list[Waiting]:
        """A worker's messages, in the order they were put."""
        query = select(OUTBOX).where(OUTBOX.c.worker == worker).order_by(OUTBOX.c.number)
        return [
            Waiting(row.number, row.message_id, row.topic, bytes(row.payload), row.expires_s)
            for row in self._connection.execute(query)
        ]

    def sent(self, numbers: Sequence[int]) -> None:
        """The broker has these messages."""
        if numbers:
            self._connection.execute(delete(OUTBOX).where(OUTBOX.c.number.in_(numbers)))

    def beat(self, worker: str, now_ns: int) -> bool:
        """Show that a worker lives, and give it the work of those that do not; tells if any."""
        new = self._upsert(WORKERS)
        self._connection.execute(
            new.on_conflict_do_update(
                index_elements=[WORKERS.c.name], set_={"seen_ns": new.excluded.seen_ns}
            ),
            {"name": worker, "seen_ns": now_ns},
        )
        before_ns = now_ns - WORKER_DEAD_S * 10**9
        query = select(WORKERS.c.name).where(
            WORKERS.c.seen_ns < before_ns, WORKERS.c.name != worker
        )
        dead = list(self._connection.scalars(query.with_for_update(skip_locked=True)))
        if not dead:
            return False
        for table in (COMMANDS, OUTBOX):
            self._connection.execute(
                update(table).where(table.c.worker.in_(dead)).values(worker=worker)
            )
        self._connection.execute(delete(WORKERS).where(WORKERS.c.name.in_(dead)))
        return True


def _incident(row: Any, table: Table | None = None) -> Incident:
    """An incident from its row, or from one that holds other tables' columns, too."""

    def column(name: str) -> Any:
        return row[table.c[name]] if table is not None else getattr(row, name)

    action = column("action")
    return Incident(
        id=column("id"),
        verdict=column("verdict"),
        target=column("target"),
        host=column("host"),
        vm=column("vm"),
        state=IncidentState(column("state")),
        opened_ns=column("opened_ns"),
        action=Action(action) if action else None,
        command=column("command"),
    )


def _track(row: Row[Any]) -> Track:
    return Track(
        target=row.target,
        host=row.host,
        vm=row.vm,
        state=VerdictState(row.state),
        decided_ns=row.decided_ns,
        unapproved=row.unapproved,
        undecided=row.undecided,
    )
