"""What every digest backend offers, and the checks that they share.

A digest is SHA-256 of one page (FIPS 180-4). Shapes: pages ``(n, PAGE_SIZE)`` uint8,
digests ``(n, DIGEST_SIZE)`` uint8, statuses ``(n,)`` uint8 of `PageStatus` values, offsets
``(n,)`` uint64 in bytes. A page whose status is not OK has a digest of POISON bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from mmap import mmap
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pyscan.records import PAGE_SIZE

DIGEST_SIZE: Final = 32
#: Indices that a comparison lists unless told otherwise.
INDICES_MAX: Final = 4096

Bytes = NDArray[np.uint8]
Offsets = NDArray[np.uint64]
Buffer = Bytes | bytes | bytearray | memoryview | mmap


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Pages held against their expected digests. `ok + mismatched + unreadable == n`."""

    statuses: Bytes
    indices: Offsets  # shape (k,): pages that are not equal or not read, ascending; bounded
    ok: int
    mismatched: int
    unreadable: int


class Digester(Protocol):
    """One backend. Safe for calls from several threads; the GIL is released while it works.

    All methods raise ValueError when a shape or a type does not fit, and never raise for a
    page: what cannot be read has a status.
    """

    @property
    def name(self) -> str:
        """The backend: ``native`` or ``numba``."""

    @property
    def form(self) -> str:
        """Algorithm and implementation that are in use now, such as ``sha256/shani``."""

    def hash_pages(self, pages: Buffer) -> tuple[Bytes, Bytes]:
        """Digests and statuses of pages that stand one behind the other.

        `pages` is contiguous: an array of shape (n, PAGE_SIZE), or any buffer of n pages.
        """

    def hash_view(self, data: memoryview, offsets: Offsets) -> tuple[Bytes, Bytes]:
        """Digests and statuses of the pages at `offsets` of `data`.

        `data` may be a mapping that shrinks meanwhile: such a page is LINK_DOWN. An offset
        that leaves no room for a whole page is HOLE.
        """

    def compare_pages(
        self, pages: Buffer, expected: Bytes, indices_max: int = INDICES_MAX
    ) -> Comparison:
        """Hold pages as in `hash_pages` against `expected`, shape (n, DIGEST_SIZE)."""

    def compare_view(
        self,
        data: memoryview,
        offsets: Offsets,
        expected: Bytes,
        indices_max: int = INDICES_MAX,
    ) -> Comparison:
        """Hold pages as in `hash_view` against `expected`, shape (n, DIGEST_SIZE)."""

    def copy_view(self, data: memoryview, offsets: Offsets, pages: Bytes) -> Bytes:
        """Copy pages as in `hash_view` to `pages`, shape (n, PAGE_SIZE); gives the statuses.

        A page whose status is not OK is filled with POISON.
        """


def as_pages(pages: Buffer) -> Bytes:
    """`pages` as an array of shape (n, PAGE_SIZE), without a copy."""
    if not isinstance(pages, np.ndarray):
        flat = np.frombuffer(pages, dtype=np.uint8)
        if len(flat) % PAGE_SIZE:
            raise ValueError(f"pages: {len(flat)} bytes are not whole pages of {PAGE_SIZE} bytes")
        return flat.reshape(-1, PAGE_SIZE)
    _check("pages", pages, np.uint8, (None, PAGE_SIZE))
    if not pages.flags.c_contiguous:
        raise ValueError("pages: the array is not contiguous")
    return pages


def as_output(pages: Bytes, count: int) -> Bytes:
    """`pages` as a writable array of shape (count, PAGE_SIZE), without a copy."""
    _check("pages", pages, np.uint8, (count, PAGE_SIZE))
    if not (pages.flags.c_contiguous and pages.flags.writeable):
        raise ValueError("pages: the array is not contiguous or is read-only")
    return pages


def as_data(data: memoryview) -> memoryview:
    """`data` as a contiguous view of bytes, without a copy."""
    if not data.c_contiguous:
        raise ValueError("data: the view is not contiguous")
    return data.cast("B")


def as_offsets(offsets: Offsets) -> Offsets:
    """`offsets` as a contiguous array of shape (n,)."""
    _check("offsets", offsets, np.uint64, (None,))
    return np.ascontiguousarray(offsets)


def as_expected(expected: Bytes, count: int) -> Bytes:
    """`expected` as a contiguous array of shape (count, DIGEST_SIZE)."""
    _check("expected", expected, np.uint8, (count, DIGEST_SIZE))
    return np.ascontiguousarray(expected)


def as_indices_max(indices_max: int, count: int) -> int:
    """How many indices a comparison of `count` pages can list."""
    if indices_max < 0:
        raise ValueError(f"indices_max: {indices_max} is negative")
    return min(indices_max, count)


def _check(
    name: str, array: NDArray[Any], kind: type[np.generic], shape: tuple[int | None, ...]
) -> None:
    """Raise ValueError unless `array` has this dtype and shape; None fits any length."""
    fits = array.ndim == len(shape) and all(
        wanted in (None, length) for wanted, length in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype != kind:
        wanted_shape = tuple("n" if length is None else length for length in shape)
        raise ValueError(
            f"{name}: {array.dtype} of shape {array.shape} given, "
            f"{np.dtype(kind)} of shape {wanted_shape} needed"
        )
