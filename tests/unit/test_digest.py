"""One suite for every backend, every digest, and every form of it that this CPU has."""

import json
import mmap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import naive
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import make

from pyscan.digest import (
    DIGESTS,
    FORM_VARIABLE,
    Comparison,
    Digester,
    DigestKey,
    available_forms,
    open_digester,
)
from pyscan.records import PAGE_SIZE, POISON, PageStatus

CASES = [
    *(f"native/{digest}/{form}/1" for digest in DIGESTS for form in available_forms(digest)),
    *(f"native/{digest}/{available_forms(digest)[-1]}/3" for digest in DIGESTS),
    "numba/sha256/numba/1",
    "numba/nh4aes/numba/1",
    "numba/nh4aes/numba/2",
]
SECRET = bytes(range(32))
COUNT = 20
PAGES = np.random.default_rng(7).integers(0, 256, (COUNT, PAGE_SIZE), dtype=np.uint8)
NO_ROOM = 2**64 - 1
VIEW = memoryview(PAGES).cast("B")


def opened(name: str, digest: str, threads: int = 1, secret: bytes = SECRET) -> Digester:
    key = DigestKey.from_secret(digest, secret) if DIGESTS[digest].keyed else None
    return open_digester(name, digest, key, threads)


@pytest.fixture(scope="module", params=CASES)
def digester(request: pytest.FixtureRequest) -> Digester:
    name, digest, form, threads = request.param.split("/")
    with pytest.MonkeyPatch.context() as patch:
        if name == "native":
            patch.setenv(FORM_VARIABLE, form)
        made = opened(name, digest, int(threads))
    assert (made.name, made.digest, made.threads) == (name, digest, int(threads))
    assert made.form == f"{digest}/{form}"
    assert made.digest_bytes == DIGESTS[digest].size
    return made


def frames_of(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64) * np.uint64(0x1_0001) + np.uint64(5)


@cache
def random_pages(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, PAGE_SIZE), dtype=np.uint8)


@cache
def digests_of(digest: str, count: int, *, fixed: bool = False) -> np.ndarray:
    """Expected digests of `random_pages(count)`, or of PAGES."""
    pages = PAGES if fixed else random_pages(count)
    made = b"".join(
        reference.digest_of(digest, page.tobytes(), SECRET, int(frame))
        for page, frame in zip(pages, frames_of(count), strict=True)
    )
    return np.frombuffer(made, dtype=np.uint8).reshape(-1, DIGESTS[digest].size)


FRAMES = frames_of(COUNT)


def expected_of(digester: Digester) -> np.ndarray:
    return digests_of(digester.digest, COUNT, fixed=True)


def counts_of(comparison: Comparison) -> tuple[int, int, int]:
    return comparison.ok, comparison.mismatched, comparison.unreadable


def offsets_of(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def in_order(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64) * np.uint64(PAGE_SIZE)


def test_the_vectors_hold(digester: Digester) -> None:
    digest = digester.digest
    vectors = json.loads(make.path_of(digest).read_text(encoding="utf-8"))["vectors"]
    for vector in vectors:
        page = make.page_of(vector["rule"], vector["a"], vector["b"])
        secret = bytes.fromhex(vector.get("secret", ""))
        frames = np.array([vector.get("frame", 0)], dtype=np.uint64)
        own = opened(digester.name, digest, secret=secret)
        digests, statuses = own.hash_pages(page, frames=frames)
        assert digests[0].tobytes().hex() == vector[digest]
        assert statuses.tolist() == [PageStatus.OK]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 16, 17, 255, 256, 257, 600])
def test_pages_and_view_equal_the_reference(digester: Digester, count: int) -> None:
    pages, frames = random_pages(count), frames_of(count)
    expected = digests_of(digester.digest, count)
    backwards = in_order(count)[::-1].copy()
    for digests, statuses in (
        digester.hash_pages(pages, frames=frames),
        digester.hash_pages(pages.tobytes(), frames=frames),
        digester.hash_view(memoryview(pages.tobytes()), in_order(count), frames=frames),
    ):
        np.testing.assert_array_equal(digests, expected)
        np.testing.assert_array_equal(statuses, np.zeros(count))
    digests, _ = digester.hash_view(memoryview(pages.tobytes()), backwards, frames=frames[::-1])
    np.testing.assert_array_equal(digests, expected[::-1])
    comparison = digester.compare_pages(pages, expected, frames=frames)
    assert counts_of(comparison) == (count, 0, 0)
    assert comparison.indices.size == 0


