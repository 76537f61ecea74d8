"""The database of a program, and in it the messages that are still to be published.

A program changes its state and puts the message that tells of it in one transaction, so
that over a crash both happened or neither. Messages leave in the order they were put, at
least once and always as the same bytes; receivers know them by the id inside.

A connection belongs to the thread that opened it (sqlite3 raises otherwise); a thread
that needs the database opens its own, and WAL lets them work side by side.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyscan.errors import FileFormatError, InternalError, TransportError, UsageError

#: PRAGMA application_id: "PySc". A database of another program is never touched.
APPLICATION_ID: Final = 0x50795363
#: PRAGMA user_version: the layout of all tables of this pyscan.
SCHEMA_VERSION: Final = 1
BUSY_TIMEOUT_MS: Final = 5_000

MESSAGES_MAX: Final = 10_000
PAYLOAD_BYTES_MAX: Final = 64 << 20  # of all waiting messages together
#: How many ids of sent messages are remembered, so that putting one again does nothing.
SENT_IDS_MAX: Final = 10_000


def open_database(path: Path) -> sqlite3.Connection:
    """Open or create a program's database; autocommit mode, use `transaction`.

    WAL and synchronous=FULL: what is committed survives a loss of power. The file has mode
    0600. Raises UsageError when it cannot be opened, FileFormatError when it is not a
    database of this version of pyscan.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(
            path, isolation_level=None, timeout=BUSY_TIMEOUT_MS / 1000, cached_statements=64
        )
    except (OSError, sqlite3.Error) as error:
        raise UsageError(f"{path}: cannot open the database: {error}") from error
    try:
        _check_owner(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    except sqlite3.Error as error:
        connection.close()
        raise FileFormatError(
            f"{path}: not a usable database ({error}); move it away to start afresh"
        ) from error
    except FileFormatError:
        connection.close()
        raise
    return connection


def _check_owner(connection: sqlite3.Connection, path: Path) -> None:
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if (tables, application, version) == (0, 0, 0):
        return
    if application != APPLICATION_ID:
        raise FileFormatError(f"{path}: a database of another program; choose another path")
    if version != SCHEMA_VERSION:
        raise FileFormatError(
            f"{path}: database version {version}, this pyscan has {SCHEMA_VERSION}; "
            "run the pyscan that wrote it, or move it away to start afresh"
        )


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All statements of the block or none; the write lock is taken at the start.

    Raises InternalError when the database cannot work (disk full, locked for too long).
    """
    try:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            # SQLite has rolled back by itself after some errors, such as a full disk.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise InternalError(
            f"the state database failed: {error}; check the disk's free space"
        ) from error


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message that waits to be published."""

    number: int  # rises in the order of `put`
    message_id: str
    topic: str
    payload: bytes
    retain: bool
    expiry_s: int | None  # seconds left when it was read, at least 1; None: does not expire
    correlation: bytes


class Outbox:
    """The waiting messages of one program, in its own database."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        messages_max: int = MESSAGES_MAX,
        payload_bytes_max: int = PAYLOAD_BYTES_MAX,
    ) -> None:
        self.connection = connection  # for the caller's `transaction`
        self._messages_max = messages_max
        self._payload_bytes_max = payload_bytes_max
        connection.execute(
            "CREATE TABLE IF NOT EXISTS outbox ("
            " number INTEGER PRIMARY KEY AUTOINCREMENT,"
            " message_id TEXT NOT NULL UNIQUE,"
            " topic TEXT NOT NULL,"
            " payload BLOB,"  # NULL: sent
            " retain INTEGER NOT NULL,"
            " expires_s INTEGER,"
            " correlation BLOB NOT NULL) STRICT"
        )
        connection.execute(
            "CREATE INDEX IF NOT EXISTS outbox_waiting ON outbox (number) WHERE payload IS NOT NULL"
        )

    def put(
        self,
        topic: str,
        payload: bytes,
        *,
        message_id: str,
        retain: bool = False,
        expires_s: int | None = None,
        correlation: bytes = b"",
    ) -> None:
        """Add a message, inside the caller's transaction. Again with the same id: no effect.

        `expires_s` is in Unix seconds and serves the broker's housekeeping; an expired
        message is still sent, so that its receiver can refuse it and say so. Raises
        TransportError when the outbox is full, InternalError outside of a transaction.
        """
        if not self.connection.in_transaction:
            raise InternalError("a message is put into the outbox outside of a transaction")
        known = self.connection.execute(
            "SELECT 1 FROM outbox WHERE message_id = ?", (message_id,)
        ).fetchone()
        if known:
            return
        count, size = self.connection.execute(
            "SELECT count(*), ifnull(sum(length(payload)), 0) FROM outbox WHERE payload IS NOT NULL"
        ).fetchone()
        if count >= self._messages_max or size + len(payload) > self._payload_bytes_max:
            raise TransportError(
                f"the outbox is full ({count} messages, {size} bytes wait for the broker); "
                "bring the broker back"
            )
        self.connection.execute(
            "INSERT INTO outbox (message_id, topic, payload, retain, expires_s, correlation)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (message_id, topic, payload, int(retain), expires_s, correlation),
        )

    def pending(self, limit: int = 64) -> list[Outgoing]:
        """The oldest waiting messages, in the order they were put."""
        rows = self.connection.execute(
            "SELECT number, message_id, topic, payload, retain, expires_s, correlation"
            " FROM outbox WHERE payload IS NOT NULL ORDER BY number LIMIT ?",
            (limit,),
        )
        now_s = int(time.time())
        return [
            Outgoing(
                number=number,
                message_id=message_id,
                topic=topic,
                payload=payload,
                retain=bool(retain),
                expiry_s=None if expires_s is None else max(1, expires_s - now_s),
                correlation=correlation,
            )
            for number, message_id, topic, payload, retain, expires_s, correlation in rows
        ]

    def sent(self, number: int) -> None:
        """The broker has the message: it waits no longer. Idempotent.

        Its id is kept for a while, without the payload.
        """
        self.connection.execute("UPDATE outbox SET payload = NULL WHERE number = ?", (number,))
        self.connection.execute(
            "DELETE FROM outbox WHERE payload IS NULL AND number <= ?", (number - SENT_IDS_MAX,)
        )
