"""Verdict -> wanted action, by a policy and the situation."""

from __future__ import annotations

from dataclasses import dataclass

from pyscan.policy.rules import Policy, Profile, Rule, matches, rung
from pyscan.records import (
    Action,
    Finding,
    FindingKind,
    Incident,
    IncidentState,
    Verdict,
    VerdictState,
)


@dataclass(frozen=True, slots=True)
class Situation:
    """What a decision depends on besides the verdict."""

    now_ns: int = 0
    unapproved: int = 1  # such verdicts of the target since an approved one, this one included
    undecided: int = 1  # those and the undecided ones
    actions: int = 0  # that the policy took in the last minute
    tenant_actions: int = 0  # of these, on targets of the same tenant
    fleet: int = 0  # targets that are known
    fleet_unapproved: int = 0
    fleet_undecided: int = 0
    tripped: bool = False  # the circuit breaker: too much of the fleet was unapproved


@dataclass(frozen=True, slots=True)
class Decision:
    """What is wanted: a new incident, an action under the new or the open one, or neither."""

    incident_wanted: bool
    action: Action | None
    reason: str  # one line for a person
    rule: str = ""  # whose answer it is; "" for the policy's default
    validated: str = ""  # what the rules that only validate would do instead; "" when the same
    trips: bool = False  # the circuit breaker opens by this verdict
    held: bool = False  # a limit held an action back: it is due with a later verdict


@dataclass(frozen=True, slots=True)
class _Answer:
    rule: Rule
    action: Action | None


def decide(
    verdict: Verdict,
    policy: Policy,
    open_incident: Incident | None,
    situation: Situation | None = None,
) -> Decision:
    """Answer a verdict; `open_incident` is the target's incident that is not released yet.

    An incident climbs the ladder: it gets each action at most once, however many verdicts
    repeat it, and never a milder one. An approved verdict wants nothing: it does not close
    an incident, a person's release does.
    """
    if verdict.state is VerdictState.APPROVED:
        return Decision(False, None, "approved")
    situation = situation or Situation()
    if open_incident is not None and open_incident.state is IncidentState.RELEASED:
        open_incident = None
    answer = _answer(verdict, policy, situation, validating=False)
    action, reason = _restrained(answer, verdict, policy, situation)
    trips = held = False
    if (
        action is not None
        and open_incident is not None
        and (rung(open_incident.action) >= rung(action))
    ):
        action, reason = (
            None,
            f"{open_incident.action} was commanded already under {open_incident.id}",
        )
    if action is not None and (why := _breaker(verdict, policy, situation)):
        trips, reason, action = not situation.tripped, f"{why}: {action} is left to a person", None
    if action is not None and (why := _rate(policy, situation)):
        held, reason, action = True, f"{why}: {action} waits", None
    return Decision(
        incident_wanted=open_incident is None,
        action=action,
        reason=reason,
        rule=answer.rule.name,
        validated=_validated(answer, verdict, policy, situation),
        trips=trips,
        held=held,
    )


def _answer(verdict: Verdict, policy: Policy, situation: Situation, *, validating: bool) -> _Answer:
    """The strongest answer to any of the findings.

    Every finding is asked on its own: a harmless one must not cover up for another. What
    was found and is not listed counts as a finding that no condition holds for.
    """
    facts = [f for f in verdict.findings if f.kind is not FindingKind.UNREADABLE]
    gaps = [f for f in verdict.findings if f.kind is FindingKind.UNREADABLE]
    matters: list[tuple[VerdictState, Finding | None]]
    if verdict.state is VerdictState.UNDECIDED:
        matters = [(VerdictState.UNDECIDED, f) for f in (*facts, *gaps)]
    else:
        matters = [(VerdictState.UNAPPROVED, f) for f in facts]
        matters += [(VerdictState.UNDECIDED, f) for f in gaps]
    if (
        verdict.findings_total > len(verdict.findings)
        or not verdict.findings
        or (not facts and verdict.state is VerdictState.UNAPPROVED)
    ):
        matters.insert(0, (verdict.state, None))
    tags = policy.tags(verdict.target)
    rules = [
        rule
        for rule in policy.rules
        if (validating or rule.profile is Profile.ENFORCE)
        and matches(rule.targets, verdict.target)
        and (not rule.tags or rule.tags & tags)
    ]
    best: _Answer | None = None
    for state, finding in matters:
        rule = _first(rules, state, finding) or policy.default(state)
        unapproved = state is VerdictState.UNAPPROVED
        action = rule.action(situation.unapproved if unapproved else situation.undecided)
        answer = _Answer(rule, action)
        # Of two that do nothing yet, the one that is going to counts.
        if best is None or _weight(answer) > _weight(best):
            best = answer
    return best if best is not None else _Answer(policy.default(verdict.state), None)


