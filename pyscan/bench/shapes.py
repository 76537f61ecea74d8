"""What the contenders go over: one row a shape, in the order of the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pyscan.bench.contenders import (
    CALL_PAGES,
    CONTENDERS,
    LIMIT,
    Contender,
    digest_variants,
)
from pyscan.bench.memory import Backing
from pyscan.records import PAGE_SIZE

_MIB: Final = 1 << 20
_ALL: Final = tuple(contender.name for contender in CONTENDERS)
_FAST: Final = (
    "nh4aes",
    "gf128aes",
    "sha256",
    "numba-nh4aes",
    LIMIT,
    "memcpy",
    "memcmp",
    "openssl-evp-sha256",
)
_COPIED: Final = ("pread+nh4aes", "pread+sha256", "leechcore-file+sha256", "nh4aes", LIMIT)
FIRST: Final = "contiguous-1GiB"
SCATTERED: Final = "scattered-8000"
CALLS: Final = "calls-256MiB"
FORMS: Final = "forms-256MiB"


@dataclass(frozen=True, slots=True)
class Shape:
    """One way that watched pages lie in memory.

    `scattered_pages` distinct pages at random places, or all of `size_bytes` when 0;
    `evicted`: the caches are emptied ahead of every pass.
    """

    name: str
    title: str
    size_bytes: int
    contenders: tuple[str, ...]
    backing: Backing = Backing.SHARED
    huge: bool = False
    scattered_pages: int = 0
    evicted: bool = False
    chunk_pages: int = 256
    threads: tuple[int, ...] = (1, 2)
    quick: bool = True  # part of a quick run, too


def _copied_in(chunk_kib: int, quick: bool) -> Shape:
    return Shape(
        f"copied-in-{chunk_kib}KiB",
        f"256 MiB copied in by pread, {chunk_kib} KiB at a time",
        256 * _MIB,
        _COPIED,
        chunk_pages=chunk_kib * 1024 // PAGE_SIZE,
        threads=(1,),
        quick=quick,
    )


SHAPES: Final[tuple[Shape, ...]] = (
    Shape(FIRST, "1 GiB in one range of /dev/shm, 4 KiB pages", 1024 * _MIB, _ALL[:-1]),
    Shape(
        f"{FIRST}-anonymous-huge",
        "1 GiB in one range, anonymous, huge pages",
        1024 * _MIB,
        _FAST,
        backing=Backing.ANONYMOUS,
        huge=True,
    ),
    Shape(
        f"{FIRST}-anonymous-4KiB",
        "1 GiB in one range, anonymous, 4 KiB pages",
        1024 * _MIB,
        _FAST,
        backing=Backing.ANONYMOUS,
        quick=False,
    ),
    Shape(
        f"{FIRST}-shm-huge",
        "1 GiB in one range of /dev/shm, huge pages",
        1024 * _MIB,
        _FAST,
        huge=True,
        quick=False,
    ),
    Shape(
        SCATTERED,
        "8,000 pages at random places of 512 MiB, caches warm",
        512 * _MIB,
        _ALL[:-1],
        scattered_pages=8000,
    ),
    Shape(
        f"{SCATTERED}-evicted",
        "8,000 pages at random places of 512 MiB, caches emptied before every sweep",
        512 * _MIB,
        (*_FAST, "hashlib-sha256"),
        scattered_pages=8000,
        evicted=True,
    ),
    Shape("one-page", "one page, one call", 32 * _MIB, _ALL[:-1], scattered_pages=1, threads=(1,)),
    *(_copied_in(size, size == 1024) for size in (64, 128, 256, 512, 1024, 4096)),
    Shape(
        CALLS,
        "256 MiB, so many pages a call from Python",
        256 * _MIB,
        (*(f"nh4aes/{pages}" for pages in CALL_PAGES), "nh4aes", LIMIT),
        threads=(1,),
    ),
    Shape(
        "in-cache-8MiB",
        "8 MiB again and again: what computing costs when memory costs little",
        8 * _MIB,
        _FAST,
        threads=(1,),
    ),
    Shape(
        FORMS,
        "256 MiB, every form that this processor has",
        256 * _MIB,
        (*(each.name for each in digest_variants() if "[" in each.name), LIMIT),
        threads=(1,),
        quick=False,
    ),
)


#: Every contender by its name: rows of the table, forms, sizes of call.
BY_NAME: Final[dict[str, Contender]] = {
    each.name: each for each in (*CONTENDERS, *digest_variants())
}
