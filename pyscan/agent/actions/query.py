"""Query: what the machine's state is. Changes nothing."""

from __future__ import annotations

import time

from pyscan.agent.actions.base import Outcome, Situation, VmState, failed


async def query(situation: Situation) -> Outcome:
    """Tell what was observed and what the machine is owed."""
    before, owed = situation.before, situation.containment
    if before.problem and before.vm_state is not VmState.GONE:
        return failed(situation, before.problem_reason, before.problem)
    parts = [before.vm_state.value]
    if situation.machine is not None:
        parts.append(f"links: {', '.join(before.links) or 'none'}")
    if before.unplugged:
        parts.append(f"down: {', '.join(before.unplugged)}")
    if owed is not None:
        parts.append("contained")
        if owed.layers:
            parts.append(f"overlays: {', '.join(owed.layers)}")
        if owed.release_at_s is not None:
            parts.append(f"released in {max(0, owed.release_at_s - int(time.time()))} s")
    return Outcome(before.vm_state, ", ".join(parts), containment=owed)
