"""What a policy is made of: rules, groups of targets, maintenance windows, limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Final

from pyscan.errors import UsageError
from pyscan.records import Action, Finding, FindingKind, VerdictState

#: The actions that answer a verdict, from the mildest on; below them all is to observe.
#: `release` and `query` answer a person.
LADDER: Final = (Action.CAPTURE, Action.SANDBOX, Action.FREEZE, Action.KILL)
ANSWERS: Final = frozenset(LADDER)

MINUTES_PER_DAY: Final = 24 * 60


class Severity(StrEnum):
    """How grave a finding is, by its kind."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


_SEVERITY_ORDER: Final = tuple(Severity)
_SEVERITIES: Final = {
    FindingKind.UNREADABLE: Severity.LOW,
    FindingKind.ATTACH: Severity.MEDIUM,
    FindingKind.STATE: Severity.MEDIUM,
    FindingKind.DIGEST: Severity.HIGH,
    FindingKind.MAPPING: Severity.HIGH,
    FindingKind.CODE: Severity.CRITICAL,
    FindingKind.STRUCTURE: Severity.CRITICAL,
}


class Profile(StrEnum):
    """Whether a rule acts, or only says what it would do."""

    VALIDATE = "validate"
    ENFORCE = "enforce"


def rung(action: Action | None) -> int:
    """How high an action stands on the ladder; 0 is to observe."""
    return LADDER.index(action) + 1 if action in ANSWERS else 0


def severity(kind: FindingKind) -> Severity:
    """How grave a finding of this kind is."""
    return _SEVERITIES[kind]


def matches(patterns: Sequence[str], text: str) -> bool:
    """Whether one of the patterns, as of fnmatch(3), is `text`'s."""
    return any(fnmatchcase(text, pattern) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Rule:
    """What to do about findings. Conditions that are left out hold for everything.

    A rule is asked for each finding on its own: kinds, places and severity hold for the
    same finding. `answer` are rungs of the ladder, mildest first, () to observe: the first
    is taken at the `sweeps`-th verdict in a row, the next one `climb_sweeps` verdicts later.
    Raises UsageError for an answer that is none.
    """

    name: str
    answer: tuple[Action, ...]
    state: VerdictState = VerdictState.UNAPPROVED
    targets: tuple[str, ...] = ("*",)  # patterns of names
    tags: frozenset[str] = frozenset()  # one of them
    kinds: frozenset[FindingKind] = frozenset()
    places: tuple[str, ...] = ()  # patterns of a finding's place: a symbol, with its module
    severity: Severity | None = None  # at least
    sweeps: int = 1
    climb_sweeps: int = 1
    profile: Profile = Profile.ENFORCE

    def __post_init__(self) -> None:
        rungs = [rung(action) for action in self.answer]
        if 0 in rungs or rungs != sorted(set(rungs)):
            raise UsageError(
                f"rule {self.name}: an answer climbs {' < '.join(LADDER)}, or is empty"
            )

    def covers(self, finding: Finding | None) -> bool:
        """Whether the conditions hold for a finding, or for one that nothing is known of."""
        if not (self.kinds or self.places or self.severity):
            return True
        if finding is None:
            return False
        order = _SEVERITY_ORDER.index
        return (
            (not self.kinds or finding.kind in self.kinds)
            and (not self.places or matches(self.places, finding.place))
            and (self.severity is None or order(severity(finding.kind)) >= order(self.severity))
        )

    def action(self, sweeps: int) -> Action | None:
        """The rung after so many verdicts in a row; None to observe, or to wait."""
        if sweeps < self.sweeps or not self.answer:
            return None
        climbed = (sweeps - self.sweeps) // self.climb_sweeps
        return self.answer[min(climbed, len(self.answer) - 1)]


@dataclass(frozen=True, slots=True)
class Group:
    """Targets that have tags and an owner in common."""

    targets: tuple[str, ...]  # patterns of names
    tags: frozenset[str] = frozenset()
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Window:
    """A time, in UTC, in which nothing stronger than `at_most` is done to some targets."""

    name: str
    begin_minute: int  # of the day
    end_minute: int  # not after `begin_minute`: of the next day
    days: frozenset[int] = frozenset(range(7))  # on which it begins; Monday is 0
    targets: tuple[str, ...] = ("*",)
    tags: frozenset[str] = frozenset()
    at_most: Action | None = None

    def holds(self, now_ns: int) -> bool:
        """Whether the window is open at a time."""
        now = datetime.fromtimestamp(now_ns // 10**9, UTC)
        minute = now.hour * 60 + now.minute
        if self.begin_minute < self.end_minute:
            return now.weekday() in self.days and self.begin_minute <= minute < self.end_minute
        if minute >= self.begin_minute:
            return now.weekday() in self.days
        return minute < self.end_minute and (now - timedelta(days=1)).weekday() in self.days


@dataclass(frozen=True, slots=True)
class Limits:
    """What a policy does at most, however many verdicts ask for it."""

    actions_per_minute: int = 30
    tenant_actions_per_minute: int = 10  # on the targets of one tenant; not where none is named
    #: More of the fleet unapproved at once is no intrusion but an update, or a broken policy:
    #: nothing more is done until a person says so.
    unapproved_percent_max: float = 20.0
    fleet_min: int = 5  # fewer targets are no fleet


@dataclass(frozen=True, slots=True)
class Policy:
    """How a configuration environment answers verdicts.

    `unapproved` and `undecided` are the actions that answer such a verdict where no rule
    covers a finding, None for an incident without an action; at the `sweeps`-th and the
    `undecided_sweeps`-th verdict in a row. Without `enforce`, incidents are opened and
    nothing is done. The VMs of `protected_vms` are never acted on. Raises UsageError for an
    action that is no answer.
    """

    enforce: bool
    unapproved: Action | None
    undecided: Action | None = None
    protected_vms: frozenset[str] = frozenset()
    sweeps: int = 1
    undecided_sweeps: int = 1
    rules: tuple[Rule, ...] = ()  # the first that covers a finding is taken
    groups: tuple[Group, ...] = ()
    windows: tuple[Window, ...] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for action in (self.unapproved, self.undecided):
            if action is not None and action not in ANSWERS:
                raise UsageError(
                    f"policy: {action} does not answer a verdict; use one of "
                    f"{', '.join(sorted(ANSWERS))}, or none"
                )

    def tags(self, target: str) -> frozenset[str]:
        """All tags of a target."""
        return frozenset().union(
            *(group.tags for group in self.groups if matches(group.targets, target))
        )

    def tenant(self, target: str) -> str:
        """Whose a target is: of the first group that says so; "" for nobody's."""
        owners = (g.tenant for g in self.groups if g.tenant and matches(g.targets, target))
        return next(owners, "")

    def default(self, state: VerdictState) -> Rule:
        """What stands behind all rules."""
        unapproved = state is VerdictState.UNAPPROVED
        action = self.unapproved if unapproved else self.undecided
        sweeps = self.sweeps if unapproved else self.undecided_sweeps
        return Rule("", (action,) if action else (), state, sweeps=sweeps)
