"""One suite for every backend and every form of it that this CPU has."""

import hashlib
import json
import mmap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vectors import make

from pyscan.digest import Digester, open_digester
from pyscan.digest._native import FORM_VARIABLE, available_forms
from pyscan.records import PAGE_SIZE, POISON, PageStatus

NATIVE = [f"native/{form}" for form in available_forms("sha256")]
COUNT = 20
DIGEST_BYTES = 32
PAGES = np.random.default_rng(7).integers(0, 256, (COUNT, PAGE_SIZE), dtype=np.uint8)
NO_ROOM = 2**64 - 1


@pytest.fixture(scope="module", params=[*NATIVE, "numba"])
def digester(request: pytest.FixtureRequest) -> Iterator[Digester]:
    name, _, form = request.param.partition("/")
    with pytest.MonkeyPatch.context() as patch:
        if form:
            patch.setenv(FORM_VARIABLE, form)
        opened = open_digester(name)
        assert opened.name == name
        assert opened.form == f"sha256/{form or name}"
        yield opened
    open_digester()  # the form is a setting of the process: back to the fastest


def reference(pages: np.ndarray) -> np.ndarray:
    digests = b"".join(hashlib.sha256(page).digest() for page in pages)
    return np.frombuffer(digests, dtype=np.uint8).reshape(-1, DIGEST_BYTES)


EXPECTED = reference(PAGES)


def offsets_of(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def in_order(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64) * np.uint64(PAGE_SIZE)


def test_the_vectors_hold(digester: Digester) -> None:
    vectors = json.loads(make.PATH.read_text(encoding="utf-8"))["vectors"]
    pages = b"".join(make.page_of(vector["rule"], vector["a"], vector["b"]) for vector in vectors)
    digests, statuses = digester.hash_pages(pages)
    assert [digest.tobytes().hex() for digest in digests] == [v["sha256"] for v in vectors]
    assert not statuses.any()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 16, 17, 255, 256, 257, 600])
def test_pages_and_view_equal_hashlib(digester: Digester, count: int) -> None:
    pages = np.random.default_rng(count).integers(0, 256, (count, PAGE_SIZE), dtype=np.uint8)
    expected = reference(pages)
    for digests, statuses in (
        digester.hash_pages(pages),
        digester.hash_pages(pages.tobytes()),
        digester.hash_view(memoryview(pages.tobytes()), in_order(count)),
    ):
        np.testing.assert_array_equal(digests, expected)
        np.testing.assert_array_equal(statuses, np.zeros(count))
    comparison = digester.compare_pages(pages, expected)
    assert (comparison.ok, comparison.mismatched, comparison.unreadable) == (count, 0, 0)
    assert comparison.indices.size == 0


