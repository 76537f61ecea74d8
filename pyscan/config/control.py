"""`pyscan control`: what it does about verdicts, and where it remembers it.

group = "control"                 several workers, each with its own [identity], share the
[store]                           load: one store for all of them
url = "postgresql://pyscan@db/pyscan"

[policy]                          without `enforce` nothing is ever done, only recorded
enforce = true
unapproved = "freeze"             where no rule covers a finding
sweeps = 2                        verdicts in a row, before anything is done

[[policy.rule]]                   the first that covers a finding is taken
name = "bpf"
places = ["bpf*"]
kinds = ["state"]
answer = ["capture", "sandbox"]   climbs with later verdicts; [] is to observe
profile = "validate"              only says what it would do

[[policy.group]]                  tags and owners of targets
targets = ["web-*"]
tags = ["public"]
tenant = "acme"

[[policy.window]]                 UTC
name = "sunday"
days = ["sun"]
begin = "02:00"
end = "04:00"
at_most = "capture"
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec

from pyscan.config.base import Name, Program, Table, load_config, refuse_duplicates
from pyscan.errors import UsageError
from pyscan.policy import Group, Limits, Policy, Profile, Rule, Severity, Window
from pyscan.records import Action, FindingKind, VerdictState
from pyscan.trust import Role

RULES_MAX = 1000
URL_CHARACTERS_MAX = 1024

_Count = Annotated[int, msgspec.Meta(ge=1, le=1000)]
_Rate = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
_Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
_Patterns = Annotated[tuple[_Pattern, ...], msgspec.Meta(min_length=1, max_length=256)]
_Time = Annotated[str, msgspec.Meta(pattern=r"\A(?:[01][0-9]|2[0-3]):[0-5][0-9]\Z")]


class Day(StrEnum):
    """When a maintenance window begins; as datetime.weekday counts."""

    MONDAY = "mon"
    TUESDAY = "tue"
    WEDNESDAY = "wed"
    THURSDAY = "thu"
    FRIDAY = "fri"
    SATURDAY = "sat"
    SUNDAY = "sun"


_DAYS = tuple(Day)


def _check_answer(action: Action | None) -> None:
    if action in {Action.RELEASE, Action.QUERY}:
        raise ValueError(f"{action} is no answer to a verdict; use freeze or kill")


class RuleTable(Table, frozen=True, kw_only=True):
    """A `[[policy.rule]]`, see `Rule`."""

    name: Name
    answer: Annotated[tuple[Action, ...], msgspec.Meta(max_length=4)]  # () is to observe
    state: VerdictState = VerdictState.UNAPPROVED
    targets: _Patterns = ("*",)
    tags: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)] = ()
    kinds: Annotated[tuple[FindingKind, ...], msgspec.Meta(max_length=16)] = ()
    places: Annotated[tuple[_Pattern, ...], msgspec.Meta(max_length=256)] = ()
    severity: Severity | None = None
    sweeps: _Count = 1
    climb_sweeps: _Count = 1
    profile: Profile = Profile.ENFORCE

    def __post_init__(self) -> None:
        if self.state is VerdictState.APPROVED:
            raise ValueError("an approved verdict needs no answer")
        try:
            self.rule()
        except UsageError as error:
            raise ValueError(str(error)) from error

    def rule(self) -> Rule:
        """The rule that policy takes."""
        return Rule(
            name=self.name,
            answer=self.answer,
            state=self.state,
            targets=self.targets,
            tags=frozenset(self.tags),
            kinds=frozenset(self.kinds),
            places=self.places,
            severity=self.severity,
            sweeps=self.sweeps,
            climb_sweeps=self.climb_sweeps,
            profile=self.profile,
        )


class GroupTable(Table, frozen=True, kw_only=True):
    """A `[[policy.group]]`, see `Group`."""

    targets: _Patterns
    tags: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)] = ()
    tenant: Name | None = None

    def group(self) -> Group:
        """The group that policy takes."""
        return Group(self.targets, frozenset(self.tags), self.tenant or "")


class WindowTable(Table, frozen=True, kw_only=True):
    """A `[[policy.window]]`, see `Window`; the end may lie on the next day."""

    name: Name
    begin: _Time
    end: _Time
    days: Annotated[tuple[Day, ...], msgspec.Meta(min_length=1, max_length=7)] = _DAYS
    targets: _Patterns = ("*",)
    tags: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)] = ()
    at_most: Action | None = None  # None: nothing is done

    def __post_init__(self) -> None:
        _check_answer(self.at_most)

    def window(self) -> Window:
        """The window that policy takes."""
        return Window(
            name=self.name,
            begin_minute=_minute(self.begin),
            end_minute=_minute(self.end),
            days=frozenset(_DAYS.index(day) for day in self.days),
            targets=self.targets,
            tags=frozenset(self.tags),
            at_most=self.at_most,
        )


class LimitsTable(Table, frozen=True, kw_only=True):
    """`[policy.limits]`, see `Limits`."""

    actions_per_minute: _Rate = 30
    tenant_actions_per_minute: _Rate = 10
    unapproved_percent_max: Annotated[float, msgspec.Meta(ge=0, le=100)] = 20.0
    fleet_min: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 5

    def limits(self) -> Limits:
        """The limits that policy takes."""
        return Limits(
            self.actions_per_minute,
            self.tenant_actions_per_minute,
            self.unapproved_percent_max,
            self.fleet_min,
        )


class PolicyTable(Table, frozen=True, kw_only=True):
    """What control does about a verdict."""

    enforce: bool = False  # false: incidents are recorded, no command leaves
    unapproved: Action = Action.FREEZE
    undecided: Action | None = None  # None: an alarm, never an action
    protected: tuple[Name, ...] = ()  # VMs that are never acted on
    sweeps: _Count = 1
    undecided_sweeps: _Count = 1
    rule: Annotated[tuple[RuleTable, ...], msgspec.Meta(max_length=RULES_MAX)] = ()
    group: Annotated[tuple[GroupTable, ...], msgspec.Meta(max_length=RULES_MAX)] = ()
    window: Annotated[tuple[WindowTable, ...], msgspec.Meta(max_length=RULES_MAX)] = ()
    limits: LimitsTable = LimitsTable()

    def __post_init__(self) -> None:
        for action in (self.unapproved, self.undecided):
            _check_answer(action)
        refuse_duplicates("rule name", [rule.name for rule in self.rule])

    def policy(self) -> Policy:
        """The policy that this table asks for."""
        return Policy(
            enforce=self.enforce,
            unapproved=self.unapproved,
            undecided=self.undecided,
            protected_vms=frozenset(self.protected),
            sweeps=self.sweeps,
            undecided_sweeps=self.undecided_sweeps,
            rules=tuple(rule.rule() for rule in self.rule),
            groups=tuple(group.group() for group in self.group),
            windows=tuple(window.window() for window in self.window),
            limits=self.limits.limits(),
        )


class StoreTable(Table, frozen=True, kw_only=True):
    """Where verdicts, incidents and commands are remembered."""

    #: postgresql://...; None: a file in [state] directory.
    url: Annotated[str, msgspec.Meta(max_length=URL_CHARACTERS_MAX)] | None = None

    def __post_init__(self) -> None:
        if self.url is not None and not self.url.startswith("postgresql://"):
            raise ValueError("[store] url begins with postgresql://; without it a file is used")


class ControlConfig(Program, frozen=True, kw_only=True):
    """`pyscan control`: the common tables, [policy] and [store]."""

    policy: PolicyTable = PolicyTable()
    store: StoreTable = StoreTable()
    group: Name | None = None  # of workers that share the load; None: the only one
    command_lifetime_s: Annotated[int, msgspec.Meta(ge=5, le=600)] = 30

    def __post_init__(self) -> None:
        if not self.trust.hears(Role.MONITOR):
            raise ValueError("[trust] monitors is empty: no verdict can be trusted")
        if self.policy.enforce and not self.trust.hears(Role.AGENT):
            raise ValueError("[trust] agents is empty: no report can be trusted")
        if self.group is not None and self.store.url is None:
            raise ValueError("[store] url is missing: the workers of a group share a store")


class PolicyFile(msgspec.Struct, frozen=True):
    """The [policy] of a file, whatever else is in it: a control's configuration, or a draft."""

    policy: PolicyTable


def load_control(path: Path) -> ControlConfig:
    """Read a control's configuration. Raises ConfigError."""
    return load_config(path, ControlConfig)


def load_policy(path: Path) -> PolicyTable:
    """Read only the [policy] of a file. Raises ConfigError."""
    return load_config(path, PolicyFile).policy


def _minute(time: str) -> int:
    hour, minute = time.split(":")
    return int(hour) * 60 + int(minute)
