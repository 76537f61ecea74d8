"""Policy: what a sweep means, and what a verdict leads to."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyscan.errors import UsageError
from pyscan.policy import ANSWERS, Policy, decide, judge
from pyscan.records import (
    Action,
    Finding,
    FindingKind,
    Incident,
    IncidentState,
    PageStatus,
    Sweep,
    Verdict,
    VerdictState,
)

SWEEP = Sweep("s", "t", 1, 0, 0, watched=10, ok=10, mismatched=0, unreadable=0)
VERDICT = Verdict("v", "s", "m", "t", "h", "vm", VerdictState.UNAPPROVED, "", 0, 10, 9, 0)
APPROVED = replace(VERDICT, state=VerdictState.APPROVED)
UNDECIDED = replace(VERDICT, state=VerdictState.UNDECIDED)
INCIDENT = Incident("i", "v", "t", "h", "vm", IncidentState.OPEN, 0)
FREEZE = Policy(enforce=True, unapproved=Action.FREEZE)


def _finding(kind: FindingKind) -> Finding:
    return Finding("f", "s", kind, PageStatus.OK, place=f"place of {kind}")


def _sweep(*kinds: FindingKind, **changes: Any) -> Sweep:
    findings = tuple(_finding(kind) for kind in kinds)
    changes = {"findings": findings, "findings_total": len(findings)} | changes
    return replace(SWEEP, **changes)


DIGEST, MAPPING, UNREADABLE, ATTACH = (
    FindingKind.DIGEST,
    FindingKind.MAPPING,
    FindingKind.UNREADABLE,
    FindingKind.ATTACH,
)


@pytest.mark.parametrize(
    ("sweep", "state", "reason"),
    [
        (_sweep(), VerdictState.APPROVED, "all 10 pages are as approved"),
        (_sweep(transient=2), VerdictState.APPROVED, "all 10"),
        (_sweep(DIGEST, ok=9, mismatched=1), VerdictState.UNAPPROVED, "1 of 10.*place of digest"),
        (_sweep(ok=9, mismatched=1), VerdictState.UNAPPROVED, "1 of 10"),
        (
            _sweep(UNREADABLE, DIGEST, ok=8, mismatched=1, unreadable=1),
            VerdictState.UNAPPROVED,
            "place of digest",
        ),
        (_sweep(ATTACH, DIGEST, ok=9, mismatched=1), VerdictState.UNAPPROVED, "1 of 10"),
        (_sweep(MAPPING), VerdictState.UNAPPROVED, "lead elsewhere.*place of mapping"),
        (_sweep(DIGEST), VerdictState.UNAPPROVED, "place of digest"),
        (_sweep(ATTACH), VerdictState.UNDECIDED, "running kernel is another one"),
        (_sweep(ATTACH, DIGEST, ok=5, mismatched=5), VerdictState.UNAPPROVED, "5 of 10"),
        (_sweep(ATTACH, DIGEST, ok=4, mismatched=6), VerdictState.UNDECIDED, "rebooted"),
        (_sweep(DIGEST, ok=4, mismatched=6), VerdictState.UNAPPROVED, "6 of 10"),
        (_sweep(ATTACH, UNREADABLE, ok=4, unreadable=6), VerdictState.UNDECIDED, "rebooted"),
        (_sweep(UNREADABLE, ok=9, unreadable=1), VerdictState.UNDECIDED, "1 of 10"),
        (_sweep(ok=9, unreadable=1), VerdictState.UNDECIDED, "could not be read"),
        (_sweep(UNREADABLE), VerdictState.UNDECIDED, "page tables could not be read"),
        (_sweep(ok=0, unreadable=10), VerdictState.UNDECIDED, "access lost: none of 10"),
        (_sweep(UNREADABLE, ATTACH, ok=0, unreadable=10), VerdictState.UNDECIDED, "access lost"),
        (_sweep(UNREADABLE, MAPPING, ok=0, unreadable=10), VerdictState.UNAPPROVED, "elsewhere"),
        (_sweep(UNREADABLE, ok=1, unreadable=9), VerdictState.UNDECIDED, "^9 of 10 pages"),
        (_sweep(findings_total=1), VerdictState.UNDECIDED, "do not explain"),
        (_sweep(watched=0, ok=0), VerdictState.UNDECIDED, "do not add up"),
        (_sweep(watched=11), VerdictState.UNDECIDED, "do not add up"),
        (_sweep(ok=11, unreadable=-1), VerdictState.UNDECIDED, "do not add up"),
    ],
)
def test_what_a_sweep_means(sweep: Sweep, state: VerdictState, reason: str) -> None:
    decided, text = judge(sweep)
    assert decided is state
    assert re.search(reason, text)
    assert "\n" not in text


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (PageStatus.BLOCKED, "access lost: none of 10 pages could be read (blocked)"),
        (PageStatus.LINK_DOWN, "access lost: none of 10 pages could be read (link down): why"),
        (PageStatus.OK, "why"),
    ],
)
def test_why_nothing_was_read(status: PageStatus, reason: str) -> None:
    finding = replace(_finding(UNREADABLE), status=status)
    if status is PageStatus.BLOCKED:
        finding = replace(finding, frame=7, actual="unreadable table")
    else:
        finding = replace(finding, actual="why")
    sweep = _sweep(ok=0, unreadable=10, findings=(finding,))
    assert judge(sweep) == (VerdictState.UNDECIDED, reason)


COUNTS = st.integers(-1, 3)


@given(st.tuples(COUNTS, COUNTS, COUNTS, COUNTS, COUNTS), st.sampled_from([(), *FindingKind]))
def test_approved_takes_every_page_and_no_finding(
    counts: tuple[int, ...], kind: FindingKind | tuple[()]
) -> None:
    watched, ok, mismatched, unreadable, total = counts
    sweep = _sweep(
        *([kind] if kind else []),
        watched=watched,
        ok=ok,
        mismatched=mismatched,
        unreadable=unreadable,
        findings_total=total,
    )
    clean = watched == ok > 0 and (mismatched, unreadable, total, kind) == (0, 0, 0, ())
    assert (judge(sweep)[0] is VerdictState.APPROVED) == clean


@pytest.mark.parametrize(
    ("verdict", "policy", "incident", "wanted", "action"),
    [
        (APPROVED, FREEZE, None, False, None),
        (APPROVED, FREEZE, INCIDENT, False, None),
        (VERDICT, FREEZE, None, True, Action.FREEZE),
        (VERDICT, FREEZE, INCIDENT, False, Action.FREEZE),
        (VERDICT, FREEZE, replace(INCIDENT, action=Action.FREEZE), False, None),
        (
            VERDICT,
            FREEZE,
            replace(INCIDENT, action=Action.FREEZE, state=IncidentState.ANSWERED),
            False,
            None,
        ),
        (VERDICT, FREEZE, replace(INCIDENT, action=Action.CAPTURE), False, Action.FREEZE),
        (
            VERDICT,
            FREEZE,
            replace(INCIDENT, action=Action.FREEZE, state=IncidentState.RELEASED),
            True,
            Action.FREEZE,
        ),
        (VERDICT, Policy(enforce=True, unapproved=Action.KILL), None, True, Action.KILL),
        (VERDICT, Policy(enforce=True, unapproved=None), None, True, None),
        (VERDICT, replace(FREEZE, enforce=False), None, True, None),
        (VERDICT, replace(FREEZE, protected_vms=frozenset({"vm"})), None, True, None),
        (VERDICT, replace(FREEZE, protected_vms=frozenset({"x"})), None, True, Action.FREEZE),
        (replace(VERDICT, vm=""), FREEZE, None, True, None),
        (replace(VERDICT, host=""), FREEZE, None, True, None),
        (UNDECIDED, FREEZE, None, True, None),
        (UNDECIDED, FREEZE, INCIDENT, False, None),
        (UNDECIDED, replace(FREEZE, undecided=Action.CAPTURE), None, True, Action.CAPTURE),
        (UNDECIDED, replace(FREEZE, undecided=Action.FREEZE, enforce=False), None, True, None),
    ],
)
def test_what_a_verdict_leads_to(
    verdict: Verdict,
    policy: Policy,
    incident: Incident | None,
    wanted: bool,
    action: Action | None,
) -> None:
    decision = decide(verdict, policy, incident)
    assert (decision.incident_wanted, decision.action) == (wanted, action)
    assert decision.reason
    assert "\n" not in decision.reason


POLICIES = st.builds(
    Policy,
    enforce=st.booleans(),
    unapproved=st.sampled_from([None, *sorted(ANSWERS)]),
    protected_vms=st.sampled_from([frozenset(), frozenset({"vm"})]),
)


@given(POLICIES, st.sampled_from([None, INCIDENT]))
def test_doubt_never_acts_by_default(policy: Policy, incident: Incident | None) -> None:
    assert decide(UNDECIDED, policy, incident).action is None


@given(POLICIES)
def test_an_incident_gets_an_action_once(policy: Policy) -> None:
    first = decide(VERDICT, policy, None)
    assert first.incident_wanted
    again = decide(VERDICT, policy, replace(INCIDENT, action=first.action))
    assert not again.incident_wanted
    assert again.action is None


@pytest.mark.parametrize("action", [Action.RELEASE, Action.QUERY])
def test_release_and_query_answer_no_verdict(action: Action) -> None:
    with pytest.raises(UsageError, match="use one of capture, freeze, kill, sandbox"):
        Policy(enforce=True, unapproved=action)
    with pytest.raises(UsageError):
        Policy(enforce=True, unapproved=None, undecided=action)
