"""What one call costs: comparing 0, 1, 16 and 256 pages, and digesting one.

The call of no pages is the price of the way from Python to C and back; the share that it
has in a call of 256 pages is what batching leaves of it.
"""

from __future__ import annotations

import hashlib
from itertools import cycle

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from pyscan.digest import DIGESTS, Digester, DigestKey, open_digester
from pyscan.records import PAGE_SIZE


def opened(digest: str) -> Digester:
    """A digester of the native core on one thread."""
    key = DigestKey.generate(digest) if DIGESTS[digest].keyed else None
    return open_digester("native", digest, key)


@pytest.mark.parametrize("count", [0, 1, 16, 256])
@pytest.mark.parametrize("digest", DIGESTS)
def bench_compare(
    benchmark: BenchmarkFixture, pages: NDArray[np.uint8], digest: str, count: int
) -> None:
    """`compare_pages` on pages that the caches do not hold."""
    benchmark.group = f"compare {count} pages"
    digester = opened(digest)
    frames = np.arange(len(pages), dtype=np.uint64)
    expected, _ = digester.hash_pages(pages, frames=frames)
    starts = cycle(range(0, len(pages) - count, max(count, 1)))

    def call() -> int:
        part = slice(start := next(starts), start + count)
        return digester.compare_pages(pages[part], expected[part], frames=frames[part]).ok

    assert benchmark(call) == count


@pytest.mark.parametrize("digest", DIGESTS)
def bench_one_page(benchmark: BenchmarkFixture, pages: NDArray[np.uint8], digest: str) -> None:
    """The digest of one page that the caches hold."""
    benchmark.group = "digest of one page"
    digester = opened(digest)
    frames = np.zeros(1, dtype=np.uint64)
    digests, _ = benchmark(digester.hash_pages, pages[:1], frames=frames)
    assert digests.shape == (1, digester.digest_bytes)


def bench_one_page_hashlib(benchmark: BenchmarkFixture, pages: NDArray[np.uint8]) -> None:
    """The same page by hashlib."""
    benchmark.group = "digest of one page"
    page = memoryview(pages)[:1].cast("B")
    assert len(page) == PAGE_SIZE
    benchmark(lambda: hashlib.sha256(page).digest())
