"""Commands and their approvals [3.1], [3.5]: who may say them, when, and once.

Implements clauses [5.6] to [5.9] and [5.15] of docs/spec/wire.md. What was seen before is
asked of a `ReplayGuard`.
"""

from __future__ import annotations

import hashlib
from typing import Final, Protocol

from pyscan.cose import media_type
from pyscan.errors import Rejected
from pyscan.keys import KeyRing, SigningKey
from pyscan.protocol.envelope import (
    Arguments,
    Count,
    Digest,
    Id,
    Name,
    OptionalId,
    Seconds,
    Version,
    Wire,
    open_message,
    seal,
)
from pyscan.protocol.topics import (
    APPROVAL_BYTES_MAX,
    COMMAND_BYTES_MAX,
    COMMAND_LIFETIME_S_MAX,
    SKEW_S,
    VERSION,
    RejectReason,
    TopicKind,
    approval_topic,
    command_topic,
    expect_topic,
)
from pyscan.records import Action, Approval, Cause, Command

CONTENT_COMMAND: Final = media_type("command")
CONTENT_APPROVAL: Final = media_type("approval")


class _CauseWire(Wire, frozen=True):
    incident: OptionalId
    finding: OptionalId
    verdict: OptionalId


class _CommandWire(Wire, frozen=True):
    v: Version
    id: Id
    iss: Name
    aud: Name
    seq: Count
    iat: Seconds
    exp: Seconds
    act: Action
    vm: Name
    args: Arguments
    why: _CauseWire


class _ApprovalWire(Wire, frozen=True):
    v: Version
    id: Id
    cmd: Id
    digest: Digest
    iss: Name
    aud: Name
    vm: Name
    act: Action
    iat: Seconds
    exp: Seconds


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
    return seal(payload, key, CONTENT_COMMAND, topic, COMMAND_BYTES_MAX)


def decode_command(
    data: bytes, ring: KeyRing, *, topic: str, audience: str, now_s: int, replay: ReplayGuard
) -> Command:
    """Verify a command that arrived on `topic` at the agent of host `audience`.

    `ring` holds the keys that may command. Raises Rejected with the reason code of the
    first check of wire.md section 5 that fails; from `WRONG_ISSUER` on, the error carries
    the command, which is authentic then. `DUPLICATE` means: answer with the stored report.
    """
    expect_topic(topic, TopicKind.COMMAND)
    wire, signer = open_message(
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
    _check_time(command.issued_s, command.expires_s, now_s, command)
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


def _check_time(issued_s: int, expires_s: int, now_s: int, command: Command | None) -> None:
    """Enforce [5.7]."""
    lifetime_s = expires_s - issued_s
    ahead_s = issued_s - now_s
    late_s = now_s - expires_s
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


def command_digest(envelope: bytes) -> str:
    """What an approval says about the command: the hex SHA-256 of its signed bytes."""
    return hashlib.sha256(envelope).hexdigest()


def encode_approval(approval: Approval, key: SigningKey) -> bytes:
    """Sign an approval for ``approval_topic(approval.audience, approval.vm)``."""
    payload = _ApprovalWire(
        v=VERSION,
        id=approval.id,
        cmd=approval.command,
        digest=approval.digest,
        iss=approval.issuer,
        aud=approval.audience,
        vm=approval.vm,
        act=approval.action,
        iat=approval.issued_s,
        exp=approval.expires_s,
    )
    topic = approval_topic(approval.audience, approval.vm)
    return seal(payload, key, CONTENT_APPROVAL, topic, APPROVAL_BYTES_MAX)


def decode_approval(
    data: bytes, ring: KeyRing, *, topic: str, audience: str, now_s: int
) -> Approval:
    """Verify an approval that arrived on `topic` at the agent of host `audience`.

    `ring` holds the keys that may command. Raises Rejected. An approval repeats safely: it
    is good for one command, and that is carried out once.
    """
    expect_topic(topic, TopicKind.APPROVAL)
    wire, signer = open_message(
        data,
        ring,
        _ApprovalWire,
        content_type=CONTENT_APPROVAL,
        topic=topic,
        size_max=APPROVAL_BYTES_MAX,
    )
    if wire.iss != signer:
        raise Rejected(RejectReason.WRONG_ISSUER, f"issued as {wire.iss} with the key of {signer}")
    if wire.aud != audience:
        raise Rejected(RejectReason.WRONG_AUDIENCE, f"for host {wire.aud}, not {audience}")
    if topic != approval_topic(wire.aud, wire.vm):
        raise Rejected(RejectReason.WRONG_TOPIC, f"for VM {wire.vm}, arrived on {topic}")
    _check_time(wire.iat, wire.exp, now_s, None)
    return Approval(
        id=wire.id,
        command=wire.cmd,
        digest=wire.digest,
        issuer=wire.iss,
        audience=wire.aud,
        vm=wire.vm,
        action=wire.act,
        issued_s=wire.iat,
        expires_s=wire.exp,
    )


def check_approval(approval: Approval, command: Command, envelope: bytes) -> None:
    """Enforce [5.15]: raise Rejected unless a second person approved this very command."""
    if approval.issuer == command.issuer:
        text = f"{approval.issuer} gave the command; another person has to approve it"
        raise Rejected(RejectReason.SAME_SIGNER, text)
    told = (approval.command, approval.audience, approval.vm, approval.action, approval.digest)
    digest = command_digest(envelope)
    if told != (command.id, command.audience, command.vm, command.action, digest):
        text = f"an approval of other bytes than those of command {command.id}"
        raise Rejected(RejectReason.OTHER_COMMAND, text)
