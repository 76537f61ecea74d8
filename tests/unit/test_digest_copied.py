"""Sweeps of copied-in memory: the same result as without the copy, and two buffers at work."""

import threading

import numpy as np
import pytest

from pyscan.digest import CopiedSweep, DigestKey, open_digester
from pyscan.records import PAGE_SIZE, POISON, PageStatus

COUNT = 50
MEMORY = np.random.default_rng(11).integers(0, 256, (COUNT, PAGE_SIZE), dtype=np.uint8)
FRAMES = np.random.default_rng(12).permutation(COUNT).astype(np.uint64)
KEY = DigestKey.generate("nh4aes")
DIGESTER = open_digester("native", "nh4aes", KEY)
EXPECTED = DIGESTER.hash_pages(MEMORY[FRAMES], frames=FRAMES)[0]


def read(frames: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """A source with 40 frames; frame 13 is blocked."""
    statuses = np.where(frames < 40, PageStatus.OK, PageStatus.HOLE).astype(np.uint8)
    statuses[frames == 13] = PageStatus.BLOCKED
    pages[:] = MEMORY[frames]
    pages[statuses != PageStatus.OK] = POISON
    return statuses


@pytest.mark.parametrize("chunk_pages", [1, 2, 7, 49, 50, 51])
@pytest.mark.parametrize("count", [0, 1, COUNT])
def test_every_page_is_compared_once(chunk_pages: int, count: int) -> None:
    frames, expected = FRAMES[:count], EXPECTED[:count].copy()
    changed = [index for index in range(0, count, 9) if frames[index] < 13]
    expected[changed, 3] ^= 0x20
    with CopiedSweep(DIGESTER, read, chunk_pages) as sweep:
        found = sweep.compare(frames, expected)
        bounded = sweep.compare(frames, expected, indices_max=2)
    unread = np.flatnonzero((frames >= 40) | (frames == 13)).tolist()
    assert found.indices.tolist() == sorted({*changed, *unread})
    assert found.indices.dtype == np.uint64
    assert (found.mismatched, found.unreadable) == (len(changed), len(unread))
    assert found.ok == count - len(changed) - len(unread)
    assert bounded.indices.tolist() == found.indices.tolist()[:2]
    for frame, status in zip(frames.tolist(), found.statuses.tolist(), strict=True):
        other = PageStatus.HOLE if frame >= 40 else PageStatus.OK
        assert status == (PageStatus.BLOCKED if frame == 13 else other)


def test_an_unread_page_is_never_as_expected() -> None:
    """Not even when the digest of POISON is what is expected."""
    poison = np.full((1, PAGE_SIZE), POISON, dtype=np.uint8)
    frames = np.array([45], dtype=np.uint64)
    expected = DIGESTER.hash_pages(poison, frames=frames)[0]
    with CopiedSweep(DIGESTER, read) as sweep:
        found = sweep.compare(frames, expected)
    assert (found.ok, found.mismatched, found.unreadable) == (0, 0, 1)


def test_a_chunk_is_read_while_another_is_digested() -> None:
    """The first chunk is not digested before the second is being read."""
    second_read = threading.Event()

    class Waiting:
        digest = "nh4aes"

        def compare_pages(self, *arguments: object, **named: object) -> object:
            assert second_read.wait(timeout=30)
            return DIGESTER.compare_pages(*arguments, **named)

    def watched(frames: np.ndarray, pages: np.ndarray) -> np.ndarray:
        if frames[0] != FRAMES[0]:
            second_read.set()
        return read(frames, pages)

    with CopiedSweep(Waiting(), watched, chunk_pages=25) as sweep:
        assert sweep.compare(FRAMES, EXPECTED).ok == 39


def test_what_the_reader_raises_reaches_the_caller() -> None:
    def broken(frames: np.ndarray, pages: np.ndarray) -> np.ndarray:
        raise OSError("gone")

    with CopiedSweep(DIGESTER, broken) as sweep:
        for _ in range(2):
            with pytest.raises(OSError, match="gone"):
                sweep.compare(FRAMES, EXPECTED)


@pytest.mark.parametrize("chunk_pages", [0, -1])
def test_a_chunk_has_pages(chunk_pages: int) -> None:
    with pytest.raises(ValueError, match=r"^chunk_pages: "):
        CopiedSweep(DIGESTER, read, chunk_pages)
