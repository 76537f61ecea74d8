"""Release: the machine gets back what the journal says that it had."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from pyscan.agent.actions.arguments import COMMIT, DISCARD
from pyscan.agent.actions.base import Outcome, Situation, VmState, attempt, failed, not_there
from pyscan.agent.drivers.base import Machine, remove_overlay
from pyscan.agent.journal import Containment, Layer


async def release(situation: Situation) -> Outcome:
    """Restore disks, links, limits and running, in this order.

    A machine whose disk goes back runs at no moment with its links plugged in before that.
    """
    machine, owed = situation.machine, situation.containment
    if machine is None:
        return not_there(situation)
    if owed is None:
        return Outcome(situation.before.vm_state, "nothing was taken from it, nothing to release")
    choice = situation.arguments.disk_choice
    layers = await _layers_in_use(machine, owed, choice)
    if layers and not choice:
        return failed(
            situation,
            "disk_choice",
            f"disks {', '.join(layers)} write to an overlay; say disk={COMMIT} or disk={DISCARD}",
        )
    if layers and choice == DISCARD and await machine.running():
        await machine.pause()
    limits = await _restore_limits(situation, machine, owed)
    await _restore_disks(situation, machine, layers)
    links = await _restore_links(situation, machine, owed)
    if owed.was_running and not await machine.running():
        await machine.resume()
    return await _judge(situation, machine, owed, links, limits)


async def _judge(
    situation: Situation,
    machine: Machine,
    owed: Containment,
    links: list[str],
    limits: list[str],
) -> Outcome:
    """What the release came to; `links` and `limits` name what failed."""
    running = await machine.running()
    state = VmState.RUNNING if running else VmState.PAUSED
    if owed.was_running and not running:
        return failed(situation, "refused", "it does not run after cont", state)
    if links:
        return failed(situation, "link", "; ".join(links), state)
    if limits:
        return failed(situation, "refused", "; ".join(limits), state)
    detail = "as before: running" if owed.was_running else "as before: it was not running"
    return Outcome(state, f"{detail}, links up: {', '.join(owed.links) or 'none'}")


async def _layers_in_use(machine: Machine, owed: Containment, choice: str) -> dict[str, Layer]:
    """The overlays of disks that do not write to their base: what was planned may have failed.

    Files of the others are removed: a crash came behind what made them useless. When they are
    discarded, it may have come before the machine was started afresh: that is done again.
    """
    if not owed.layers:
        return {}
    files = {disk.name: disk.file for disk in await machine.disks()}
    in_use = {}
    for name, layer in owed.layers.items():
        if name not in files:
            continue
        again = choice == DISCARD and await asyncio.to_thread(Path(layer.file).exists)
        if files[name] != layer.base.file or again:
            in_use[name] = layer
        else:
            _forget(layer)
    return in_use


def _forget(layer: Layer) -> None:
    """Remove what there is of an overlay, and its directory with the last one."""
    file = Path(layer.file)
    for part in file.parent.glob(f"{file.stem}.*"):
        remove_overlay(part)
    with suppress(OSError):  # other disks' overlays are in it still
        file.parent.rmdir()


async def _restore_limits(situation: Situation, machine: Machine, owed: Containment) -> list[str]:
    """Speed first: what follows is done by the machine's own process. Returns what failed."""
    problems = []
    if owed.cpu is not None:
        problem = await attempt(machine.set_cpu_quota(owed.cpu))
        situation.step(f"cpu: {problem or 'as before'}")
        problems += [f"cpu: {problem}"] if problem else []
    for name, throttle in owed.throttles.items():
        problem = await attempt(machine.set_throttle(name, throttle))
        situation.step(f"disk {name} speed: {problem or 'as before'}")
        problems += [f"disk {name} speed: {problem}"] if problem else []
    return problems


async def _restore_disks(situation: Situation, machine: Machine, layers: dict[str, Layer]) -> None:
    """Give the disks back. Raises DriverError: half a disk is no state to go on from."""
    for name, layer in layers.items():
        file = Path(layer.file)
        if situation.arguments.disk_choice == COMMIT:
            await machine.commit_overlay(name, file, layer.base)
            situation.step(f"disk {name}: written back")
        else:
            await machine.discard_overlay(name, file, layer.base)
            situation.step(f"disk {name}: as before, the machine starts afresh")
        _forget(layer)


async def _restore_links(situation: Situation, machine: Machine, owed: Containment) -> list[str]:
    """Returns what failed."""
    problems = []
    for name in situation.before.links:
        problem = ""
        if name in owed.networks:
            problem = await attempt(machine.move_link(name, owed.networks[name]))
        if name in owed.links and not problem:
            problem = await attempt(machine.set_link(name, up=True))
            situation.step(f"link {name}: {problem or 'up'}")
        if problem:
            problems.append(f"link {name}: {problem}")
    return problems
