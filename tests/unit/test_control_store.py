"""The control's store: one incident a target, rising sequences, reports only go forward.

Every test runs on a file and on PostgreSQL; those of several workers on the latter.
"""

from __future__ import annotations

import itertools
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from postgres import Postgres
from sqlalchemy.exc import IntegrityError

from pyscan import outbox
from pyscan.control.database import open_engine, sqlite_url
from pyscan.control.store import (
    PAUSE_LIFETIMES_MAX,
    RETRYABLE,
    VERDICTS_KEPT_S,
    WORKER_DEAD_S,
    Books,
    Note,
    Store,
)
from pyscan.errors import FileFormatError, InternalError, StoreUnavailable, UsageError
from pyscan.ids import new_id
from pyscan.policy import Track
from pyscan.protocol import SKEW_S, RejectReason
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

INCIDENT = Incident(new_id(), new_id(), "web-1", "host-1", "web-1", IncidentState.OPEN, 1)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture
def open_stores() -> Iterator[Callable[[str], Store]]:
    with ExitStack() as stack:

        def open_store(url: str) -> Store:
            store = Store(open_engine(url))
            stack.callback(store.close)
            return store

        yield open_store


@pytest.fixture(params=["file", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return sqlite_url(tmp_path / "state.sqlite")
    return str(request.getfixturevalue("postgres").create())


@pytest.fixture
def store(url: str, open_stores: Callable[[str], Store]) -> Store:
    return open_stores(url)


@pytest.fixture
def books(store: Store) -> Iterator[Books]:
    with store.transaction() as books:
        yield books


def verdict(decided_ns: int, target: str = "web-1") -> Verdict:
    state = VerdictState.UNAPPROVED
    return Verdict(
        new_id(), new_id(), "mon-1", target, "host-1", target, state, "", decided_ns, 1, 0, 0
    )


def command(incident: Incident = INCIDENT, **changes: object) -> Command:
    cause = Cause(incident.id, new_id(), incident.verdict)
    one = Command(new_id(), "ctl-1", "host-1", 1, 1000, 1030, Action.FREEZE, "web-1", cause=cause)
    return replace(one, **changes)  # type: ignore[arg-type]


def put(books: Books, one: Command, attempt: int = 1, tenant: str = "") -> None:
    books.put_command(one, b"", attempt, worker="ctl-1", tenant=tenant)
    incident = books.incident(one.cause.incident)
    incident = replace(incident, state=IncidentState.OPEN, action=one.action, command=one.id)
    books.change_incident(incident)


def report(about: Command, state: ReportState, reason: str = "") -> Report:
    return Report(new_id(), about.id, "host-1", "web-1", about.action, state, 1, reason)


def test_verdict_is_taken_once(books: Books) -> None:
    first = verdict(decided_ns=10**18)
    assert books.take_verdicts([first, first]) == [first]
    assert books.take_verdicts([first]) == []
    late = verdict(decided_ns=10**18 + (VERDICTS_KEPT_S + 1) * 10**9)
    assert books.take_verdicts([first, late]) == [late]
    books.forget_verdicts(late.decided_ns)
    assert books.take_verdicts([first, late]) == [first]  # too old to be accepted by now


def test_tracks_are_kept_by_target(books: Books) -> None:
    assert books.lock(["web-2", "web-1"]) == {}
    one = Track("web-1", "host-1", "web-1", VerdictState.UNAPPROVED, 7, 2, 3)
    books.put_tracks([one])
    assert books.lock(["web-1", "web-2", "web-3"]) == {"web-1": one}
    two = replace(one, target="web-2", state=VerdictState.APPROVED, unapproved=0, undecided=0)
    books.put_tracks([replace(one, state=VerdictState.UNDECIDED), two])
    fleet = books.lock_fleet()
    assert (fleet.targets, fleet.unapproved, fleet.undecided, fleet.tripped) == (2, 0, 1, "")
    books.set_breaker(1, "half of the fleet")
    assert books.lock_fleet().tripped == "half of the fleet"
    books.set_breaker(0, "")
    assert books.lock_fleet().tripped == ""


def test_one_incident_a_target_until_it_is_released(store: Store) -> None:
    with store.transaction() as books:
        assert books.open_incidents(["web-1"]) == {}
        books.put_incident(INCIDENT, "why")
        assert books.open_incidents(["web-1", "web-2"]) == {"web-1": INCIDENT}
    another = replace(INCIDENT, id=new_id())
    with pytest.raises(IntegrityError), store.transaction() as books:
        books.put_incident(another, "")
    with store.transaction() as books:
        books.change_incident(replace(INCIDENT, state=IncidentState.ANSWERED))
        assert books.open_incidents(["web-1"])
        books.change_incident(replace(INCIDENT, state=IncidentState.RELEASED))
        assert not books.open_incidents(["web-1"])
        books.put_incident(another, "")
        assert books.open_incidents(["web-1"]) == {"web-1": another}
        assert books.incidents() == [(another, "")]
        assert {(i.id, why) for i, why in books.incidents(released=True)} == {
            (INCIDENT.id, "why"),
            (another.id, ""),
        }
        with pytest.raises(UsageError, match="no incident"):
            books.incident(new_id())


def test_nothing_of_a_transaction_that_fails(store: Store) -> None:
    one = verdict(1)
    with suppress(RuntimeError), store.transaction() as books:
        books.take_verdicts([one])
        books.put_incident(INCIDENT, "why")
        books.put_message("ctl-1", new_id(), "t", b"m", 1)
        raise RuntimeError
    with store.transaction() as books:
        assert books.take_verdicts([one]) == [one]
        assert books.open_incidents(["web-1"]) == {}
        assert books.waiting("ctl-1") == []


def test_sequences_rise_whatever_the_clock_does(books: Books) -> None:
    clock_ms = [1000, 1000, 900, 2000, 0]
    taken = [books.next_sequence("host-1", "web-1", ms * 10**6) for ms in clock_ms]
    assert taken == [1000, 1001, 1002, 2000, 2001]
    assert books.next_sequence("host-1", "web-2", 5 * 10**6) == 5


STATES = (ReportState.ACCEPTED, ReportState.STARTED, ReportState.PROGRESS, ReportState.SUCCEEDED)


def test_reports_in_any_order_end_in_the_same_state(store: Store) -> None:
    for order in itertools.permutations(STATES):
        with store.transaction() as books:
            incident = replace(INCIDENT, id=new_id(), target=f"web-{new_id()}")
            books.put_incident(incident, "")
            one = command(incident)
            put(books, one)
            for state in order:
                books.take_report(report(one, state))
            assert books.incident(incident.id).state is IncidentState.ANSWERED
            assert books.take_report(report(one, ReportState.FAILED)) is None
            assert books.incident(incident.id).state is IncidentState.ANSWERED


def test_each_step_is_taken_once(books: Books) -> None:
    books.put_incident(INCIDENT, "why")
    one = command()
    put(books, one)
    steps = [report(one, ReportState.PROGRESS), report(one, ReportState.PROGRESS)]
    assert [books.take_report(step) is None for step in (*steps, *steps)] == [
        False,
        False,
        True,
        True,
    ]
    assert books.take_report(report(one, ReportState.STARTED)) is None
    assert books.take_report(report(one, ReportState.SUCCEEDED)) is not None
    assert books.take_report(report(one, ReportState.PROGRESS)) is None
    [(listed, reports)] = books.history(INCIDENT.id)
    assert listed["id"] == one.id
    assert [each["state"] for each in reports] == ["progress", "progress", "succeeded"]


def test_reports_that_are_not_about_our_command(books: Books) -> None:
    books.put_incident(INCIDENT, "why")
    one = command()
    put(books, one)
    success = report(one, ReportState.SUCCEEDED)
    for foreign in (
        replace(success, command=new_id()),
        replace(success, host="host-2"),
        replace(success, vm="web-2"),
    ):
        assert books.take_report(foreign) is None
    assert books.incident(INCIDENT.id).state is IncidentState.OPEN


def test_a_machine_that_somebody_released_has_no_open_incident(books: Books) -> None:
    books.put_incident(INCIDENT, "why")
    by_hand = replace(report(command(), ReportState.SUCCEEDED), action=Action.RELEASE)
    for other in (
        replace(by_hand, state=ReportState.FAILED),
        replace(by_hand, action=Action.QUERY),
        replace(by_hand, vm="web-2"),
    ):
        assert books.take_report(other) is None
    assert books.targets_of([by_hand]) == {"web-1"}
    released = books.take_report(by_hand)
    assert released is not None
    assert released.state is IncidentState.RELEASED
    assert books.open_incidents(["web-1"]) == {}
    assert books.take_report(by_hand) is None


def test_success_of_a_superseded_command_does_not_answer(books: Books) -> None:
    books.put_incident(INCIDENT, "why")
    first, second = command(), command()
    put(books, first)
    put(books, second, attempt=2)
    books.take_report(report(first, ReportState.SUCCEEDED))
    assert books.incident(INCIDENT.id).state is IncidentState.OPEN
    assert [waiting.command_id for waiting in books.unanswered("ctl-1")] == [second.id]
    assert books.unanswered("ctl-2") == []


@pytest.mark.parametrize(
    ("state", "reason", "attempt", "due_s"),
    [
        (None, "", 1, 1030 + SKEW_S),
        (None, "", 3, 1030 + SKEW_S + 2 * 30),
        (None, "", 1000, 1030 + SKEW_S + PAUSE_LIFETIMES_MAX * 30),
        (ReportState.STARTED, "", 1, 1030 + SKEW_S),
        (ReportState.PROGRESS, "", 1, 1030 + SKEW_S),
        (ReportState.FAILED, "timeout", 1, 1030),
        (ReportState.REJECTED, "rate_limited", 2, 1060),
    ],
)
def test_next_attempt_waits_until_the_last_one_is_void(
    books: Books, state: ReportState | None, reason: str, attempt: int, due_s: int
) -> None:
    books.put_incident(INCIDENT, "why")
    one = command()
    put(books, one, attempt)
    if state:
        books.take_report(report(one, state, reason))
    [waiting] = books.unanswered("ctl-1")
    assert waiting.due_s == due_s
    assert waiting.incident == books.incident(INCIDENT.id)
    assert not waiting.hopeless


@pytest.mark.parametrize("reason", ["gone", "unsupported", "protected_vm", "unknown_vm", ""])
def test_some_answers_wait_for_a_person(books: Books, reason: str) -> None:
    books.put_incident(INCIDENT, "why")
    one = command()
    put(books, one)
    books.take_report(report(one, ReportState.FAILED, reason))
    [waiting] = books.unanswered("ctl-1")
    assert waiting.hopeless


def test_retryable_rejections_are_codes_of_the_protocol() -> None:
    drivers = {"unreachable", "timeout", "refused", "link"}
    assert set(RETRYABLE) - drivers <= set(RejectReason)


def test_actions_are_counted_by_tenant_and_without_repetitions(books: Books) -> None:
    books.put_incident(INCIDENT, "why")
    put(books, command(), tenant="acme")
    put(books, command(), attempt=2, tenant="acme")
    put(books, command(issued_s=2000), tenant="acme")
    put(books, command(issued_s=2000))
    assert books.actions_since(999) == {"acme": 2, "": 1}
    assert books.actions_since(1000) == {"acme": 1, "": 1}
    assert not books.actions_since(2000)


def test_what_waits_is_sent_once_and_in_order(books: Books) -> None:
    first, second = (
        books.put_message("ctl-1", new_id(), f"t/{n}", bytes([n]), 100 + n) for n in (1, 2)
    )
    other = books.put_message("ctl-2", new_id(), "t/3", b"", 103)
    assert books.waiting("ctl-1") == [first, second]
    books.sent([first.number])
    assert books.waiting("ctl-1") == [second]
    assert books.waiting("ctl-2") == [other]


def test_work_of_a_worker_that_is_gone_is_taken_over(books: Books) -> None:
    books.put_incident(INCIDENT, "why")
    put(books, command())
    message = books.put_message("ctl-1", new_id(), "t", b"m", 1)
    assert not books.beat("ctl-1", 0)
    assert not books.beat("ctl-2", WORKER_DEAD_S * 10**9)
    assert books.waiting("ctl-2") == []
    assert books.beat("ctl-2", WORKER_DEAD_S * 10**9 + 1)
    assert books.waiting("ctl-2") == [message]
    assert len(books.unanswered("ctl-2")) == 1
    assert books.unanswered("ctl-1") == []
    assert not books.beat("ctl-2", 10**12)


def test_a_note_is_taken_once(books: Books) -> None:
    books.put_incident(INCIDENT, "why")
    books.release(INCIDENT, "ann", "the machine is gone", 5)
    assert books.incident(INCIDENT.id).state is IncidentState.RELEASED
    [note] = books.take_notes()
    assert note == Note(note.id, 5, "ann", INCIDENT.id, "the machine is gone")
    assert books.take_notes() == []


def test_a_store_is_found_again(url: str, open_stores: Callable[[str], Store]) -> None:
    with open_stores(url).transaction() as books:
        books.put_incident(INCIDENT, "why")
    with open_stores(url).transaction() as books:
        assert books.incidents() == [(INCIDENT, "why")]


def test_a_store_of_another_version(url: str, open_stores: Callable[[str], Store]) -> None:
    store = open_stores(url)
    with store.transaction() as books:
        books._connection.exec_driver_sql("UPDATE schema SET version = 99")
    store.close()
    with pytest.raises(FileFormatError, match="version 99"):
        open_stores(url)


@pytest.mark.parametrize("wrong", ["nonsense", "mysql://user@host/database", ""])
def test_a_url_that_is_none(wrong: str) -> None:
    with pytest.raises(UsageError):
        open_engine(wrong)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="is the server running") as caught:
        open_engine(f"postgresql://me:secret@/x?host={tmp_path}")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_locked(
    tmp_path: Path, open_stores: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "BUSY_TIMEOUT_MS", 50)
    path = tmp_path / "state.sqlite"
    store = open_stores(sqlite_url(path))
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(InternalError, match="locked"), store.transaction():
            pass


# --- several workers --------------------------------------------------------------------

WORKERS = 4
ROUNDS = 25


@pytest.fixture(params=["file", "postgresql"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Opens the same store, in the thread that uses it."""
    if request.param == "file":
        url = sqlite_url(tmp_path / "state.sqlite")
    else:
        url = str(request.getfixturevalue("postgres").create())
    open_engine(url).dispose()
    return lambda: Store(open_engine(url))


def together(work: Callable[[int], object]) -> list[object]:
    """Run `work` in WORKERS threads that start at once."""
    barrier = threading.Barrier(WORKERS)

    def run(number: int) -> object:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(run, range(WORKERS)))


def test_workers_never_give_a_sequence_twice(stores: Callable[[], Store]) -> None:
    def work(_number: int) -> list[int]:
        store = stores()
        taken = []
        for _ in range(ROUNDS):
            with store.transaction() as books:
                taken.append(books.next_sequence("host-1", "web-1", 0))
        store.close()
        assert taken == sorted(taken)
        return taken

    taken = [n for part in together(work) for n in part]  # type: ignore[attr-defined]
    assert sorted(taken) == list(range(WORKERS * ROUNDS))


def test_workers_open_one_incident_and_take_each_verdict_once(stores: Callable[[], Store]) -> None:
    verdicts = [verdict(n, f"web-{n % 5}") for n in range(ROUNDS)]

    def work(number: int) -> int:
        """Every worker hears every verdict, in an order of its own."""
        store = stores()
        fresh = 0
        for one in verdicts[number:] + verdicts[:number]:
            with store.transaction() as books:
                tracks = books.lock([one.target])
                if not books.take_verdicts([one]):
                    continue
                fresh += 1
                before = tracks.get(one.target)
                count = before.unapproved if before else 0
                track = Track(one.target, "h", "v", one.state, 1, count + 1, count + 1)
                books.put_tracks([track])
                if not books.open_incidents([one.target]):
                    books.put_incident(replace(INCIDENT, id=new_id(), target=one.target), "")
        store.close()
        return fresh

    assert sum(together(work)) == ROUNDS  # type: ignore[arg-type]
    store = stores()
    with store.transaction() as books:
        assert sorted(incident.target for incident, _ in books.incidents()) == [
            f"web-{n}" for n in range(5)
        ]
        tracks = books.lock(f"web-{n}" for n in range(5))
        assert sum(track.unapproved for track in tracks.values()) == ROUNDS
    store.close()


def test_workers_together_keep_a_limit(stores: Callable[[], Store]) -> None:
    limit = 10

    def work(number: int) -> int:
        store = stores()
        acted = 0
        for turn in range(ROUNDS):
            incident = replace(INCIDENT, id=new_id(), target=f"web-{number}-{turn}")
            with store.transaction() as books:
                books.lock([incident.target])
                books.put_incident(incident, "")
                books.lock_fleet()
                if books.actions_since(0).total() < limit:
                    put(books, command(incident))
                    acted += 1
        store.close()
        return acted

    assert sum(together(work)) == limit  # type: ignore[arg-type]


def test_a_server_that_comes_back(postgres: Postgres, open_stores: Callable[[str], Store]) -> None:
    store = open_stores(postgres.create())
    with store.transaction() as books:
        books.put_incident(INCIDENT, "why")
    postgres.stop()
    try:
        with pytest.raises(StoreUnavailable), store.transaction() as books:
            books.incidents()
    finally:
        postgres.start()
    with store.transaction() as books:
        assert books.incident(INCIDENT.id) == INCIDENT
