"""Text in memory against predicted text: what differs, and whether it is legal there.

A place that differs from the prediction is legal only where the kernel writes what the package
cannot tell: calls of a tracer, probes, thunks in pages of their own. For each there is a list
of what it may be, made of registered structures of the same target.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pyscan.approved.unit import VMLINUX, Unit
from pyscan.records import PAGE_SIZE
from pyscan.validate.patch import CALL, CS_PREFIX, INT3, JMP32, RETURN, branch, its_sites
from pyscan.validate.placed import Placed, within
from pyscan.validate.predict import Predictor

U64 = NDArray[np.uint64]

#: Bytes between two differences that are still reported as one.
_GAP: Final = 8
DIFFERENCES_MAX: Final = 64
#: Bytes around a part of text in which nothing begins that reaches into it and is settled here.
CONTEXT: Final = 16
_DIFFERENCE_BYTES_MAX: Final = 64


class Registers(Protocol):
    """What knows thunks by their addresses, as a dictionary of registers does."""

    def get(self, address: int, /) -> int | None:
        """The register that the thunk at an address jumps through; None: there is none."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A kprobe that has written to text: int3, or a jump to its own slot."""

    address: int
    opcode: int  # first byte that it saved
    slot: int  # where an optimised probe jumps to; 0 for none
    copied: bytes  # four bytes behind the first that an optimised probe saved


@dataclass(frozen=True, slots=True, eq=False)
class Allowed:
    """What a target has registered that shows in its text. Addresses are virtual.

    `tracers` (n,) uint64: where traced functions may call. `core` (n,): what the tracer's own
    entry may call. `its` gives the register of the ITS thunk at an address.
    """

    tracers: U64
    core: U64
    core_sites: tuple[int, ...]
    probes: tuple[Probe, ...]
    its: Registers = field(default_factory=dict[int, int])


@dataclass(frozen=True, slots=True)
class Difference:
    """Bytes of a unit that nothing explains; `offset` in the unit's image."""

    unit: str
    offset: int
    address: int
    site: str  # class of the patch site there; "" where nothing is ever patched
    expected: bytes
    actual: bytes
    place: bytes | None = None  # all that the patch site holds now


@dataclass(slots=True)
class CodeResult:
    """What a comparison of text found. `settled` counts legal places by class."""

    differences: list[Difference] = field(default_factory=list)
    total: int = 0
    bytes: int = 0
    settled: dict[str, int] = field(default_factory=dict)
    traced: int = 0
    pages: set[tuple[str, int]] = field(default_factory=set)  # unit and offset of each that differs

    def count(self, kind: str, places: int) -> None:
        """Count legal places that differ from the prediction."""
        if places:
            self.settled[kind] = self.settled.get(kind, 0) + places


