"""One suite for all backends: what every source promises (docs/spec/sources.md)."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pyscan.errors import SourceUnavailable
from pyscan.records import PAGE_SIZE, POISON, MemoryRegion, PageStatus, RegionKind
from pyscan.sources.base import NO_OFFSET, Source, find_regions, is_ram, populated
from pyscan.sources.file import Access, FileSource
from pyscan.sources.layers import FaultSource
from pyscan.sources.layout import Layout, Segment

HIGH = (4 << 30) >> 12
OK, HOLE, LINK_DOWN = PageStatus.OK, PageStatus.HOLE, PageStatus.LINK_DOWN

#: RAM, ROM, a hole, RAM above 4 GiB that lies first in the file.
LAYOUT = Layout.of(
    [
        Segment(MemoryRegion(0, 8 * PAGE_SIZE), 4 * PAGE_SIZE),
        Segment(MemoryRegion(8 * PAGE_SIZE, 2 * PAGE_SIZE, RegionKind.ROM), 12 * PAGE_SIZE),
        Segment(MemoryRegion(HIGH << 12, 4 * PAGE_SIZE), 0),
    ]
)
FRAMES = [*range(10), *range(HIGH, HIGH + 4)]
OUTSIDE = [10, 11, HIGH - 1, HIGH + 4, 1 << 40, (1 << 52) - 1, (1 << 64) - 1]


@dataclass
class Target:
    """A source and the file behind it."""

    source: Source
    path: Path
    kind: str

    def content(self, frame: int) -> bytes:
        offset = int(LAYOUT.offsets(np.array([frame], dtype=np.uint64))[0])
        data = self.path.read_bytes()
        return data[offset : offset + PAGE_SIZE]


def opened(path: Path, kind: str, stack: ExitStack) -> Source:
    if kind == "layer":
        return FaultSource(opened(path, "map", stack), {})
    pidfd = None
    if kind == "process":  # as qemu: does; this process does not end
        pidfd = os.pidfd_open(os.getpid())
    access = Access.PREAD if kind == "pread" else Access.MAP
    return stack.enter_context(FileSource(f"file:{path}", path, LAYOUT, access, pidfd))


@pytest.fixture(params=["map", "pread", "process", "layer"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    path = tmp_path / "ram"
    path.write_bytes(np.random.default_rng(1).bytes(14 * PAGE_SIZE))
    with ExitStack() as stack:
        yield Target(opened(path, request.param, stack), path, request.param)


def read(source: Source, frames: list[int]) -> tuple[list[int], np.ndarray]:
    buffer = np.zeros((len(frames), PAGE_SIZE), dtype=np.uint8)
    statuses = source.read(np.array(frames, dtype=np.uint64), buffer)
    assert statuses.dtype == np.uint8
    return statuses.tolist(), buffer


def assert_poisoned(pages: np.ndarray) -> None:
    assert (pages == POISON).all()


def test_every_page_of_the_map(target: Target) -> None:
    statuses, pages = read(target.source, FRAMES)
    assert statuses == [OK] * len(FRAMES)
    for frame, page in zip(FRAMES, pages, strict=True):
        assert page.tobytes() == target.content(frame)


def test_scattered_reversed_and_repeated_frames(target: Target) -> None:
    frames = [HIGH + 3, 0, 5, 4, 5, 5, HIGH, 9, 8, 7, 0]
    statuses, pages = read(target.source, frames)
    assert statuses == [OK] * len(frames)
    assert [page.tobytes() for page in pages] == [target.content(frame) for frame in frames]


def test_frames_outside_the_map_are_holes_among_good_pages(target: Target) -> None:
    frames = [frame for pair in zip(OUTSIDE, FRAMES, strict=False) for frame in pair]
    statuses, pages = read(target.source, frames)
    assert statuses == [HOLE, OK] * len(OUTSIDE)
    assert_poisoned(pages[::2])
    assert [page.tobytes() for page in pages[1::2]] == [target.content(f) for f in frames[1::2]]


def test_no_frames(target: Target) -> None:
    assert read(target.source, [])[0] == []


@pytest.mark.parametrize(
    ("frames", "buffer"),
    [
        (np.zeros(2, np.uint64), np.zeros((1, PAGE_SIZE), np.uint8)),
        (np.zeros(1, np.uint64), np.zeros((1, PAGE_SIZE - 1), np.uint8)),
        (np.zeros(1, np.uint64), np.zeros(PAGE_SIZE, np.uint8)),
        (np.zeros(1, np.uint64), np.zeros((1, PAGE_SIZE), np.int8)),
        (np.zeros(1, np.int64), np.zeros((1, PAGE_SIZE), np.uint8)),
        (np.zeros((1, 1), np.uint64), np.zeros((1, PAGE_SIZE), np.uint8)),
        (np.zeros(2, np.uint64), np.zeros((4, PAGE_SIZE), np.uint8)[::2]),
        (np.zeros(1, np.uint64), np.frombuffer(bytes(PAGE_SIZE), np.uint8).reshape(1, -1)),
    ],
    ids=["short", "narrow", "flat", "signed", "frames", "matrix", "strided", "read-only"],
)
def test_requests_of_a_wrong_shape(target: Target, frames: np.ndarray, buffer: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be"):
        target.source.read(frames, buffer)


def test_regions_and_kinds(target: Target) -> None:
    memory = target.source.regions()
    assert memory == LAYOUT.memory_map
    frames = np.array([0, 7, 8, 9, 10, HIGH - 1, HIGH, HIGH + 3, HIGH + 4], dtype=np.uint64)
    assert find_regions(memory, frames).tolist() == [0, 0, 1, 1, -1, -1, 2, 2, -1]
    ram = [True, True, False, False, False, False, True, True, False]
    assert is_ram(memory, frames).tolist() == ram


def test_view_shows_the_same_pages(target: Target) -> None:
    view = target.source.view()
    assert (view is None) == (target.kind in {"pread", "layer"})
    if view is None:
        return
    assert view.data.readonly
    offsets = view.offsets(np.array(FRAMES + OUTSIDE, dtype=np.uint64))
    assert (offsets[len(FRAMES) :] == NO_OFFSET).all()
    for frame, offset in zip(FRAMES, offsets[: len(FRAMES)].tolist(), strict=True):
        assert view.data[offset : offset + PAGE_SIZE] == target.content(frame)


def test_a_truncated_file_loses_pages_and_never_invents_zeros(target: Target) -> None:
    os.truncate(target.path, 6 * PAGE_SIZE + 100)  # frames 0 and 1, and RAM above 4 GiB, stay
    statuses, pages = read(target.source, FRAMES)
    assert statuses == [OK] * 2 + [LINK_DOWN] * 8 + [OK] * 4
    assert_poisoned(pages[2:10])
    assert pages[1].tobytes() == target.content(1)
    # A search of all memory must meet the lost pages, not skip them as holes.
    assert populated(target.source) == LAYOUT.memory_map


def test_a_closed_source_is_down(target: Target) -> None:
    target.source.close()
    target.source.close()
    statuses, pages = read(target.source, [0, 10, HIGH])
    assert statuses == [LINK_DOWN] * 3
    assert_poisoned(pages)
    assert target.source.view() is None
    with pytest.raises(SourceUnavailable, match="open the source again"):
        target.source.regions()


def race(target: Target, act: Callable[[], None]) -> list[tuple[list[int], np.ndarray]]:
    """Four threads read until each has seen what `act` does; returns their last reads."""
    results: list[tuple[list[int], np.ndarray]] = []
    started = threading.Barrier(5)

    def reader() -> None:
        started.wait()
        while True:
            statuses, pages = read(target.source, FRAMES)
            for status, frame, page in zip(statuses, FRAMES, pages, strict=True):
                good = contents[frame] if status == OK else bytes([POISON]) * PAGE_SIZE
                assert page.tobytes() == good
            if OK not in statuses:
                results.append((statuses, pages))
                return

    contents = {frame: target.content(frame) for frame in FRAMES}
    threads = [threading.Thread(target=reader, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    act()
    for thread in threads:
        thread.join(timeout=20)
    return results


def test_close_while_others_read(target: Target) -> None:
    results = race(target, target.source.close)
    assert [statuses for statuses, _ in results] == [[LINK_DOWN] * len(FRAMES)] * 4


def test_close_waits_for_a_read_under_way(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed earlier, the descriptor's number could be another file's by now."""
    real = os.preadv
    inside, go_on = threading.Event(), threading.Event()
    results = []

    def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
        inside.set()
        assert go_on.wait(timeout=20)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    reader = threading.Thread(target=lambda: results.append(read(target.source, [0])))
    closer = threading.Thread(target=target.source.close)
    reader.start()
    assert inside.wait(timeout=20)
    closer.start()
    closer.join(timeout=0.1)
    waits = closer.is_alive()
    go_on.set()
    reader.join(timeout=20)
    closer.join(timeout=20)
    assert waits
    assert not closer.is_alive()
    assert results[0][0] == [OK]
    assert results[0][1].tobytes() == target.content(0)


