"""The database and the outbox: nothing lost, nothing twice, over crashes of real processes."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyscan.errors import FileFormatError, InternalError, TransportError, UsageError
from pyscan.outbox import Outbox, open_database, transaction

ROOT = Path(__file__).parents[2]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = open_database(tmp_path / "state.sqlite")
    yield connection
    connection.close()


def _put(outbox: Outbox, *names: str) -> None:
    with transaction(outbox.connection):
        for name in names:
            outbox.put(f"topic/{name}", name.encode(), message_id=name)


def _ids(outbox: Outbox) -> list[str]:
    return [message.message_id for message in outbox.pending()]


def test_messages_leave_in_order_and_stay_until_sent(database: sqlite3.Connection) -> None:
    outbox = Outbox(database)
    _put(outbox, "b", "a")
    _put(outbox, "c")
    assert _ids(outbox) == _ids(outbox) == ["b", "a", "c"]
    assert [message.message_id for message in outbox.pending(2)] == ["b", "a"]
    first = outbox.pending()[0]
    assert (first.topic, first.payload, first.retain) == ("topic/b", b"b", False)
    assert (first.expiry_s, first.correlation) == (None, b"")
    outbox.sent(first.number)
    outbox.sent(first.number)
    assert _ids(outbox) == ["a", "c"]


def test_everything_about_a_message_is_kept(database: sqlite3.Connection) -> None:
    outbox = Outbox(database)
    now_s = int(time.time())
    with transaction(database):
        outbox.put(
            "topic",
            b"\0",
            message_id="1",
            retain=True,
            expires_s=now_s + 1000,
            correlation=b"\xff",
        )
        outbox.put("topic", b"", message_id="2", expires_s=now_s - 1000)
    kept, late = outbox.pending()
    assert (kept.payload, kept.retain, kept.correlation) == (b"\0", True, b"\xff")
    assert kept.expiry_s is not None
    assert 900 < kept.expiry_s <= 1000
    assert (late.payload, late.expiry_s) == (b"", 1)


def test_a_message_put_again_is_one_message(database: sqlite3.Connection) -> None:
    outbox = Outbox(database)
    _put(outbox, "a", "a")
    _put(outbox, "a")
    (message,) = outbox.pending()
    outbox.sent(message.number)
    _put(outbox, "a")
    assert outbox.pending() == []


def test_sent_ids_are_forgotten_in_the_end(
    database: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyscan.outbox.SENT_IDS_MAX", 3)
    outbox = Outbox(database)
    for name in "abcdefgh":
        _put(outbox, name)
        outbox.sent(outbox.pending()[0].number)
    assert database.execute("SELECT count(*) FROM outbox").fetchone()[0] == 3


def test_what_is_rolled_back_was_never_put(database: sqlite3.Connection) -> None:
    outbox = Outbox(database)

    def fail() -> None:
        with transaction(database):
            outbox.put("topic", b"", message_id="a")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert outbox.pending() == []
    _put(outbox, "a")
    assert _ids(outbox) == ["a"]


def test_a_message_needs_a_transaction(database: sqlite3.Connection) -> None:
    with pytest.raises(InternalError, match="outside of a transaction"):
        Outbox(database).put("topic", b"", message_id="a")


def test_a_full_outbox_says_so(database: sqlite3.Connection) -> None:
    outbox = Outbox(database, messages_max=2, payload_bytes_max=10)
    _put(outbox, "a", "b")
    with pytest.raises(TransportError, match=r"full.*2 messages"):
        _put(outbox, "c")
    _put(outbox, "a")  # is there already
    outbox.sent(outbox.pending()[0].number)
    with pytest.raises(TransportError, match="full"), transaction(database):
        outbox.put("topic", bytes(10), message_id="large")
    _put(outbox, "c")
    assert _ids(outbox) == ["b", "c"]


PUTTER = """
import os, signal, sys
from pathlib import Path
from pyscan.outbox import Outbox, open_database, transaction
database = open_database(Path(sys.argv[1]))
outbox = Outbox(database)
with transaction(database):
    outbox.put("topic", b"whole", message_id="whole")
with transaction(database):
    outbox.put("topic", b"half", message_id="half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    killed = subprocess.run([sys.executable, "-c", PUTTER, path], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    connection = open_database(path)
    outbox = Outbox(connection)
    assert _ids(outbox) == ["whole"]
    _put(outbox, "whole", "half")
    assert _ids(outbox) == ["whole", "half"]
    connection.close()


def test_two_threads_with_their_own_connections(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    outboxes = open_database(path)
    Outbox(outboxes)

    def work(prefix: str) -> None:
        connection = open_database(path)
        outbox = Outbox(connection)
        for number in range(20):
            _put(outbox, f"{prefix}{number}")
        connection.close()

    threads = [threading.Thread(target=work, args=(prefix,)) for prefix in "xy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    ids = _ids(Outbox(outboxes))
    assert [name for name in ids if name[0] == "x"] == [f"x{number}" for number in range(20)]
    assert len(ids) == 40
    outboxes.close()


def test_the_database_survives_a_loss_of_power(
    database: sqlite3.Connection, tmp_path: Path
) -> None:
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert database.execute("PRAGMA synchronous").fetchone() == (2,)
    _put(Outbox(database), "a")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert set(modes) >= {"state.sqlite", "state.sqlite-wal"}
    assert set(modes.values()) == {0o600}


def test_the_database_is_ours_or_refused(tmp_path: Path) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(8192))
    with pytest.raises(FileFormatError, match="move it away"):
        open_database(noise)
    foreign = tmp_path / "foreign"
    other = sqlite3.connect(foreign)
    other.execute("CREATE TABLE theirs (x)")
    other.commit()
    other.close()
    with pytest.raises(FileFormatError, match="another program"):
        open_database(foreign)
    future = tmp_path / "future"
    open_database(future).close()
    other = sqlite3.connect(future)
    other.execute("PRAGMA user_version = 7")
    other.close()
    with pytest.raises(FileFormatError, match="version 7, this pyscan has 1"):
        open_database(future)
    with pytest.raises(UsageError, match="cannot open the database"):
        open_database(tmp_path / "missing" / "state.sqlite")


def test_a_failing_database_is_a_clear_error(database: sqlite3.Connection) -> None:
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    outbox = Outbox(database)
    _put(outbox, "a")
    database.execute(f"PRAGMA max_page_count = {pages + 4}")
    with pytest.raises(InternalError, match=r"is full.*free space"), transaction(database):
        outbox.put("topic", bytes(100_000), message_id="large")
    assert not database.in_transaction
    assert _ids(outbox) == ["a"]
