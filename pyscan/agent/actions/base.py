"""What all actions share: what they find, what they may use, and what became of them."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from pyscan.agent.actions.arguments import Arguments
from pyscan.agent.drivers.base import Driver, Machine, Setup, Throttle
from pyscan.agent.journal import Containment
from pyscan.agent.process import ProcessIdentity
from pyscan.errors import DriverError
from pyscan.evidence import EvidenceLog
from pyscan.keys import SigningKey
from pyscan.records import Command

NO_ARGUMENTS: Final = Arguments()


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
    unplugged: tuple[str, ...] = ()  # those of `links` that are known to be down
    setup: Setup | None = None  # only before something is taken from it


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an action."""

    vm_state: VmState
    detail: str  # one line for a person
    reason: str = ""  # reason code of a failure; empty: succeeded
    containment: Containment | None = None  # what the machine is owed afterwards


@dataclass(frozen=True, slots=True)
class Means:
    """What the host gives to actions."""

    host: str
    key: SigningKey  # signs the manifest of a capture
    overlays: Path  # directory of the disks' copy-on-write layers
    captures: Path  # directory of captured memory
    evidence: EvidenceLog  # tells of captures
    envelope: Callable[[str], bytes]  # a command as it was received, by its id
    throttle: Throttle  # of a sandboxed machine's disks
    revoke: tuple[str, ...] = ()  # program and arguments; the machine's name comes behind
    revoke_timeout_s: int = 10


@dataclass(frozen=True, slots=True)
class Situation:
    """All that an action may use."""

    vm: str
    command: Command | None  # None: no command, its own time releases the machine
    driver: Driver
    machine: Machine | None  # None: it does not answer
    before: Observation
    containment: Containment | None
    means: Means
    arguments: Arguments = NO_ARGUMENTS
    step: Callable[[str], None] = lambda _text: None  # reports one that was taken, or failed


def make_directory(path: Path, process: ProcessIdentity | None) -> None:
    """Make a private directory that the machine's hypervisor can write to. Raises OSError.

    It often runs as a user of its own. The directories above must let that user through.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.geteuid() == 0 and process is not None:
        with suppress(FileNotFoundError):  # it has just ended
            owner = os.stat(f"/proc/{process.pid}")
            os.chown(path, owner.st_uid, owner.st_gid)


async def attempt(doing: Awaitable[None]) -> str:
    """Take a step that may fail: what went wrong in one line, or nothing.

    What a hypervisor refuses is told and the action goes on; a lost connection ends it.
    """
    try:
        await doing
    except DriverError as error:
        if error.reason not in {"refused", "unsupported"}:
            raise
        return str(error)
    return ""


def not_there(situation: Situation) -> Outcome:
    """The failure of an action on a machine that does not answer or is no more."""
    before = situation.before
    if before.vm_state is VmState.GONE:
        return failed(situation, "gone", "its process is gone", VmState.GONE)
    return failed(situation, before.problem_reason or "unreachable", before.problem)


def failed(
    situation: Situation, reason: str, detail: str, vm_state: VmState | None = None
) -> Outcome:
    """A failure owes the machine what was noted before the attempt."""
    state = vm_state if vm_state is not None else situation.before.vm_state
    return Outcome(state, detail, reason, situation.containment)
