"""Looking at a machine, and what it will be owed once something is taken from it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pyscan.agent.actions.arguments import NO_NETWORK, Arguments
from pyscan.agent.actions.base import NO_ARGUMENTS, Observation, VmState
from pyscan.agent.drivers.base import Driver, Machine, Setup
from pyscan.agent.journal import Containment, Layer
from pyscan.agent.process import Pidfile, ProcessIdentity
from pyscan.errors import DriverError
from pyscan.records import Action

PartT = TypeVar("PartT")


async def observe(
    driver: Driver,
    machine: Machine | None,
    known: ProcessIdentity | None,
    problem: DriverError | None = None,
    *,
    with_links: bool = True,
) -> Observation:
    """Look at a machine; without links it is a matter of one question.

    `known` is its process as it was last seen; `problem` tells why there is no `machine`.
    """
    if machine is None:
        if problem is not None and problem.reason == "gone":
            return Observation(VmState.GONE)
        return _unreachable(driver.recorded_process(), known)
    try:
        state = VmState.RUNNING if await machine.running() else VmState.PAUSED
    except DriverError as error:
        found = VmState.GONE if error.reason == "gone" else VmState.UNKNOWN
        return Observation(found, (), machine.process, str(error), error.reason)
    try:
        links = await machine.links() if with_links else ()
    except DriverError as error:
        # A machine whose devices cannot be listed can still be paused.
        return Observation(state, (), machine.process, str(error), error.reason)
    return Observation(
        state,
        tuple(link.name for link in links),
        machine.process,
        unplugged=tuple(link.name for link in links if link.up is False),
    )


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


async def look_closer(machine: Machine, before: Observation) -> Observation:
    """Add what a sandbox takes away. What cannot be looked at is told, never guessed."""
    problems: dict[str, str] = {}

    async def part(name: str, look: Callable[[], Awaitable[PartT]], instead: PartT) -> PartT:
        try:
            return await look()
        except DriverError as error:
            problems[name] = str(error)
            return instead

    setup = Setup(
        links=await part("links", machine.links, ()),
        disks=await part("disks", machine.disks, ()),
        cpu=await part("cpu", machine.cpu_quota, None),
        problems=problems,
    )
    return replace(before, setup=setup)


def wanted_containment(
    action: Action,
    before: Observation,
    owed: Containment | None,
    arguments: Arguments = NO_ARGUMENTS,
    overlays: Path = Path(),
) -> Containment | None:
    """What the machine will be owed once `action` is started; committed before the effect.

    What it was before the first action counts, and of several times the newest.
    `overlays` is a directory of this command's own.
    """
    if owed is not None and owed.process != before.process and before.process is not None:
        owed = None  # taken from a process that is no more
    takes = {Action.FREEZE, Action.SANDBOX}
    if action not in takes or before.vm_state in {VmState.GONE, VmState.UNKNOWN}:
        return owed  # nothing can be taken from it, and what it was is not known
    plugged = tuple(name for name in before.links if name not in before.unplugged)
    if owed is None:
        owed = Containment(before.vm_state is VmState.RUNNING, plugged, before.process)
    else:
        owed = replace(owed, links=tuple(dict.fromkeys((*owed.links, *plugged))))
    release_at_s = None if arguments.ttl_s is None else int(time.time()) + arguments.ttl_s
    owed = replace(owed, release_at_s=release_at_s)
    if action is Action.SANDBOX and before.setup is not None:
        owed = _with_setup(owed, before.setup, arguments, overlays)
    return owed


def _with_setup(
    owed: Containment, setup: Setup, arguments: Arguments, overlays: Path
) -> Containment:
    networks, layers, throttles = owed.networks, owed.layers, owed.throttles
    if arguments.network != NO_NETWORK:
        networks = _first({link.name: link.network for link in setup.links}, networks)
    if arguments.disk:
        # By number: names come from the machine's configuration and may hold anything.
        new = {
            disk.name: Layer(disk, str(overlays / f"{number}.qcow2"))
            for number, disk in enumerate(setup.disks)
        }
        layers = _first(new, layers)
        throttles = _first({disk.name: disk.throttle for disk in setup.disks}, throttles)
    cpu = owed.cpu
    if cpu is None and arguments.cpu_percent is not None:
        cpu = setup.cpu
    return replace(owed, networks=networks, layers=layers, throttles=throttles, cpu=cpu)


def _first(new: Mapping[str, PartT], known: Mapping[str, PartT]) -> dict[str, PartT]:
    return {**new, **known}
