"""Measurements of single calls: `make bench`, or `python -m pytest bench`.

Ratios between contenders, which need them to alternate, are measured by `pyscan bench`.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pyscan.records import PAGE_SIZE

#: 64 MiB: more than the caches of most machines hold.
PAGES = 16_384


@pytest.fixture(scope="session")
def pages() -> NDArray[np.uint8]:
    """Pages of random bytes, (PAGES, PAGE_SIZE)."""
    random = np.random.default_rng()
    return random.integers(0, 256, size=(PAGES, PAGE_SIZE), dtype=np.uint8)
