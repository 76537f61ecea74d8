"""The control's tables, and how its store is reached: a file, or PostgreSQL for several workers.

A file is a program's database as any other (`pyscan.outbox.open_database`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    create_engine,
    event,
    insert,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.pool import QueuePool

from pyscan.errors import FileFormatError, InternalError, StoreUnavailable, UsageError
from pyscan.outbox import SCHEMA_VERSION, open_database

CONNECT_TIMEOUT_S: Final = 5
#: Bounds of a statement and of a wait for another worker's lock, in PostgreSQL.
STATEMENT_TIMEOUT_MS: Final = 10_000
LOCK_TIMEOUT_MS: Final = 5_000
#: SQLSTATE of a deadlock, a failed serialization and a lock that did not come in time.
CONFLICTS: Final = frozenset({"40P01", "40001", "55P03"})
#: Any number: workers that make the tables at the same time wait for each other.
_SCHEMA_LOCK: Final = 0x50795363

METADATA: Final = MetaData()
_Whole = BigInteger().with_variant(Integer, "sqlite")


def _table(name: str, *parts: Column[Any] | Index, **options: Any) -> Table:
    return Table(name, METADATA, *parts, sqlite_strict=True, **options)


def _text(name: str, **options: Any) -> Column[Any]:
    return Column(name, Text, nullable=options.pop("nullable", False), **options)


def _whole(name: str, **options: Any) -> Column[Any]:
    return Column(name, _Whole, nullable=False, **options)


VERDICTS: Final = _table(
    "verdicts",
    _text("id", primary_key=True),
    _whole("decided_ns", index=True),
)
TARGETS: Final = _table(
    "targets",
    _text("target", primary_key=True),
    _text("host"),
    _text("vm"),
    _text("state"),
    _whole("decided_ns"),
    _whole("unapproved"),
    _whole("undecided"),
)
INCIDENTS: Final = _table(
    "incidents",
    _text("id", primary_key=True),
    _text("verdict"),
    _text("target"),
    _text("host"),
    _text("vm"),
    _text("state"),
    _whole("opened_ns"),
    _text("action", nullable=True),
    _text("command"),
    _text("reason"),
)
#: One incident at a time for a target.
_NOT_RELEASED: Final = INCIDENTS.c.state != text("'released'")
Index(
    "incidents_open",
    INCIDENTS.c.target,
    unique=True,
    sqlite_where=_NOT_RELEASED,
    postgresql_where=_NOT_RELEASED,
)
SEQUENCES: Final = _table(
    "sequences",
    _text("host", primary_key=True),
    _text("vm", primary_key=True),
    _whole("highest"),
)
COMMANDS: Final = _table(
    "commands",
    _text("id", primary_key=True),
    _text("incident", index=True),
    _text("finding"),
    _text("verdict"),
    _text("issuer"),
    _text("action"),
    _text("tenant"),
    _text("worker"),  # who follows it up; "" for an operator's
    _whole("attempt"),
    _whole("issued_s", index=True),
    _whole("expires_s"),
    Column("envelope", LargeBinary, nullable=False),
    _text("state"),
    _text("reason"),
)
REPORTS: Final = _table(
    "reports",
    _text("id", primary_key=True),
    _text("command", index=True),
    _text("state"),
    _text("reason"),
    _text("detail"),
    _text("vm_state"),
    _whole("at_ns"),
)
OUTBOX: Final = _table(
    "outbox",
    Column("number", _Whole, primary_key=True, autoincrement=True),
    _text("message_id", unique=True),
    _text("worker", index=True),  # who publishes it
    _text("topic"),
    Column("payload", LargeBinary, nullable=False),
    _whole("expires_s"),
    sqlite_autoincrement=True,
)
WORKERS: Final = _table(
    "workers",
    _text("name", primary_key=True),
    _whole("seen_ns"),
)
#: What an operator did to the store; the control takes it into its evidence.
NOTES: Final = _table(
    "notes",
    _text("id", primary_key=True),
    _whole("at_ns"),
    _text("operator"),
    _text("incident"),
    _text("text"),
)
BREAKER: Final = _table(
    "breaker",
    _text("name", primary_key=True),
    _whole("tripped_ns"),
    _text("reason"),
)
SCHEMA: Final = _table("schema", _whole("version", primary_key=True, autoincrement=False))


def sqlite_url(path: Path) -> str:
    """The URL of a store in a file."""
    return f"sqlite:///{path.absolute()}"


def open_engine(url: str) -> Engine:
    """Reach a store and make its tables where they are missing.

    Raises UsageError for a URL that cannot be used, StoreUnavailable when nobody answers,
    FileFormatError for a store of another version.
    """
    try:
        address = make_url(url)
    except ArgumentError as error:
        raise UsageError("the store's URL is none; use postgresql://USER@HOST/DATABASE") from error
    if address.get_backend_name() == "sqlite":
        engine = _open_file(Path(address.database or ""))
    elif address.get_backend_name() == "postgresql":
        engine = _open_server(url)
    else:
        raise UsageError(f"no store is known by {address.drivername}; use postgresql://...")
    try:
        with guarded(engine), engine.begin() as connection:
            _make_tables(connection)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _open_file(path: Path) -> Engine:
    # Kept by one thread: a connection belongs to the thread that opened it.
    engine = create_engine(
        "sqlite://", creator=lambda: open_database(path), poolclass=QueuePool, pool_size=1,
        max_overflow=0,
    )  # fmt: skip

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # The driver would begin late and without the write lock.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _open_server(url: str) -> Engine:
    options = f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c lock_timeout={LOCK_TIMEOUT_MS}"
    try:
        return create_engine(
            make_url(url).set(drivername="postgresql+psycopg"),
            pool_size=1,
            max_overflow=0,
            pool_pre_ping=True,
            connect_args={
                "connect_timeout": CONNECT_TIMEOUT_S,
                "options": options,
                "application_name": "pyscan",
            },
        )
    except ImportError as error:
        raise UsageError("no driver for PostgreSQL; install pyscan[postgresql]") from error


def _make_tables(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_SCHEMA_LOCK})")
    METADATA.create_all(connection)
    versions = list(connection.scalars(select(SCHEMA.c.version)))
    if not versions:
        connection.execute(insert(SCHEMA), {"version": SCHEMA_VERSION})
    elif versions != [SCHEMA_VERSION]:
        raise FileFormatError(
            f"the store has version {versions[0]}, this pyscan has {SCHEMA_VERSION}; "
            "run the pyscan that wrote it, or begin with an empty database"
        )


@contextlib.contextmanager
def guarded(engine: Engine) -> Iterator[None]:
    """Turn a database's failures into ours.

    A server may come back, and a conflict with another worker passes: StoreUnavailable. A
    file that cannot be written does not heal: InternalError.
    """
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as error:
        cause = " ".join(str(error.orig).split())
        if engine.dialect.name == "sqlite":
            raise InternalError(
                f"the state database failed: {cause}; check the disk's free space"
            ) from error
        where = engine.url.render_as_string(hide_password=True)
        if getattr(error.orig, "sqlstate", None) in CONFLICTS:
            raise StoreUnavailable(f"store {where}: busy: {cause}") from error
        raise StoreUnavailable(
            f"store {where}: {cause}; is the server running, and are the URL and its rights right?"
        ) from error
