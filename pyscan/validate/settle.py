"""Differences that may be patching in progress: read again until they settle, or do not.

A validation is no snapshot: the kernel flips keys and traces functions while it is read, and
text_poke_bp() writes a place in three steps with an int3 in between (arch/x86/kernel/
alternative.c). So a page that differs is read again with the state that belongs to it. What
is no legal content of its place under any state is a finding after a few reads; what is legal
there under another state has the time that a large update takes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.records import PAGE_SHIFT, PAGE_SIZE, PageStatus
from pyscan.validate.code import (
    CONTEXT,
    DIFFERENCES_MAX,
    CodeResult,
    Difference,
    TextComparer,
    site_span,
)
from pyscan.validate.context import Target
from pyscan.validate.memory import AccessFailed
from pyscan.validate.objects import (
    FtraceOps,
    Kprobe,
    read_ftrace,
    read_kprobes,
    read_slot_pages,
)
from pyscan.validate.patch import (
    CALL,
    INT3,
    JMP8,
    JMP32,
    NOP5,
    NOPS,
    RETURN,
    RETURN_ZERO,
    branch_target,
)
from pyscan.validate.placed import Placed
from pyscan.validate.predict import Predictor
from pyscan.validate.problem import Problems
from pyscan.validate.reader import KeyReader, read_state
from pyscan.validate.state import PatchState, same_state
from pyscan.validate.validation import TRACE_ENTRIES, Validation, allowed_of

#: How often a page that differs in a way that no patching explains is read again.
REREADS: Final = 3
#: How long what is legal under another state may take to agree with the state. Switching the
#: function tracer under emulation patches 35,000 places in two to three seconds; a key or a call
#: has a few hundred places at most.
TRACING_S: Final = 10.0
SETTLE_S: Final = 2.0
_PAUSE_S: Final = 0.001
_PAUSE_MAX_S: Final = 0.2
#: Pages that are followed; more than that is no patching in progress of any kernel that
#: would settle in time. (The tracer's are settled by their targets, not by waiting.)
PAGES_MAX: Final = 8192

#: What a place of a class may hold in one state or another: its first bytes.
_FORMS: Final = {
    "ftrace call": (NOP5, bytes([CALL])),
    "jump label": (NOP5, NOPS[1], bytes([JMP8]), bytes([JMP32])),
    "static call": (NOP5, RETURN, RETURN_ZERO, bytes([CALL]), bytes([JMP32]), b"\x0f"),
    "static call trampoline": (RETURN, bytes([JMP32])),
}

_BRANCH_BYTES: Final = 5
_OPTIMISED_SLOTS: Final = "kprobe_optinsn_slots"

Page = tuple[str, int]  # name of the unit, offset of the page


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """The state of a target at one moment."""

    state: PatchState
    keys: KeyReader
    ftrace: tuple[FtraceOps, ...]
    kprobes: tuple[Kprobe, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Settled:
    """What has become of the pages that differed."""

    differences: tuple[Difference, ...]
    differences_total: int
    legal: dict[Page, NDArray[np.uint8]]  # content of each page that may be there now
    pages_differing: int
    unreadable: frozenset[Page]
    reads: int
    last: Reading | None  # the state that goes with it


def settle(validation: Validation, pages: Iterable[Page]) -> Settled:
    """Read pages of text again until each is legal, or cannot become so by waiting.

    Raises AccessFailed when the state cannot be read any more.
    """
    units = {placed.unit.name: placed for placed in validation.units.all}
    waiting = sorted(set(pages))[:PAGES_MAX]
    legal: dict[Page, NDArray[np.uint8]] = {}
    unreadable: set[Page] = set()
    started = time.monotonic()
    pause, reads = _PAUSE_S, 0
    found = CodeResult()
    last: Reading | None = None
    while waiting:
        reads += 1
        round_ = _Round(validation)
        last = round_.reading
        found = CodeResult()
        still: list[Page] = []
        patient, patience_s = True, TRACING_S
        for page in waiting:
            result = CodeResult()
            content, status = round_.compare(units[page[0]], page[1], result)
            legal[page] = content
            (unreadable.discard if status is PageStatus.OK else unreadable.add)(page)
            if result.total:
                still.append(page)
                placed = units[page[0]]
                patient &= all(
                    _in_progress(validation.target, placed, each) or round_.may_be_a_probe(each)
                    for each in result.differences
                )
                if any(each.site != "ftrace call" for each in result.differences):
                    patience_s = SETTLE_S
                _merge(found, result)
        waiting = still
        elapsed = time.monotonic() - started
        if elapsed > patience_s or (reads >= REREADS and not patient):
            break
        if waiting:
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE_MAX_S) if patient else _PAUSE_S
    return Settled(
        tuple(found.differences), found.total if waiting else 0, legal, len(waiting),
        frozenset(unreadable), reads, last,
    )  # fmt: skip


class _Round:
    """One reading of the state, and of the pages that go with it."""

    def __init__(self, validation: Validation) -> None:
        target = validation.target
        target.memory.forget()
        problems = Problems()
        self.reading = Reading(
            read_state(target),
            KeyReader(target, validation.units.keys, problems),
            read_ftrace(target, problems),
            read_kprobes(target, problems),
        )
        self._target = target
        self._predictor = Predictor(self.reading.state, self.reading.keys.keys())
        self._allowed = allowed_of(target, self.reading.ftrace, self.reading.kprobes)
        self._slots = [
            page.address
            for page in read_slot_pages(target, problems)
            if page.cache == _OPTIMISED_SLOTS
        ]

    def may_be_a_probe(self, difference: Difference) -> bool:
        """Whether the bytes may be a probe's that is being put in place or taken away.

        Its breakpoint, or a jump into the pages of such jumps: both outlive the probe's entry in
        the table (kernel/kprobes.c, unoptimize_kprobe and kprobe_optimizer).
        """
        if difference.actual[0] == INT3:
            return True
        try:
            code = self._target.memory.read(difference.address, _BRANCH_BYTES)
        except AccessFailed:
            return False
        slot = branch_target(code, difference.address)
        return code[0] == JMP32 and any(page <= slot < page + PAGE_SIZE for page in self._slots)

    def compare(
        self, placed: Placed, offset: int, result: CodeResult
    ) -> tuple[NDArray[np.uint8], PageStatus]:
        """Legal content of one page now, and how it was read."""
        first, end = _segment_of(placed, offset)
        low, high = max(first, offset - CONTEXT), min(end, offset + PAGE_SIZE + CONTEXT)
        actual, statuses = self._target.memory.read_range(placed.address + low, high - low)
        pages = (np.arange(low, high) >> PAGE_SHIFT) - (low >> PAGE_SHIFT)
        unread = (statuses != PageStatus.OK)[pages]
        comparer = TextComparer(self._predictor, placed, self._allowed)
        part = slice(offset - low, offset - low + PAGE_SIZE)
        status = PageStatus(int(statuses[pages[part.start]]))
        return comparer.compare(low, actual, unread, result, part), status


def _segment_of(placed: Placed, offset: int) -> tuple[int, int]:
    """Where the watched segment that holds an offset begins and ends."""
    for segment in placed.unit.segments:
        end = segment.offset + segment.length
        if segment.offset <= offset < end:
            return segment.offset, end
    return offset, offset + PAGE_SIZE


def _in_progress(target: Target, placed: Placed, difference: Difference) -> bool:
    """Whether the bytes may be a step of legal patching."""
    if difference.place is None:
        return False
    place = difference.place
    if place[0] == INT3:
        return True
    if not any(place.startswith(form) for form in _FORMS.get(difference.site, ())):
        return False
    if place[0] not in {CALL, JMP32} or len(place) < _BRANCH_BYTES:
        return True
    at = site_span(placed.unit, difference.offset)[1]
    return _may_lead_to(target, difference.site, branch_target(place, placed.address + at))


def _may_lead_to(target: Target, site: str, address: int) -> bool:
    """Whether a site of a class may call or jump there in some legal state.

    A traced function calls one of two entries, or a trampoline, which lies in no unit.
    """
    if site == "ftrace call":
        in_unit = target.virtual_base <= address < target.image_end
        in_unit |= any(each.base <= address < each.base + each.size for each in target.modules)
        return not in_unit or address in {target.address(name) for name in TRACE_ENTRIES}
    if site in {"static call", "static call trampoline"}:
        return target.is_function(address)
    return True


def _merge(into: CodeResult, result: CodeResult) -> None:
    into.total += result.total
    into.differences += result.differences[: max(0, DIFFERENCES_MAX - len(into.differences))]


def pages_of(differences: Iterable[Difference]) -> set[Page]:
    """The pages that differences lie in."""
    found = set()
    for each in differences:
        last = each.offset + max(1, len(each.actual)) - 1
        for offset in {each.offset & -PAGE_SIZE, last & -PAGE_SIZE}:
            found.add((each.unit, offset))
    return found


def take_over(validation: Validation, settled: Settled) -> bool:
    """Make what has settled part of the validation: content of pages, and state.

    Returns whether the state is another one now.
    """
    for extent in validation.extents:
        for (unit, offset), content in settled.legal.items():
            at = offset - extent.offset
            if extent.placed.unit.name == unit and 0 <= at < len(extent.legal):
                extent.legal[at : at + PAGE_SIZE] = content
    validation.text.differences = list(settled.differences)
    validation.text.total = settled.differences_total
    validation.text.pages = pages_of(settled.differences)
    return settled.last is not None and _take_over_state(validation, settled.last)


def _take_over_state(validation: Validation, last: Reading) -> bool:
    keys, structures = validation.keys, validation.structures
    same = (
        last.keys.enabled.items() <= keys.enabled.items()
        and last.keys.functions.items() <= keys.functions.items()
        and (last.ftrace, last.kprobes) == (structures.ftrace, structures.kprobes)
        and same_state(last.state, validation.state)
    )
    validation.state = last.state
    keys.enabled.update(last.keys.enabled)
    keys.functions.update(last.keys.functions)
    validation.structures = replace(structures, ftrace=last.ftrace, kprobes=last.kprobes)
    return not same
