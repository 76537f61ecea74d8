"""Freeze: the machine stands still, off its networks, with all that it holds in memory."""

from __future__ import annotations

from pyscan.agent.actions.base import Outcome, Situation, VmState, attempt, failed, not_there


async def freeze(situation: Situation) -> Outcome:
    """Pause the machine and unplug its links."""
    machine, owed = situation.machine, situation.containment
    if machine is None or owed is None:
        return not_there(situation)
    if owed.cpu is not None:
        # A hypervisor that gets no processor time is slow to stop its machine.
        await attempt(machine.set_cpu_quota(owed.cpu))
    if await machine.running():
        await machine.pause()
    problems = [
        f"link {name}: {problem}"
        for name in owed.links
        if name in situation.before.links
        and (problem := await attempt(machine.set_link(name, up=False)))
    ]
    if await machine.running():
        return failed(situation, "refused", "it runs on after stop; kill it", VmState.RUNNING)
    if not situation.before.links and situation.before.problem:
        problems.append(f"links unknown: {situation.before.problem}")
    if problems:
        return failed(situation, "link", f"paused, but {'; '.join(problems)}", VmState.PAUSED)
    return Outcome(
        VmState.PAUSED,
        f"paused, links down: {', '.join(owed.links) or 'none'}",
        containment=owed,
    )
