"""Sandbox: the machine goes on, cut off from its networks and with little of the host's power.

Cutting it off is what the action is for: if that fails, the action fails. The rest (overlay
and throttle of its disks, processor time, revoking its credentials) is done as far as it can
be; each step is reported, and the final report names what was not done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pyscan.agent.actions.arguments import NO_NETWORK
from pyscan.agent.actions.base import (
    Outcome,
    Situation,
    VmState,
    attempt,
    failed,
    make_directory,
    not_there,
)
from pyscan.agent.actions.hook import revoke
from pyscan.agent.drivers.base import CpuQuota, Machine
from pyscan.agent.journal import Containment, Layer

#: Period of a processor limit, the kernel's default (sched-bwc.rst).
PERIOD_US: Final = 100_000


async def sandbox(situation: Situation) -> Outcome:
    """Isolate the machine. It runs on if it ran, and stays paused if it was paused."""
    machine, owed = situation.machine, situation.containment
    if machine is None or owed is None:
        return not_there(situation)
    told: list[str] = []
    problems: list[str] = []
    if situation.before.problem:
        problems.append(f"links unknown: {situation.before.problem}")
    for name in situation.before.links:
        text, isolated = await _isolate(situation, machine, name, plugged=name in owed.links)
        situation.step(text)
        (told if isolated else problems).append(text)
    state = VmState.RUNNING if await machine.running() else VmState.PAUSED
    if problems:
        return failed(situation, "link", f"not isolated: {'; '.join(problems)}", state)
    undone = await _confine(situation, machine, owed)
    rest = f"; not done: {'; '.join(undone)}" if undone else ""
    return Outcome(state, f"isolated: {', '.join(told) or 'no links'}{rest}", containment=owed)


async def _isolate(
    situation: Situation, machine: Machine, name: str, *, plugged: bool
) -> tuple[str, bool]:
    """Take a link from its network: what was done, and whether it is isolated now."""
    network, moved = situation.arguments.network, ""
    if network != NO_NETWORK:
        moved = await attempt(machine.move_link(name, network))
        if not moved:
            # A freeze before may have unplugged it.
            problem = await attempt(machine.set_link(name, up=plugged))
            return f"link {name}: {problem or f'on {network}'}", True
    # Better off every network than on the one that it is to leave.
    problem = await attempt(machine.set_link(name, up=False))
    text = f"link {name}: {problem or 'down'}"
    return f"{text} ({moved})" if moved else text, not problem


async def _confine(situation: Situation, machine: Machine, owed: Containment) -> list[str]:
    """All that may fail; returns what did."""
    arguments, means = situation.arguments, situation.means
    undone = []

    def note(what: str, problem: str, done: str) -> None:
        situation.step(f"{what}: {problem or done}")
        if problem:
            undone.append(f"{what}: {problem}")

    if arguments.disk:
        if problem := _unseen(situation, "disks"):
            note("disks", problem, "")
        for name, layer in owed.layers.items():
            note(
                f"disk {name}",
                await _overlay(situation, machine, name, layer),
                "writes to an overlay",
            )
            limited = await attempt(machine.set_throttle(name, means.throttle))
            note(f"disk {name} speed", limited, "limited")
    if arguments.cpu_percent is not None:
        note("cpu", await _limit_cpu(situation, machine, owed, arguments.cpu_percent), "limited")
    if means.revoke:
        note("credentials", await revoke(means, situation.vm), "revoked")
    return undone


async def _overlay(situation: Situation, machine: Machine, name: str, layer: Layer) -> str:
    file = Path(layer.file)
    try:
        make_directory(file.parent, situation.before.process)
    except OSError as error:
        return f"{file.parent}: {error.strerror}"
    return await attempt(machine.add_overlay(name, file))


async def _limit_cpu(
    situation: Situation, machine: Machine, owed: Containment, percent: int
) -> str:
    if owed.cpu is None:
        return _unseen(situation, "cpu") or "its limit is not known"
    runtime_us = PERIOD_US * percent // 100
    return await attempt(machine.set_cpu_quota(CpuQuota(runtime_us, PERIOD_US)))


def _unseen(situation: Situation, part: str) -> str:
    """Why a part of the machine could not be looked at before."""
    setup = situation.before.setup
    return setup.problems.get(part, "") if setup is not None else ""
