"""Two people for one command: what waits for a second signature, and who gave it.

Clause 5.15 of docs/spec/wire.md. An approval may come before its command, so it is kept
either way; whether it fits is asked again each time, of the bytes that the journal holds.
Nothing here commits: callers wrap changes in `pyscan.outbox.transaction`.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Collection
from typing import Final

import msgspec

from pyscan.agent.journal import CommandState, Journal
from pyscan.errors import Rejected
from pyscan.protocol import SKEW_S, RejectReason, check_approval
from pyscan.records import Action, Approval, Command

#: Approvals whose command is not known yet; they are authentic, so this is a person's mistake.
EARLY_MAX: Final = 1_000

_SCHEMA: Final = (
    "CREATE TABLE IF NOT EXISTS approvals ("
    " command TEXT, issuer TEXT,"
    " approval BLOB NOT NULL,"  # JSON of the verified record
    " expires_s INTEGER NOT NULL, PRIMARY KEY (command, issuer)) STRICT"
)


class Approvals:
    """The agent's table of approvals, and the actions that want one."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        journal: Journal,
        actions: Collection[Action],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._connection = connection
        self._clock = clock
        self._journal = journal
        self._actions = frozenset(actions)
        connection.execute(_SCHEMA)

    def missing(self, command: Command) -> bool:
        """Whether a journalled command must wait. A dry run never does."""
        if command.action not in self._actions or command.arguments.get("dry_run") is True:
            return False
        rows = self._connection.execute(
            "SELECT approval FROM approvals WHERE command = ? AND expires_s >= ?",
            (command.id, int(self._clock()) - SKEW_S),
        ).fetchall()
        envelope = self._journal.envelope(command.id)
        return not any(
            _fits(msgspec.json.decode(row[0], type=Approval), command, envelope) for row in rows
        )

    def take(self, approval: Approval) -> Command | None:
        """Note a verified approval; the command that goes ahead by it, or None so far.

        Raises Rejected when it is no second person's, of another command, of none that waits,
        or known already: a broker may repeat it for ever, and each one taken is put on record.
        """
        record = msgspec.json.encode(approval)
        if self._connection.execute(
            "SELECT 1 FROM approvals WHERE command = ? AND issuer = ? AND approval = ?",
            (approval.command, approval.issuer, record),
        ).fetchone():
            text = f"approval {approval.id} was taken before"
            raise Rejected(RejectReason.DUPLICATE, text)
        entry = self._journal.find(approval.command)
        if entry is not None:
            if entry.state is not CommandState.ACCEPTED or not self.missing(entry.command):
                text = f"command {approval.command} does not wait for an approval"
                raise Rejected(RejectReason.NOT_WAITING, text)
            check_approval(approval, entry.command, self._journal.envelope(approval.command))
        elif approval.action not in self._actions:
            raise Rejected(RejectReason.NOT_WAITING, f"{approval.action} needs no approval here")
        else:
            self._make_room()
        self._connection.execute(
            "INSERT INTO approvals (command, issuer, approval, expires_s) VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE"
            " SET approval = excluded.approval, expires_s = excluded.expires_s",
            (approval.command, approval.issuer, record, approval.expires_s),
        )
        return entry.command if entry is not None else None

    def _make_room(self) -> None:
        """Drop what is of no use any more; the command itself is void by then, too."""
        self._connection.execute(
            "DELETE FROM approvals WHERE expires_s < ?"
            " AND command NOT IN (SELECT id FROM commands WHERE state <> 'done')",
            (int(self._clock()) - SKEW_S,),
        )
        row = self._connection.execute("SELECT count(*) FROM approvals").fetchone()
        if row[0] >= EARLY_MAX:
            raise Rejected(RejectReason.RATE_LIMITED, f"{EARLY_MAX} approvals wait already")

    def overdue(self) -> list[Command]:
        """Commands that waited until their time was over."""
        if not self._actions:
            return []
        return [
            entry.command
            for entry in self._journal.unfinished()
            if entry.state is CommandState.ACCEPTED
            and self._clock() > entry.command.expires_s + SKEW_S
            and self.missing(entry.command)
        ]


def _fits(approval: Approval, command: Command, envelope: bytes) -> bool:
    try:
        check_approval(approval, command, envelope)
    except Rejected:
        return False
    return True
