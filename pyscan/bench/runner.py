"""Contenders in turn, A B C A B C, in one process: what one round costs, and ratios.

Machines drift: clocks, neighbours, temperature. A ratio is therefore taken inside a round,
between passes that ran one right after the other, and the figure that counts is the median
of those ratios, never a ratio of two medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from pyscan.bench.document import Spread

#: A timed pass repeats its work until it lasts this long: far above the clock's own cost.
PASS_MIN_NS: Final = 2_000_000
#: Repetitions of a pass are bounded, whatever a clock says.
REPEATS_MAX: Final = 100_000

Clock = Callable[[], int]


@dataclass(frozen=True, slots=True)
class Entry:
    """One contender as the runner sees it.

    `run()` does one pass and returns how much work that was, in bytes or in calls. `before()`
    runs ahead of every timed pass, outside the time taken: to empty the caches, or to fill
    them. `once`: a timed pass is never repeated, as after the first the caches are warm.
    """

    name: str
    run: Callable[[], int]
    before: Callable[[], object] | None = None
    once: bool = False


@dataclass(frozen=True, slots=True)
class Samples:
    """What the rounds of one contender gave, in their order: work a nanosecond.

    For work in bytes that is GB/s.
    """

    name: str
    per_ns: tuple[float, ...]

    def spread(self) -> Spread:
        """Median, least and greatest rate."""
        return spread(self.per_ns)

    def ms_for(self, size_bytes: int) -> Spread:
        """Time in milliseconds for `size_bytes` at these rates."""
        return spread([size_bytes / rate / 1e6 for rate in self.per_ns])


def alternate(
    entries: Sequence[Entry],
    rounds: int,
    *,
    pass_min_ns: int = PASS_MIN_NS,
    clock: Clock = time.perf_counter_ns,
) -> list[Samples]:
    """Run every entry once a round, in turn, and keep its rate in every round.

    A warm-up ahead of the rounds compiles, faults pages in, and finds how often a short
    pass must be repeated. Raises ValueError for no rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds: {rounds}, at least 1 is needed")
    repeats = [_warm_up(entry, pass_min_ns, clock) for entry in entries]
    rates: list[list[float]] = [[] for _ in entries]
    for _ in range(rounds):
        for entry, count, rate in zip(entries, repeats, rates, strict=True):
            rate.append(_timed(entry, count, clock))
    return [Samples(entry.name, tuple(rate)) for entry, rate in zip(entries, rates, strict=True)]


def spread(values: Sequence[float]) -> Spread:
    """Median, least and greatest of at least one value."""
    return Spread(median=statistics.median(values), min=min(values), max=max(values))


def ratio(samples: Samples, against: Samples) -> Spread:
    """How many times as fast as `against`, taken round by round."""
    pairs = zip(samples.per_ns, against.per_ns, strict=True)
    return spread([rate / other for rate, other in pairs])


def _warm_up(entry: Entry, pass_min_ns: int, clock: Clock) -> int:
    """How many repetitions make a pass last `pass_min_ns`."""
    entry.run()
    if entry.once:
        return 1
    started = clock()
    entry.run()
    elapsed = max(1, clock() - started)
    return min(REPEATS_MAX, -(-pass_min_ns // elapsed))


def _timed(entry: Entry, repeats: int, clock: Clock) -> float:
    """Work a nanosecond of one pass."""
    if entry.before is not None:
        entry.before()
    done = 0
    started = clock()
    for _ in range(repeats):
        done += entry.run()
    return done / max(1, clock() - started)
