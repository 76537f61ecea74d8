"""The control's clerk: batches of verdicts and reports, answered in one transaction each.

Every test runs on a file and on PostgreSQL; those of several workers have one clerk each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from postgres import Postgres

from pyscan import protocol
from pyscan.control.clerk import Clerk, Heard, Office
from pyscan.control.database import open_engine, sqlite_url
from pyscan.control.store import Books, Store
from pyscan.errors import EvidenceError, StoreUnavailable
from pyscan.evidence import EvidenceLog, verify_directory
from pyscan.ids import new_id
from pyscan.keys import KeyRing, SigningKey
from pyscan.policy import Group, Limits, Policy, Profile, Rule
from pyscan.records import (
    Action,
    Cause,
    Command,
    Finding,
    FindingKind,
    IncidentState,
    PageStatus,
    Report,
    ReportState,
    Verdict,
    VerdictState,
)

MONITOR, AGENT = SigningKey.generate(), SigningKey.generate()
FREEZE = Policy(enforce=True, unapproved=Action.FREEZE)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture(params=["file", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return sqlite_url(tmp_path / "state.sqlite")
    return str(request.getfixturevalue("postgres").create())


class Desk:
    """A clerk with what it needs."""

    def __init__(self, url: str, path: Path, policy: Policy = FREEZE, name: str = "ctl-1") -> None:
        self.key = SigningKey.generate()
        self.name = name
        self.path = path / name
        self.store = Store(open_engine(url))
        self.evidence = EvidenceLog.open(self.path, self.key, name)
        self.clerk = Clerk(Office(name, self.key, policy, 30), self.store, self.evidence)

    def take(self, *contents: Verdict | Report) -> list[Command]:
        """Take a batch; the commands that leave."""
        messages = self.clerk.take([heard(content) for content in contents])
        ring = KeyRing.of({self.name: self.key.public})
        return [
            protocol.decode_command(
                message.payload,
                ring,
                topic=message.topic,
                audience="host-1",
                now_s=int(time.time()),
                replay=_Fresh(),
            )
            for message in messages
        ]

    def close(self) -> None:
        self.evidence.close()
        self.store.close()


class _Fresh:
    def seen(self, command_id: str) -> bool:
        return not command_id

    def highest_sequence(self, issuer: str, vm: str) -> int:
        return -1 if issuer and vm else 0


MakeDesk = Callable[..., Desk]


@pytest.fixture
def desk(url: str, tmp_path: Path) -> Iterator[MakeDesk]:
    with ExitStack() as stack:

        def make(policy: Policy = FREEZE, name: str = "ctl-1") -> Desk:
            made = Desk(url, tmp_path, policy, name)
            stack.callback(made.close)
            return made

        yield make


def verdict(
    target: str = "web-1", state: VerdictState = VerdictState.UNAPPROVED, **changes: Any
) -> Verdict:
    sweep, bad = new_id(), state is not VerdictState.APPROVED
    found = Finding(new_id(), sweep, FindingKind.CODE, PageStatus.OK, place="ksys_read")
    one = Verdict(
        id=new_id(),
        sweep=sweep,
        monitor="mon-1",
        target=target,
        host="host-1",
        vm=target,
        state=state,
        reason="1 page is not as approved",
        decided_ns=time.time_ns(),
        watched=10,
        ok=10 - bad,
        unreadable=0,
        findings=(found,) if bad else (),
        findings_total=int(bad),
    )
    return replace(one, **changes)


def report(command: Command, state: ReportState = ReportState.SUCCEEDED) -> Report:
    return Report(new_id(), command.id, "host-1", command.vm, command.action, state, 1)


def heard(content: Verdict | Report) -> Heard:
    if isinstance(content, Verdict):
        topic = protocol.verdict_topic(content.monitor, content.target)
        return Heard(content, topic, protocol.encode_verdict(content, MONITOR))
    topic = protocol.report_topic(content.host, content.command)
    return Heard(content, topic, protocol.encode_report(content, AGENT))


def test_a_batch_is_answered_in_order(desk: MakeDesk) -> None:
    one = desk()
    bad, worse, good = verdict(), verdict(), verdict("web-2", VerdictState.APPROVED)
    other = verdict("web-3")
    commands = one.take(bad, bad, good, worse, other)
    assert [(c.vm, c.action, c.cause.verdict) for c in commands] == [
        ("web-1", Action.FREEZE, bad.id),
        ("web-3", Action.FREEZE, other.id),
    ]
    assert one.take(bad, worse, good) == []
    with one.store.transaction() as books:
        assert [w.message_id for w in books.waiting("ctl-1")] == [c.id for c in commands]
        assert {i.target for i, _ in books.incidents()} == {"web-1", "web-3"}
        [track] = books.lock(["web-1"]).values()
        assert (track.unapproved, track.undecided) == (2, 2)
    one.take(*(report(command) for command in commands))
    with one.store.transaction() as books:
        assert {i.state for i, _ in books.incidents()} == {IncidentState.ANSWERED}
        assert books.unanswered("ctl-1") == []
    keys = {"ctl-1": one.key.public, "mon-1": MONITOR.public, "host-1": AGENT.public}
    one.close()
    verify_directory(one.path, KeyRing.of(keys))


def test_a_rule_waits_and_climbs_over_batches(desk: MakeDesk) -> None:
    ladder = Rule("code", (Action.CAPTURE, Action.FREEZE), sweeps=2)
    one = desk(replace(FREEZE, rules=(ladder,)))
    assert one.take(verdict()) == []
    [capture] = one.take(verdict())
    [freeze] = one.take(verdict())
    assert (capture.action, freeze.action) == (Action.CAPTURE, Action.FREEZE)
    assert capture.cause.incident == freeze.cause.incident
    assert freeze.sequence > capture.sequence
    assert one.take(verdict(), verdict()) == []
    # What succeeded late does not answer for what was commanded after it.
    one.take(report(capture))
    with one.store.transaction() as books:
        assert books.incident(freeze.cause.incident).state is IncidentState.OPEN


def test_approval_in_between_makes_a_rule_wait_anew(desk: MakeDesk) -> None:
    one = desk(replace(FREEZE, sweeps=2))
    assert one.take(verdict(), verdict(state=VerdictState.APPROVED), verdict()) == []
    assert len(one.take(verdict())) == 1


def test_an_old_approval_that_comes_late_changes_nothing(desk: MakeDesk) -> None:
    one = desk(replace(FREEZE, sweeps=2))
    first = verdict()
    late = verdict(state=VerdictState.APPROVED, decided_ns=first.decided_ns - 1)
    assert one.take(first) == []
    assert one.take(late) == []
    assert len(one.take(verdict())) == 1


def test_limits_by_tenant_and_in_all(desk: MakeDesk) -> None:
    limits = Limits(actions_per_minute=5, tenant_actions_per_minute=2, unapproved_percent_max=100)
    groups = tuple(Group((f"{who}-*",), tenant=who) for who in ("a", "b"))
    one = desk(replace(FREEZE, limits=limits, groups=groups))
    assert len(one.take(*(verdict(f"a-{n}") for n in range(4)))) == 2
    assert len(one.take(*(verdict(f"c-{n}") for n in range(2)))) == 2
    assert len(one.take(*(verdict(f"b-{n}") for n in range(4)))) == 1
    with one.store.transaction() as books:
        assert len(books.incidents()) == 10  # what is held back is an incident, too


def test_the_breaker_stops_everything_until_it_is_closed(desk: MakeDesk) -> None:
    one = desk(replace(FREEZE, limits=Limits(unapproved_percent_max=25)))
    fleet = [verdict(f"web-{n}", VerdictState.APPROVED) for n in range(8)]
    one.take(*fleet)
    assert len(one.take(verdict("web-0"), verdict("web-1"))) == 2
    assert one.take(verdict("web-2"), verdict("web-3")) == []
    with one.store.transaction() as books:
        assert "4 of 8 targets" in books.lock_fleet().tripped
        [unanswered, _] = books.unanswered("ctl-1")
    assert one.clerk.retry(unanswered.incident, Cause(unanswered.incident.id), 2) == []
    one.take(*(verdict(f"web-{n}", VerdictState.APPROVED) for n in range(8)))
    assert one.take(verdict("web-4")) == []
    with one.store.transaction() as books:
        books.set_breaker(0, "")
    assert len(one.take(verdict("web-4"))) == 1


def test_a_rule_that_validates_is_logged(desk: MakeDesk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    kill = Rule("new", (Action.KILL,), profile=Profile.VALIDATE)
    [command] = desk(replace(FREEZE, rules=(kill,))).take(verdict())
    assert command.action is Action.FREEZE
    assert "validated=rule new would kill" in caplog.text


def test_released_incidents_are_not_retried(desk: MakeDesk) -> None:
    one = desk()
    [command] = one.take(verdict())
    with one.store.transaction() as books:
        incident = books.incident(command.cause.incident)
    assert len(one.clerk.retry(incident, command.cause, 2)) == 1
    # The incident has moved on: what was seen before is no reason any more.
    assert one.clerk.retry(incident, Cause(incident.id), 3) == []


def test_nothing_is_commanded_without_evidence(desk: MakeDesk) -> None:
    one = desk()
    one.evidence._file.close()
    with pytest.raises(EvidenceError):
        one.take(verdict())
    with one.store.transaction() as books:
        assert books.incidents() == []
        assert books.waiting("ctl-1") == []


WORKERS = 3


def test_workers_that_hear_the_same_act_once(desk: MakeDesk) -> None:
    """Each has all verdicts, in batches and orders of its own."""
    policy = replace(FREEZE, limits=Limits(unapproved_percent_max=100))
    desks = [desk(policy, f"ctl-{n}") for n in range(WORKERS)]
    verdicts = [verdict(f"web-{n % 7}", decided_ns=time.time_ns()) for n in range(42)]
    barrier = threading.Barrier(WORKERS)

    def work(number: int) -> list[Command]:
        # A connection belongs to a thread: this one opens its own.
        mine = desks[number]
        commands = []
        barrier.wait()
        for start in range(0, len(verdicts), 6):
            batch = verdicts[start : start + 6]
            batch = batch[number:] + batch[:number]
            commands += _until_taken(mine, batch)
        mine.store.close()
        return commands

    for each in desks:
        each.store.close()
    with ThreadPoolExecutor(WORKERS) as pool:
        commands = [command for part in pool.map(work, range(WORKERS)) for command in part]
    assert sorted(command.vm for command in commands) == sorted({v.target for v in verdicts})
    fresh = desk(name="ctl-9")
    with fresh.store.transaction() as books:
        assert _open_targets(books) == sorted({v.target for v in verdicts})
        tracks = books.lock(v.target for v in verdicts)
        assert sum(track.unapproved for track in tracks.values()) <= len(verdicts)


def _until_taken(desk: Desk, batch: list[Verdict]) -> list[Command]:
    for _ in range(20):
        try:
            return desk.take(*batch)
        except StoreUnavailable:  # a conflict with another worker
            continue
    raise AssertionError("always busy")


def _open_targets(books: Books) -> list[str]:
    return sorted(incident.target for incident, _ in books.incidents())
