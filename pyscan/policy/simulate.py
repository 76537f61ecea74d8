"""What a policy would have done about verdicts that were recorded."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from pyscan.policy.decide import Decision, Situation, decide
from pyscan.policy.rules import Policy
from pyscan.policy.track import Track, follow
from pyscan.records import Incident, IncidentState, Verdict, VerdictState

MINUTE_NS = 60 * 10**9


@dataclass(frozen=True, slots=True)
class Step:
    """One verdict and the answer to it."""

    verdict: Verdict
    decision: Decision


class Simulator:
    """Takes verdicts in the order they were decided. Commands succeed, nobody releases."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._tracks: dict[str, Track] = {}
        self._incidents: dict[str, Incident] = {}
        self._actions: deque[tuple[int, str]] = deque()  # when, on whose target
        self._tripped = False

    @property
    def incidents(self) -> int:
        """How many were opened."""
        return len(self._incidents)

    def step(self, verdict: Verdict) -> Step:
        """Answer one verdict."""
        track = follow(self._tracks.get(verdict.target), verdict)
        self._tracks[verdict.target] = track
        tenant = self._policy.tenant(verdict.target)
        incident = self._incidents.get(verdict.target)
        decision = decide(verdict, self._policy, incident, self._situation(verdict, track, tenant))
        self._tripped |= decision.trips
        if decision.incident_wanted:
            incident = Incident(
                id=f"incident-{len(self._incidents) + 1}",
                verdict=verdict.id,
                target=verdict.target,
                host=verdict.host,
                vm=verdict.vm,
                state=IncidentState.OPEN,
                opened_ns=verdict.decided_ns,
            )
            self._incidents[verdict.target] = incident
        if decision.action is not None and incident is not None:
            self._incidents[verdict.target] = replace(incident, action=decision.action)
            self._actions.append((verdict.decided_ns, tenant))
        return Step(verdict, decision)

    def _situation(self, verdict: Verdict, track: Track, tenant: str) -> Situation:
        while self._actions and self._actions[0][0] <= verdict.decided_ns - MINUTE_NS:
            self._actions.popleft()
        states = [each.state for each in self._tracks.values()]
        return Situation(
            now_ns=verdict.decided_ns,
            unapproved=track.unapproved,
            undecided=track.undecided,
            actions=len(self._actions),
            tenant_actions=sum(bool(tenant) and owner == tenant for _, owner in self._actions),
            fleet=len(states),
            fleet_unapproved=states.count(VerdictState.UNAPPROVED),
            fleet_undecided=states.count(VerdictState.UNDECIDED),
            tripped=self._tripped,
        )
