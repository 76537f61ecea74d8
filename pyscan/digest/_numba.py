"""Digests by numba, in parallel: SHA-256 from FIPS 180-4, to which section numbers refer, and
nh4aes from docs/spec/digest.md, of which the core does the AES: numba has none.

The same interface and the same bytes as the native core, as an explicit alternative. Code
made by numba has no fault guard, so the pages of a view, whose mapping may shrink at any
time, are first copied by the native core, under its guard, chunk by chunk into one reused
buffer. `hash_pages` and `compare_pages` take the caller's own memory, never a mapping that
may shrink.

Importing this module needs the extra ``pyscan[numba]``.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, Final, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from pyscan.digest import base
from pyscan.digest._native import NativeDigester, finish_nh4aes, nh4aes_pairs
from pyscan.digest.base import Buffer, Bytes, Comparison, Frames, Offsets
from pyscan.digest.key import DigestKey
from pyscan.errors import UsageError
from pyscan.records import PAGE_SIZE, POISON, PageStatus

_Words = NDArray[np.uint32]
_Pairs = NDArray[np.uint64]
_F = TypeVar("_F", bound=Callable[..., Any])

#: Pages of the reused buffer (1 MiB: it stays in the caches between copy and digest).
_CHUNK_PAGES: Final = 256

#: Threads that numba has made: one per processor, or what NUMBA_NUM_THREADS says.
_THREADS_MAX: Final = int(numba.get_num_threads())

#: numba's default threading layer may end the process when two threads enter it at once.
_PARALLEL: Final = Lock()

_PAGE_BLOCKS: Final = PAGE_SIZE // 64
_PRIMES: Final = [n for n in range(2, 312) if all(n % divisor for divisor in range(2, n))]

#: 4.2.2: the first 32 bits of the fractional parts of the cube roots of the first 64 primes.
_CONSTANTS: Final[_Words] = np.array(
    [int(prime ** (1 / 3) % 1 * 2**32) for prime in _PRIMES], dtype=np.uint32
)
#: 5.3.3: the same of the square roots of the first 8.
_INITIAL: Final[_Words] = np.array(
    [int(prime**0.5 % 1 * 2**32) for prime in _PRIMES[:8]], dtype=np.uint32
)
#: 5.1.1: a one bit, zeros, and the length of a page in bits.
_PADDING: Final[_Words] = np.array([0x8000_0000] + 14 * [0] + [PAGE_SIZE * 8], dtype=np.uint32)

_LOW: Final = np.uint64(0xFFFF_FFFF)
_HALF: Final = np.uint64(32)

_NJIT: Any = numba.njit


def _compiled(*, parallel: bool = False) -> Callable[[_F], _F]:
    """numba's decorator, which is untyped, as one that keeps the function's type."""
    return cast(Callable[[_F], _F], _NJIT(cache=True, nogil=True, parallel=parallel))


@_compiled()
def _rotate_right(word: np.uint32, bits: int) -> np.uint32:
    return np.uint32((word >> np.uint32(bits)) | (word << np.uint32(32 - bits)))


@_compiled()
def _swap(word: np.uint32) -> np.uint32:
    """Big-endian to little-endian and back."""
    outer = (word << np.uint32(24)) | (word >> np.uint32(24))
    inner = ((word & np.uint32(0xFF00)) << np.uint32(8)) | (
        (word >> np.uint32(8)) & np.uint32(0xFF00)
    )
    return np.uint32(outer | inner)


@_compiled()
def _schedule_next(ring: _Words, t: int) -> np.uint32:
    """6.2.2 step 1, in a ring of 16 words: W[t] takes the place of W[t - 16]."""
    w2, w15 = ring[(t - 2) & 15], ring[(t - 15) & 15]
    sigma0 = _rotate_right(w15, 7) ^ _rotate_right(w15, 18) ^ (w15 >> np.uint32(3))
    sigma1 = _rotate_right(w2, 17) ^ _rotate_right(w2, 19) ^ (w2 >> np.uint32(10))
    return np.uint32(sigma1 + ring[(t - 7) & 15] + sigma0 + ring[t & 15])


@_compiled()
def _compress(state: _Words, ring: _Words) -> None:
    """6.2.2 for the block in `ring`, which is used up."""
    a, b, c, d, e, f, g, h = state
    for t in range(64):
        if t >= 16:
            ring[t & 15] = _schedule_next(ring, t)
        sum1 = _rotate_right(e, 6) ^ _rotate_right(e, 11) ^ _rotate_right(e, 25)
        choice = (e & f) ^ (~e & g)
        t1 = np.uint32(h + sum1 + choice + _CONSTANTS[t] + ring[t & 15])
        sum0 = _rotate_right(a, 2) ^ _rotate_right(a, 13) ^ _rotate_right(a, 22)
        majority = (a & b) ^ (a & c) ^ (b & c)
        h, g, f, e, d, c, b = g, f, e, np.uint32(d + t1), c, b, a
        a = np.uint32(t1 + sum0 + majority)
    for i, word in enumerate((a, b, c, d, e, f, g, h)):
        state[i] += word


@_compiled(parallel=True)
def _hash_words(pages: _Words, digests: _Words) -> None:
    """SHA-256 of the rows of `pages`, (n, 1024) little-endian words, to `digests` (n, 8)."""
    for i in numba.prange(len(pages)):
        state = _INITIAL.copy()
        ring = np.empty(16, dtype=np.uint32)
        for block in range(_PAGE_BLOCKS):
            for t in range(16):
                ring[t] = _swap(pages[i, 16 * block + t])
            _compress(state, ring)
        ring[:] = _PADDING
        _compress(state, ring)
        for t in range(8):
            digests[i, t] = _swap(state[t])


@_compiled(parallel=True)
def _sum_pairs(pages: _Pairs, key: _Pairs, sums: _Pairs) -> None:
    """The four sums of the rows of `pages`, (n, 512) pairs of words, to `sums` (n, 4).

    A pair is one 64-bit integer, the even word low: so the halves are taken apart in
    registers, and LLVM finds the vector multiply of 32 by 32 bits.
    """
    for i in numba.prange(len(pages)):
        n0 = n1 = n2 = n3 = np.uint64(0)
        for j in range(512):
            pair = pages[i, j]
            k0, k1, k2, k3 = key[j], key[j + 4], key[j + 8], key[j + 12]
            n0 += ((pair + k0) & _LOW) * (((pair >> _HALF) + (k0 >> _HALF)) & _LOW)
            n1 += ((pair + k1) & _LOW) * (((pair >> _HALF) + (k1 >> _HALF)) & _LOW)
            n2 += ((pair + k2) & _LOW) * (((pair >> _HALF) + (k2 >> _HALF)) & _LOW)
            n3 += ((pair + k3) & _LOW) * (((pair >> _HALF) + (k3 >> _HALF)) & _LOW)
        sums[i, 0], sums[i, 1], sums[i, 2], sums[i, 3] = n0, n1, n2, n3


class NumbaDigester:
    """The backend ``numba``: compiled at first use.

    For sha256 and nh4aes; gf128aes needs a carry-less multiply, which numba does not have.
    Raises UsageError as `NativeDigester` does, and for more threads than the machine has
    processors.
    """

    name: Final = "numba"

    def __init__(
        self, digest: str = "sha256", key: DigestKey | None = None, threads: int = 1
    ) -> None:
        if digest not in _HASHERS:
            raise UsageError(f"digest {digest!r} is not made by numba; use native")
        self._native = NativeDigester(digest, key, threads)
        if threads > _THREADS_MAX:
            raise UsageError(
                f"{threads} threads were asked for, and numba has {_THREADS_MAX}; use fewer"
            )
        self._kind = base.digest_kind(digest)
        self._key = key

    @property
    def digest(self) -> str:
        """See `Digester.digest`."""
        return self._kind.name

    @property
    def digest_bytes(self) -> int:
        """See `Digester.digest_bytes`."""
        return self._kind.size

    @property
    def form(self) -> str:
        """See `Digester.form`."""
        return f"{self._kind.name}/numba"

    @property
    def threads(self) -> int:
        """See `Digester.threads`."""
        return self._native.threads

    def hash_pages(self, pages: Buffer, *, frames: Frames | None = None) -> tuple[Bytes, Bytes]:
        """See `Digester.hash_pages`; not for a mapping that may shrink."""
        pages = base.as_pages(pages)
        frames = base.as_frames(frames, self._kind, len(pages))
        digests = np.empty((len(pages), self._kind.size), dtype=np.uint8)
        self._hash_to(pages, frames, digests)
        return digests, np.full(len(pages), PageStatus.OK, dtype=np.uint8)

    def hash_view(
        self, data: memoryview, offsets: Offsets, *, frames: Frames | None = None
    ) -> tuple[Bytes, Bytes]:
        """See `Digester.hash_view`."""
        offsets = base.as_offsets(offsets)
        frames = base.as_frames(frames, self._kind, len(offsets))
        digests = np.empty((len(offsets), self._kind.size), dtype=np.uint8)
        statuses = np.empty(len(offsets), dtype=np.uint8)
        chunk = np.empty((min(_CHUNK_PAGES, len(offsets)), PAGE_SIZE), dtype=np.uint8)
        for start in range(0, len(offsets), _CHUNK_PAGES):
            part = slice(start, start + _CHUNK_PAGES)
            pages = chunk[: len(offsets[part])]
            statuses[part] = self.copy_view(data, offsets[part], pages)
            self._hash_to(pages, None if frames is None else frames[part], digests[part])
        digests[statuses != PageStatus.OK] = POISON
        return digests, statuses

    def compare_pages(
        self,
        pages: Buffer,
        expected: Bytes,
        indices_max: int = base.INDICES_MAX,
        *,
        frames: Frames | None = None,
    ) -> Comparison:
        """See `Digester.compare_pages`; not for a mapping that may shrink."""
        digests, statuses = self.hash_pages(pages, frames=frames)
        return self._compare(digests, statuses, expected, indices_max)

    def compare_view(
        self,
        data: memoryview,
        offsets: Offsets,
        expected: Bytes,
        indices_max: int = base.INDICES_MAX,
        *,
        frames: Frames | None = None,
    ) -> Comparison:
        """See `Digester.compare_view`."""
        digests, statuses = self.hash_view(data, offsets, frames=frames)
        return self._compare(digests, statuses, expected, indices_max)

    def copy_view(self, data: memoryview, offsets: Offsets, pages: Bytes) -> Bytes:
        """See `Digester.copy_view`; the native core's copy."""
        return self._native.copy_view(data, offsets, pages)

    def _hash_to(self, pages: Bytes, frames: Frames | None, digests: Bytes) -> None:
        with _PARALLEL:
            numba.set_num_threads(self.threads)
            _HASHERS[self._kind.name](pages, self._key, frames, digests)

    def _compare(
        self, digests: Bytes, statuses: Bytes, expected: Bytes, indices_max: int
    ) -> Comparison:
        expected = base.as_expected(expected, self._kind, len(digests))
        listed_max = base.as_indices_max(indices_max, len(digests))
        unread = statuses != PageStatus.OK
        different = unread | (digests.view("<u8") != expected.view("<u8")).any(axis=1)
        indices = np.flatnonzero(different).astype(np.uint64)
        unreadable = int(unread.sum())
        return Comparison(
            statuses=statuses,
            indices=indices[:listed_max],
            ok=len(digests) - len(indices),
            mismatched=len(indices) - unreadable,
            unreadable=unreadable,
        )


def _hash_sha256(
    pages: Bytes, key: DigestKey | None, frames: Frames | None, digests: Bytes
) -> None:
    _hash_words(pages.view("<u4"), digests.view("<u4"))


def _hash_nh4aes(
    pages: Bytes, key: DigestKey | None, frames: Frames | None, digests: Bytes
) -> None:
    if key is None or frames is None:
        raise ValueError("frames: nh4aes needs a key and the frame number of every page")
    sums = np.empty((len(pages), 4), dtype=np.uint64)
    _sum_pairs(pages.view("<u8"), nh4aes_pairs(key), sums)
    finish_nh4aes(key, sums, frames, digests)


_HASHERS: Final = {"sha256": _hash_sha256, "nh4aes": _hash_nh4aes}
