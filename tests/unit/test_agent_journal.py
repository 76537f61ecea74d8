"""The agent's journal: states, replay memory, what a machine is owed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyscan.agent.actions import Observation, VmState, wanted_containment
from pyscan.agent.journal import KEPT_S, CommandState, Containment, Entry, Journal
from pyscan.agent.process import ProcessIdentity
from pyscan.ids import new_id
from pyscan.outbox import open_database
from pyscan.records import Action, Cause, Command

PROCESS = ProcessIdentity(100, 5, "boot")
OTHER = ProcessIdentity(200, 9, "boot")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    database = open_database(tmp_path / "state.sqlite")
    yield Journal(database)
    database.close()


def command(sequence: int = 1, action: Action = Action.FREEZE, vm: str = "web-1") -> Command:
    return Command(
        id=new_id(),
        issuer="ctl-1",
        audience="host-1",
        sequence=sequence,
        issued_s=1000,
        expires_s=1060,
        action=action,
        vm=vm,
        arguments={"dry_run": True},
        cause=Cause(incident=new_id()),
    )


def test_life_of_a_command(journal: Journal) -> None:
    one = command()
    assert not journal.seen(one.id)
    journal.accept(one, b"envelope", 1)
    assert journal.find(one.id) == Entry(one, CommandState.ACCEPTED, None)
    containment = Containment(True, ("n0",), PROCESS)
    journal.start(one, Observation(VmState.RUNNING, ("n0",), PROCESS), containment)
    assert journal.unfinished() == [Entry(one, CommandState.STARTED, None)]
    assert journal.containment("web-1") == containment
    journal.finish(one, b"report")
    assert journal.find(one.id) == Entry(one, CommandState.DONE, b"report")
    assert journal.unfinished() == []
    assert journal.seen(one.id)


def test_unfinished_in_the_order_they_came(journal: Journal) -> None:
    commands = [command(sequence) for sequence in (1, 2, 3)]
    for one in commands:
        journal.accept(one, b"", 1)
    journal.start(commands[2], None, None)
    assert [entry.command for entry in journal.unfinished()] == commands


def test_sequence_only_rises(journal: Journal) -> None:
    assert journal.highest_sequence("ctl-1", "web-1") == -1
    for sequence in (5, 3):
        journal.accept(command(sequence), b"", 1)
    assert journal.highest_sequence("ctl-1", "web-1") == 5
    assert journal.highest_sequence("ctl-1", "web-2") == -1
    assert journal.highest_sequence("ctl-2", "web-1") == -1


def test_refused_command_uses_up_its_sequence_but_no_rate(journal: Journal) -> None:
    refused = command(7, Action.KILL)
    journal.refuse(refused, b"", b"report")
    assert journal.find(refused.id) == Entry(refused, CommandState.DONE, b"report")
    assert journal.highest_sequence("ctl-1", "web-1") == 7
    assert journal.accepted_since(Action.KILL, 0) == 0
    journal.accept(command(8, Action.KILL), b"", 50)
    assert journal.accepted_since(Action.KILL, 50) == 1
    assert journal.accepted_since(Action.KILL, 51) == 0


def test_only_old_and_finished_commands_are_forgotten(journal: Journal) -> None:
    done, waiting = command(1), command(2)
    for one in (done, waiting):
        journal.accept(one, b"", 1)
    journal.finish(done, b"report")
    journal.forget_old(done.expires_s + KEPT_S)
    assert journal.seen(done.id)
    journal.forget_old(done.expires_s + KEPT_S + 1)
    assert not journal.seen(done.id)
    assert journal.seen(waiting.id)
    assert journal.highest_sequence("ctl-1", "web-1") == 2


def test_process_and_containment_are_kept_apart(journal: Journal) -> None:
    assert journal.process("web-1") is None
    journal.set_containment("web-1", Containment(False, (), None))
    journal.set_process("web-1", PROCESS)
    journal.set_process("web-1", OTHER)
    assert journal.process("web-1") == OTHER
    assert journal.containment("web-1") == Containment(False, (), None)
    journal.set_containment("web-1", None)
    assert journal.containment("web-1") is None
    assert journal.process("web-1") == OTHER


RUNNING = Observation(VmState.RUNNING, ("n0", "n1"), PROCESS)
OWED = Containment(True, ("n0",), PROCESS)


@pytest.mark.parametrize(
    ("action", "before", "owed", "wanted"),
    [
        (Action.FREEZE, RUNNING, None, Containment(True, ("n0", "n1"), PROCESS)),
        (
            Action.FREEZE,
            Observation(VmState.PAUSED, (), PROCESS),
            None,
            Containment(False, (), PROCESS),
        ),
        # A second freeze finds it paused; what it was before the first one counts.
        (
            Action.FREEZE,
            Observation(VmState.PAUSED, ("n0", "n1"), PROCESS),
            OWED,
            Containment(True, ("n0", "n1"), PROCESS),
        ),
        # Restarted meanwhile: the new process owes nothing to the old one's record.
        (
            Action.FREEZE,
            Observation(VmState.PAUSED, (), OTHER),
            OWED,
            Containment(False, (), OTHER),
        ),
        (Action.RELEASE, Observation(VmState.RUNNING, (), OTHER), OWED, None),
        (Action.RELEASE, RUNNING, OWED, OWED),
        (Action.QUERY, RUNNING, OWED, OWED),
        (Action.FREEZE, Observation(VmState.UNKNOWN), OWED, OWED),
        (Action.FREEZE, Observation(VmState.GONE), None, None),
    ],
)
def test_what_a_machine_is_owed(
    action: Action, before: Observation, owed: Containment | None, wanted: Containment | None
) -> None:
    assert wanted_containment(action, before, owed) == wanted
