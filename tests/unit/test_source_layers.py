"""Layers alone: what they count, how long they take, and links that come and go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pyscan.records import PAGE_SIZE, PageStatus
from pyscan.sources import Source, open_source
from pyscan.sources.layers import CountingSource, DelaySource, Faults, FaultSource

OK, HOLE, BLOCKED, LINK_DOWN, TIMEOUT, TORN = PageStatus
PAGES = 64
OUTSIDE = PAGES


class FakeClock:
    """Time that passes only while somebody sleeps, or when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now_s += seconds


class SlowSource:
    """Part of a source whose reads take a second."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock

    def read(self, frames: np.ndarray, _buffer: np.ndarray) -> np.ndarray:
        self._clock.now_s += 1.0
        return np.zeros(len(frames), dtype=np.uint8)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Source]:
    path = tmp_path / "ram"
    path.write_bytes(bytes(PAGES * PAGE_SIZE))
    with open_source(f"file:{path}?machine=pc&size={PAGES * PAGE_SIZE}") as source:
        yield source


def read(source: Source, frames: list[int]) -> list[int]:
    buffer = np.zeros((len(frames), PAGE_SIZE), dtype=np.uint8)
    return source.read(np.array(frames, dtype=np.uint64), buffer).tolist()


def test_a_read_takes_latency_and_bytes(memory: Source) -> None:
    clock = FakeClock()
    source = DelaySource(memory, latency_s=0.25, bytes_per_s=4 * PAGE_SIZE, clock=clock)
    assert read(source, [0, 1, OUTSIDE]) == [OK, OK, HOLE]
    assert clock.sleeps == [pytest.approx(0.25 + 0.5)]
    assert read(source, [0]) == [OK]
    assert clock.sleeps[1:] == [pytest.approx(0.25 + 0.25)]


def test_holes_and_empty_reads_never_reach_the_link(memory: Source) -> None:
    clock = FakeClock()
    source = DelaySource(memory, latency_s=1, clock=clock)
    assert read(source, [OUTSIDE, OUTSIDE + 1]) == [HOLE] * 2
    assert read(source, []) == []
    assert clock.sleeps == []


def test_a_source_that_is_slower_than_the_link_does_not_wait() -> None:
    clock = FakeClock()
    source = DelaySource(SlowSource(clock), latency_s=0.75, clock=clock)  # type: ignore[arg-type]
    assert read(source, [1]) == [OK]
    assert clock.sleeps == []


def test_latencies_overlap_and_bytes_queue(memory: Source) -> None:
    """Four readers come at one moment: the last waits for one latency, and all the bytes."""

    class Frozen(FakeClock):
        def sleep(self, seconds: float) -> None:
            self.sleeps.append(seconds)

    clock = Frozen()
    source = DelaySource(memory, latency_s=1, bytes_per_s=2 * PAGE_SIZE, clock=clock)
    for _ in range(4):
        read(source, [0])
    assert clock.sleeps == [pytest.approx(wait) for wait in (1.5, 2.0, 2.5, 3.0)]


def test_jitter_is_bounded_and_the_same_in_every_run(memory: Source) -> None:
    waits = []
    for _ in range(2):
        clock = FakeClock()
        source = DelaySource(memory, latency_s=1, jitter_s=0.5, clock=clock)
        for _ in range(50):
            read(source, [0])
        waits.append(clock.sleeps)
    assert waits[0] == waits[1]
    assert all(1 <= wait <= 1.5001 for wait in waits[0])
    assert max(waits[0]) - min(waits[0]) > 0.25


def test_counts(memory: Source) -> None:
    clock = FakeClock()
    faults = {1: TORN, 2: BLOCKED, 3: TIMEOUT, 4: LINK_DOWN}
    source = CountingSource(FaultSource(memory, faults), clock=clock)
    assert source.counts().reads == 0
    assert source.counts().bytes_read == 0
    assert read(source, [0, 1, 2, 3, 4, 5, OUTSIDE]) == [
        OK,
        TORN,
        BLOCKED,
        TIMEOUT,
        LINK_DOWN,
        OK,
        HOLE,
    ]
    read(source, [7])
    counts = source.counts()
    assert counts.reads == 2
    assert counts.pages == {OK: 3, HOLE: 1, BLOCKED: 1, LINK_DOWN: 1, TIMEOUT: 1, TORN: 1}
    assert counts.bytes_read == 3 * PAGE_SIZE
    with pytest.raises(ValueError, match="must be"):
        source.read(np.zeros(1, np.uint64), np.zeros((2, PAGE_SIZE), np.uint8))
    assert source.counts() == counts


def test_seconds_are_those_inside_reads() -> None:
    clock = FakeClock()
    source = CountingSource(SlowSource(clock), clock=clock)  # type: ignore[arg-type]
    for _ in range(3):
        read(source, [0])
        clock.now_s += 50
    assert source.counts().seconds == pytest.approx(3.0)


def test_counts_of_many_readers(memory: Source) -> None:
    source = CountingSource(memory)

    def reader() -> None:
        for _ in range(200):
            read(source, [0, 1, OUTSIDE])

    threads = [threading.Thread(target=reader) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        counts = source.counts()  # one moment: every read has two good pages and a hole
        assert counts.pages[OK] == 2 * counts.reads == 2 * counts.pages[HOLE]
    for thread in threads:
        thread.join()
    assert source.counts().reads == 800


def test_a_schedule_of_faults(memory: Source) -> None:
    """Asked once a read: the link goes, comes back, and a page stays blocked."""
    schedule: list[Faults] = [{}, LINK_DOWN, LINK_DOWN, {1: BLOCKED}, {}]
    source = FaultSource(memory, iter(schedule).__next__)
    assert [read(source, [0, 1, OUTSIDE]) for _ in schedule] == [
        [OK, OK, HOLE],
        [LINK_DOWN, LINK_DOWN, HOLE],
        [LINK_DOWN, LINK_DOWN, HOLE],
        [OK, BLOCKED, HOLE],
        [OK, OK, HOLE],
    ]


def test_layers_pass_the_rest_on(memory: Source) -> None:
    source = CountingSource(DelaySource(FaultSource(memory, {})))
    assert source.uri == memory.uri
    assert source.regions() == memory.regions()
    assert source.view() is None
    source.close()
    assert read(memory, [0]) == [LINK_DOWN]
