"""Run the contenders of a shape in turn, and make results and ratios of the samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from pyscan.bench.contenders import LIMIT, WINDOW_PAGES, Contender, Ready, ready
from pyscan.bench.document import Absent, Detection, Latency, Rate, Ratio, Result, Series
from pyscan.bench.memory import Workload, evictor, filled, workload
from pyscan.bench.peers import Unavailable
from pyscan.bench.runner import PASS_MIN_NS, Entry, Samples, alternate, ratio
from pyscan.bench.shapes import BY_NAME, Shape
from pyscan.records import PAGE_SIZE

#: A pass over all of a large range begins at one of so many first pages.
_OFFSET_PAGES: Final = 255

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to measure: `wanted` narrows the contenders, empty for all of a shape."""

    rounds: int
    random: np.random.Generator
    threads_max: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    wanted: frozenset[str] = frozenset()


@dataclass(slots=True)
class Measured:
    """What a run has given so far."""

    results: list[Result] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    rates: list[Rate] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)
    detection: list[Detection] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)


def measure_shapes(
    shapes: Sequence[Shape], plan: Plan, progress: Progress, measured: Measured
) -> None:
    """Add every shape with every number of threads to `measured`."""
    for shape in shapes:
        try:
            _measure_shape(shape, plan, progress, measured)
        except Unavailable as reason:
            measured.absent.append(Absent(shape.name, "", str(reason)))


def ratios_of(shape: str, threads: int, samples: Iterable[Samples]) -> list[Ratio]:
    """Every contender against every other one."""
    samples = list(samples)
    return [
        Ratio(shape, threads, one.name, other.name, ratio(one, other))
        for one in samples
        for other in samples
        if one is not other
    ]


def _measure_shape(shape: Shape, plan: Plan, progress: Progress, measured: Measured) -> None:
    with filled(shape.size_bytes, shape.backing, shape.huge, plan.random) as memory:
        work = workload(
            memory,
            plan.random,
            scattered_pages=shape.scattered_pages,
            chunk_pages=shape.chunk_pages,
        )
        for threads in shape.threads:
            if threads > plan.threads_max:
                reason = f"this machine lends {plan.threads_max} processors"
                measured.absent.append(Absent(shape.name, f"all, {threads} threads", reason))
                continue
            progress(f"{shape.name}, {threads} thread{'s' * (threads > 1)}")
            _measure_threads(shape, work, threads, plan, measured)


def _measure_threads(
    shape: Shape, work: Workload, threads: int, plan: Plan, measured: Measured
) -> None:
    evict = evictor() if shape.evicted else None
    with ExitStack() as stack:
        entries, forms = [], {}
        for name in shape.contenders:
            if plan.wanted and name not in plan.wanted:
                continue
            contender = BY_NAME[name]
            try:
                made = ready(contender, work, threads, stack)
            except Unavailable as reason:
                absent = Absent(shape.name, name, str(reason))
                if absent not in measured.absent:
                    measured.absent.append(absent)
                continue
            forms[name] = made.form
            run = _pass(contender, made, work, plan.random)
            # A range is larger than the caches; pages that fit are warm only after a pass.
            warm = None if work.contiguous else run
            entries.append(Entry(name, run, evict or warm, once=evict is not None))
        if not entries:
            return
        samples = alternate(entries, plan.rounds, pass_min_ns=PASS_MIN_NS)
    measured.ratios += ratios_of(shape.name, threads, samples)
    limit = next((each for each in samples if each.name == LIMIT), None)
    for each in samples:
        rates = each.spread()
        measured.results.append(
            Result(
                shape=shape.name,
                contender=each.name,
                form=forms[each.name],
                threads=threads,
                pages=work.pages,
                rounds=plan.rounds,
                gb_per_s=rates,
                pages_per_s=rates.median * 1e9 / PAGE_SIZE,
                ms=each.ms_for(work.pages * PAGE_SIZE),
                limit=ratio(each, limit) if limit else None,
            )
        )


def _pass(
    contender: Contender, made: Ready, work: Workload, random: np.random.Generator
) -> Callable[[], int]:
    """One pass from a random page on: all but a little, or a window for a slow contender.

    Scattered pages are at random places already, and are all gone over.
    """
    count = work.pages
    if work.contiguous and count > WINDOW_PAGES:
        count = count - _OFFSET_PAGES if contender.whole else WINDOW_PAGES

    def run() -> int:
        made.run(int(random.integers(work.pages - count + 1)), count)
        return count * PAGE_SIZE

    return run
