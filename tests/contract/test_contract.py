"""One suite for all sources: what docs/spec/sources.md promises, kept by every one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from contract.targets import HIGH, SLOW, TARGETS, Target, open_target
from pyscan.errors import SourceUnavailable
from pyscan.records import PAGE_SIZE, POISON, PageStatus
from pyscan.sources import NO_OFFSET, Source
from pyscan.sources.base import populated
from pyscan.sources.layers import FaultSource

OK, HOLE, LINK_DOWN = PageStatus.OK, PageStatus.HOLE, PageStatus.LINK_DOWN
LOST = {PageStatus.LINK_DOWN, PageStatus.TIMEOUT}
QUICK = [kind for kind in TARGETS if kind not in SLOW]


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    with open_target(request.param, tmp_path) as made:
        yield made


@pytest.fixture(params=QUICK)
def quick(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    """A target that can be asked for many pages."""
    with open_target(request.param, tmp_path) as made:
        yield made


def read(source: Source, frames: list[int]) -> tuple[list[int], np.ndarray]:
    buffer = np.zeros((len(frames), PAGE_SIZE), dtype=np.uint8)
    statuses = source.read(np.array(frames, dtype=np.uint64), buffer)
    assert statuses.dtype == np.uint8
    assert statuses.shape == (len(frames),)
    return statuses.tolist(), buffer


def assert_whole(target: Target, source: Source, frames: list[int]) -> None:
    statuses, pages = read(source, frames)
    assert statuses == [OK] * len(frames)
    contents = {frame: target.memory.read(frame) for frame in set(frames)}
    for frame, page in zip(frames, pages, strict=True):
        assert page.tobytes() == contents[frame]


def assert_poisoned(pages: np.ndarray) -> None:
    assert (pages == POISON).all()


def test_the_memory_map(target: Target) -> None:
    assert target.source.regions() == target.memory.layout.memory_map
    assert any(region.gpa >= 4 << 30 for region in target.source.regions())


def test_the_edges_of_every_region(target: Target) -> None:
    assert max(target.frames) >= HIGH
    assert_whole(target, target.source, target.frames)


def test_one_page(target: Target) -> None:
    assert_whole(target, target.source, target.frames[-1:])


def test_no_pages(target: Target) -> None:
    assert read(target.source, [])[0] == []


def test_scattered_reversed_and_repeated_frames(quick: Target) -> None:
    shuffled = np.random.default_rng(2).permutation(quick.frames).tolist()
    assert_whole(quick, quick.source, [*shuffled, *quick.frames[::-1], *quick.frames[:3] * 3])


def test_more_pages_than_any_batch(quick: Target) -> None:
    frames = sorted(quick.frames) * 60
    assert_whole(quick, quick.source, frames)


def test_frames_outside_the_map_are_holes_among_good_pages(target: Target) -> None:
    inside = target.frames * (len(target.outside) // len(target.frames) + 1)
    frames = [f for pair in zip(target.outside, inside, strict=False) for f in pair]
    if len(target.frames) < 4:  # a slow one
        frames = frames[:4]
    statuses, pages = read(target.source, frames)
    assert statuses == [HOLE, OK] * (len(frames) // 2)
    assert_poisoned(pages[::2])
    assert [p.tobytes() for p in pages[1::2]] == [target.memory.read(f) for f in frames[1::2]]


def test_a_run_across_the_end_of_a_region(target: Target) -> None:
    end = target.memory.layout.memory_map.regions[-1].end >> 12
    target.memory.fill([end - 1])
    statuses, pages = read(target.source, [end - 1, end, end + 1])
    assert statuses == [OK, HOLE, HOLE]
    assert_poisoned(pages[1:])


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
@pytest.mark.parametrize("kind", TARGETS)
def test_requests_of_a_wrong_shape(
    kind: str, frames: np.ndarray, buffer: np.ndarray, tmp_path: Path
) -> None:
    with (
        open_target(kind, tmp_path) as target,
        pytest.raises(ValueError, match="must be"),
    ):
        target.source.read(frames, buffer)


@pytest.mark.parametrize("odd", [1, 8, 2049])
def test_buffers_and_frame_lists_at_odd_addresses(odd: int, quick: Target) -> None:
    count = len(quick.frames)
    memory = np.zeros(count * PAGE_SIZE + odd, dtype=np.uint8)
    buffer = memory[odd:].reshape(count, PAGE_SIZE)
    frames = np.array([frame for frame in quick.frames for _ in range(2)], dtype=np.uint64)[::2]
    assert not frames.flags.c_contiguous
    assert quick.source.read(frames, buffer).tolist() == [OK] * count
    for frame, page in zip(quick.frames, buffer, strict=True):
        assert page.tobytes() == quick.memory.read(frame)
    assert not memory[:odd].any()


@pytest.mark.parametrize("value", [0x00, 0xFF, POISON])
def test_a_page_of_one_byte_is_content(value: int, target: Target) -> None:
    """Neither zeros nor the pattern of a failed read say anything of a status."""
    frame = target.frames[0]
    target.memory.write(frame, bytes([value]) * PAGE_SIZE)
    statuses, pages = read(target.source, [frame])
    if value == 0 and not target.tells_zeros:
        assert statuses == [PageStatus.BLOCKED]
        assert_poisoned(pages)
    else:
        assert statuses == [OK]
        assert (pages == value).all()


def test_changes_are_seen(target: Target) -> None:
    frame = target.frames[0]
    for value in (1, 2, 3):
        target.memory.write(frame, bytes([value]) * PAGE_SIZE)
        assert read(target.source, [frame])[1][0].tobytes() == bytes([value]) * PAGE_SIZE


def test_a_search_of_all_memory_meets_what_was_written(target: Target) -> None:
    found = populated(target.source)
    assert all(found.find(frame << 12) for frame in target.frames)
    assert not any(found.find(frame << 12) for frame in target.outside)


def test_a_view_shows_the_same_pages(target: Target) -> None:
    view = target.source.view()
    assert (view is not None) == target.has_view
    if view is None:
        return
    assert view.data.readonly
    offsets = view.offsets(np.array(target.frames + target.outside, dtype=np.uint64))
    assert (offsets[len(target.frames) :] == NO_OFFSET).all()
    for frame, offset in zip(target.frames, offsets.tolist(), strict=False):
        assert view.data[offset : offset + PAGE_SIZE] == target.memory.read(frame)


def test_a_closed_source_is_down(target: Target) -> None:
    target.source.close()
    target.source.close()
    statuses, pages = read(target.source, [target.frames[0], target.outside[0]])
    assert statuses == [LINK_DOWN] * 2
    assert_poisoned(pages)
    assert target.source.view() is None
    with pytest.raises(SourceUnavailable, match="open the source again"):
        target.source.regions()


def race(target: Target, act: Callable[[], None]) -> list[list[int]]:
    """Four threads read until each has seen what `act` does; returns their last statuses."""
    results: list[list[int]] = []
    started = threading.Barrier(5)
    contents = {frame: target.memory.read(frame) for frame in target.frames}

    def reader() -> None:
        frames = target.frames
        started.wait()
        while True:
            statuses, pages = read(target.source, frames)
            for status, frame, page in zip(statuses, frames, pages, strict=True):
                good = contents[frame] if status == OK else bytes([POISON]) * PAGE_SIZE
                assert page.tobytes() == good
            if OK not in statuses:
                results.append(statuses)
                return

    threads = [threading.Thread(target=reader, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    act()
    for thread in threads:
        thread.join(timeout=60)
    return results


def test_close_while_others_read(target: Target) -> None:
    assert race(target, target.source.close) == [[LINK_DOWN] * len(target.frames)] * 4


def test_the_link_goes_while_others_read(quick: Target) -> None:
    results = race(quick, quick.lose_link)
    assert len(results) == 4
    assert all(set(statuses) <= LOST for statuses in results)


def test_readers_side_by_side(quick: Target) -> None:
    failures: list[BaseException] = []

    def reader(number: int) -> None:
        frames = np.random.default_rng(number).permutation(quick.frames).tolist()
        try:
            for _ in range(20):
                assert_whole(quick, quick.source, frames)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=reader, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failures


def test_a_lost_link_gives_no_pages_and_never_zeros(target: Target) -> None:
    target.lose_link()
    statuses, pages = read(target.source, target.frames)
    assert set(statuses) <= LOST
    assert_poisoned(pages)
    # A search of all memory must meet the lost pages, not skip them.
    try:
        found = populated(target.source)
    except SourceUnavailable:
        return
    assert found == target.memory.layout.memory_map


def test_a_link_that_comes_back(target: Target) -> None:
    target.lose_link()
    assert OK not in read(target.source, target.frames)[0]
    target.return_link()
    assert_whole(target, target.source, target.frames)
    target.source.close()  # some serve one reader at a time
    with target.open() as again:
        assert_whole(target, again, target.frames)


@pytest.mark.parametrize("fault", [status for status in PageStatus if status != OK])
def test_faults_of_all_pages(quick: Target, fault: PageStatus) -> None:
    source = FaultSource(quick.source, fault)
    statuses, pages = read(source, [quick.frames[0], quick.outside[0], quick.frames[-1]])
    assert statuses == [fault, HOLE, fault]
    assert_poisoned(pages)
    assert source.view() is None


def test_faults_of_some_pages(quick: Target) -> None:
    first, second, third, *_ = quick.frames
    outside = quick.outside[0]
    faults = {
        first: PageStatus.TORN,
        second: PageStatus.BLOCKED,
        outside: PageStatus.TIMEOUT,
    }
    source = FaultSource(quick.source, faults)
    statuses, pages = read(source, [third, first, first, outside, second, third])
    assert statuses == [OK, PageStatus.TORN, PageStatus.TORN, HOLE, PageStatus.BLOCKED, OK]
    assert_poisoned(pages[1:5])
    assert pages[5].tobytes() == quick.memory.read(third)
