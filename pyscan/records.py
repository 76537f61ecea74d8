"""The nouns of pyscan: plain, frozen values that flow one way.

    page bytes -> digest -> finding -> verdict -> command -> report -> evidence

Every record carries the identifier of its parent. This module imports nothing of
pyscan and does no I/O, so every layer may use it.

Identifiers are ULIDs as 26 character strings. Times ending in ``_ns`` are nanoseconds
since the Unix epoch. Addresses and frame numbers are plain integers; a *frame* is a
guest-physical address divided by `PAGE_SIZE`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT

#: Byte that fills every page of a caller's buffer whose read failed. Never zero: a failed
#: read must not look like an empty page.
POISON = 0xA5


class PageStatus(IntEnum):
    """What became of one page read."""

    OK = 0
    HOLE = 1  # not RAM by the memory map; the bus was not touched
    BLOCKED = 2  # refused by an IOMMU or by the bus
    LINK_DOWN = 3  # the way to the memory is gone
    TIMEOUT = 4
    TORN = 5  # kept changing while it was read


class RegionKind(StrEnum):
    """What a range of guest-physical addresses is."""

    RAM = "ram"
    ROM = "rom"  # RAM that the chipset may shadow with firmware: read apart from RAM


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """A range of guest-physical addresses, page aligned; `length` in bytes."""

    gpa: int
    length: int
    kind: RegionKind = RegionKind.RAM

    @property
    def end(self) -> int:
        """First address behind the region."""
        return self.gpa + self.length


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """The regions of a target, ascending and disjoint. Everything else is never touched."""

    regions: tuple[MemoryRegion, ...]
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        end = 0
        for region in self.regions:
            if region.length <= 0 or (region.gpa | region.length) % PAGE_SIZE:
                raise ValueError(f"region at {region.gpa:#x} is empty or not page aligned")
            if region.gpa < end:
                raise ValueError(f"region at {region.gpa:#x} overlaps or is out of order")
            end = region.end
        object.__setattr__(self, "_starts", tuple(region.gpa for region in self.regions))

    @classmethod
    def of(cls, regions: Iterable[MemoryRegion]) -> MemoryMap:
        """Build a map from regions in any order."""
        return cls(tuple(sorted(regions, key=lambda region: region.gpa)))

    def __iter__(self) -> Iterator[MemoryRegion]:
        return iter(self.regions)

    def find(self, gpa: int) -> MemoryRegion | None:
        """The region that holds `gpa`, or None."""
        index = bisect_right(self._starts, gpa) - 1
        if index >= 0 and gpa < self.regions[index].end:
            return self.regions[index]
        return None

    @property
    def bytes_total(self) -> int:
        """Sum of all region lengths in bytes."""
        return sum(region.length for region in self.regions)


class FindingKind(StrEnum):
    """Why a page (or structure) is reported."""

    DIGEST = "digest"  # content differs from the approved content
    MAPPING = "mapping"  # an approved virtual page leads to another frame, or nowhere
    UNREADABLE = "unreadable"  # no content could be read: neither clean nor compromised
    ATTACH = "attach"  # the kernel was not found where, or as, it was approved
    CODE = "code"  # bytes that the kernel package does not explain
    STATE = "state"  # the kernel is in one state, but not in one that the policy allows
    STRUCTURE = "structure"  # a table, list or pointer that no legal kernel holds


@dataclass(frozen=True, slots=True)
class Finding:
    """One page that is not as approved, or could not be read. Parent: a sweep."""

    id: str
    sweep: str
    kind: FindingKind
    status: PageStatus
    address: int | None = None  # virtual address of the page
    frame: int | None = None
    place: str = ""  # where in the kernel, free of symbols: "kernel text +0x5000"
    expected: str = ""  # hex digest, hex frame or word, by kind
    actual: str = ""


@dataclass(frozen=True, slots=True)
class Sweep:
    """One pass over all watched pages of a target. `watched == ok + mismatched + unreadable`."""

    id: str
    target: str
    number: int
    started_ns: int
    duration_ns: int
    watched: int
    ok: int
    mismatched: int
    unreadable: int
    transient: int = 0  # of `ok`: differed once and were as approved when read again
    findings: tuple[Finding, ...] = ()  # bounded; `findings_total` counts them all
    findings_total: int = 0


class VerdictState(StrEnum):
    """A target's state after a sweep."""

    APPROVED = "approved"
    UNAPPROVED = "unapproved"
    UNDECIDED = "undecided"  # unreadable, or not enough known; never acted on as a compromise


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target's state, published by a monitor. Parent: a sweep."""

    id: str
    sweep: str
    monitor: str
    target: str
    host: str
    vm: str
    state: VerdictState
    reason: str  # one line for a person
    decided_ns: int
    watched: int
    ok: int
    unreadable: int
    findings: tuple[Finding, ...] = ()
    findings_total: int = 0


class Action(StrEnum):
    """What an agent can be ordered to do to a virtual machine."""

    KILL = "kill"
    SANDBOX = "sandbox"
    FREEZE = "freeze"
    RELEASE = "release"
    CAPTURE = "capture"
    QUERY = "query"


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a command was given: the incident and its parents. Empty for an operator's query."""

    incident: str = ""
    finding: str = ""
    verdict: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """A signed order to one agent about one VM. Parent: an incident's verdict."""

    id: str
    issuer: str
    audience: str  # host name of the agent
    sequence: int  # rises per issuer and VM
    issued_s: int  # Unix seconds
    expires_s: int
    action: Action
    vm: str
    arguments: dict[str, str | int | bool] = field(default_factory=dict)
    cause: Cause = field(default_factory=Cause)


@dataclass(frozen=True, slots=True)
class Approval:
    """A second person's signature under one command. Parent: the command."""

    id: str
    command: str
    digest: str  # hex SHA-256 of the command's signed bytes
    issuer: str
    audience: str  # host name of the agent
    vm: str
    action: Action
    issued_s: int  # Unix seconds
    expires_s: int


class ReportState(StrEnum):
    """How far an agent is with a command."""

    ACCEPTED = "accepted"
    STARTED = "started"
    PROGRESS = "progress"  # one step; as many as there are steps
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Report:
    """An agent's signed account of one step of a command. Parent: a command."""

    id: str
    command: str
    host: str
    vm: str
    action: Action
    state: ReportState
    at_ns: int
    reason: str = ""  # reason code when rejected or failed
    detail: str = ""  # one line for a person
    vm_state: str = ""  # the VM's state as observed afterwards: running, paused, gone, unknown


class IncidentState(StrEnum):
    """How far an incident is."""

    OPEN = "open"
    ANSWERED = "answered"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class Incident:
    """A verdict that policy must answer. Parent: the verdict that opened it."""

    id: str
    verdict: str
    target: str
    host: str
    vm: str
    state: IncidentState
    opened_ns: int
    action: Action | None = None
    command: str = ""
