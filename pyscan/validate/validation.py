"""Strict validation: every protected byte of a running kernel against its package."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.approved.unit import Segment, SegmentKind
from pyscan.records import PAGE_SIZE, PageStatus
from pyscan.validate.after_init import AfterInitComparer, AfterInitResult
from pyscan.validate.attach import Attached
from pyscan.validate.code import Allowed, CodeResult, Probe, TextComparer
from pyscan.validate.context import Target, function_offsets
from pyscan.validate.invariants import check_invariants
from pyscan.validate.objects import FtraceOps, Kprobe, Structures, read_structures
from pyscan.validate.ownership import FTRACE_ALLOC_TRAMP
from pyscan.validate.placed import Placed
from pyscan.validate.predict import Predictor
from pyscan.validate.problem import ProblemKind, Problems
from pyscan.validate.reader import KeyReader, read_state
from pyscan.validate.rodata import InitRange, RodataComparer, RodataResult
from pyscan.validate.state import PatchState
from pyscan.validate.thunks import Thunks
from pyscan.validate.units import PlacedUnits, place_units

U64 = NDArray[np.uint64]

#: Where calls of a traced function lead when no ops has a trampoline of its own, and what the
#: two may call (arch/x86/kernel/ftrace_64.S, kernel/trace/ftrace.c).
TRACE_ENTRIES: Final = ("ftrace_caller", "ftrace_regs_caller")
_TRACE_TARGETS: Final = (
    "ftrace_stub",
    "arch_ftrace_ops_list_func",
    "ftrace_ops_assist_func",
    "ftrace_graph_caller",
    "ftrace_graph_func",
)
_TRACE_SITES: Final = ("ftrace_call", "ftrace_regs_call", "ftrace_graph_call")


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """Protected bytes of one unit that follow each other: whole pages.

    `legal` (n,) uint8 is what they may hold now, `statuses` (n / PAGE_SIZE,) uint8 the
    PageStatus with which each page was read.
    """

    placed: Placed
    offset: int
    legal: NDArray[np.uint8]
    statuses: NDArray[np.uint8]
    executable: bool


@dataclass(slots=True, eq=False)
class Validation:
    """What one validation found."""

    attached: Attached
    target: Target
    units: PlacedUnits
    structures: Structures
    state: PatchState
    keys: KeyReader
    problems: Problems
    text: CodeResult = field(default_factory=CodeResult)
    rodata: RodataResult = field(default_factory=RodataResult)
    after_init: AfterInitResult = field(default_factory=AfterInitResult)
    unverified: dict[str, int] = field(default_factory=dict)  # owned code of unknown content
    extents: list[Extent] = field(default_factory=list)
    timings_ms: dict[str, float] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether nothing at all was found."""
        return not (self.problems.total or self.text.total or self.rodata.code.total)

    def lasting(self) -> frozenset[tuple[str, int]]:
        """What is found beyond text, to be held against another validation."""
        problems = {(str(problem.kind), problem.address) for problem in self.problems.kept}
        data = {("data", each.address) for each in self.rodata.code.differences}
        return frozenset(problems | data)


def validate(attached: Attached) -> Validation:
    """Validate all of an attached kernel once, as it is now.

    Raises AccessFailed when not even the state can be read.
    """
    clock = _Clock()
    target = attached.target
    structures = read_structures(target)
    problems = structures.problems
    target = target.with_modules(structures.modules)
    clock.lap("structures")
    units = place_units(target, problems)
    for module in units.modules:
        placed = module.placed
        target = target.with_functions(placed.address, function_offsets(placed.unit.symbols))
    clock.lap("place")
    state = read_state(target)
    keys = KeyReader(target, units.keys, problems)
    validation = Validation(
        attached, target, units, structures, state, keys, problems, timings_ms=clock.laps
    )
    comparer = _Comparer(validation)
    for placed in units.all:
        for segments in _extents(placed):
            comparer.compare(placed, segments)
    clock.lap("bytes")
    invariants = check_invariants(target, structures, attached.walked)
    problems.extend(invariants.problems)
    problems.total += invariants.problems_total - len(invariants.problems)
    validation.unverified = {str(kind): size for kind, size in invariants.unverified.items()}
    clock.lap("invariants")
    return validation


