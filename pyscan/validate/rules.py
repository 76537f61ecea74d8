"""Rules for the state of a kernel: what may change, what is told, what is a finding.

Bytes that fit the state are legal to the kernel, whoever brought that state about. Only its
operator knows whether a probe or another module is wanted. So every class of state has a rule,
and names may have rules of their own. What was found when a target was attached is the
reference and stays it: a state is never made right by being seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Final

from pyscan.errors import UsageError
from pyscan.validate.vector import (
    StateChange,
    StateClass,
    StateVector,
    changes,
    present_text,
)

#: Findings that one judgement lists; the others are counted.
STATE_FINDINGS_MAX: Final = 256
OVERRIDES_MAX: Final = 1024
PATTERN_CHARACTERS_MAX: Final = 256


class Rule(StrEnum):
    """What is thought of a class of state, or of one name in it."""

    PIN = "pin"  # as it was at attach; else a finding
    ALLOW = "allow"  # silent
    REPORT = "report"  # a change is told, and is no finding
    FORBID = "forbid"  # its presence is a finding, also at the first validation; so is a change


@dataclass(frozen=True, slots=True)
class Override:
    """A rule for names that match a pattern of fnmatch(3), such as `nf_*` or `ext4:*`."""

    kind: StateClass
    pattern: str
    rule: Rule


#: The kernel itself leaves the state of one CPU when a second is plugged in
#: (alternatives_enable_smp, arch/x86/kernel/alternative.c).
DEFAULT_OVERRIDES: Final = (Override(StateClass.FEATURES, "uniprocessor", Rule.REPORT),)


@dataclass(frozen=True, slots=True)
class StateRules:
    """A rule for each class; the first override that matches goes before it.

    Defaults, and why:

    * `features` pin: CPU features and the ways of branches and returns are chosen once at
      boot. A change means that somebody turns mitigations off.
    * `static_key`, `static_call` allow: the kernel switches them by itself, when a socket
      option is set or a module is loaded; each site is compared with its key in any case.
    * `ftrace`, `kprobe`, `bpf` report: tracing tools and service managers use them, and so do
      rootkits. Told, so that a person can forbid them where nothing traces.
    * `module` allow: modules of the approved packages are loaded on demand. One that is in
      no approved package is a finding under every rule.

    `forbid` of static calls and features, which are always there, means `pin`. Raises
    UsageError for overrides that break the limits, or that name unknown modules.
    """

    features: Rule = Rule.PIN
    static_key: Rule = Rule.ALLOW
    static_call: Rule = Rule.ALLOW
    ftrace: Rule = Rule.REPORT
    kprobe: Rule = Rule.REPORT
    module: Rule = Rule.ALLOW
    bpf: Rule = Rule.REPORT
    overrides: tuple[Override, ...] = DEFAULT_OVERRIDES

    def __post_init__(self) -> None:
        if len(self.overrides) > OVERRIDES_MAX:
            raise UsageError(f"{len(self.overrides)} rules for names; at most {OVERRIDES_MAX}")
        for override in self.overrides:
            if not 0 < len(override.pattern) <= PATTERN_CHARACTERS_MAX:
                raise UsageError(f"a pattern has 1 to {PATTERN_CHARACTERS_MAX} characters")
            if override.kind is StateClass.UNKNOWN_MODULE:
                raise UsageError(
                    "no rule allows a module that is in no approved package; approve its package"
                )

    def rule_for(self, kind: StateClass, name: str) -> Rule:
        """The rule for one name."""
        if kind is StateClass.UNKNOWN_MODULE:
            return Rule.FORBID
        for override in self.overrides:
            if override.kind is kind and fnmatchcase(name, override.pattern):
                return override.rule
        by_class = {
            StateClass.FEATURES: self.features,
            StateClass.STATIC_KEY: self.static_key,
            StateClass.STATIC_CALL: self.static_call,
            StateClass.FTRACE: self.ftrace,
            StateClass.KPROBE: self.kprobe,
            StateClass.MODULE: self.module,
            StateClass.BPF: self.bpf,
        }
        return by_class[kind]


@dataclass(frozen=True, slots=True)
class StateFinding:
    """State that a rule does not let pass: it is there although forbidden, or has changed."""

    change: StateChange  # `before` is the pinned state
    rule: Rule

    def __str__(self) -> str:
        return f"{self.change} ({self.rule})"


@dataclass(frozen=True, slots=True)
class Judged:
    """A judgement. `findings` is bounded, `findings_total` counts all; `reports` are changes
    since attach that are told and are no findings."""

    findings: tuple[StateFinding, ...]
    reports: tuple[StateChange, ...]
    findings_total: int


def judge_state(rules: StateRules, pinned: StateVector, now: StateVector) -> Judged:
    """Hold a state against the rules; `pinned` is that of the attach (at the first, `now`)."""
    findings: dict[tuple[StateClass, str], StateFinding] = {}
    reports = []
    for change in changes(pinned, now):
        rule = rules.rule_for(change.kind, change.name)
        if rule is Rule.REPORT:
            reports.append(change)
        elif rule is not Rule.ALLOW and not _gone(change):
            findings[change.kind, change.name] = StateFinding(change, rule)
    for change in _present(pinned, now):
        if rules.rule_for(change.kind, change.name) is Rule.FORBID:
            found = StateFinding(change, Rule.FORBID)
            findings.setdefault((change.kind, change.name), found)
    order = list(StateClass)
    ranked = sorted(findings.values(), key=lambda f: (order.index(f.change.kind), f.change.name))
    return Judged(tuple(ranked[:STATE_FINDINGS_MAX]), tuple(reports), len(ranked))


def _gone(change: StateChange) -> bool:
    """Whether a module that is in no approved package was taken out: that is no new fault."""
    return change.kind is StateClass.UNKNOWN_MODULE and not change.after


def _present(pinned: StateVector, now: StateVector) -> Iterator[StateChange]:
    """All that is there now and could be absent."""
    for name, on in now.static_keys.items():
        if on:
            before = pinned.static_keys.get(name)
            yield StateChange(
                StateClass.STATIC_KEY,
                name,
                "" if before is None else "on" if before else "off",
                "on",
            )
    before_lists = pinned.listed()
    for kind, names in now.listed().items():
        old = Counter(before_lists[kind])
        for name, count in Counter(names).items():
            yield StateChange(kind, name, present_text(old[name]), present_text(count))
