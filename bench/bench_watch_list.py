"""A watch list of 64-bit values, by its length."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from pyscan.digest import WatchList


@pytest.mark.parametrize("count", [0, 512, 8192])
def bench_watch_list(benchmark: BenchmarkFixture, pages: NDArray[np.uint8], count: int) -> None:
    """Values at random places of 4 MiB."""
    benchmark.group = "watch list"
    data = memoryview(pages).cast("B")[: 4 << 20].toreadonly()
    words = np.frombuffer(data, dtype="<u8")
    chosen = np.sort(np.random.default_rng().choice(len(words), size=count, replace=False))
    watched = WatchList((8 * chosen).astype(np.uint64), words[chosen])
    assert benchmark(watched.compare, data).ok == count
