"""Commands, reports and verdicts as signed bytes, and the rules for accepting them.

Implements docs/spec/wire.md; numbers in brackets are its clauses. There is no I/O and no
clock here: times are arguments, and what was seen before is asked of a `ReplayGuard`.
A message is verified whole before anything in it is used, and refused with a reason code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final, Literal, Protocol, Self, TypeVar

import msgspec

from pyscan.cose import decode_cbor, encode_cbor, media_type, sign1, verify1
from pyscan.errors import FileFormatError, InternalError, Rejected, SignatureInvalid
from pyscan.ids import ID_PATTERN
from pyscan.keys import KeyRing, SigningKey
from pyscan.records import (
    Action,
    Cause,
    Command,
    Finding,
    FindingKind,
    PageStatus,
    Report,
    ReportState,
    Verdict,
    VerdictState,
)

CONTENT_COMMAND: Final = media_type("command")
CONTENT_REPORT: Final = media_type("report")
CONTENT_VERDICT: Final = media_type("verdict")

VERSION: Final = 1
COMMAND_BYTES_MAX: Final = 16_384
REPORT_BYTES_MAX: Final = 8_192
VERDICT_BYTES_MAX: Final = 65_536
FINDINGS_MAX: Final = 32
ARGUMENTS_MAX: Final = 8
LINE_CHARACTERS_MAX: Final = 512  # reason and detail: one line for a person
PLACE_CHARACTERS_MAX: Final = 128  # place, expected, actual

#: How far two clocks may be apart [5.7].
SKEW_S: Final = 30
#: The longest time between `iat` and `exp` of a command [5.7].
COMMAND_LIFETIME_S_MAX: Final = 600
#: An older verdict says nothing about now [5.10]; its id must be remembered that long.
VERDICT_AGE_S_MAX: Final = 3_600


class RejectReason(StrEnum):
    """Why a message is refused: the codes of docs/spec/wire.md section 6."""

    TOO_LARGE = "too_large"
    """More bytes than the message type may have."""
    MALFORMED = "malformed"
    """Not the bytes that the specification describes."""
    UNKNOWN_KEY = "unknown_key"
    """The key id is not pinned for this role."""
    WRONG_ALGORITHM = "wrong_algorithm"
    """Signed with something other than EdDSA."""
    WRONG_CONTENT_TYPE = "wrong_content_type"
    """A message of one type presented as another."""
    BAD_SIGNATURE = "bad_signature"
    """Altered, forged, or moved to another topic."""
    UNSUPPORTED_VERSION = "unsupported_version"
    """Authentic, of a version that this program does not know."""
    WRONG_ISSUER = "wrong_issuer"
    """The issuer named inside is not the owner of the key."""
    WRONG_AUDIENCE = "wrong_audience"
    """A command for another host."""
    WRONG_TOPIC = "wrong_topic"
    """The topic and the payload name different things."""
    EXPIRED = "expired"
    """The command's time is over."""
    NOT_YET_VALID = "not_yet_valid"
    """Issued in the future: a clock is wrong."""
    LIFETIME = "lifetime"
    """Valid for no time at all, or for longer than is allowed."""
    STALE = "stale"
    """A verdict that is too old to act on."""
    DUPLICATE = "duplicate"
    """This very command was taken before: a redelivery, answered with the stored report."""
    REPLAYED = "replayed"
    """A new id with a sequence number that is not new."""
    UNKNOWN_VM = "unknown_vm"
    """Local policy: the agent has no such virtual machine."""
    PROTECTED_VM = "protected_vm"
    """Local policy: this virtual machine may not be acted on."""
    RATE_LIMITED = "rate_limited"
    """Local policy: too many commands of this kind in too short a time."""
    UNSUPPORTED_ACTION = "unsupported_action"
    """Local policy: the agent cannot do this, or not with these arguments."""


# ---------------------------------------------------------------------------- topics [1]

_ROOT = "pyscan/v1"
_NAME_PATTERN = r"[A-Za-z0-9._-]{1,64}"
_NAME = re.compile(_NAME_PATTERN)


class TopicKind(StrEnum):
    """What is published on a topic."""

    COMMAND = "command"
    REPORT = "report"
    STATE = "state"
    HOST_STATUS = "host_status"
    VERDICT = "verdict"
    SWEEP = "sweep"
    MONITOR_STATUS = "monitor_status"


