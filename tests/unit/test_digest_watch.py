"""Watch lists of 64-bit values, and the yardstick of all scans."""

import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyscan.digest import ReadLimit, WatchList
from pyscan.records import PAGE_SIZE, PageStatus

DATA = np.random.default_rng(3).integers(0, 256, 16 * PAGE_SIZE, dtype=np.uint8)
VIEW = memoryview(DATA)
HOLE = 2**64 - 1


def offsets_of(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def values_at(offsets: list[int]) -> np.ndarray:
    """What is there; zero for a hole."""
    data = DATA.tobytes()
    read = [int.from_bytes(data[at : at + 8], "little") for at in offsets]
    return np.array(read, dtype=np.uint64)


inside = st.integers(0, len(DATA) - 8)
outside = st.integers(len(DATA) - 7, HOLE)


@given(
    st.lists(inside | outside, max_size=600),
    st.sets(st.integers(0, 599), max_size=8),
    st.integers(0, 63),
)
def test_every_value_is_equal_different_or_a_hole(
    offsets: list[int], changed: set[int], bit: int
) -> None:
    values = values_at(offsets)
    changed = {index for index in changed if index < len(offsets)}
    for index in changed:
        values[index] ^= np.uint64(1 << bit)
    holes = {index for index, offset in enumerate(offsets) if offset > len(DATA) - 8}
    comparison = WatchList(offsets_of(offsets), values).compare(VIEW)
    assert comparison.indices.tolist() == sorted(holes | changed)
    assert comparison.unreadable == len(holes)
    assert comparison.mismatched == len(changed - holes)
    assert comparison.ok == len(offsets) - len(holes | changed)
    assert {int(index) for index in np.flatnonzero(comparison.statuses)} == holes


def test_a_result_outlives_the_next_compare() -> None:
    data = bytearray(DATA.tobytes())
    offsets = list(range(0, 800, 8))
    watched = WatchList(offsets_of(offsets), values_at(offsets))
    data[80] ^= 1
    first = watched.compare(memoryview(data))
    data[160] ^= 1
    second = watched.compare(memoryview(data))
    data[80] ^= 1
    data[160] ^= 1
    assert watched.compare(memoryview(data)).ok == 100
    assert (first.indices.tolist(), second.indices.tolist()) == ([10], [10, 20])


def test_the_list_is_bounded() -> None:
    offsets = list(range(100))
    watched = WatchList(offsets_of(offsets), values_at(offsets) ^ 1, indices_max=7)
    comparison = watched.compare(VIEW)
    assert comparison.indices.tolist() == list(range(7))
    assert comparison.mismatched == 100


def test_values_of_a_truncated_file_are_link_down(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(DATA.tobytes())
    offsets = [0, 2 * PAGE_SIZE - 8, 2 * PAGE_SIZE - 4, 5 * PAGE_SIZE]
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as ram:
        file.truncate(2 * PAGE_SIZE)
        with memoryview(ram) as view:
            comparison = WatchList(offsets_of(offsets), values_at(offsets)).compare(view)
    gone = [PageStatus.OK] * 2 + [PageStatus.LINK_DOWN] * 2
    assert comparison.statuses.tolist() == gone
    assert comparison.indices.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("offsets", "values"),
    [
        (np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.uint64)),
        (np.zeros(2, dtype=np.uint64), np.zeros(3, dtype=np.uint64)),
        (np.zeros(2, dtype=np.uint64), np.zeros(2, dtype=np.uint32)),
    ],
)
def test_lists_that_do_not_fit_are_refused(offsets: np.ndarray, values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^(offsets|values): "):
        WatchList(offsets, values)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 16])
def test_the_read_limit_reads_every_word(threads: int, interleaved: bool, count: int) -> None:
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(PAGE_SIZE)
    words = DATA[: count * PAGE_SIZE].view("<u8")
    limit = ReadLimit(threads, interleaved=interleaved)
    assert limit.read_view(VIEW, offsets) == int(np.bitwise_xor.reduce(words))


def test_the_read_limit_refuses_holes() -> None:
    with pytest.raises(ValueError, match=r"^offsets: "):
        ReadLimit().read_view(VIEW, offsets_of([len(DATA) - 1]))
