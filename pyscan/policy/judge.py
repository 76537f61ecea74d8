"""Sweep -> verdict state: what one pass over a target's pages means."""

from __future__ import annotations

from pyscan.records import (
    FindingKind,
    PageStatus,
    Sweep,
    VerdictState,
)

#: Findings that are facts whatever the counts say, and what each kind means in a reason.
_FACT_TEXTS = {
    FindingKind.MAPPING: "kernel addresses lead elsewhere than approved",
    FindingKind.DIGEST: "kernel addresses lead elsewhere than approved",
    FindingKind.CODE: "the kernel's code is not as its package has it",
    FindingKind.STRUCTURE: "the kernel's structures are not as a kernel leaves them",
    FindingKind.STATE: "the kernel is in a state that the rules do not allow",
}
_FACTS = frozenset(_FACT_TEXTS)


def judge(sweep: Sweep) -> tuple[VerdictState, str]:
    """The state of a target after a sweep, and the reason as one line for a person.

    A page that is not as approved outweighs pages that could not be read: the first is a
    fact, the others are gaps. Where nothing could be read, access is lost. A target whose
    kernel is gone from its place *and* whose pages are mostly other pages is another boot,
    of which nothing is known (docs/spec/approved.md, 2.2). Approved takes every watched page
    read, as approved, and not a single finding.
    """
    kinds = {finding.kind for finding in sweep.findings}
    places = [f.place for f in sweep.findings if f.kind is not FindingKind.UNREADABLE and f.place]
    where = f", first at {places[0]}" if places else ""
    counts = (sweep.ok, sweep.mismatched, sweep.unreadable)
    if sweep.watched <= 0 or min(counts) < 0 or sum(counts) != sweep.watched:
        state, reason = VerdictState.UNDECIDED, _uncountable(sweep)
    elif sweep.unreadable == sweep.watched and not kinds & _FACTS:
        state, reason = VerdictState.UNDECIDED, _lost(sweep)
    elif FindingKind.ATTACH in kinds and 2 * sweep.ok < sweep.watched:
        state, reason = (
            VerdictState.UNDECIDED,
            "neither the kernel's page tables nor most of its pages are as approved: "
            "the target was rebooted, or cannot be read; enrol it again",
        )
    elif sweep.mismatched:
        state, reason = (
            VerdictState.UNAPPROVED,
            f"{sweep.mismatched} of {sweep.watched} pages "
            f"{'is' if sweep.mismatched == 1 else 'are'} not as approved{where}",
        )
    elif kinds & _FACTS:
        what = _FACT_TEXTS[next(kind for kind in _FACT_TEXTS if kind in kinds)]
        state, reason = VerdictState.UNAPPROVED, f"{what}{where}"
    elif gap := _gap(sweep, kinds):
        state, reason = VerdictState.UNDECIDED, gap
    else:
        state, reason = VerdictState.APPROVED, f"all {sweep.watched} pages are as approved"
    return state, reason


def _gap(sweep: Sweep, kinds: set[FindingKind]) -> str:
    """What is not known of a target in which nothing was found amiss; empty when all is known."""
    reason = ""
    if kinds == {FindingKind.ATTACH, FindingKind.UNREADABLE}:
        reason = "pages or page tables could not be read"
    elif FindingKind.ATTACH in kinds:
        reason = "the pages are as approved, but the running kernel is another one"
    elif sweep.unreadable:
        reason = f"{sweep.unreadable} of {sweep.watched} pages could not be read"
    elif kinds == {FindingKind.UNREADABLE}:
        reason = "page tables could not be read"
    elif sweep.findings or sweep.findings_total:
        reason = "the sweep has findings that its counts do not explain"
    return reason


def _lost(sweep: Sweep) -> str:
    """What is said of a target of which no page was read."""
    unread = [f for f in sweep.findings if f.kind is FindingKind.UNREADABLE]
    target = next((f for f in unread if f.frame is None and f.actual), None)
    if target is not None and target.status is PageStatus.OK:
        return target.actual  # it was read, and not understood
    statuses = sorted({f.status.name.lower().replace("_", " ") for f in unread})
    how = f" ({', '.join(statuses)})" if statuses else ""
    why = f": {target.actual}" if target is not None else ""
    return f"access lost: none of {sweep.watched} pages could be read{how}{why}"


def _uncountable(sweep: Sweep) -> str:
    """Why nothing can be said by the counts of a sweep."""
    unread = [f for f in sweep.findings if f.kind is FindingKind.UNREADABLE]
    if sweep.watched == 0 and unread:
        return unread[0].actual  # the target was never read: its finding says why
    return (
        f"the counts of the sweep do not add up: watched {sweep.watched}, "
        f"ok {sweep.ok}, mismatched {sweep.mismatched}, unreadable {sweep.unreadable}"
    )
