"""The control's store: one incident a target, rising sequences, reports only go forward."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyscan.control.store import PAUSE_LIFETIMES_MAX, RETRYABLE, VERDICTS_KEPT_S, Store
from pyscan.ids import new_id
from pyscan.outbox import open_database
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


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    database = open_database(tmp_path / "state.sqlite")
    yield Store(database)
    database.close()


def verdict(decided_ns: int) -> Verdict:
    state = VerdictState.UNAPPROVED
    return Verdict(
        new_id(), new_id(), "mon-1", "web-1", "host-1", "web-1", state, "", decided_ns, 1, 0, 0
    )


def command(incident: Incident = INCIDENT) -> Command:
    cause = Cause(incident.id, new_id(), incident.verdict)
    return Command(new_id(), "ctl-1", "host-1", 1, 1000, 1030, Action.FREEZE, "web-1", cause=cause)


def report(about: Command, state: ReportState, reason: str = "") -> Report:
    return Report(new_id(), about.id, "host-1", "web-1", about.action, state, 1, reason)


def test_verdict_is_taken_once(store: Store) -> None:
    first = verdict(decided_ns=10**18)
    assert store.take_verdict(first)
    assert not store.take_verdict(first)
    late = verdict(decided_ns=10**18 + (VERDICTS_KEPT_S + 1) * 10**9)
    assert store.take_verdict(late)  # by now the first one is too old to be accepted again
    assert not store.take_verdict(late)


def test_one_incident_a_target_until_it_is_released(store: Store) -> None:
    assert store.open_incident("web-1") is None
    store.put_incident(INCIDENT)
    assert store.open_incident("web-1") == INCIDENT
    another = replace(INCIDENT, id=new_id())
    with pytest.raises(sqlite3.IntegrityError):
        store.put_incident(another)
    store.put_incident(replace(INCIDENT, state=IncidentState.ANSWERED))
    assert store.open_incident("web-1") is not None
    store.put_incident(replace(INCIDENT, state=IncidentState.RELEASED))
    assert store.open_incident("web-1") is None
    store.put_incident(another)
    assert store.open_incident("web-1") == another


def test_sequences_rise_whatever_the_clock_does(store: Store) -> None:
    clock_ms = [1000, 1000, 900, 2000, 0]
    taken = [store.next_sequence("host-1", "web-1", ms * 10**6) for ms in clock_ms]
    assert taken == [1000, 1001, 1002, 2000, 2001]
    assert store.next_sequence("host-1", "web-2", 5 * 10**6) == 5


STATES = (ReportState.ACCEPTED, ReportState.STARTED, ReportState.SUCCEEDED)


@pytest.mark.parametrize("order", [*itertools.permutations(STATES)])
def test_reports_in_any_order_end_in_the_same_state(
    store: Store, order: tuple[ReportState, ...]
) -> None:
    store.put_incident(INCIDENT)
    one = command()
    store.put_command(one, b"", attempt=1)
    for state in order:
        store.take_report(report(one, state))
    assert store.incident(INCIDENT.id).state is IncidentState.ANSWERED
    assert store.take_report(report(one, ReportState.FAILED)) is None
    assert store.incident(INCIDENT.id).state is IncidentState.ANSWERED


def test_reports_that_are_not_about_our_command(store: Store) -> None:
    store.put_incident(INCIDENT)
    one = command()
    store.put_command(one, b"", attempt=1)
    success = report(one, ReportState.SUCCEEDED)
    for foreign in (
        replace(success, command=new_id()),
        replace(success, host="host-2"),
        replace(success, vm="web-2"),
    ):
        assert store.take_report(foreign) is None
    assert store.incident(INCIDENT.id).state is IncidentState.OPEN


def test_success_of_a_superseded_command_does_not_answer(store: Store) -> None:
    store.put_incident(INCIDENT)
    first, second = command(), command()
    store.put_command(first, b"", attempt=1)
    store.put_command(second, b"", attempt=2)
    store.take_report(report(first, ReportState.SUCCEEDED))
    assert store.incident(INCIDENT.id).state is IncidentState.OPEN
    assert [waiting.command_id for waiting in store.unanswered()] == [second.id]


@pytest.mark.parametrize(
    ("state", "reason", "attempt", "due_s"),
    [
        (None, "", 1, 1030 + SKEW_S),
        (None, "", 3, 1030 + SKEW_S + 2 * 30),
        (None, "", 1000, 1030 + SKEW_S + PAUSE_LIFETIMES_MAX * 30),
        (ReportState.STARTED, "", 1, 1030 + SKEW_S),
        (ReportState.FAILED, "timeout", 1, 1030),
        (ReportState.REJECTED, "rate_limited", 2, 1060),
    ],
)
def test_next_attempt_waits_until_the_last_one_is_void(
    store: Store, state: ReportState | None, reason: str, attempt: int, due_s: int
) -> None:
    store.put_incident(INCIDENT)
    one = command()
    store.put_command(one, b"", attempt)
    if state:
        store.take_report(report(one, state, reason))
    [waiting] = store.unanswered()
    assert waiting.due_s == due_s
    assert not waiting.hopeless


@pytest.mark.parametrize("reason", ["gone", "unsupported", "protected_vm", "unknown_vm", ""])
def test_some_answers_wait_for_a_person(store: Store, reason: str) -> None:
    store.put_incident(INCIDENT)
    one = command()
    store.put_command(one, b"", attempt=1)
    store.take_report(report(one, ReportState.FAILED, reason))
    [waiting] = store.unanswered()
    assert waiting.hopeless


def test_retryable_rejections_are_codes_of_the_protocol() -> None:
    drivers = {"unreachable", "timeout", "refused", "link"}
    assert set(RETRYABLE) - drivers <= set(RejectReason)