#: The levels of each topic: group, name of the kind, and whether a last level follows [1.2].
_SHAPES: Final = {
    TopicKind.COMMAND: ("hosts", "cmd", True),
    TopicKind.REPORT: ("hosts", "report", True),
    TopicKind.STATE: ("hosts", "state", True),
    TopicKind.HOST_STATUS: ("hosts", "status", False),
    TopicKind.VERDICT: ("monitors", "verdict", True),
    TopicKind.SWEEP: ("monitors", "sweep", False),
    TopicKind.MONITOR_STATUS: ("monitors", "status", False),
}
_KINDS: Final = {shape: kind for kind, shape in _SHAPES.items()}


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic taken apart: ``pyscan/v1/{group}/{owner}/{name}[/{item}]``.

    `owner` is the host or the monitor; `item` is the VM, command or target, or empty.
    """

    kind: TopicKind
    owner: str
    item: str = ""

    def __str__(self) -> str:
        """The topic as published. Raises InternalError for a name that cannot be in one."""
        group, name, has_item = _SHAPES[self.kind]
        levels = [self.owner, self.item] if has_item else [self.owner]
        for level in levels:
            if not _NAME.fullmatch(level):
                raise InternalError(
                    f"{level!r} cannot be part of a topic; names are {_NAME_PATTERN}"
                )
        return "/".join([_ROOT, group, self.owner, name, *levels[1:]])

    @classmethod
    def parse(cls, text: str) -> Self:
        """Take a received topic apart. Raises Rejected(WRONG_TOPIC)."""
        levels = text.removeprefix(f"{_ROOT}/").split("/")
        if text.startswith(f"{_ROOT}/") and len(levels) in (3, 4):
            group, owner, name, *items = levels
            kind = _KINDS.get((group, name, bool(items)))
            if kind and all(_NAME.fullmatch(level) for level in (owner, *items)):
                return cls(kind, owner, *items)
        raise Rejected(RejectReason.WRONG_TOPIC, "a topic that is none of pyscan's")


def command_topic(host: str, vm: str) -> str:
    """Where commands for one VM go."""
    return str(Topic(TopicKind.COMMAND, host, vm))


def report_topic(host: str, command: str) -> str:
    """Where the reports about one command go."""
    return str(Topic(TopicKind.REPORT, host, command))


def state_topic(host: str, vm: str) -> str:
    """Where the state of one VM is retained."""
    return str(Topic(TopicKind.STATE, host, vm))


def host_status_topic(host: str) -> str:
    """Where an agent's presence is retained; also its will."""
    return str(Topic(TopicKind.HOST_STATUS, host))


def verdict_topic(monitor: str, target: str) -> str:
    """Where a monitor's verdicts about one target go."""
    return str(Topic(TopicKind.VERDICT, monitor, target))


def sweep_topic(monitor: str) -> str:
    """Where a monitor tells how its sweeps go."""
    return str(Topic(TopicKind.SWEEP, monitor))


def monitor_status_topic(monitor: str) -> str:
    """Where a monitor's presence is retained; also its will."""
    return str(Topic(TopicKind.MONITOR_STATUS, monitor))


def subscription(kind: TopicKind, owner: str = "+") -> str:
    """The filter for all topics of a kind, of one owner or of all."""
    group, name, has_item = _SHAPES[kind]
    if owner != "+" and not _NAME.fullmatch(owner):
        raise InternalError(f"{owner!r} cannot be part of a topic; names are {_NAME_PATTERN}")
    return "/".join([_ROOT, group, owner, name, *(["+"] if has_item else [])])


# ------------------------------------------------------------- payloads and limits [3], [4]

# Control characters, surrogates, and marks that reorder text on a terminal: free text is
# shown to people.
_UNSHOWABLE = "\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNSHOWABLE_CHARACTER = re.compile(f"[{_UNSHOWABLE}]")
_SHOWABLE_PATTERN = rf"\A[^{_UNSHOWABLE}]*\Z"

