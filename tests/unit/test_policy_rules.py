"""Rules: which answer a finding gets, when, how often, and what holds it back."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyscan.errors import UsageError
from pyscan.policy import (
    ANSWERS,
    LADDER,
    Group,
    Limits,
    Policy,
    Profile,
    Rule,
    Severity,
    Simulator,
    Situation,
    Window,
    decide,
    follow,
    rung,
)
from pyscan.records import (
    Action,
    Finding,
    FindingKind,
    Incident,
    IncidentState,
    PageStatus,
    Verdict,
    VerdictState,
)

CAPTURE, SANDBOX, FREEZE, KILL = LADDER
VERDICT = Verdict("v", "s", "m", "web-1", "h", "vm", VerdictState.UNAPPROVED, "", 0, 10, 9, 0)
MINUTE_NS = 60 * 10**9


def finding(kind: FindingKind = FindingKind.CODE, place: str = "ksys_read") -> Finding:
    return Finding("f", "s", kind, PageStatus.OK, place=place)


def verdict(*findings: Finding, **changes: Any) -> Verdict:
    changes = {"findings": findings, "findings_total": len(findings)} | changes
    return replace(VERDICT, **changes)


def policy(*rules: Rule, **changes: Any) -> Policy:
    return replace(Policy(enforce=True, unapproved=FREEZE, rules=rules), **changes)


OBSERVE_BPF = Rule("bpf", (), places=("bpf*",))
BPF, CODE = finding(FindingKind.STATE, "bpf_prog"), finding()


@pytest.mark.parametrize(
    ("rule", "hit", "miss"),
    [
        (Rule("r", (KILL,), targets=("web-*",)), verdict(CODE), verdict(CODE, target="db-1")),
        (Rule("r", (KILL,), tags=frozenset({"x"})), verdict(CODE), verdict(CODE, target="db-1")),
        (Rule("r", (KILL,), kinds=frozenset({FindingKind.CODE})), verdict(CODE), verdict(BPF)),
        (Rule("r", (KILL,), places=("ksys_*", "x")), verdict(CODE), verdict(BPF)),
        (Rule("r", (KILL,), severity=Severity.HIGH), verdict(CODE), verdict(BPF)),
        (Rule("r", (KILL,), severity=Severity.MEDIUM), verdict(BPF), verdict()),
        (
            Rule("r", (KILL,), kinds=frozenset({FindingKind.CODE}), places=("bpf*",)),
            verdict(finding(place="bpf_jit")),
            verdict(BPF, CODE),  # no single finding has both
        ),
    ],
    ids=["target", "tag", "kind", "place", "severity", "severity at least", "both"],
)
def test_what_a_rule_covers(rule: Rule, hit: Verdict, miss: Verdict) -> None:
    groups = (Group(("web-*",), frozenset({"x", "y"})), Group(("*",), frozenset({"z"})))
    asked = policy(rule, groups=groups)
    decision = decide(hit, asked, None)
    assert (decision.action, decision.rule) == (KILL, "r")
    assert (decide(miss, asked, None).action, decide(miss, asked, None).rule) == (FREEZE, "")


def test_the_first_rule_that_covers_a_finding_is_taken() -> None:
    asked = policy(OBSERVE_BPF, Rule("all", (KILL,)))
    assert decide(verdict(BPF), asked, None).action is None
    assert decide(verdict(CODE), asked, None).action is KILL


@pytest.mark.parametrize(
    "hidden",
    [
        verdict(BPF, CODE),
        verdict(CODE, BPF),
        verdict(BPF, findings_total=2),
        verdict(),
        verdict(finding(FindingKind.UNREADABLE)),
    ],
    ids=["behind", "ahead", "not listed", "none listed", "only gaps listed"],
)
def test_a_harmless_finding_covers_up_for_no_other(hidden: Verdict) -> None:
    assert decide(hidden, policy(OBSERVE_BPF), None).action is FREEZE


def test_gaps_of_an_unapproved_verdict_are_doubt() -> None:
    gap = finding(FindingKind.UNREADABLE, "bpf")
    assert decide(verdict(BPF, gap), policy(OBSERVE_BPF), None).action is None
    assert decide(verdict(BPF, gap), policy(OBSERVE_BPF, undecided=CAPTURE), None).action is CAPTURE
    lost = Rule("lost", (SANDBOX,), VerdictState.UNDECIDED)
    assert decide(verdict(BPF, gap), policy(OBSERVE_BPF, lost), None).rule == "lost"


def test_doubt_has_rules_of_its_own() -> None:
    lost = verdict(finding(FindingKind.UNREADABLE), state=VerdictState.UNDECIDED)
    assert decide(lost, policy(Rule("r", (KILL,))), None).action is None
    rule = Rule("lost", (SANDBOX,), VerdictState.UNDECIDED, sweeps=3)
    for count, action in ((2, None), (3, SANDBOX)):
        situation = Situation(undecided=count)
        assert decide(lost, policy(rule), None, situation).action is action


@pytest.mark.parametrize(
    ("sweeps", "climb", "wanted"),
    [
        (1, 1, [CAPTURE, FREEZE, KILL, KILL, KILL, KILL]),
        (3, 1, [None, None, CAPTURE, FREEZE, KILL, KILL]),
        (1, 2, [CAPTURE, CAPTURE, FREEZE, FREEZE, KILL, KILL]),
        (2, 3, [None, CAPTURE, CAPTURE, CAPTURE, FREEZE, FREEZE]),
    ],
)
def test_an_answer_climbs_with_verdicts(
    sweeps: int, climb: int, wanted: list[Action | None]
) -> None:
    rule = Rule("r", (CAPTURE, FREEZE, KILL), sweeps=sweeps, climb_sweeps=climb)
    for count, action in enumerate(wanted, start=1):
        decision = decide(verdict(CODE), policy(rule), None, Situation(unapproved=count))
        assert decision.action is action
        assert decision.incident_wanted  # an incident is opened while policy waits, too


@pytest.mark.parametrize(
    "answer", [(FREEZE, CAPTURE), (KILL, KILL), (Action.RELEASE,), (CAPTURE, Action.QUERY)]
)
def test_an_answer_that_is_no_ladder(answer: tuple[Action, ...]) -> None:
    with pytest.raises(UsageError, match="climbs capture < sandbox < freeze < kill"):
        Rule("r", answer)


ACTIONS = st.sampled_from([None, *LADDER])


@given(ACTIONS, ACTIONS)
def test_an_incident_never_climbs_down(before: Action | None, wanted: Action | None) -> None:
    incident = Incident("i", "v", "web-1", "h", "vm", IncidentState.OPEN, 0, action=before)
    action = decide(verdict(CODE), policy(unapproved=wanted), incident).action
    assert action is (wanted if rung(wanted) > rung(before) else None)


def test_a_rule_that_validates_acts_never_and_says_so() -> None:
    kill = Rule("new", (KILL,), profile=Profile.VALIDATE)
    decision = decide(verdict(CODE), policy(kill), None)
    assert decision.action is FREEZE
    assert decision.validated == "rule new would kill"
    same = Rule("new", (FREEZE,), profile=Profile.ENFORCE)
    assert decide(verdict(CODE), policy(same), None).validated == ""
    observing = policy(same, enforce=False)
    decision = decide(verdict(CODE), observing, None)
    assert decision.action is None
    assert "would freeze" in decision.reason


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 10**9


SUNDAY = Window("w", 120, 240, frozenset({6}))
NIGHT = Window("w", 1380, 60, frozenset({4}))  # from Friday, 23:00


@pytest.mark.parametrize(
    ("window", "when", "holds"),
    [
        (SUNDAY, "2026-11-22T02:00", True),
        (SUNDAY, "2026-11-22T03:59", True),
        (SUNDAY, "2026-11-22T04:00", False),
        (SUNDAY, "2026-11-22T01:59", False),
        (SUNDAY, "2026-11-23T02:30", False),
        (NIGHT, "2026-11-20T22:59", False),
        (NIGHT, "2026-11-20T23:00", True),
        (NIGHT, "2026-11-21T00:59", True),
        (NIGHT, "2026-11-21T01:00", False),
        (NIGHT, "2026-11-21T23:30", False),
        (NIGHT, "2026-11-20T00:30", False),
        (Window("w", 0, 0), "2026-11-20T00:00", True),
        (Window("w", 600, 600, frozenset({4})), "2026-11-21T09:59", True),
    ],
)
def test_maintenance_windows(window: Window, when: str, holds: bool) -> None:
    situation = Situation(now_ns=at(when))
    decision = decide(verdict(CODE), policy(windows=(window,)), None, situation)
    assert decision.action is (None if holds else FREEZE)
    assert ("maintenance window w" in decision.reason) is holds


def test_a_window_for_some_up_to_something() -> None:
    always = Window("w", 0, 0, at_most=CAPTURE, tags=frozenset({"x"}))
    groups = (Group(("web-*",), frozenset({"x"})),)
    asked = policy(windows=(always,), groups=groups)
    assert decide(verdict(CODE), asked, None).action is CAPTURE
    assert decide(verdict(CODE, target="db-1"), asked, None).action is FREEZE
    weaker = replace(asked, unapproved=CAPTURE)
    assert "window" not in decide(verdict(CODE), weaker, None).reason


@pytest.mark.parametrize(
    ("situation", "held"),
    [
        (Situation(actions=29, tenant_actions=9), False),
        (Situation(actions=30), True),
        (Situation(actions=10, tenant_actions=10), True),
    ],
)
def test_limits_hold_actions_back(situation: Situation, held: bool) -> None:
    decision = decide(verdict(CODE), policy(), None, situation)
    assert (decision.action is None, decision.held) == (held, held)
    assert decision.incident_wanted


@pytest.mark.parametrize(
    ("state", "situation", "trips", "acts"),
    [
        (VerdictState.UNAPPROVED, Situation(fleet=100, fleet_unapproved=20), False, True),
        (VerdictState.UNAPPROVED, Situation(fleet=100, fleet_unapproved=21), True, False),
        (VerdictState.UNAPPROVED, Situation(fleet=4, fleet_unapproved=4), False, True),
        (VerdictState.UNAPPROVED, Situation(fleet=5, fleet_unapproved=2), True, False),
        (VerdictState.UNAPPROVED, Situation(fleet=100, fleet_undecided=90), False, True),
        (VerdictState.UNDECIDED, Situation(fleet=100, fleet_undecided=90), True, False),
        (VerdictState.UNAPPROVED, Situation(fleet=100, tripped=True), False, False),
    ],
)
def test_circuit_breaker(
    state: VerdictState, situation: Situation, trips: bool, acts: bool
) -> None:
    asked = policy(undecided=SANDBOX)
    decision = decide(verdict(CODE, state=state), asked, None, situation)
    assert (decision.trips, decision.action is not None) == (trips, acts)
    assert decision.incident_wanted
    if not acts:
        assert "person" in decision.reason


def test_observing_trips_nothing() -> None:
    situation = Situation(fleet=10, fleet_unapproved=10)
    assert not decide(verdict(CODE), policy(enforce=False), None, situation).trips


def test_a_track_is_reset_by_approval_alone() -> None:
    def then(state: VerdictState, at_ns: int) -> Verdict:
        return verdict(state=state, decided_ns=at_ns)

    track = None
    counts = []
    for number, state in enumerate(
        (
            VerdictState.UNAPPROVED,
            VerdictState.UNDECIDED,
            VerdictState.UNAPPROVED,
            VerdictState.APPROVED,
            VerdictState.UNDECIDED,
        )
    ):
        track = follow(track, then(state, number))
        counts.append((track.unapproved, track.undecided))
    assert counts == [(1, 1), (1, 2), (2, 3), (0, 0), (0, 1)]
    assert track is not None
    assert follow(track, then(VerdictState.APPROVED, 3)) == track  # late: no way to be reset


SITUATIONS = st.builds(
    Situation,
    unapproved=st.integers(0, 9),
    undecided=st.integers(0, 9),
    actions=st.integers(0, 99),
    tenant_actions=st.integers(0, 99),
    fleet=st.integers(0, 99),
    fleet_unapproved=st.integers(0, 99),
    fleet_undecided=st.integers(0, 99),
    tripped=st.booleans(),
)
FINDINGS = st.builds(
    finding, st.sampled_from(list(FindingKind)), st.sampled_from(["bpf_x", "ksys_read", ""])
)
RULES = st.builds(
    Rule,
    st.just("r"),
    st.lists(st.sampled_from(LADDER), unique=True).map(lambda a: tuple(sorted(a, key=rung))),
    st.sampled_from([VerdictState.UNAPPROVED, VerdictState.UNDECIDED]),
    kinds=st.frozensets(st.sampled_from(list(FindingKind)), max_size=2),
    places=st.sampled_from([(), ("bpf*",)]),
    severity=st.sampled_from([None, *Severity]),
    sweeps=st.integers(1, 4),
    profile=st.sampled_from(list(Profile)),
)


@given(
    st.lists(FINDINGS, max_size=4),
    st.sampled_from(list(VerdictState)),
    st.lists(RULES, max_size=3),
    SITUATIONS,
)
def test_whatever_the_rules_are(
    findings: list[Finding], state: VerdictState, rules: list[Rule], situation: Situation
) -> None:
    told = verdict(*findings, state=state)
    asked = policy(*rules)
    decision = decide(told, asked, None, situation)
    assert decision.incident_wanted is (state is not VerdictState.APPROVED)
    assert "\n" not in decision.reason + decision.validated
    assert decision.action in {None, *ANSWERS}
    if decision.action is not None:
        assert not situation.tripped
        assert situation.actions < asked.limits.actions_per_minute
        # Another finding never makes the answer milder.
        more = verdict(*findings, CODE, state=state)
        assert rung(decide(more, asked, None, situation).action) >= rung(decision.action)
    assert decide(told, replace(asked, enforce=False), None, situation).action is None


def test_simulation_is_what_control_does_in_time() -> None:
    limits = Limits(actions_per_minute=3, unapproved_percent_max=50)
    simulator = Simulator(policy(limits=limits))
    for number in range(20):
        simulator.step(verdict(state=VerdictState.APPROVED, target=f"web-{number}"))
    steps = [
        simulator.step(verdict(CODE, target=f"web-{n}", vm=f"web-{n}", decided_ns=n * 10**9))
        for n in range(5)
    ]
    assert [step.decision.action for step in steps] == [FREEZE] * 3 + [None] * 2
    assert [step.decision.held for step in steps] == [False] * 3 + [True] * 2
    later = simulator.step(verdict(CODE, target="web-4", decided_ns=62 * 10**9))
    assert later.decision.action is FREEZE
    assert not later.decision.incident_wanted
    again = simulator.step(verdict(CODE, target="web-4", decided_ns=63 * 10**9))
    assert again.decision.action is None
    tripping = [
        simulator.step(verdict(CODE, target=f"web-{n}", decided_ns=10**12 + n * MINUTE_NS))
        for n in range(5, 20)
    ]
    assert [step.decision.trips for step in tripping].count(True) == 1
    assert tripping[-1].decision.action is None
    assert simulator.incidents == 20
