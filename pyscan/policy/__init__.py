"""Sweep -> verdict state -> wanted action. Pure: no I/O, no clock, no memory.

Fail-closed: what is missing, unreadable or does not add up is never approved, and doubt
alone never acts on a machine unless the policy says so in as many words.

`judge` gives a sweep's state. `decide` answers a verdict by a `Policy` and a `Situation`,
which tells what was before and how the fleet is; `simulate` does so for recorded verdicts.
"""

from pyscan.policy.decide import Decision, Situation, decide
from pyscan.policy.judge import judge
from pyscan.policy.rules import (
    ANSWERS,
    LADDER,
    Group,
    Limits,
    Policy,
    Profile,
    Rule,
    Severity,
    Window,
    rung,
)
from pyscan.policy.simulate import Simulator, Step
from pyscan.policy.track import Track, follow

__all__ = [
    "ANSWERS",
    "LADDER",
    "Decision",
    "Group",
    "Limits",
    "Policy",
    "Profile",
    "Rule",
    "Severity",
    "Simulator",
    "Situation",
    "Step",
    "Track",
    "Window",
    "decide",
    "follow",
    "judge",
    "rung",
]
