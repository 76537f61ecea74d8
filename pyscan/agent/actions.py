"""What each action does to a virtual machine: look, then converge to the wanted state.

Actions name a state, not a step: repeating one, also after a crash in the middle, leads
to the same state and does nothing that is done already. Every failure is an `Outcome`
with a reason code; a machine is never called gone because it does not answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pyscan.agent.driver import Driver, Machine
from pyscan.agent.journal import Containment
from pyscan.agent.process import Pidfile, ProcessHandle, ProcessIdentity
from pyscan.errors import DriverError
from pyscan.records import Action

#: How long a machine may take to end after QMP `quit`, and after SIGKILL.
QUIT_WAIT_S: Final = 2.0
KILL_WAIT_S: Final = 5.0


class VmState(StrEnum):
    """A machine's state as observed."""

    RUNNING = "running"
    PAUSED = "paused"
    GONE = "gone"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Observation:
    """A machine as it was found."""

    vm_state: VmState
    links: tuple[str, ...] = ()
    process: ProcessIdentity | None = None
    problem: str = ""  # one line, when the machine could not be (fully) looked at
    problem_reason: str = ""  # its reason code


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an action."""

    vm_state: VmState
    detail: str  # one line for a person
    reason: str = ""  # reason code of a failure; empty: succeeded
    containment: Containment | None = None  # what the machine is owed afterwards


@dataclass(frozen=True, slots=True)
class Situation:
    """All that an action may use."""

    driver: Driver
    machine: Machine | None  # None: it does not answer
    before: Observation
    containment: Containment | None


async def observe(
    driver: Driver, machine: Machine | None, known: ProcessIdentity | None
) -> Observation:
    """Look at a machine. `known` is its process as it was last seen."""
    if machine is None:
        return _unreachable(driver.recorded_process(), known)
    try:
        state = VmState.RUNNING if await machine.running() else VmState.PAUSED
    except DriverError as error:
        return Observation(VmState.UNKNOWN, (), machine.process, str(error), error.reason)
    try:
        links = await machine.links()
    except DriverError as error:
        # A machine whose devices cannot be listed can still be paused.
        return Observation(state, (), machine.process, str(error), error.reason)
    return Observation(state, links, machine.process)


def _unreachable(recorded: Pidfile, known: ProcessIdentity | None) -> Observation:
    """A dead socket proves nothing: only a process that was known and ended is gone."""
    process = recorded.process or known
    if process is not None and process.alive():
        return Observation(VmState.UNKNOWN, (), process, "it runs but does not answer", "timeout")
    if process is not None or recorded.gone:
        return Observation(VmState.GONE, (), None)
    return Observation(
        VmState.UNKNOWN,
        (),
        None,
        "it does not answer and its process is not known; check [[vm]] qmp and pidfile",
        "unreachable",
    )


def wanted_containment(
    action: Action, before: Observation, owed: Containment | None
) -> Containment | None:
    """What the machine will be owed once `action` is started; committed before the effect."""
    if owed is not None and owed.process != before.process and before.process is not None:
        owed = None  # taken from a process that is no more
    if action is not Action.FREEZE or before.vm_state is VmState.GONE:
        return owed
    if owed is None:
        return Containment(before.vm_state is VmState.RUNNING, before.links, before.process)
    links = tuple(dict.fromkeys((*owed.links, *before.links)))
    return Containment(owed.was_running, links, owed.process)


async def perform(action: Action, situation: Situation, *, dry_run: bool) -> Outcome:
    """Carry an action out, or say what it would do. Never raises DriverError."""
    do = _ACTIONS.get(action)
    if do is None:
        return _failed(situation, "unsupported", f"this agent cannot {action} a machine")
    if dry_run:
        return Outcome(
            situation.before.vm_state,
            f"dry run: would {action}; nothing was done",
            containment=situation.containment,
        )
    try:
        return await do(situation)
    except DriverError as error:
        return _failed(situation, error.reason, str(error), VmState.UNKNOWN)


async def _freeze(situation: Situation) -> Outcome:
    machine = situation.machine
    if machine is None:
        return _not_there(situation)
    if await machine.running():
        await machine.pause()
    owed = situation.containment
    unplugged = owed.links if owed else situation.before.links
    problems = [
        f"link {name}: {problem}"
        for name in unplugged
        if name in situation.before.links
        and (problem := await _try_set_link(machine, name, up=False))
    ]
    if await machine.running():
        return _failed(situation, "refused", "it runs on after stop; kill it", VmState.RUNNING)
    if not situation.before.links and situation.before.problem:
        problems.append(f"links unknown: {situation.before.problem}")
    if problems:
        return _failed(situation, "link", f"paused, but {'; '.join(problems)}", VmState.PAUSED)
    return Outcome(
        VmState.PAUSED,
        f"paused, links down: {', '.join(unplugged) or 'none'}",
        containment=owed,
    )


async def _release(situation: Situation) -> Outcome:
    machine, owed = situation.machine, situation.containment
    if machine is None:
        return _not_there(situation)
    if owed is None:
        return Outcome(situation.before.vm_state, "nothing was taken from it, nothing to release")
    problems = [
        f"link {name}: {problem}"
        for name in owed.links
        if name in situation.before.links
        and (problem := await _try_set_link(machine, name, up=True))
    ]
    if owed.was_running and not await machine.running():
        await machine.resume()
    running = await machine.running()
    state = VmState.RUNNING if running else VmState.PAUSED
    if owed.was_running and not running:
        return _failed(situation, "refused", "it does not run after cont", state)
    if problems:
        return _failed(situation, "link", "; ".join(problems), state)
    detail = "as before: running" if owed.was_running else "as before: it was not running"
    return Outcome(state, f"{detail}, links up: {', '.join(owed.links) or 'none'}")


async def _kill(situation: Situation) -> Outcome:
    machine, process = situation.machine, situation.before.process
    if machine is None and situation.before.vm_state is VmState.GONE:
        return Outcome(VmState.GONE, "its process was gone already")
    if process is None:
        if machine is not None:
            await machine.quit()
        return _failed(
            situation, "unreachable", "its process is not known, so its end is not sure; "
            "set [[vm]] pidfile", VmState.UNKNOWN
        )  # fmt: skip
    with ProcessHandle(process) as handle:
        if machine is not None and await _try_quit(machine) and await handle.wait_gone(QUIT_WAIT_S):
            return Outcome(VmState.GONE, f"process {process.pid} ended by quit")
        handle.kill()
        if await handle.wait_gone(KILL_WAIT_S):
            return Outcome(VmState.GONE, f"process {process.pid} ended by SIGKILL")
    return _failed(
        situation,
        "timeout",
        f"process {process.pid} still there {KILL_WAIT_S:g} s after SIGKILL; "
        "the host's kernel holds it",
        VmState.UNKNOWN,
    )


async def _query(situation: Situation) -> Outcome:
    before = situation.before
    if before.problem:
        return _failed(situation, before.problem_reason, before.problem)
    links = f", links: {', '.join(before.links) or 'none'}" if situation.machine else ""
    held = ", contained" if situation.containment else ""
    return Outcome(
        before.vm_state, f"{before.vm_state}{links}{held}", containment=situation.containment
    )


_ACTIONS: Final[dict[Action, Callable[[Situation], Awaitable[Outcome]]]] = {
    Action.FREEZE: _freeze,
    Action.RELEASE: _release,
    Action.KILL: _kill,
    Action.QUERY: _query,
}


async def _try_set_link(machine: Machine, name: str, *, up: bool) -> str:
    """Returns what went wrong, or nothing. A dead connection is not worth a second try."""
    try:
        await machine.set_link(name, up=up)
    except DriverError as error:
        if error.reason != "refused":
            raise
        return str(error)
    return ""


async def _try_quit(machine: Machine) -> bool:
    """Whether `quit` was accepted; the connection may well break before the answer."""
    try:
        await machine.quit()
    except DriverError as error:
        return error.reason == "unreachable"
    return True


def _not_there(situation: Situation) -> Outcome:
    before = situation.before
    if before.vm_state is VmState.GONE:
        return _failed(situation, "gone", "its process is gone", VmState.GONE)
    return _failed(situation, before.problem_reason or "unreachable", before.problem)


def _failed(
    situation: Situation, reason: str, detail: str, vm_state: VmState | None = None
) -> Outcome:
    """A failure owes the machine what was noted before the attempt."""
    state = vm_state if vm_state is not None else situation.before.vm_state
    return Outcome(state, detail, reason, situation.containment)
