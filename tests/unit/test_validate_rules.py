"""Rules for the state of a kernel: each rule, each class, and what no rule allows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pyscan.errors import UsageError
from pyscan.validate.rules import (
    OVERRIDES_MAX,
    STATE_FINDINGS_MAX,
    Judged,
    Override,
    Rule,
    StateRules,
    judge_state,
)
from pyscan.validate.vector import RetpolineMode, StateClass, StateVector

PINNED = StateVector(
    features="ff",
    return_thunk="thunk",
    retpoline=RetpolineMode.THUNK,
    uniprocessor=False,
    static_keys={"key_off": False, "key_on": True},
    static_calls={"call": "f"},
    ftrace=("tracer",),
    kprobes=("vfs_read",),
    modules=("ext4",),
    unknown_modules=(),
    bpf=("prog",),
)

#: Class, its field in StateRules, and a vector with one change of that class.
CHANGED = [
    (StateClass.FEATURES, "features", replace(PINNED, features="fe")),
    (
        StateClass.STATIC_KEY,
        "static_key",
        replace(PINNED, static_keys={"key_off": True, "key_on": True}),
    ),
    (StateClass.STATIC_CALL, "static_call", replace(PINNED, static_calls={"call": "g"})),
    (StateClass.FTRACE, "ftrace", replace(PINNED, ftrace=("other", "tracer"))),
    (StateClass.KPROBE, "kprobe", replace(PINNED, kprobes=("vfs_open", "vfs_read"))),
    (StateClass.MODULE, "module", replace(PINNED, modules=("ext4", "xfs"))),
    (StateClass.BPF, "bpf", replace(PINNED, bpf=("prog", "prog2"))),
]
ALLOW_ALL = {field: Rule.ALLOW for _, field, _ in CHANGED}


def found(judged: Judged) -> list[tuple[str, str]]:
    return [(str(f.change.kind), f.change.name) for f in judged.findings]


@pytest.mark.parametrize(("kind", "field", "now"), CHANGED, ids=[field for _, field, _ in CHANGED])
@pytest.mark.parametrize("rule", list(Rule))
def test_a_change_under_each_rule(
    kind: StateClass, field: str, now: StateVector, rule: Rule
) -> None:
    rules = StateRules(**{**ALLOW_ALL, field: rule}, overrides=())
    judged = judge_state(rules, PINNED, now)
    changed = [f for f in judged.findings if f.change.before != f.change.after]
    assert bool(changed) is (rule in (Rule.PIN, Rule.FORBID))
    assert bool(judged.reports) is (rule is Rule.REPORT)
    assert all(f.change.kind is kind and f.rule is rule for f in judged.findings)
    assert judged.findings_total == len(judged.findings)


@pytest.mark.parametrize("rule", [Rule.PIN, Rule.ALLOW, Rule.REPORT])
def test_an_unchanged_state_is_fine(rule: Rule) -> None:
    rules = StateRules(**{field: rule for _, field, _ in CHANGED})
    assert judge_state(rules, PINNED, PINNED) == Judged((), (), 0)


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("static_key", "key_on"),
        ("ftrace", "tracer"),
        ("kprobe", "vfs_read"),
        ("module", "ext4"),
        ("bpf", "prog"),
    ],
)
def test_what_is_forbidden_is_found_at_the_first_validation(field: str, name: str) -> None:
    judged = judge_state(StateRules(**{**ALLOW_ALL, field: Rule.FORBID}), PINNED, PINNED)
    assert [f.change.name for f in judged.findings] == [name]


def test_forbidden_features_and_calls_are_pinned() -> None:
    rules = StateRules(**{**ALLOW_ALL, "features": Rule.FORBID, "static_call": Rule.FORBID})
    assert judge_state(rules, PINNED, PINNED).findings == ()


def test_what_was_forbidden_and_has_gone_is_found() -> None:
    rules = StateRules(**{**ALLOW_ALL, "kprobe": Rule.FORBID})
    judged = judge_state(rules, PINNED, replace(PINNED, kprobes=()))
    assert [(f.change.before, f.change.after) for f in judged.findings] == [("present", "")]


@pytest.mark.parametrize("rule", list(Rule))
def test_an_unknown_module_is_always_a_finding(rule: Rule) -> None:
    rules = StateRules(**{field: rule for _, field, _ in CHANGED})
    bad = replace(PINNED, unknown_modules=("rootkit",))
    assert ("unknown-module", "rootkit") in found(judge_state(rules, bad, bad))
    assert ("unknown-module", "rootkit") in found(judge_state(rules, PINNED, bad))
    gone = judge_state(rules, bad, PINNED)
    assert ("unknown-module", "rootkit") not in found(gone)


def test_the_pinned_state_is_never_learned() -> None:
    rules = StateRules(features=Rule.PIN)
    changed = replace(PINNED, return_thunk="other")
    for _ in range(3):
        assert found(judge_state(rules, PINNED, changed)) == [("features", "return-thunk")]
    assert judge_state(rules, PINNED, PINNED).findings == ()


def test_the_first_override_that_matches_wins() -> None:
    rules = StateRules(
        kprobe=Rule.FORBID,
        overrides=(
            Override(StateClass.KPROBE, "vfs_read", Rule.ALLOW),
            Override(StateClass.KPROBE, "vfs_*", Rule.REPORT),
            Override(StateClass.MODULE, "*", Rule.PIN),
        ),
    )
    assert rules.rule_for(StateClass.KPROBE, "vfs_read") is Rule.ALLOW
    assert rules.rule_for(StateClass.KPROBE, "vfs_open") is Rule.REPORT
    assert rules.rule_for(StateClass.KPROBE, "VFS_open") is Rule.FORBID
    assert rules.rule_for(StateClass.MODULE, "xfs") is Rule.PIN
    assert rules.rule_for(StateClass.BPF, "vfs_read") is Rule.REPORT


def test_a_second_cpu_is_told_only() -> None:
    one = replace(PINNED, uniprocessor=True)
    judged = judge_state(StateRules(), one, PINNED)
    assert judged.findings == ()
    assert [change.name for change in judged.reports] == ["uniprocessor"]


def test_by_default_mitigations_are_pinned_and_tracing_is_told() -> None:
    now = replace(
        PINNED,
        return_thunk="none",
        kprobes=("a", "vfs_read"),
        modules=("a", "ext4"),
        static_keys={"key_off": True, "key_on": False},
    )
    judged = judge_state(StateRules(), PINNED, now)
    assert found(judged) == [("features", "return-thunk")]
    assert [change.name for change in judged.reports] == ["a"]


def test_the_gravest_come_first_and_the_number_is_bounded() -> None:
    rules = StateRules(module=Rule.PIN, kprobe=Rule.PIN)
    many = tuple(f"m{n:04}" for n in range(STATE_FINDINGS_MAX + 10))
    now = replace(PINNED, modules=many, kprobes=(), features="0", unknown_modules=("rk",))
    judged = judge_state(rules, PINNED, now)
    assert len(judged.findings) == STATE_FINDINGS_MAX
    assert judged.findings_total == STATE_FINDINGS_MAX + 10 + 4
    assert found(judged)[:2] == [("unknown-module", "rk"), ("features", "cpu")]


@pytest.mark.parametrize(
    "overrides",
    [
        (Override(StateClass.BPF, "", Rule.PIN),),
        (Override(StateClass.BPF, "x" * 300, Rule.PIN),),
        (Override(StateClass.BPF, "x", Rule.PIN),) * (OVERRIDES_MAX + 1),
        (Override(StateClass.UNKNOWN_MODULE, "*", Rule.ALLOW),),
    ],
)
def test_rules_that_break_a_limit(overrides: tuple[Override, ...]) -> None:
    with pytest.raises(UsageError):
        StateRules(overrides=overrides)
