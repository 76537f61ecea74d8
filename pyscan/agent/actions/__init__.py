"""What each action does to a virtual machine: look, then converge to the wanted state.

Actions name a state, not a step: repeating one, also after a crash in the middle, leads
to the same state and does nothing that is done already. Every failure is an `Outcome`
with a reason code; a machine is never called gone because it does not answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from pyscan.agent.actions.arguments import Arguments, read_arguments
from pyscan.agent.actions.base import Means, Observation, Outcome, Situation, VmState, failed
from pyscan.agent.actions.capture import capture
from pyscan.agent.actions.freeze import freeze
from pyscan.agent.actions.kill import kill
from pyscan.agent.actions.observe import look_closer, observe, wanted_containment
from pyscan.agent.actions.query import query
from pyscan.agent.actions.release import release
from pyscan.agent.actions.sandbox import sandbox
from pyscan.errors import DriverError
from pyscan.records import Action

__all__ = [
    "Arguments",
    "Means",
    "Observation",
    "Outcome",
    "Situation",
    "VmState",
    "look_closer",
    "observe",
    "perform",
    "read_arguments",
    "wanted_containment",
]

_ACTIONS: Final[dict[Action, Callable[[Situation], Awaitable[Outcome]]]] = {
    Action.FREEZE: freeze,
    Action.SANDBOX: sandbox,
    Action.RELEASE: release,
    Action.CAPTURE: capture,
    Action.KILL: kill,
    Action.QUERY: query,
}


async def perform(action: Action, situation: Situation) -> Outcome:
    """Carry an action out, or say what it would do. Never raises DriverError."""
    if situation.arguments.dry_run:
        return Outcome(
            situation.before.vm_state,
            f"dry run: would {action}; nothing was done",
            containment=situation.containment,
        )
    try:
        return await _ACTIONS[action](situation)
    except DriverError as error:
        state = VmState.GONE if error.reason == "gone" else VmState.UNKNOWN
        return failed(situation, error.reason, str(error), state)