@given(
    page=st.integers(0, COUNT - 1),
    bit=st.integers(0, 8 * PAGE_SIZE - 1),
    order=st.permutations(range(COUNT)),
)
def test_a_changed_bit_is_found_and_only_it(
    digester: Digester, page: int, bit: int, order: list[int]
) -> None:
    pages = PAGES.copy()
    pages[page, bit // 8] ^= 1 << bit % 8
    whole = digester.compare_pages(pages, EXPECTED)
    assert whole.indices.tolist() == [page]
    assert (whole.ok, whole.mismatched, whole.unreadable) == (COUNT - 1, 1, 0)
    view = digester.compare_view(
        memoryview(pages).cast("B"), in_order(COUNT)[order], EXPECTED[order]
    )
    assert view.indices.tolist() == [order.index(page)]
    assert (view.ok, view.mismatched, view.unreadable) == (COUNT - 1, 1, 0)


@given(st.lists(st.integers(0, (COUNT + 1) * PAGE_SIZE) | st.integers(2**63, NO_ROOM), max_size=40))
def test_any_offset_is_a_page_or_a_hole(digester: Digester, offsets: list[int]) -> None:
    data = PAGES.tobytes()
    digests, statuses = digester.hash_view(memoryview(data), offsets_of(*offsets))
    for offset, digest, status in zip(offsets, digests, statuses, strict=True):
        if offset + PAGE_SIZE <= len(data):
            page = data[offset : offset + PAGE_SIZE]
            assert (status, digest.tobytes()) == (PageStatus.OK, hashlib.sha256(page).digest())
        else:
            assert status == PageStatus.HOLE
            assert (digest == POISON).all()


def test_holes_are_unreadable_even_where_poison_is_expected(digester: Digester) -> None:
    offsets = in_order(3)
    offsets[1] = NO_ROOM
    expected = EXPECTED[:3].copy()
    expected[1] = POISON
    comparison = digester.compare_view(memoryview(PAGES).cast("B"), offsets, expected)
    assert comparison.statuses.tolist() == [PageStatus.OK, PageStatus.HOLE, PageStatus.OK]
    assert comparison.indices.tolist() == [1]
    assert (comparison.ok, comparison.mismatched, comparison.unreadable) == (2, 0, 1)


@pytest.mark.parametrize("indices_max", [0, 1, COUNT - 1, COUNT, 10 * COUNT])
def test_counts_hold_however_short_the_list(digester: Digester, indices_max: int) -> None:
    different = EXPECTED ^ 1
    for comparison in (
        digester.compare_pages(PAGES, different, indices_max=indices_max),
        digester.compare_view(
            memoryview(PAGES).cast("B"), in_order(COUNT), different, indices_max=indices_max
        ),
    ):
        assert comparison.indices.tolist() == list(range(min(indices_max, COUNT)))
        assert (comparison.ok, comparison.mismatched, comparison.unreadable) == (0, COUNT, 0)


def test_copies_are_poisoned_where_unread(digester: Digester) -> None:
    copies = np.zeros((3, PAGE_SIZE), dtype=np.uint8)
    offsets = offsets_of(5 * PAGE_SIZE, NO_ROOM, 0)
    statuses = digester.copy_view(memoryview(PAGES).cast("B"), offsets, copies)
    assert statuses.tolist() == [PageStatus.OK, PageStatus.HOLE, PageStatus.OK]
    np.testing.assert_array_equal(copies[0], PAGES[5])
    np.testing.assert_array_equal(copies[2], PAGES[0])
    assert (copies[1] == POISON).all()


def test_a_file_truncated_under_its_mapping_is_link_down(
    digester: Digester, tmp_path: Path
) -> None:
    kept = 7
    gone = [PageStatus.OK] * kept + [PageStatus.LINK_DOWN] * (COUNT - kept)
    path = tmp_path / "ram"
    path.write_bytes(PAGES.tobytes())
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as ram:
        file.truncate(kept * PAGE_SIZE)
        with memoryview(ram) as view:
            digests, statuses = digester.hash_view(view, in_order(COUNT))
            comparison = digester.compare_view(view, in_order(COUNT), EXPECTED)
            copies = np.zeros_like(PAGES)
            copied = digester.copy_view(view, in_order(COUNT), copies)
    assert statuses.tolist() == comparison.statuses.tolist() == copied.tolist() == gone
    np.testing.assert_array_equal(digests[:kept], EXPECTED[:kept])
    np.testing.assert_array_equal(copies[:kept], PAGES[:kept])
    assert (digests[kept:] == POISON).all()
    assert (copies[kept:] == POISON).all()
    assert comparison.indices.tolist() == list(range(kept, COUNT))
    assert (comparison.ok, comparison.mismatched, comparison.unreadable) == (kept, 0, COUNT - kept)


VIEW = memoryview(PAGES).cast("B")
WRONG: dict[str, Callable[[Digester], object]] = {
    "half a page": lambda d: d.hash_pages(bytes(PAGE_SIZE + 1)),
    "narrow pages": lambda d: d.hash_pages(PAGES[:, :-1]),
    "flat pages": lambda d: d.hash_pages(PAGES.reshape(-1)),
    "wide words": lambda d: d.hash_pages(PAGES.astype(np.uint16)),
    "scattered pages": lambda d: d.hash_pages(PAGES[::2]),
    "signed offsets": lambda d: d.hash_view(VIEW, in_order(3).astype(np.int64)),
    "flat offsets": lambda d: d.hash_view(VIEW, in_order(4).reshape(2, 2)),
    "scattered view": lambda d: d.hash_view(VIEW[::2], in_order(1)),
    "too few expected": lambda d: d.compare_pages(PAGES, EXPECTED[:-1]),
    "short expected": lambda d: d.compare_view(VIEW, in_order(COUNT), EXPECTED[:, :-1]),
    "negative bound": lambda d: d.compare_pages(PAGES, EXPECTED, indices_max=-1),
    "small copy": lambda d: d.copy_view(VIEW, in_order(2), PAGES[:1].copy()),
    "read-only copy": lambda d: d.copy_view(
        VIEW, in_order(1), np.frombuffer(bytes(PAGE_SIZE), dtype=np.uint8).reshape(1, PAGE_SIZE)
    ),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_refused(
    digester: Digester, call: Callable[[Digester], object]
) -> None:
    with pytest.raises(ValueError, match=r"^(pages|offsets|data|expected|indices_max): "):
        call(digester)


def test_scattered_expected_and_offsets_are_understood(digester: Digester) -> None:
    comparison = digester.compare_view(VIEW, in_order(COUNT)[::2], EXPECTED[::2])
    assert comparison.ok == COUNT // 2


def test_threads_do_not_disturb_each_other(digester: Digester) -> None:
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: digester.compare_pages(PAGES, EXPECTED), range(64)))
    assert [result.ok for result in results] == [COUNT] * 64


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