_Version = Literal[1]
_Id = Annotated[str, msgspec.Meta(pattern=rf"\A{ID_PATTERN}\Z")]
_OptionalId = Annotated[str, msgspec.Meta(pattern=rf"\A(?:{ID_PATTERN})?\Z")]
_Name = Annotated[str, msgspec.Meta(pattern=rf"\A{_NAME_PATTERN}\Z")]
_OptionalName = Annotated[str, msgspec.Meta(pattern=rf"\A(?:{_NAME_PATTERN})?\Z")]
_Code = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9_-]{0,64}\Z")]
_Line = Annotated[str, msgspec.Meta(max_length=LINE_CHARACTERS_MAX, pattern=_SHOWABLE_PATTERN)]
_Place = Annotated[str, msgspec.Meta(max_length=PLACE_CHARACTERS_MAX, pattern=_SHOWABLE_PATTERN)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Seconds = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
_Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Natural = Annotated[int, msgspec.Meta(ge=0)]  # the decoder ends at 64 bits
_Integer = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
_Arguments = Annotated[
    dict[
        _Name,
        Annotated[str, msgspec.Meta(max_length=256, pattern=_SHOWABLE_PATTERN)] | _Integer | bool,
    ],
    msgspec.Meta(max_length=ARGUMENTS_MAX),
]


class _Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A payload map: these keys, all of them, no others. The fields are the limits."""


class _CauseWire(_Wire, frozen=True):
    incident: _OptionalId
    finding: _OptionalId
    verdict: _OptionalId


class _CommandWire(_Wire, frozen=True):
    v: _Version
    id: _Id
    iss: _Name
    aud: _Name
    seq: _Count
    iat: _Seconds
    exp: _Seconds
    act: Action
    vm: _Name
    args: _Arguments
    why: _CauseWire


class _ReportWire(_Wire, frozen=True):
    v: _Version
    id: _Id
    iss: _Name
    cmd: _Id
    vm: _Name
    act: Action
    state: ReportState
    at: _Nanoseconds
    reason: _Code
    detail: _Line
    vm_state: _Code


class _FindingWire(_Wire, frozen=True):
    id: _Id
    sweep: _Id
    kind: FindingKind
    status: PageStatus
    address: _Natural | None
    frame: _Natural | None
    place: _Place
    expected: _Place
    actual: _Place


class _VerdictWire(_Wire, frozen=True):
    v: _Version
    id: _Id
    iss: _Name
    sweep: _Id
    target: _Name
    host: _OptionalName
    vm: _OptionalName
    state: VerdictState
    reason: _Line
    at: _Nanoseconds
    watched: _Count
    ok: _Count
    unreadable: _Count
    findings: Annotated[list[_FindingWire], msgspec.Meta(max_length=FINDINGS_MAX)]
    total: _Count


_W = TypeVar("_W", bound=_Wire)


def _seal(payload: _Wire, key: SigningKey, content_type: str, topic: str, size_max: int) -> bytes:
    """Sign a payload for one topic. Raises InternalError when it breaks a limit."""
    plain = msgspec.to_builtins(payload)
    try:
        msgspec.convert(plain, type(payload))
    except msgspec.ValidationError as error:
        raise InternalError(f"a message for {topic} breaks its own format: {error}") from error
    data = sign1(encode_cbor(plain), key, content_type, topic.encode())
    if len(data) > size_max:
        raise InternalError(f"a message for {topic} of {len(data)} bytes, limit {size_max}")
    return data


def _open(
    data: bytes, ring: KeyRing, wire: type[_W], *, content_type: str, topic: str, size_max: int
) -> tuple[_W, str]:
    """Verify a message [5.1] to [5.5]; returns the payload and the signer's name."""
    try:
        verified = verify1(data, ring, content_type, topic.encode(), size_max)
        plain = decode_cbor(verified.payload, size_max)
    except SignatureInvalid as error:
        raise Rejected(RejectReason(error.reason), str(error)) from error
    except FileFormatError as error:
        raise Rejected(RejectReason.MALFORMED, str(error)) from error
    version = plain.get("v") if isinstance(plain, dict) else None
    if type(version) is int and version != VERSION:
        raise Rejected(RejectReason.UNSUPPORTED_VERSION, f"version {version}, not {VERSION}")
    try:
        return msgspec.convert(plain, wire), verified.signer
    except msgspec.ValidationError as error:
        raise Rejected(RejectReason.MALFORMED, one_line(str(error), 200)) from error


def one_line(text: str, characters_max: int = LINE_CHARACTERS_MAX) -> str:
    """Free text made fit for a message: one line, showable, cut to length.

    An alarm must not fail to leave because its explanation is too long.
    """
    return _UNSHOWABLE_CHARACTER.sub("?", text)[:characters_max]


# -------------------------------------------------------------------------- commands [3.1]


class ReplayGuard(Protocol):
    """What a receiver of commands remembers, durably. Its own issuers' commands only."""

    def seen(self, command_id: str) -> bool:
        """Whether a command with this id was taken before; kept at least until its `exp`."""

    def highest_sequence(self, issuer: str, vm: str) -> int:
        """The highest sequence number taken from `issuer` for `vm`; -1 before the first."""


def encode_command(command: Command, key: SigningKey) -> bytes:
    """Sign a command for ``command_topic(command.audience, command.vm)``."""
    cause = command.cause
    payload = _CommandWire(
        v=VERSION,
        id=command.id,
        iss=command.issuer,
        aud=command.audience,
        seq=command.sequence,
        iat=command.issued_s,
        exp=command.expires_s,
        act=command.action,
        vm=command.vm,
        args=command.arguments,
        why=_CauseWire(incident=cause.incident, finding=cause.finding, verdict=cause.verdict),
    )
    topic = command_topic(command.audience, command.vm)
    return _seal(payload, key, CONTENT_COMMAND, topic, COMMAND_BYTES_MAX)


def decode_command(
    data: bytes, ring: KeyRing, *, topic: str, audience: str, now_s: int, replay: ReplayGuard
) -> Command:
    """Verify a command that arrived on `topic` at the agent of host `audience`.

    `ring` holds the keys that may command. Raises Rejected with the reason code of the
    first check of wire.md section 5 that fails; from `WRONG_ISSUER` on, the error carries
    the command, which is authentic then. `DUPLICATE` means: answer with the stored report.
    """
    _topic_of(topic, TopicKind.COMMAND)
    wire, signer = _open(
        data,
        ring,
        _CommandWire,
        content_type=CONTENT_COMMAND,
        topic=topic,
        size_max=COMMAND_BYTES_MAX,
    )
    command = Command(
        id=wire.id,
        issuer=wire.iss,
        audience=wire.aud,
        sequence=wire.seq,
        issued_s=wire.iat,
        expires_s=wire.exp,
        action=wire.act,
        vm=wire.vm,
        arguments=wire.args,
        cause=Cause(wire.why.incident, wire.why.finding, wire.why.verdict),
    )
    _check_identity(command, signer, topic, audience)
    _check_time(command, now_s)
    _check_replay(command, replay)
    return command


def _check_identity(command: Command, signer: str, topic: str, audience: str) -> None:
    """Enforce [5.6]."""
    issuer, host, vm = command.issuer, command.audience, command.vm
    if issuer != signer:
        text = f"issued as {issuer} with the key of {signer}"
        raise Rejected(RejectReason.WRONG_ISSUER, text, command)
    if host != audience:
        raise Rejected(RejectReason.WRONG_AUDIENCE, f"for host {host}, not {audience}", command)
    if topic != command_topic(host, vm):
        raise Rejected(RejectReason.WRONG_TOPIC, f"for VM {vm}, arrived on {topic}", command)


def _check_time(command: Command, now_s: int) -> None:
    """Enforce [5.7]."""
    lifetime_s = command.expires_s - command.issued_s
    ahead_s = command.issued_s - now_s
    late_s = now_s - command.expires_s
    if not 0 < lifetime_s <= COMMAND_LIFETIME_S_MAX:
        text = f"valid for {lifetime_s} s, allowed are 1 to {COMMAND_LIFETIME_S_MAX}"
        raise Rejected(RejectReason.LIFETIME, text, command)
    if ahead_s > SKEW_S:
        text = f"issued {ahead_s} s in the future; compare the clocks"
        raise Rejected(RejectReason.NOT_YET_VALID, text, command)
    if late_s > SKEW_S:
        raise Rejected(RejectReason.EXPIRED, f"expired {late_s} s ago; issue it again", command)


def _check_replay(command: Command, replay: ReplayGuard) -> None:
    """Enforce [5.8] and [5.9]."""
    if replay.seen(command.id):
        text = f"command {command.id} was taken before"
        raise Rejected(RejectReason.DUPLICATE, text, command)
    highest = replay.highest_sequence(command.issuer, command.vm)
    if command.sequence <= highest:
        text = f"sequence {command.sequence}, {highest} was taken before"
        raise Rejected(RejectReason.REPLAYED, text, command)


def _topic_of(text: str, kind: TopicKind) -> Topic:
    topic = Topic.parse(text)
    if topic.kind != kind:
        raise Rejected(RejectReason.WRONG_TOPIC, f"a {kind} on a topic for {topic.kind}")
    return topic


# --------------------------------------------------------------------------- reports [3.2]


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
    return _seal(payload, key, CONTENT_REPORT, topic, REPORT_BYTES_MAX)


def decode_report(data: bytes, ring: KeyRing, *, topic: str) -> Report:
    """Verify a report that arrived on `topic`; `ring` holds the agents' keys by host name.

    Raises Rejected. A report repeats safely: its id and its command's id are in it.
    """
    where = _topic_of(topic, TopicKind.REPORT)
    wire, signer = _open(
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


# -------------------------------------------------------------------------- verdicts [3.3]


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
    return _seal(payload, key, CONTENT_VERDICT, topic, VERDICT_BYTES_MAX)


def decode_verdict(data: bytes, ring: KeyRing, *, topic: str, now_ns: int) -> Verdict:
    """Verify a verdict that arrived on `topic`; `ring` holds the monitors' keys by name.

    Raises Rejected, also for a verdict older than `VERDICT_AGE_S_MAX`: the receiver
    remembers ids that long and takes each verdict once.
    """
    where = _topic_of(topic, TopicKind.VERDICT)
    wire, signer = _open(
        data,
        ring,
        _VerdictWire,
        content_type=CONTENT_VERDICT,
        topic=topic,
        size_max=VERDICT_BYTES_MAX,
    )
    _check_issuer(wire.iss, signer, where)
    _check_item(wire.target, where)
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