class TextComparer:
    """Compares the text of one placed unit, all of it or a part."""

    def __init__(self, predictor: Predictor, placed: Placed, allowed: Allowed) -> None:
        self._predictor = predictor
        self._placed = placed
        self._allowed = allowed

    def compare(
        self,
        start: int,
        actual: NDArray[np.uint8],
        unread: NDArray[np.bool_],
        result: CodeResult,
        part: slice | None = None,
    ) -> NDArray[np.uint8]:
        """Hold `actual`, the bytes from offset `start` on, against the prediction.

        Adds what differs to `result`, but for the `unread` bytes; returns the legal bytes.
        All arrays have shape (n,). With `part`, only those of the bytes are judged and
        returned: the others, CONTEXT of them on each side, are there for what straddles
        its edges.
        """
        end = start + len(actual)
        expected = self._predictor.text(self._placed, start, end)
        actual = np.where(unread, expected, actual)
        result.bytes += len(actual) - int(unread.sum())
        if not np.array_equal(expected, actual):
            self._settle_tracing(start, expected, actual, result)
            self._settle_core(start, expected, actual, result)
            self._settle_trampolines(start, expected, actual, result)
            self._settle_early_returns(start, expected, actual, result)
            self._settle_its(start, expected, actual, result)
            self._settle_probes(start, expected, actual, result)
        if part is not None:
            start, expected, actual = start + part.start, expected[part], actual[part]
        if not np.array_equal(expected, actual):
            add_differences(self._placed, start, expected, actual, result)
        return expected

    def _targets(self, start: int, actual: NDArray[np.uint8], offsets: NDArray[np.int64]) -> U64:
        """Where branches of 5 bytes at `offsets` lead."""
        at = (offsets - start)[:, None] + np.arange(1, 5)
        displacement = actual[at].view("<i4")[:, 0].astype(np.int64)
        found: U64 = (displacement + offsets + 5).astype(np.uint64) + np.uint64(
            self._placed.address
        )
        return found

    def _return(
        self, start: int, expected: NDArray[np.uint8], offsets: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which predicted places return, be it by a jump to the return thunk."""
        thunk = np.uint64(self._predictor.state.return_thunk)
        through = self._targets(start, expected, offsets) == thunk
        first = expected[offsets - start]
        found: NDArray[np.bool_] = (first == RETURN[0]) | ((first == JMP32) & through)
        return found

    def _settle_tracing(
        self,
        start: int,
        expected: NDArray[np.uint8],
        actual: NDArray[np.uint8],
        result: CodeResult,
    ) -> None:
        mcount = self._placed.unit.sites.mcount
        offsets = within(mcount, mcount, start, start + len(actual) - 5).astype(np.int64)
        at = (offsets - start)[:, None] + np.arange(5)
        calls = actual[offsets - start] == CALL
        offsets, at = offsets[calls], at[calls]
        legal = np.isin(self._targets(start, actual, offsets), self._allowed.tracers)
        expected[at[legal]] = actual[at[legal]]
        result.traced += int(legal.sum())

    def _settle_core(
        self,
        start: int,
        expected: NDArray[np.uint8],
        actual: NDArray[np.uint8],
        result: CodeResult,
    ) -> None:
        for address in self._allowed.core_sites:
            offset = address - self._placed.address
            if not start <= offset <= start + len(actual) - 5:
                continue
            at = slice(offset - start, offset - start + 5)
            if int(actual[at][0]) not in (CALL, JMP32):
                continue
            target = self._targets(start, actual, np.array([offset]))
            if np.isin(target, self._allowed.core)[0] and (expected[at] != actual[at]).any():
                expected[at] = actual[at]
                result.count("ftrace", 1)

    def _settle_trampolines(
        self,
        start: int,
        expected: NDArray[np.uint8],
        actual: NDArray[np.uint8],
        result: CodeResult,
    ) -> None:
        """A trampoline without a function, never updated, returns as the build made it."""
        column = self._placed.unit.sites.trampolines
        rows = within(column, column["offset"], start, start + len(actual) - 8)
        offsets = rows["offset"].astype(np.int64)
        for offset in offsets[self._return(start, expected, offsets)].tolist():
            at = slice(offset - start, offset - start + 8)
            if np.array_equal(expected[at], actual[at]):
                continue
            built = self._predictor.linked(self._placed, offset, offset + 8)
            if np.array_equal(built, actual[at]):
                expected[at] = built
                result.count("static call", 1)

    def _settle_early_returns(
        self,
        start: int,
        expected: NDArray[np.uint8],
        actual: NDArray[np.uint8],
        result: CodeResult,
    ) -> None:
        """A tail call of no function that was patched before the kernel chose its thunk.

        static_call_init() runs ahead of cpu_select_mitigations(), and nothing patches the
        place again until its key is updated. Both forms return. Modules come later.
        """
        unit = self._placed.unit
        if unit.name != VMLINUX:
            return
        calls = within(unit.sites.static_calls, unit.sites.static_calls["offset"], start,
                       start + len(actual) - 6)  # fmt: skip
        calls = calls["offset"][(calls["tail"] != 0) & (calls["length"] == 5)]
        trampolines = within(unit.sites.trampolines, unit.sites.trampolines["offset"], start,
                             start + len(actual) - 8)["offset"]  # fmt: skip
        for offsets in (calls.astype(np.int64), trampolines.astype(np.int64)):
            at = (offsets - start)[:, None] + np.arange(5)
            early = (actual[at] == np.frombuffer(RETURN, dtype=np.uint8)).all(axis=1)
            early &= self._return(start, expected, offsets)
            early &= expected[offsets - start] == JMP32
            expected[at[early]] = actual[at[early]]
            result.count("static call", int(early.sum()))

    def _settle_its(
        self,
        start: int,
        expected: NDArray[np.uint8],
        actual: NDArray[np.uint8],
        result: CodeResult,
    ) -> None:
        column = self._placed.unit.sites.retpolines
        rows = within(column, column["offset"], start, start + len(actual) - 8)
        rows = rows[its_sites(self._placed, rows, self._predictor.state)]
        used: set[int] = set()
        for row in rows:
            offset, length = int(row["offset"]), int(row["length"])
            at = slice(offset - start, offset - start + length)
            opcode = CALL if row["form"] == 0 else JMP32
            # __emit_trampoline(): of 6 bytes, the first is a CS prefix.
            source = offset + (length == 6)
            target = int(self._targets(start, actual, np.array([source]))[0])
            # its_allocate_thunk(): every site has a thunk of its own.
            if target in used or self._allowed.its.get(target) != int(row["register"]):
                continue
            used.add(target)
            code = branch(opcode, self._placed.address + source, target)
            if actual[at].tobytes() == bytes([CS_PREFIX])[: source - offset] + code:
                expected[at] = actual[at]
                result.count("ITS thunk", 1)

    def _settle_probes(
        self,
        start: int,
        expected: NDArray[np.uint8],
        actual: NDArray[np.uint8],
        result: CodeResult,
    ) -> None:
        for probe in self._allowed.probes:
            offset = probe.address - self._placed.address - start
            if not 0 <= offset <= len(actual) - 5:
                continue
            saved = bytes([probe.opcode]) + probe.copied
            if actual[offset] == INT3 and expected[offset] == probe.opcode:
                expected[offset] = INT3
                result.count("kprobe", 1)
            elif (
                probe.slot
                and actual[offset : offset + 5].tobytes()
                == branch(JMP32, probe.address, probe.slot)
                and expected[offset : offset + 5].tobytes() == saved
            ):
                expected[offset : offset + 5] = actual[offset : offset + 5]
                result.count("optimised kprobe", 1)


def add_differences(
    placed: Placed,
    start: int,
    expected: NDArray[np.uint8],
    actual: NDArray[np.uint8],
    result: CodeResult,
) -> None:
    """List where the two differ, neighbours as one; a bounded number of them."""
    places = np.flatnonzero(expected != actual)
    if not len(places):
        return
    breaks = np.flatnonzero(np.diff(places) > _GAP) + 1
    firsts = places[np.concatenate(([0], breaks))]
    lasts = places[np.concatenate((breaks - 1, [len(places) - 1]))]
    result.total += len(firsts)
    pages = np.unique((places + start) & -PAGE_SIZE)
    result.pages.update((placed.unit.name, page) for page in pages.tolist())
    room = max(0, DIFFERENCES_MAX - len(result.differences))
    for first, last in zip(firsts[:room].tolist(), lasts[:room].tolist(), strict=True):
        end = min(last + 1, first + _DIFFERENCE_BYTES_MAX)
        site, at, length = site_span(placed.unit, start + first)
        at = max(0, at - start)
        result.differences.append(
            Difference(
                unit=placed.unit.name,
                offset=start + first,
                address=placed.address + start + first,
                site=site,
                expected=expected[first:end].tobytes(),
                actual=actual[first:end].tobytes(),
                place=actual[at : at + length].tobytes() if site else None,
            )
        )


def site_at(unit: Unit, offset: int) -> str:
    """Class of the patch site that covers an offset; "" when there is none."""
    return site_span(unit, offset)[0]


def site_span(unit: Unit, offset: int) -> tuple[str, int, int]:
    """Class, offset and length of the patch site that covers an offset; "" for none."""
    sites = unit.sites
    plain: Iterable[tuple[str, NDArray[np.uint32], int]] = (
        ("ftrace call", sites.mcount, 5),
        ("return", sites.returns, 5),
        ("lock", sites.locks, 1),
        ("static call trampoline", sites.trampolines["offset"], 8),
    )
    for name, offsets, length in plain:
        at = int(np.searchsorted(offsets, offset, side="right")) - 1
        if at >= 0 and offset < int(offsets[at]) + length:
            return name, int(offsets[at]), length
    for name, column in (
        ("jump label", sites.jump_labels),
        ("static call", sites.static_calls),
        ("retpoline", sites.retpolines),
        ("paravirt call", sites.paravirt),
        ("alternative", sites.alternatives),
    ):
        starts = column["offset"].astype(np.int64)
        rows = np.flatnonzero((starts <= offset) & (offset < starts + column["length"]))
        if len(rows):
            return name, int(starts[rows[0]]), int(column["length"][rows[0]])
    return "", 0, 0