words = st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)


@settings(max_examples=20)
@given(st.lists(words, min_size=8, max_size=8), st.binary(min_size=32, max_size=32))
def test_sums_wrap_as_wide_integers_do(pattern: list[int], secret: bytes) -> None:
    page = np.resize(np.array(pattern, dtype="<u4"), PAGE_SIZE // 4).tobytes()
    frames = np.array([NO_ROOM], dtype=np.uint64)
    for name in ("native", "numba"):
        digests, _ = opened(name, "nh4aes", secret=secret).hash_pages(page, frames=frames)
        assert digests[0].tobytes() == naive.nh4aes(secret, page, NO_ROOM)


@given(
    page=st.integers(0, COUNT - 1),
    bit=st.integers(0, 8 * PAGE_SIZE - 1),
    order=st.permutations(range(COUNT)),
)
def test_a_changed_bit_is_found_and_only_it(
    digester: Digester, page: int, bit: int, order: list[int]
) -> None:
    expected = expected_of(digester)
    pages = PAGES.copy()
    pages[page, bit // 8] ^= 1 << bit % 8
    whole = digester.compare_pages(pages, expected, frames=FRAMES)
    assert whole.indices.tolist() == [page]
    assert counts_of(whole) == (COUNT - 1, 1, 0)
    view = digester.compare_view(
        memoryview(pages).cast("B"), in_order(COUNT)[order], expected[order], frames=FRAMES[order]
    )
    assert view.indices.tolist() == [order.index(page)]
    assert counts_of(view) == (COUNT - 1, 1, 0)


@given(st.lists(st.integers(0, COUNT - 1), min_size=2, max_size=2, unique=True))
def test_two_pages_that_change_places_are_both_found(
    digester: Digester, swapped: list[int]
) -> None:
    pages = PAGES.copy()
    pages[swapped] = pages[swapped[::-1]]
    comparison = digester.compare_pages(pages, expected_of(digester), frames=FRAMES)
    assert comparison.indices.tolist() == sorted(swapped)


@given(page=st.integers(0, COUNT - 1), bit=st.integers(0, 63))
def test_a_page_in_another_frame_is_found(digester: Digester, page: int, bit: int) -> None:
    frames = FRAMES.copy()
    frames[page] ^= np.uint64(1 << bit)
    comparison = digester.compare_pages(PAGES, expected_of(digester), frames=frames)
    assert comparison.indices.tolist() == ([page] if DIGESTS[digester.digest].keyed else [])


def test_bits_of_digests_are_balanced(digester: Digester) -> None:
    """Pages that differ in one bit: each bit of the digest is set in half of them.

    Five standard deviations of a fair coin, over content that is always the same.
    """
    count = 4096
    pages = np.zeros((count, PAGE_SIZE), dtype=np.uint8)
    pages[np.arange(count), np.arange(count)] = 1
    digests, _ = digester.hash_pages(pages, frames=np.zeros(count, dtype=np.uint64))
    ones = np.unpackbits(digests, axis=1).sum(axis=0, dtype=np.int64)
    assert np.abs(ones - count // 2).max() < 5 * np.sqrt(count) / 2
    assert len(np.unique(digests, axis=0)) == count


@given(st.lists(st.integers(0, (COUNT + 1) * PAGE_SIZE) | st.integers(2**63, NO_ROOM), max_size=40))
def test_any_offset_is_a_page_or_a_hole(digester: Digester, offsets: list[int]) -> None:
    data, frames = PAGES.tobytes(), frames_of(len(offsets))
    digests, statuses = digester.hash_view(memoryview(data), offsets_of(*offsets), frames=frames)
    for index, (offset, digest, status) in enumerate(zip(offsets, digests, statuses, strict=True)):
        if offset + PAGE_SIZE <= len(data):
            page = data[offset : offset + PAGE_SIZE]
            alone, _ = digester.hash_pages(page, frames=frames[index : index + 1])
            assert (status, digest.tobytes()) == (PageStatus.OK, alone.tobytes())
        else:
            assert status == PageStatus.HOLE
            assert (digest == POISON).all()


def test_holes_are_unreadable_even_where_poison_is_expected(digester: Digester) -> None:
    offsets = in_order(3)
    offsets[1] = NO_ROOM
    expected = expected_of(digester)[:3].copy()
    expected[1] = POISON
    comparison = digester.compare_view(VIEW, offsets, expected, frames=FRAMES[:3])
    assert comparison.statuses.tolist() == [PageStatus.OK, PageStatus.HOLE, PageStatus.OK]
    assert comparison.indices.tolist() == [1]
    assert counts_of(comparison) == (2, 0, 1)


@pytest.mark.parametrize("indices_max", [0, 1, COUNT - 1, COUNT, 10 * COUNT])
def test_counts_hold_however_short_the_list(digester: Digester, indices_max: int) -> None:
    different = expected_of(digester) ^ 1
    for comparison in (
        digester.compare_pages(PAGES, different, indices_max, frames=FRAMES),
        digester.compare_view(VIEW, in_order(COUNT), different, indices_max, frames=FRAMES),
    ):
        assert comparison.indices.tolist() == list(range(min(indices_max, COUNT)))
        assert counts_of(comparison) == (0, COUNT, 0)


def test_the_list_ascends_over_all_parts(digester: Digester) -> None:
    """More pages than a thread takes at once; every third differs, every fifth is a hole."""
    count = 2000
    offsets = np.resize(in_order(COUNT), count)
    frames = np.resize(FRAMES, count)
    expected = np.resize(expected_of(digester), (count, digester.digest_bytes))
    expected[::3] ^= 0x40
    offsets[::5] = NO_ROOM
    unequal = [index for index in range(count) if index % 3 == 0 or index % 5 == 0]
    comparison = digester.compare_view(VIEW, offsets, expected, 700, frames=frames)
    assert comparison.indices.tolist() == unequal[:700]
    assert comparison.unreadable == count // 5
    assert comparison.mismatched == len(unequal) - count // 5
    assert set(comparison.statuses.tolist()) == {PageStatus.OK, PageStatus.HOLE}


def test_copies_are_poisoned_where_unread(digester: Digester) -> None:
    copies = np.zeros((3, PAGE_SIZE), dtype=np.uint8)
    offsets = offsets_of(5 * PAGE_SIZE, NO_ROOM, 0)
    statuses = digester.copy_view(VIEW, offsets, copies)
    assert statuses.tolist() == [PageStatus.OK, PageStatus.HOLE, PageStatus.OK]
    np.testing.assert_array_equal(copies[0], PAGES[5])
    np.testing.assert_array_equal(copies[2], PAGES[0])
    assert (copies[1] == POISON).all()


def test_a_file_truncated_under_its_mapping_is_link_down(
    digester: Digester, tmp_path: Path
) -> None:
    kept, expected = 7, expected_of(digester)
    gone = [PageStatus.OK] * kept + [PageStatus.LINK_DOWN] * (COUNT - kept)
    path = tmp_path / "ram"
    path.write_bytes(PAGES.tobytes())
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as ram:
        file.truncate(kept * PAGE_SIZE)
        with memoryview(ram) as view:
            digests, statuses = digester.hash_view(view, in_order(COUNT), frames=FRAMES)
            comparison = digester.compare_view(view, in_order(COUNT), expected, frames=FRAMES)
            copies = np.zeros_like(PAGES)
            copied = digester.copy_view(view, in_order(COUNT), copies)
    assert statuses.tolist() == comparison.statuses.tolist() == copied.tolist() == gone
    np.testing.assert_array_equal(digests[:kept], expected[:kept])
    np.testing.assert_array_equal(copies[:kept], PAGES[:kept])
    assert (digests[kept:] == POISON).all()
    assert (copies[kept:] == POISON).all()
    assert comparison.indices.tolist() == list(range(kept, COUNT))
    assert counts_of(comparison) == (kept, 0, COUNT - kept)


WRONG: dict[str, Callable[[Digester, np.ndarray], object]] = {
    "half a page": lambda d, _: d.hash_pages(bytes(PAGE_SIZE + 1), frames=FRAMES[:1]),
    "narrow pages": lambda d, _: d.hash_pages(PAGES[:, :-1], frames=FRAMES),
    "flat pages": lambda d, _: d.hash_pages(PAGES.reshape(-1), frames=FRAMES),
    "wide words": lambda d, _: d.hash_pages(PAGES.astype(np.uint16), frames=FRAMES),
    "scattered pages": lambda d, _: d.hash_pages(PAGES[::2], frames=FRAMES[::2]),
    "signed offsets": lambda d, _: d.hash_view(VIEW, in_order(3).astype(np.int64)),
    "flat offsets": lambda d, _: d.hash_view(VIEW, in_order(4).reshape(2, 2)),
    "scattered view": lambda d, _: d.hash_view(VIEW[::2], in_order(1), frames=FRAMES[:1]),
    "too few expected": lambda d, e: d.compare_pages(PAGES, e[:-1], frames=FRAMES),
    "short expected": lambda d, e: d.compare_view(VIEW, in_order(COUNT), e[:, :-1], frames=FRAMES),
    "negative bound": lambda d, e: d.compare_pages(PAGES, e, -1, frames=FRAMES),
    "small copy": lambda d, _: d.copy_view(VIEW, in_order(2), PAGES[:1].copy()),
    "read-only copy": lambda d, _: d.copy_view(
        VIEW, in_order(1), np.frombuffer(bytes(PAGE_SIZE), dtype=np.uint8).reshape(1, PAGE_SIZE)
    ),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_refused(
    digester: Digester, call: Callable[[Digester, np.ndarray], object]
) -> None:
    with pytest.raises(ValueError, match=r"^(pages|offsets|data|expected|indices_max): "):
        call(digester, expected_of(digester))


@pytest.mark.parametrize("frames", [None, FRAMES[:-1], FRAMES.astype(np.int64), FRAMES[:, None]])
def test_a_keyed_digest_needs_a_frame_for_every_page(
    digester: Digester, frames: np.ndarray | None
) -> None:
    expected = expected_of(digester)
    calls: list[Callable[[], object]] = [
        lambda: digester.hash_pages(PAGES, frames=frames),
        lambda: digester.hash_view(VIEW, in_order(COUNT), frames=frames),
        lambda: digester.compare_pages(PAGES, expected, frames=frames),
        lambda: digester.compare_view(VIEW, in_order(COUNT), expected, frames=frames),
    ]
    for call in calls:
        if DIGESTS[digester.digest].keyed:
            with pytest.raises(ValueError, match=r"^frames: "):
                call()
        else:
            call()


def test_scattered_expected_and_offsets_are_understood(digester: Digester) -> None:
    comparison = digester.compare_view(
        VIEW, in_order(COUNT)[::2], expected_of(digester)[::2], frames=FRAMES[::2]
    )
    assert comparison.ok == COUNT // 2


def test_callers_do_not_disturb_each_other(digester: Digester) -> None:
    count = 600
    pages, frames = random_pages(count), frames_of(count)
    expected = digests_of(digester.digest, count)
    with ThreadPoolExecutor(4) as callers:
        results = list(
            callers.map(lambda _: digester.compare_pages(pages, expected, frames=frames), range(32))
        )
    assert [result.ok for result in results] == [count] * 32


@pytest.mark.parametrize("form", available_forms("sha256"))
def test_other_threads_run_during_a_call(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One page, digested again and again by one call while this thread changes it.

    The call sees more than one content only if this thread runs in the middle of it.
    """
    monkeypatch.setenv(FORM_VARIABLE, form)
    digester = open_digester("native")
    page = bytearray(PAGE_SIZE)
    same = np.zeros(20_000, dtype=np.uint64)
    contents = 1
    for _ in range(50):
        done = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            call = thread.submit(digester.hash_view, memoryview(page), same)
            call.add_done_callback(lambda _, done=done: done.set())
            while not done.is_set():
                page[0] ^= 1
        contents = len(np.unique(call.result()[0], axis=0))
        if contents > 1:
            break
    assert contents > 1
