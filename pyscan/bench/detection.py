"""How likely a modification that lives d is found, when sweeps begin every T and last s.

A page at place p of a sweep, 0 <= p <= s, is read once an interval, in an instant that is
short beside all others. A modification comes at a moment that does not depend on the
sweeps, so it is *seen* when one of these instants falls into its life:

    P(seen) = min(1, d / T)

It is a *finding* only when it is still there when the page is read again, which happens
when the sweep is over, s - p later (what is gone by then counts as transient). So

    P(found) = mean over p of min(1, max(0, d - (s - p)) / T)

which is about (d - s / 2) / T for s < d < T. Certainty takes d >= T + s.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np

from pyscan.approved import Snapshot
from pyscan.bench.document import Detection, Life
from pyscan.bench.measure import Plan, Progress
from pyscan.bench.memory import Backing, Memory, filled
from pyscan.digest import DigestKey, open_digester
from pyscan.errors import LabError
from pyscan.kernel import KernelImage
from pyscan.records import PAGE_SIZE
from pyscan.scanner import Scanner
from pyscan.sources import open_source

INTERVAL_MS: Final = 20.0
PAGES: Final = 8000
#: Lives as shares of the interval: below, at and above certainty.
_LIVES: Final = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.75)
_SETTLE_SWEEPS: Final = 2
_TIMEOUT_S: Final = 10.0


def theory(lives_ms: float, interval_ms: float, sweep_ms: float) -> tuple[float, float]:
    """Probability that a modification is found, and that it is at least seen."""
    places = (np.arange(1000) + 0.5) / 1000 * sweep_ms
    found = np.clip((lives_ms - (sweep_ms - places)) / interval_ms, 0, 1).mean()
    return float(found), min(1.0, lives_ms / interval_ms)


def measure_detection(plan: Plan, trials: int, progress: Progress) -> Detection:
    """Modify a random page at a random moment, put it back after d, and ask what was seen."""
    progress(f"detection of short-lived modifications, {trials} trials each")
    dice = random.Random(int(plan.random.integers(1 << 62)))  # noqa: S311 - moments, no secrets
    size = 2 * PAGES * PAGE_SIZE >> 21 << 21
    with filled(size, Backing.SHARED, False, plan.random) as memory, _sweeping(memory) as sweeps:
        lives = [_life(share * INTERVAL_MS, trials, memory, sweeps, dice) for share in _LIVES]
    interval_ms, sweep_ms = sweeps.interval_ms(), sweeps.sweep_ms()
    return Detection(
        interval_ms=interval_ms,
        sweep_ms=sweep_ms,
        pages=PAGES,
        lives=[_judged(life, trials, interval_ms, sweep_ms) for life in lives],
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    lives_ms: float  # as it really was, mean of the trials
    found: int
    seen: int


def _judged(life: _Seen, trials: int, interval_ms: float, sweep_ms: float) -> Life:
    found, seen = theory(life.lives_ms, interval_ms, sweep_ms)
    return Life(
        lives_ms=life.lives_ms,
        trials=trials,
        found=life.found,
        seen=life.seen,
        found_theory=found,
        seen_theory=seen,
    )


def _life(
    lives_ms: float, trials: int, memory: Memory, sweeps: _Sweeps, dice: random.Random
) -> _Seen:
    found = seen = 0
    real_ns = 0
    clock = threading.Event()  # never set: a wait that is exact to a few tens of microseconds
    for _ in range(trials):
        clock.wait(dice.random() * INTERVAL_MS / 1e3)
        offset = int(dice.choice(sweeps.frames)) * PAGE_SIZE + dice.randrange(PAGE_SIZE)
        first = sweeps.count
        began = time.perf_counter_ns()
        memory.data[offset] ^= 0x01
        clock.wait(lives_ms / 1e3)
        memory.data[offset] ^= 0x01
        real_ns += time.perf_counter_ns() - began
        sweeps.wait_for(sweeps.count + _SETTLE_SWEEPS)
        was_found, was_seen = sweeps.since(first)
        found += was_found
        seen += was_seen
    return _Seen(real_ns / trials / 1e6, found, seen)


class _Sweeps:
    """What the sweeping thread has seen so far."""

    def __init__(self, frames: list[int]) -> None:
        self.frames = frames
        self.leave = threading.Event()
        self._sweeps: list[tuple[int, int, int, bool, bool]] = []
        self._changed = threading.Condition()

    @property
    def count(self) -> int:
        """Number of finished sweeps."""
        return len(self._sweeps)

    def note(self, started_ns: int, duration_ns: int, found: bool, seen: bool) -> None:
        """One more sweep is finished."""
        with self._changed:
            self._sweeps.append((self.count, started_ns, duration_ns, found, seen))
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        """Wait until so many sweeps are finished. Raises LabError when they do not come."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.count >= count, _TIMEOUT_S):
                raise LabError(f"no sweep within {_TIMEOUT_S:g} s; run the benchmark again")

    def since(self, first: int) -> tuple[bool, bool]:
        """Whether a sweep from number `first` on found, or saw, a modification."""
        later = self._sweeps[first:]
        return any(each[3] for each in later), any(each[3] or each[4] for each in later)

    def interval_ms(self) -> float:
        """Mean time between the beginnings of sweeps that found nothing."""
        starts = np.array([each[1] for each in self._sweeps])
        quiet = ~np.array([each[3] for each in self._sweeps])
        return float(np.median(np.diff(starts)[quiet[:-1]]) / 1e6)

    def sweep_ms(self) -> float:
        """Median duration of sweeps that found nothing."""
        return float(np.median([each[2] for each in self._sweeps if not each[3]]) / 1e6)


@contextmanager
def _sweeping(memory: Memory) -> Iterator[_Sweeps]:
    """A thread that sweeps a scattered set of pages as a monitor does."""
    count = len(memory.data) // PAGE_SIZE
    frames = np.arange(0, count, 2, dtype=np.uint64)[:PAGES]
    source = open_source(f"file:{memory.path}?machine=q35&size={len(memory.data)}")
    digester = open_digester("native", "sha256")
    digests, _ = digester.hash_view(memory.data.toreadonly(), frames * np.uint64(PAGE_SIZE))
    snapshot = Snapshot(
        created_ns=time.time_ns(),
        source=source.uri,
        memory_map=source.regions(),
        kernel=KernelImage(0, 4, 0xFFFF_FFFF_8000_0000, 0, len(frames) * PAGE_SIZE),
        addresses=np.uint64(0xFFFF_FFFF_8000_0000) + frames * np.uint64(PAGE_SIZE),
        frames=frames,
        flags=np.ones(len(frames), dtype=np.uint8),
        digests=digests,
    )
    key = DigestKey.generate("nh4aes")
    keyed = open_digester("native", "nh4aes", key)
    scanner = Scanner(source, snapshot, digester, target="bench", keyed=keyed)
    sweeps = _Sweeps(frames.tolist())

    def run() -> None:
        while not sweeps.leave.is_set():
            started = time.perf_counter_ns()
            sweep = scanner.sweep(walk_tables=False).sweep
            spent = time.perf_counter_ns() - started
            sweeps.note(started, spent, sweep.mismatched > 0, sweep.transient > 0)
            sweeps.leave.wait(max(0.0, INTERVAL_MS / 1e3 - spent / 1e9))

    thread = threading.Thread(target=run, name="sweeps", daemon=True)
    thread.start()
    try:
        yield sweeps
    finally:
        sweeps.leave.set()
        thread.join()
        scanner.close()
        key.close()
        source.close()
