"""`pyscan control`: what it does about verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from pyscan.config.base import Name, Program, Table, load_config
from pyscan.records import Action


class PolicyTable(Table, frozen=True, kw_only=True):
    """What control does about a verdict."""

    enforce: bool = False  # false: incidents are recorded, no command leaves
    unapproved: Action = Action.FREEZE
    undecided: Action | None = None  # None: an alarm, never an action
    protected: tuple[Name, ...] = ()  # VMs that are never acted on

    def __post_init__(self) -> None:
        for action in (self.unapproved, self.undecided):
            if action in {Action.RELEASE, Action.QUERY}:
                raise ValueError(f"{action} is no answer to a verdict; use freeze or kill")


class ControlConfig(Program, frozen=True, kw_only=True):
    """`pyscan control`: the common tables and [policy]."""

    policy: PolicyTable = PolicyTable()
    command_lifetime_s: Annotated[int, msgspec.Meta(ge=5, le=3600)] = 30

    def __post_init__(self) -> None:
        if not self.trust.monitors:
            raise ValueError("[trust] monitors is empty: no verdict can be trusted")
        if self.policy.enforce and not self.trust.agents:
            raise ValueError("[trust] agents is empty: no report can be trusted")


def load_control(path: Path) -> ControlConfig:
    """Read a control's configuration. Raises ConfigError."""
    return load_config(path, ControlConfig)
