"""Cost against size: scan cost must be a straight line through (almost) nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import numpy as np

from pyscan.bench.contenders import Ready, ready
from pyscan.bench.document import Point, Series
from pyscan.bench.measure import Plan, Progress
from pyscan.bench.memory import Backing, Memory, available_bytes, filled, workload
from pyscan.bench.peers import Unavailable
from pyscan.bench.runner import Entry, Samples, alternate
from pyscan.bench.shapes import BY_NAME
from pyscan.records import PAGE_SIZE

_MIB: Final = 1 << 20
_CONTENDERS: Final = ("nh4aes", "gf128aes", "sha256", "read-limit")
_SIZE_MIN: Final = 16 * _MIB
#: Of the memory that is available: our buffer and the digests must not drive others out.
_SHARE: Final = 0.5
_QUICK_BYTES: Final = 1024 * _MIB
#: What a kernel's protected pages come to.
TARGET_BYTES: Final = 30_000_000 // PAGE_SIZE * PAGE_SIZE
TARGETS_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class _Axis:
    """What a series is drawn over."""

    name: str
    unit: str
    bytes_per_unit: int


_SIZE: Final = _Axis("size", "MiB", _MIB)
_TARGETS: Final = _Axis("targets", "targets of 30 MB", TARGET_BYTES)


def fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float, float]:
    """Least-squares line: slope, intercept, R^2, greatest residual as a share of y.

    Every point counts by its relative error (weights 1 / y): otherwise the largest sizes
    alone would make the line.
    """
    x, y = np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)
    slope, intercept = np.polyfit(x, y, 1, w=1 / y)
    residuals = y - (slope * x + intercept)
    total = float(((y - y.mean()) ** 2).sum())
    r_squared = 1 - float((residuals**2).sum()) / total if total else 1.0
    return float(slope), float(intercept), r_squared, float(np.abs(residuals / y).max())


def measure_series(plan: Plan, quick: bool, progress: Progress) -> list[Series]:
    """Size and number of targets, each with every number of threads."""
    threads = [count for count in (1, 2, 4, 8, 16, 32) if count <= plan.threads_max]
    found: list[Series] = []
    for count in threads[-1:] if quick else threads:
        progress(f"scaling with size, {count} threads")
        found += _by_size(plan, count, _largest(quick))
        progress(f"scaling with targets, {count} threads")
        found += _by_targets(plan, count, 8 if quick else TARGETS_MAX)
    return found


def _largest(quick: bool) -> int:
    if quick:
        return _QUICK_BYTES
    return max(_QUICK_BYTES, int(available_bytes() * _SHARE))


def _by_size(plan: Plan, threads: int, largest: int) -> list[Series]:
    sizes = [_SIZE_MIN]
    while 2 * sizes[-1] <= largest:
        sizes.append(2 * sizes[-1])
    with filled(sizes[-1], Backing.ANONYMOUS, False, plan.random) as memory:
        parts = [Memory(memory.data[:size], None) for size in sizes]
        return [
            _series(_SIZE, name, threads, [size / _MIB for size in sizes], samples)
            for name, samples in _measured(plan, threads, [[part] for part in parts])
        ]


def _by_targets(plan: Plan, threads: int, targets_max: int) -> list[Series]:
    counts = [2**n for n in range(targets_max.bit_length())]
    with filled(targets_max * TARGET_BYTES, Backing.ANONYMOUS, False, plan.random) as memory:
        targets = [
            Memory(memory.data[start : start + TARGET_BYTES], None)
            for start in range(0, len(memory.data), TARGET_BYTES)
        ]
        return [
            _series(_TARGETS, name, threads, counts, samples)
            for name, samples in _measured(plan, threads, [targets[:count] for count in counts])
        ]


def _measured(
    plan: Plan, threads: int, groups: Sequence[Sequence[Memory]]
) -> Iterator[tuple[str, list[Samples]]]:
    """For each contender the samples of going over all memories of each group, in turn."""
    memories = {id(memory): memory for group in groups for memory in group}
    works = {key: workload(memory, plan.random) for key, memory in memories.items()}
    for name in _CONTENDERS:
        if plan.wanted and name not in plan.wanted:
            continue
        with ExitStack() as stack:
            try:
                made = {
                    key: ready(BY_NAME[name], work, threads, stack) for key, work in works.items()
                }
            except Unavailable:
                continue  # the shapes say it already
            entries = [
                Entry(
                    str(len(group)),
                    _over([(made[id(each)], works[id(each)].pages) for each in group]),
                )
                for group in groups
            ]
            yield name, alternate(entries, plan.rounds)


def _over(parts: Sequence[tuple[Ready, int]]) -> Callable[[], int]:
    def run() -> int:
        for made, pages in parts:
            made.run(0, pages)
        return sum(pages for _, pages in parts) * PAGE_SIZE

    return run


def _series(
    axis: _Axis, contender: str, threads: int, xs: Sequence[float], samples: Sequence[Samples]
) -> Series:
    points = [
        Point(x, each.ms_for(int(x * axis.bytes_per_unit)))
        for x, each in zip(xs, samples, strict=True)
    ]
    slope, intercept, r_squared, residual = fit(xs, [point.ms.median for point in points])
    return Series(
        name=axis.name,
        unit=axis.unit,
        contender=contender,
        threads=threads,
        points=points,
        ms_per_unit=slope,
        ms_at_zero=intercept,
        r_squared=r_squared,
        residual_max=residual,
    )
