"""Reports and verdicts [3.2], [3.3]: what agents and monitors say, and when it counts.

Implements clauses [5.6] and [5.10] of docs/spec/wire.md for them.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from pyscan.cose import media_type
from pyscan.errors import Rejected
from pyscan.keys import KeyRing, SigningKey
from pyscan.protocol.envelope import (
    Code,
    Count,
    Id,
    Line,
    Name,
    Nanoseconds,
    Natural,
    OptionalName,
    Place,
    Version,
    Wire,
    one_line,
    open_message,
    seal,
)
from pyscan.protocol.topics import (
    FINDINGS_MAX,
    PLACE_CHARACTERS_MAX,
    REPORT_BYTES_MAX,
    SKEW_S,
    VERDICT_AGE_S_MAX,
    VERDICT_BYTES_MAX,
    VERSION,
    RejectReason,
    Topic,
    TopicKind,
    expect_topic,
    report_topic,
    verdict_topic,
)
from pyscan.records import (
    Action,
    Finding,
    FindingKind,
    PageStatus,
    Report,
    ReportState,
    Verdict,
    VerdictState,
)

CONTENT_REPORT: Final = media_type("report")
CONTENT_VERDICT: Final = media_type("verdict")


class _ReportWire(Wire, frozen=True):
    v: Version
    id: Id
    iss: Name
    cmd: Id
    vm: Name
    act: Action
    state: ReportState
    at: Nanoseconds
    reason: Code
    detail: Line
    vm_state: Code


class _FindingWire(Wire, frozen=True):
    id: Id
    sweep: Id
    kind: FindingKind
    status: PageStatus
    address: Natural | None
    frame: Natural | None
    place: Place
    expected: Place
    actual: Place


class _VerdictWire(Wire, frozen=True):
    v: Version
    id: Id
    iss: Name
    sweep: Id
    target: Name
    host: OptionalName
    vm: OptionalName
    state: VerdictState
    reason: Line
    at: Nanoseconds
    watched: Count
    ok: Count
    unreadable: Count
    findings: Annotated[list[_FindingWire], msgspec.Meta(max_length=FINDINGS_MAX)]
    total: Count


def encode_report(report: Report, key: SigningKey) -> bytes:
    """Sign a report for ``report_topic(report.host, report.command)``."""
    payload = _ReportWire(
        v=VERSION,
        id=report.id,
        iss=report.host,
        cmd=report.command,
        vm=report.vm,
        act=report.action,
        state=report.state,
        at=report.at_ns,
        reason=report.reason,
        detail=one_line(report.detail),
        vm_state=report.vm_state,
    )
    topic = report_topic(report.host, report.command)
    return seal(payload, key, CONTENT_REPORT, topic, REPORT_BYTES_MAX)


def decode_report(data: bytes, ring: KeyRing, *, topic: str) -> Report:
    """Verify a report that arrived on `topic`; `ring` holds the agents' keys by host name.

    Raises Rejected. A report repeats safely: its id and its command's id are in it.
    """
    where = expect_topic(topic, TopicKind.REPORT)
    wire, signer = open_message(
        data,
        ring,
        _ReportWire,
        content_type=CONTENT_REPORT,
        topic=topic,
        size_max=REPORT_BYTES_MAX,
    )
    _check_issuer(wire.iss, signer, where)
    _check_item(wire.cmd, where)
    return Report(
        id=wire.id,
        command=wire.cmd,
        host=wire.iss,
        vm=wire.vm,
        action=wire.act,
        state=wire.state,
        at_ns=wire.at,
        reason=wire.reason,
        detail=wire.detail,
        vm_state=wire.vm_state,
    )


def _check_issuer(issuer: str, signer: str, where: Topic) -> None:
    if issuer != signer:
        raise Rejected(RejectReason.WRONG_ISSUER, f"issued as {issuer} with the key of {signer}")
    if issuer != where.owner:
        raise Rejected(RejectReason.WRONG_TOPIC, f"from {issuer} on a topic of {where.owner}")


def _check_item(item: str, where: Topic) -> None:
    if item != where.item:
        raise Rejected(RejectReason.WRONG_TOPIC, f"about {item} on a topic for {where.item}")


def encode_verdict(verdict: Verdict, key: SigningKey) -> bytes:
    """Sign a verdict for ``verdict_topic(verdict.monitor, verdict.target)``.

    Only the first `FINDINGS_MAX` findings travel; `findings_total` counts them all.
    """
    payload = _VerdictWire(
        v=VERSION,
        id=verdict.id,
        iss=verdict.monitor,
        sweep=verdict.sweep,
        target=verdict.target,
        host=verdict.host,
        vm=verdict.vm,
        state=verdict.state,
        reason=one_line(verdict.reason),
        at=verdict.decided_ns,
        watched=verdict.watched,
        ok=verdict.ok,
        unreadable=verdict.unreadable,
        findings=[_finding_wire(finding) for finding in verdict.findings[:FINDINGS_MAX]],
        total=max(verdict.findings_total, len(verdict.findings)),
    )
    topic = verdict_topic(verdict.monitor, verdict.target)
    return seal(payload, key, CONTENT_VERDICT, topic, VERDICT_BYTES_MAX)


def decode_verdict(data: bytes, ring: KeyRing, *, topic: str, now_ns: int) -> Verdict:
    """Verify a verdict that arrived on `topic`; `ring` holds the monitors' keys by name.

    Raises Rejected, also for a verdict older than `VERDICT_AGE_S_MAX`: the receiver
    remembers ids that long and takes each verdict once.
    """
    where = expect_topic(topic, TopicKind.VERDICT)
    wire, signer = open_message(
        data,
        ring,
        _VerdictWire,
        content_type=CONTENT_VERDICT,
        topic=topic,
        size_max=VERDICT_BYTES_MAX,
    )
    _check_issuer(wire.iss, signer, where)
    _check_item(wire.target, where)
    if wire.total < len(wire.findings):
        raise Rejected(RejectReason.MALFORMED, "fewer findings in all than it lists")
    whole = wire.watched == wire.ok > 0 and wire.unreadable == wire.total == 0
    if wire.state is VerdictState.APPROVED and not whole:
        raise Rejected(RejectReason.MALFORMED, "approved, and its own counts say otherwise")
    age_s = (now_ns - wire.at) // 1_000_000_000
    if age_s > VERDICT_AGE_S_MAX:
        raise Rejected(RejectReason.STALE, f"a verdict of {age_s} s ago")
    if age_s < -SKEW_S:
        raise Rejected(RejectReason.NOT_YET_VALID, f"a verdict {-age_s} s in the future")
    return Verdict(
        id=wire.id,
        sweep=wire.sweep,
        monitor=wire.iss,
        target=wire.target,
        host=wire.host,
        vm=wire.vm,
        state=wire.state,
        reason=wire.reason,
        decided_ns=wire.at,
        watched=wire.watched,
        ok=wire.ok,
        unreadable=wire.unreadable,
        findings=tuple(Finding(**msgspec.structs.asdict(finding)) for finding in wire.findings),
        findings_total=wire.total,
    )


def _finding_wire(finding: Finding) -> _FindingWire:
    return _FindingWire(
        id=finding.id,
        sweep=finding.sweep,
        kind=finding.kind,
        status=finding.status,
        address=finding.address,
        frame=finding.frame,
        place=one_line(finding.place, PLACE_CHARACTERS_MAX),
        expected=one_line(finding.expected, PLACE_CHARACTERS_MAX),
        actual=one_line(finding.actual, PLACE_CHARACTERS_MAX),
    )
