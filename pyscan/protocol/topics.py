"""Topics, reason codes and limits: what all messages have in common.

Implements sections 1, 5 and 6 of docs/spec/wire.md; numbers in brackets are its clauses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

from pyscan.errors import InternalError, Rejected

VERSION: Final = 1
COMMAND_BYTES_MAX: Final = 16_384
APPROVAL_BYTES_MAX: Final = 1_024
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
    NOT_WAITING = "not_waiting"
    """An approval of a command that does not wait for one."""
    SAME_SIGNER = "same_signer"
    """An approval by the one who gave the command."""
    OTHER_COMMAND = "other_command"
    """An approval of other bytes than those of the command that waits."""
    UNKNOWN_VM = "unknown_vm"
    """Local policy: the agent has no such virtual machine."""
    PROTECTED_VM = "protected_vm"
    """Local policy: this virtual machine may not be acted on."""
    RATE_LIMITED = "rate_limited"
    """Local policy: too many commands of this kind in too short a time."""
    UNSUPPORTED_ACTION = "unsupported_action"
    """Local policy: the agent cannot do this, or not with these arguments."""


_ROOT = "pyscan/v1"
NAME_PATTERN = r"[A-Za-z0-9._-]{1,64}"
_NAME = re.compile(NAME_PATTERN)


class TopicKind(StrEnum):
    """What is published on a topic."""

    COMMAND = "command"
    APPROVAL = "approval"
    REPORT = "report"
    STATE = "state"
    HOST_STATUS = "host_status"
    VERDICT = "verdict"
    SWEEP = "sweep"
    MONITOR_STATUS = "monitor_status"


#: The levels of each topic: group, name of the kind, and whether a last level follows [1.2].
_SHAPES: Final = {
    TopicKind.COMMAND: ("hosts", "cmd", True),
    TopicKind.APPROVAL: ("hosts", "approve", True),
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
                    f"{level!r} cannot be part of a topic; names are {NAME_PATTERN}"
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


def approval_topic(host: str, vm: str) -> str:
    """Where approvals of commands for one VM go."""
    return str(Topic(TopicKind.APPROVAL, host, vm))


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
        raise InternalError(f"{owner!r} cannot be part of a topic; names are {NAME_PATTERN}")
    return "/".join([_ROOT, group, owner, name, *(["+"] if has_item else [])])


def expect_topic(text: str, kind: TopicKind) -> Topic:
    """Take a received topic apart, which must be of one kind. Raises Rejected(WRONG_TOPIC)."""
    topic = Topic.parse(text)
    if topic.kind != kind:
        raise Rejected(RejectReason.WRONG_TOPIC, f"a {kind} on a topic for {topic.kind}")
    return topic
