"""What is remembered of a target between its verdicts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pyscan.records import Verdict, VerdictState


@dataclass(frozen=True, slots=True)
class Track:
    """A target's latest state, and how long it has been so.

    The counts are of verdicts since the last approved one: a target that cannot be read now
    and then is not reset by that. An undecided target is at most as good as an unapproved
    one, so `undecided` counts those, too.
    """

    target: str
    host: str
    vm: str
    state: VerdictState
    decided_ns: int
    unapproved: int = 0
    undecided: int = 0


def follow(track: Track | None, verdict: Verdict) -> Track:
    """The track after a verdict; one that comes late, after a newer one, changes nothing."""
    if track is not None and verdict.decided_ns < track.decided_ns:
        return track
    approved = verdict.state is VerdictState.APPROVED
    before_unapproved = track.unapproved if track else 0
    before_undecided = track.undecided if track else 0
    fresh = Track(verdict.target, verdict.host, verdict.vm, verdict.state, verdict.decided_ns)
    if approved:
        return fresh
    return replace(
        fresh,
        unapproved=before_unapproved + (verdict.state is VerdictState.UNAPPROVED),
        undecided=before_undecided + 1,
    )
