"""What an agent remembers over a crash: every command, how far it is, and what to undo.

A command's life, each step one transaction with the reports that tell of it:

    accepted -> started -> done
           `-------------> done    (refused by local policy, or expired while it waited)

`started` is committed before anything is done to the machine and holds what was observed
before; a command found in it after a crash is converged again, from what is then the
case. `done` holds the final report, which answers every redelivery.

The journal does not commit: callers wrap its changes in `pyscan.outbox.transaction`.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from pyscan.agent.drivers.base import CpuQuota, Disk, Throttle
from pyscan.agent.process import ProcessIdentity
from pyscan.records import Action, Command

#: Finished commands stay longer than a broker keeps our session, so that a redelivery is known.
KEPT_S = 8 * 24 * 3600


class CommandState(StrEnum):
    """How far a command is."""

    ACCEPTED = "accepted"
    STARTED = "started"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Layer:
    """A copy-on-write overlay over a disk."""

    base: Disk  # the disk as it was
    file: str  # the overlay


@dataclass(frozen=True, slots=True)
class Containment:
    """What was taken from a machine, and so what a release gives back.

    It is what the machine had, whether or not taking it away succeeded. QEMU does not tell
    whether a link is up: all its links are plugged in again.
    """

    was_running: bool
    links: tuple[str, ...]  # plugged in, as far as is known
    process: ProcessIdentity | None  # the machine it was taken from; a new one owes nothing
    networks: dict[str, str] = field(default_factory=dict)  # by link
    layers: dict[str, Layer] = field(default_factory=dict)  # by disk
    throttles: dict[str, Throttle] = field(default_factory=dict)  # by disk
    cpu: CpuQuota | None = None
    release_at_s: int | None = None  # Unix seconds; None: until a command releases it
    command: str = ""  # id of the command that set `release_at_s`


@dataclass(frozen=True, slots=True)
class Entry:
    """One journalled command."""

    command: Command
    state: CommandState
    report: bytes | None  # the final report as signed, once done


_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS commands ("
    " id TEXT PRIMARY KEY,"
    " command BLOB NOT NULL,"  # JSON of the verified record
    " envelope BLOB NOT NULL,"  # as received
    " action TEXT NOT NULL,"
    " state TEXT NOT NULL,"
    " before BLOB,"  # JSON of what was observed when it was started
    " report BLOB,"
    " accepted_ns INTEGER,"  # NULL: refused
    " expires_s INTEGER NOT NULL) STRICT",
    "CREATE INDEX IF NOT EXISTS commands_open ON commands (state) WHERE state <> 'done'",
    "CREATE INDEX IF NOT EXISTS commands_accepted ON commands (action, accepted_ns)",
    "CREATE TABLE IF NOT EXISTS sequences ("
    " issuer TEXT, vm TEXT, highest INTEGER NOT NULL, PRIMARY KEY (issuer, vm)) STRICT",
    "CREATE TABLE IF NOT EXISTS machines ("
    " vm TEXT PRIMARY KEY, process BLOB, containment BLOB) STRICT",
)


class Journal:
    """The agent's tables. Also the `ReplayGuard` of `pyscan.protocol`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        for statement in _SCHEMA:
            connection.execute(statement)

    def seen(self, command_id: str) -> bool:
        """Whether the command was accepted before."""
        return self.find(command_id) is not None

    def highest_sequence(self, issuer: str, vm: str) -> int:
        """The highest sequence number taken from `issuer` for `vm`; -1 before the first."""
        row = self._connection.execute(
            "SELECT highest FROM sequences WHERE issuer = ? AND vm = ?", (issuer, vm)
        ).fetchone()
        return int(row[0]) if row else -1

    def find(self, command_id: str) -> Entry | None:
        """The journalled command, or None."""
        row = self._connection.execute(
            "SELECT command, state, report FROM commands WHERE id = ?", (command_id,)
        ).fetchone()
        return _entry(row) if row else None

    def envelope(self, command_id: str) -> bytes:
        """The command as it was received; nothing when it is not known."""
        row = self._connection.execute(
            "SELECT envelope FROM commands WHERE id = ?", (command_id,)
        ).fetchone()
        return bytes(row[0]) if row else b""

    def unfinished(self) -> list[Entry]:
        """Commands that a crash interrupted, in the order they came."""
        rows = self._connection.execute(
            "SELECT command, state, report FROM commands WHERE state <> 'done' ORDER BY rowid"
        )
        return [_entry(row) for row in rows]

    def accept(self, command: Command, envelope: bytes, now_ns: int) -> None:
        """Take a verified command: its id is seen, its sequence number is used up."""
        self._insert(command, envelope, CommandState.ACCEPTED, now_ns, None)

    def refuse(self, command: Command, envelope: bytes, report: bytes) -> None:
        """Take a verified command that local policy forbids; `report` says so."""
        self._insert(command, envelope, CommandState.DONE, None, report)

    def _insert(
        self,
        command: Command,
        envelope: bytes,
        state: CommandState,
        accepted_ns: int | None,
        report: bytes | None,
    ) -> None:
        self._connection.execute(
            "INSERT INTO commands"
            " (id, command, envelope, action, state, accepted_ns, report, expires_s)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                command.id,
                msgspec.json.encode(command),
                envelope,
                command.action,
                state,
                accepted_ns,
                report,
                command.expires_s,
            ),
        )
        self._connection.execute(
            "INSERT INTO sequences (issuer, vm, highest) VALUES (?, ?, ?)"
            " ON CONFLICT DO UPDATE SET highest = max(highest, excluded.highest)",
            (command.issuer, command.vm, command.sequence),
        )

    def start(self, command: Command, before: object, containment: Containment | None) -> None:
        """Note what was observed and what is about to be taken from the machine."""
        self._connection.execute(
            "UPDATE commands SET state = ?, before = ? WHERE id = ?",
            (CommandState.STARTED, msgspec.json.encode(before), command.id),
        )
        self.set_containment(command.vm, containment)

    def finish(self, command: Command, report: bytes) -> None:
        """Keep the final report."""
        self._connection.execute(
            "UPDATE commands SET state = ?, report = ? WHERE id = ?",
            (CommandState.DONE, report, command.id),
        )

    def forget_old(self, now_s: int) -> None:
        """Drop finished commands that nobody can deliver again."""
        self._connection.execute(
            "DELETE FROM commands WHERE state = 'done' AND expires_s < ?", (now_s - KEPT_S,)
        )

    def accepted_since(self, action: Action, since_ns: int) -> int:
        """How many commands with this action were accepted since then."""
        row = self._connection.execute(
            "SELECT count(*) FROM commands WHERE action = ? AND accepted_ns >= ?",
            (action, since_ns),
        ).fetchone()
        return int(row[0])

    def machines(self) -> list[str]:
        """All machines that were ever reached and are not forgotten."""
        return [str(row[0]) for row in self._connection.execute("SELECT vm FROM machines")]

    def forget_machine(self, vm: str) -> None:
        """Drop a machine that is no more, and what it was owed."""
        self._connection.execute("DELETE FROM machines WHERE vm = ?", (vm,))

    def process(self, vm: str) -> ProcessIdentity | None:
        """The process of the machine when it was last reached."""
        row = self._connection.execute(
            "SELECT process FROM machines WHERE vm = ?", (vm,)
        ).fetchone()
        return msgspec.json.decode(row[0], type=ProcessIdentity) if row and row[0] else None

    def set_process(self, vm: str, process: ProcessIdentity) -> None:
        """Remember the process of a machine that was just reached."""
        self._connection.execute(
            "INSERT INTO machines (vm, process) VALUES (?, ?)"
            " ON CONFLICT DO UPDATE SET process = excluded.process",
            (vm, msgspec.json.encode(process)),
        )

    def containment(self, vm: str) -> Containment | None:
        """What was taken from the machine and not given back."""
        row = self._connection.execute(
            "SELECT containment FROM machines WHERE vm = ?", (vm,)
        ).fetchone()
        return msgspec.json.decode(row[0], type=Containment) if row and row[0] else None

    def set_containment(self, vm: str, containment: Containment | None) -> None:
        """Replace what is owed to a machine; None: nothing."""
        self._connection.execute(
            "INSERT INTO machines (vm, containment) VALUES (?, ?)"
            " ON CONFLICT DO UPDATE SET containment = excluded.containment",
            (vm, msgspec.json.encode(containment) if containment else None),
        )


def _entry(row: tuple[bytes, str, bytes | None]) -> Entry:
    command, state, report = row
    return Entry(msgspec.json.decode(command, type=Command), CommandState(state), report)