class _Comparer:
    """Compares all segments of all units under one state."""

    def __init__(self, validation: Validation) -> None:
        self._validation = validation
        self._predictor = Predictor(validation.state, validation.keys.keys())
        structures = validation.structures
        self._allowed = allowed_of(validation.target, structures.ftrace, structures.kprobes)

    def compare(self, placed: Placed, segments: list[Segment]) -> None:
        """Read and compare segments that follow each other, and keep what is legal."""
        validation = self._validation
        first, end = segments[0].offset, segments[-1].offset + segments[-1].length
        actual, statuses = _read(validation.target, placed, first, end, validation.problems)
        unread = np.repeat(statuses != PageStatus.OK, PAGE_SIZE)
        legal = np.empty_like(actual)
        for segment in segments:
            part = slice(segment.offset - first, segment.offset - first + segment.length)
            legal[part] = self._segment(placed, segment, actual[part], unread[part])
        executable = segments[0].kind is SegmentKind.TEXT
        validation.extents.append(Extent(placed, first, legal, statuses, executable))

    def _segment(
        self,
        placed: Placed,
        segment: Segment,
        actual: NDArray[np.uint8],
        unread: NDArray[np.bool_],
    ) -> NDArray[np.uint8]:
        validation = self._validation
        if segment.kind is SegmentKind.TEXT:
            text = TextComparer(self._predictor, placed, self._allowed)
            return text.compare(segment.offset, actual, unread, validation.text)
        init = init_range(validation.target, placed)
        data = RodataComparer(placed, init, validation.keys.key_of)
        if segment.kind is SegmentKind.RODATA:
            return data.compare(segment.offset, actual, unread, validation.rodata)
        after = AfterInitComparer(validation.target, placed, data, validation.state)
        return after.compare(
            segment.offset, actual, unread, validation.rodata, validation.after_init
        )


def _extents(placed: Placed) -> list[list[Segment]]:
    """Segments in groups: text alone, read-only data as far as it is contiguous."""
    groups: list[list[Segment]] = []
    for segment in placed.unit.segments:
        last = groups[-1][-1] if groups else None
        joins = (
            last is not None
            and SegmentKind.TEXT not in (segment.kind, last.kind)
            and last.offset + last.length == segment.offset
        )
        if joins:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round((now - self._last) * 1e3, 1)
        self._last = now


def _read(
    target: Target, placed: Placed, first: int, end: int, problems: Problems
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Bytes of an extent and a status a page; what cannot be read is a problem, too."""
    start = placed.address + first
    actual, statuses = target.memory.read_range(start, end - first)
    for status in np.unique(statuses[statuses != PageStatus.OK]).tolist():
        pages = np.flatnonzero(statuses == status)
        wild = status == PageStatus.HOLE
        problems.add(
            ProblemKind.WILD_POINTER if wild else ProblemKind.UNREADABLE,
            start + int(pages[0]) * PAGE_SIZE,
            placed.unit.name,
            f"{len(pages)} pages {'are not mapped' if wild else 'could not be read'}",
        )
    return actual, statuses


def allowed_of(target: Target, ftrace: Sequence[FtraceOps], kprobes: Sequence[Kprobe]) -> Allowed:
    """What the target has registered that shows in its text."""
    # Of an ops that made none, the field is of no use; nobody checks where it leads.
    trampolines = [ops.trampoline for ops in ftrace if ops.flags & FTRACE_ALLOC_TRAMP]
    entries = [target.address(name) for name in TRACE_ENTRIES if ftrace]
    core = [target.address(name) for name in _TRACE_TARGETS if target.has(name)]
    core += [ops.func for ops in ftrace]
    return Allowed(
        tracers=np.array(entries + trampolines, dtype=np.uint64),
        core=np.array(core, dtype=np.uint64),
        core_sites=tuple(target.address(name) for name in _TRACE_SITES if target.has(name)),
        probes=tuple(
            Probe(probe.address, probe.opcode, probe.optimized_slot, probe.saved)
            for probe in kprobes
        ),
        its=Thunks(target),
    )


def init_range(target: Target, placed: Placed) -> InitRange:
    """Where a unit's init code is, as far as it lies in its image."""
    if placed.unit is not target.approved.vmlinux:
        return InitRange()
    return InitRange(target.symbol("__init_begin"), target.symbol("__init_end"))
