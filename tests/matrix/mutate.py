"""Flip bytes of a stopped kernel's protected memory, each alone, and ask the validator.

    PYTHONPATH=tests .venv/bin/python -m matrix.mutate URI ...

An image is validated once and must be clean. A flip is then judged by the comparers of the
product on the page that it lies in (on the whole segment, where that page holds part of a
table whose rows may be permuted), which costs milliseconds; a sample is judged by `validate`
of an overlaid source as well, to prove that the short way says the same.

Data that is read-only after init is counted apart: what the boot alone knows of it cannot be
found by its package, and is pinned at attach.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as Grid

from matrix.examine import approved_kernel
from matrix.overlay import OverlaySource
from pyscan.approved.linux import LinuxApproved
from pyscan.approved.unit import Segment, SegmentKind
from pyscan.errors import PyscanError
from pyscan.records import PAGE_SIZE
from pyscan.sources import Source, open_source
from pyscan.validate.after_init import AfterInitComparer, AfterInitResult
from pyscan.validate.attach import attach
from pyscan.validate.code import CONTEXT, CodeResult, Difference, TextComparer, site_at
from pyscan.validate.context import SymbolNames
from pyscan.validate.placed import EDGE, Placed
from pyscan.validate.predict import Predictor
from pyscan.validate.rodata import RodataComparer, RodataResult
from pyscan.validate.validation import Extent, Validation, allowed_of, init_range, validate

Bytes = NDArray[np.uint8]

UNIFORM: Final = 3000
IN_SITES: Final = 1500
AFTER_INIT: Final = 300
SAMPLE: Final = 40

#: Class of flips that are counted apart.
APART: Final = "apart: read-only after init"


@dataclass(frozen=True, slots=True)
class Flip:
    """One byte that is changed; `kind` is the class that it is counted under."""

    kind: str
    placed: Placed
    offset: int
    old: int
    new: int

    @property
    def address(self) -> int:
        """Virtual address of the byte."""
        return self.placed.address + self.offset


@dataclass(frozen=True, slots=True)
class Miss:
    """A flip that was not found."""

    flip: Flip
    symbol: str
    site: str

    def __str__(self) -> str:
        flip = self.flip
        return (
            f"{flip.kind}: {flip.placed.unit.name} {self.symbol} ({self.site or 'no site'}, "
            f"offset {flip.offset:#x}): {flip.old:02x} -> {flip.new:02x}"
        )


@dataclass(slots=True)
class Tally:
    """What became of all flips."""

    flips: Counter[str]
    found: Counter[str]
    misses: list[Miss]  # without those that are counted apart
    sampled: int = 0
    disagreements: list[Miss] = field(default_factory=list)


class Judge:
    """Says of flips whether the validator finds them, by the page."""

    def __init__(self, validation: Validation) -> None:
        """`validation` must be clean: its legal bytes are then those in memory."""
        self._validation = validation
        structures = validation.structures
        self._predictor = Predictor(validation.state, validation.keys.keys())
        self._allowed = allowed_of(validation.target, structures.ftrace, structures.kprobes)
        self._before: dict[tuple[str, int], list[Difference]] = {}

    def finds(self, flip: Flip) -> bool:
        """Whether the comparers see the flip."""
        extent = self._extent(flip)
        segment = segment_of(flip.placed, flip.offset)
        low, high = self._range(flip, segment)
        key = (flip.placed.unit.name, low)
        part = extent.legal[low - extent.offset : high - extent.offset].copy()
        if key not in self._before:
            self._before[key] = self._compare(flip.placed, segment, low, part)
        part[flip.offset - low] = flip.new
        if self._compare(flip.placed, segment, low, part) != self._before[key]:
            return True
        return self._finds_in_whole(extent, segment, flip)

    def _finds_in_whole(self, extent: Extent, segment: Segment, flip: Flip) -> bool:
        """Some places are known to be wrong only together with others."""
        if segment.kind is not SegmentKind.TEXT:
            return False
        whole = extent.legal.copy()
        whole[flip.offset - extent.offset] = flip.new
        text = CodeResult()
        comparer = TextComparer(self._predictor, flip.placed, self._allowed)
        comparer.compare(extent.offset, whole, np.zeros(len(whole), dtype=bool), text)
        return bool(text.total)

    def _extent(self, flip: Flip) -> Extent:
        for extent in self._validation.extents:
            inside = extent.offset <= flip.offset < extent.offset + len(extent.legal)
            if extent.placed is flip.placed and inside:
                return extent
        raise LookupError(f"{flip.placed.unit.name}+{flip.offset:#x} is not protected")

    def _range(self, flip: Flip, segment: Segment) -> tuple[int, int]:
        """The page, or the segment where the page has part of a table or is set at boot."""
        end = segment.offset + segment.length
        page = flip.offset & -PAGE_SIZE
        if segment.kind is SegmentKind.RO_AFTER_INIT:
            return segment.offset, end
        if segment.kind is SegmentKind.RODATA:
            for table in flip.placed.unit.tables:
                if page < table.offset + table.length and table.offset < page + PAGE_SIZE:
                    return segment.offset, end
        margin = CONTEXT if segment.kind is SegmentKind.TEXT else EDGE
        return max(segment.offset, page - margin), min(end, page + PAGE_SIZE + margin)

    def _compare(
        self, placed: Placed, segment: Segment, start: int, actual: Bytes
    ) -> list[Difference]:
        unread = np.zeros(len(actual), dtype=bool)
        if segment.kind is SegmentKind.TEXT:
            text = CodeResult()
            page = -(-start // PAGE_SIZE) * PAGE_SIZE
            comparer = TextComparer(self._predictor, placed, self._allowed)
            part = slice(page - start, min(page - start + PAGE_SIZE, len(actual)))
            comparer.compare(start, actual, unread, text, part)
            return text.differences
        found = RodataResult()
        target = self._validation.target
        init = init_range(target, placed)
        rodata = RodataComparer(placed, init, self._validation.keys.key_of)
        if segment.kind is SegmentKind.RODATA:
            rodata.compare(start, actual, unread, found)
        else:
            after = AfterInitComparer(target, placed, rodata, self._validation.state)
            after.compare(start, actual, unread, found, AfterInitResult())
        return found.code.differences


def segment_of(placed: Placed, offset: int) -> Segment:
    """The watched segment that an offset lies in. Raises LookupError."""
    for segment in placed.unit.segments:
        if segment.offset <= offset < segment.offset + segment.length:
            return segment
    raise LookupError(f"{placed.unit.name}+{offset:#x} is not watched")


class Dice:
    """Draws flips of one validated image; the same seed gives the same flips."""

    def __init__(self, validation: Validation, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._validation = validation

    def uniform(self, count: int) -> Iterator[Flip]:
        """Flips uniformly over all protected bytes; half of them of a single bit."""
        for extent, segment, offset in self._places(count, after_init=False):
            vmlinux = extent.placed is self._validation.units.vmlinux
            kind = f"{'kernel' if vmlinux else 'module'} {segment.kind}"
            yield self._flip(kind, extent, offset)

    def after_init(self, count: int) -> Iterator[Flip]:
        """Flips uniformly over all data that is read-only after init."""
        for extent, _, offset in self._places(count, after_init=True):
            yield self._flip(APART, extent, offset)

    def _places(self, count: int, *, after_init: bool) -> Iterator[tuple[Extent, Segment, int]]:
        parts = [
            (extent, segment)
            for extent in self._validation.extents
            for segment in extent.placed.unit.segments
            if extent.offset <= segment.offset < extent.offset + len(extent.legal)
            and (segment.kind is SegmentKind.RO_AFTER_INIT) == after_init
        ]
        weights = np.array([segment.length for _, segment in parts], dtype=float)
        which = self._random.choice(len(parts), size=count, p=weights / weights.sum())
        for index in which.tolist():
            extent, segment = parts[index]
            yield extent, segment, segment.offset + int(self._random.integers(segment.length))

    def in_sites(self, count: int) -> Iterator[Flip]:
        """Flips in patch sites and tables: every class as often, any row, any of its bytes."""
        classes = dict(_classes(self._validation))
        names = sorted(classes)
        for number in range(count):
            name = names[number % len(names)]
            extents, counts = zip(*classes[name], strict=True)
            row = int(self._random.integers(sum(len(offsets) for offsets, _ in counts)))
            for extent, (offsets, lengths) in zip(extents, counts, strict=True):
                if row < len(offsets):
                    offset = int(offsets[row]) + int(self._random.integers(int(lengths[row])))
                    yield self._flip(name, extent, offset)
                    break
                row -= len(offsets)

    def _flip(self, kind: str, extent: Extent, offset: int) -> Flip:
        old = int(extent.legal[offset - extent.offset])
        change = int(self._random.integers(1, 256))
        if self._random.integers(2):
            change = 1 << int(self._random.integers(8))
        return Flip(kind, extent.placed, offset, old, old ^ change)


Rows = tuple[NDArray[np.int64], NDArray[np.int64]]


def _classes(validation: Validation) -> Iterator[tuple[str, list[tuple[Extent, Rows]]]]:
    """Patch sites by class: offsets and lengths, an entry for each extent of text."""
    fixed = {"mcount": 5, "returns": 5, "locks": 1, "trampolines": 8}
    names = ("retpolines", "paravirt", "alternatives", "jump_labels", "static_calls")
    for name in (*fixed, *names):
        found = []
        for extent in validation.extents:
            if not extent.executable:
                continue
            column = getattr(extent.placed.unit.sites, name)
            offsets = column if column.dtype.names is None else column["offset"]
            lengths = np.full(len(column), fixed[name]) if name in fixed else column["length"]
            inside = offsets.astype(np.int64) + lengths <= extent.offset + len(extent.legal)
            inside &= lengths > 0
            found.append((extent, (offsets[inside].astype(np.int64), lengths[inside])))
        if any(len(offsets) for _, (offsets, _) in found):
            yield f"site: {name}", found
    yield from _tables(validation)


def _tables(validation: Validation) -> Iterator[tuple[str, list[tuple[Extent, Rows]]]]:
    """Tables that the kernel sorts, by kind: offsets and lengths of their rows."""
    found: dict[str, list[tuple[Extent, Rows]]] = {}
    for extent in validation.extents:
        for table in extent.placed.unit.tables:
            if extent.offset <= table.offset < extent.offset + len(extent.legal):
                if segment_of(extent.placed, table.offset).kind is SegmentKind.RO_AFTER_INIT:
                    continue
                rows = table.offset + table.entry * np.arange(table.length // table.entry)
                lengths = np.full(len(rows), table.entry)
                found.setdefault(f"table: {table.kind}", []).append((extent, (rows, lengths)))
    yield from found.items()


def clean_validation(source: Source, approved: LinuxApproved) -> Validation:
    """Validate an image. Raises ValueError when its bytes differ from its package.

    Problems are no hindrance: a test module that is in no package is one.
    """
    validation = validate(attach(source, [approved]))
    total = validation.text.total + validation.rodata.code.total
    if total:
        first = [*validation.text.differences, *validation.rodata.code.differences][:3]
        raise ValueError(f"{source.uri}: {total} differences before any flip: {first}")
    return validation


def finds_fully(validation: Validation, flip: Flip) -> bool:
    """Whether a validation from scratch finds a flip in the image of a clean `validation`."""
    gpas, _ = validation.target.memory.translate(np.array([flip.address], dtype=np.uint64))
    overlay = OverlaySource(validation.attached.source)
    overlay.write(int(gpas[0]), bytes([flip.new]))
    try:
        after = validate(attach(overlay, [validation.attached.approved]))
    except PyscanError:  # the kernel is not found any more, or its state is unreadable
        return True
    differences = after.text.total + after.rodata.code.total
    return bool(differences) or after.problems.total > validation.problems.total


def mutate(
    source: Source,
    approved: LinuxApproved,
    counts: tuple[int, int, int, int] = (UNIFORM, IN_SITES, AFTER_INIT, SAMPLE),
    seed: int = 1,
) -> Tally:
    """Flip bytes of one image.

    `counts`: uniform flips, flips in sites, flips in data that is read-only after init, and
    how many of all are validated in full.
    """
    uniform, in_sites, after_init, sample = counts
    validation = clean_validation(source, approved)
    dice, judge = Dice(validation, seed), Judge(validation)
    flips = [*dice.uniform(uniform), *dice.in_sites(in_sites), *dice.after_init(after_init)]
    tally = Tally(Counter(), Counter(), [])
    verdicts = []
    for flip in flips:
        found = judge.finds(flip)
        verdicts.append(found)
        tally.flips[flip.kind] += 1
        tally.found[flip.kind] += found
        if not found and flip.kind != APART:
            tally.misses.append(_miss(flip))
    missed = [row for row, found in enumerate(verdicts) if not found][: sample // 4]
    others = np.random.default_rng(seed).permutation(len(flips)).tolist()
    for row in [*missed, *others][:sample]:
        tally.sampled += 1
        fully = finds_fully(validation, flips[row])
        # Hooks and tables that are read-only after init have checks of their own.
        if fully != verdicts[row] and not (fully and flips[row].kind == APART):
            tally.disagreements.append(_miss(flips[row]))
    return tally


def _miss(flip: Flip) -> Miss:
    near = SymbolNames(flip.placed.unit.symbols).near(flip.offset)
    symbol = f"{near[0]}+{near[1]:#x}" if near else f"+{flip.offset:#x}"
    return Miss(flip, symbol, site_at(flip.placed.unit, flip.offset))


def print_tally(tally: Tally, console: Console, title: str) -> None:
    """A row for every class, and a line for every miss."""
    grid = Grid("class", "flips", "found", "missed", title=title)
    for kind in sorted(tally.flips):
        flips, found = tally.flips[kind], tally.found[kind]
        grid.add_row(kind, str(flips), str(found), str(flips - found))
    console.print(grid)
    for miss in tally.misses:
        console.print(f"missed {miss}", markup=False, soft_wrap=True)
    console.print(
        f"in full: {tally.sampled} validated from scratch, {len(tally.disagreements)} disagree"
    )
    for miss in tally.disagreements:
        console.print(f"disagrees {miss}", markup=False, soft_wrap=True)


def main(arguments: Sequence[str]) -> int:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="matrix.mutate")
    parser.add_argument(
        "--counts", type=int, nargs=4, default=(UNIFORM, IN_SITES, AFTER_INIT, SAMPLE),
        help="flips anywhere, in sites, in data read-only after init; full validations",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("uris", nargs="+")
    options = parser.parse_args(arguments)
    console = Console(width=160)
    failed = 0
    for uri in options.uris:
        with open_source(uri) as source:
            tally = mutate(source, approved_kernel(), tuple(options.counts), options.seed)
        print_tally(tally, console, uri)
        failed += len(tally.misses) + len(tally.disagreements)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
