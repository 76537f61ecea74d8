"""What is particular to files: mappings, truncation, and pages that the disk does not give.

What every source promises: tests/contract.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from contract.targets import HIGH, LAYOUT, Target, open_target

from pyscan.records import PAGE_SIZE, POISON, PageStatus
from pyscan.sources import Source
from pyscan.sources.base import find_regions, is_ram, populated

OK, LINK_DOWN = PageStatus.OK, PageStatus.LINK_DOWN


@pytest.fixture(params=["file-map", "file-pread", "file-process"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    with open_target(request.param, tmp_path) as made:
        yield made


def read(source: Source, frames: list[int]) -> tuple[list[int], np.ndarray]:
    buffer = np.zeros((len(frames), PAGE_SIZE), dtype=np.uint8)
    return source.read(np.array(frames, dtype=np.uint64), buffer).tolist(), buffer


def test_regions_and_kinds(target: Target) -> None:
    memory = target.source.regions()
    frames = np.array([0, 7, 8, 9, 10, HIGH - 1, HIGH, HIGH + 3, HIGH + 4], dtype=np.uint64)
    assert find_regions(memory, frames).tolist() == [0, 0, 1, 1, -1, -1, 2, 2, -1]
    ram = [True, True, False, False, False, False, True, True, False]
    assert is_ram(memory, frames).tolist() == ram


def test_a_truncated_file_loses_pages_and_never_invents_zeros(target: Target) -> None:
    os.truncate(target.memory.path, 6 * PAGE_SIZE + 100)  # frames 0, 1, and what is above 4 GiB
    statuses, pages = read(target.source, [*range(10), *range(HIGH, HIGH + 4)])
    assert statuses == [OK] * 2 + [LINK_DOWN] * 8 + [OK] * 4
    assert (pages[2:10] == POISON).all()
    assert pages[1].tobytes() == target.memory.read(1)
    # A search of all memory must meet the lost pages, not skip them as holes.
    assert populated(target.source) == LAYOUT.memory_map


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
    assert results[0][1].tobytes() == target.memory.read(0)


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
    assert (pages[2] == POISON).all()
    assert pages[3].tobytes() == target.memory.read(3)