def test_truncation_while_others_read(target: Target) -> None:
    results = race(target, lambda: os.truncate(target.path, 0))
    assert [statuses for statuses, _ in results] == [[LINK_DOWN] * len(FRAMES)] * 4


@pytest.mark.parametrize("fault", [status for status in PageStatus if status != OK])
def test_faults_of_all_pages(target: Target, fault: PageStatus) -> None:
    source = FaultSource(target.source, fault)
    statuses, pages = read(source, [0, 10, HIGH])
    assert statuses == [fault, HOLE, fault]
    assert_poisoned(pages)
    assert source.view() is None


def test_faults_of_some_pages(target: Target) -> None:
    faults = {1: PageStatus.TORN, HIGH: PageStatus.BLOCKED, 10: PageStatus.TIMEOUT}
    statuses, pages = read(FaultSource(target.source, faults), [0, 1, 1, 10, HIGH, HIGH + 1])
    assert statuses == [OK, PageStatus.TORN, PageStatus.TORN, HOLE, PageStatus.BLOCKED, OK]
    assert_poisoned(pages[1:5])
    assert pages[5].tobytes() == target.content(HIGH + 1)


def test_one_bad_page_does_not_hide_its_neighbours(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO in the middle of a run: no file system here fails on demand, so preadv does."""
    real = os.preadv
    bad = 6 * PAGE_SIZE  # frame 2

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        length = sum(buffer.nbytes for buffer in buffers)
        if offset == bad:
            raise OSError(errno.EIO, "Input/output error")
        if offset < bad < offset + length:
            return real(fd, [buffers[0].cast("B")[: bad - offset]], offset)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    statuses, pages = read(target.source, list(range(10)))
    assert statuses == [OK, OK, LINK_DOWN] + [OK] * 7
    assert_poisoned(pages[2])
    assert pages[3].tobytes() == target.content(3)