def _first(rules: list[Rule], state: VerdictState, finding: Finding | None) -> Rule | None:
    return next((r for r in rules if r.state is state and r.covers(finding)), None)


def _weight(answer: _Answer) -> tuple[int, int]:
    return rung(answer.action), rung(answer.rule.answer[-1]) if answer.rule.answer else 0


def _restrained(
    answer: _Answer, verdict: Verdict, policy: Policy, situation: Situation
) -> tuple[Action | None, str]:
    """An answer after all that forbids it for this target, and why it is so."""
    rule, action = answer.rule, answer.action
    who = f"rule {rule.name}" if rule.name else "the policy"
    if action is None:
        if rule.answer:
            seen = (
                situation.unapproved
                if rule.state is VerdictState.UNAPPROVED
                else situation.undecided
            )
            return None, f"{who} waits: verdict {seen} of {rule.sweeps} in a row"
        return None, f"{who} answers {verdict.state} with an alarm only"
    if not policy.enforce:
        return None, f"observing only; enforcing would {action} VM {verdict.vm}"
    if not verdict.vm or not verdict.host:
        return None, f"target {verdict.target} is no VM of a host, so nothing can {action} it"
    if verdict.vm in policy.protected_vms:
        return None, f"VM {verdict.vm} is protected: {action} is left to a person"
    reason = f"{who} answers {verdict.state} with {action}"
    tags = policy.tags(verdict.target)
    for window in policy.windows:
        if (
            rung(window.at_most) < rung(action)
            and matches(window.targets, verdict.target)
            and (not window.tags or window.tags & tags)
            and window.holds(situation.now_ns)
        ):
            reason = f"maintenance window {window.name}: {window.at_most or 'observe'} at most"
            action = window.at_most
            if action is None:
                break
    return action, reason


def _breaker(verdict: Verdict, policy: Policy, situation: Situation) -> str:
    """Why nothing is done to anybody any more; empty when all is well."""
    if situation.tripped:
        return "the circuit breaker is open"
    bad = situation.fleet_unapproved
    if verdict.state is VerdictState.UNDECIDED:
        bad += situation.fleet_undecided
    limits = policy.limits
    if situation.fleet < limits.fleet_min:
        return ""
    if 100 * bad <= limits.unapproved_percent_max * situation.fleet:
        return ""
    return (
        f"{bad} of {situation.fleet} targets are {verdict.state} at once, "
        f"more than {limits.unapproved_percent_max:g} %"
    )


def _rate(policy: Policy, situation: Situation) -> str:
    """Which limit is reached; empty for none."""
    limits = policy.limits
    if situation.actions >= limits.actions_per_minute:
        return f"{limits.actions_per_minute} actions a minute are the limit"
    if situation.tenant_actions >= limits.tenant_actions_per_minute:
        return f"{limits.tenant_actions_per_minute} actions a minute are the tenant's limit"
    return ""


def _validated(enforced: _Answer, verdict: Verdict, policy: Policy, situation: Situation) -> str:
    """What would be done if the rules that validate acted, too."""
    if all(rule.profile is Profile.ENFORCE for rule in policy.rules):
        return ""
    answer = _answer(verdict, policy, situation, validating=True)
    if answer == enforced:
        return ""
    return f"rule {answer.rule.name or 'default'} would {answer.action or 'observe'}"
