"""What every digest backend offers, and the checks that they share.

A digest is one of three of a page, named in `DIGESTS` and defined in docs/spec/digest.md. A
keyed one also takes the number of the page's frame, so that a page that was moved differs.
Shapes: pages ``(n, PAGE_SIZE)`` uint8, digests ``(n, digest_bytes)`` uint8, statuses ``(n,)``
uint8 of `PageStatus` values, offsets ``(n,)`` uint64 in bytes, frames ``(n,)`` uint64. A page
whose status is not OK has a digest of POISON bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from mmap import mmap
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pyscan.errors import UsageError
from pyscan.records import PAGE_SIZE

#: Indices that a comparison lists unless told otherwise.
INDICES_MAX: Final = 4096
#: Threads that a digester can have.
THREADS_MAX: Final = 256

_UINT8: Final = np.dtype(np.uint8)
_UINT64: Final = np.dtype(np.uint64)

Bytes = NDArray[np.uint8]
Offsets = NDArray[np.uint64]
Frames = NDArray[np.uint64]
Buffer = Bytes | bytes | bytearray | memoryview | mmap


@dataclass(frozen=True, slots=True)
class DigestKind:
    """One definition of docs/spec/digest.md."""

    name: str
    size: int  # bytes
    keyed: bool


DIGESTS: Final = {
    kind.name: kind
    for kind in (
        DigestKind("sha256", 32, keyed=False),
        DigestKind("nh4aes", 16, keyed=True),
        DigestKind("gf128aes", 16, keyed=True),
    )
}


def digest_kind(name: str) -> DigestKind:
    """The digest `name`. Raises UsageError when there is none."""
    try:
        return DIGESTS[name]
    except KeyError:
        raise UsageError(f"digest {name!r} is unknown; use one of: {', '.join(DIGESTS)}") from None


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What was held against what is expected. `ok + mismatched + unreadable == n`."""

    statuses: Bytes
    indices: Offsets  # shape (k,): those that are not equal or not read, ascending; bounded
    ok: int
    mismatched: int
    unreadable: int


class Digester(Protocol):
    """One backend with one digest. Safe for calls from several threads; the GIL is released.

    All methods raise ValueError when a shape or a type does not fit or a keyed digest is not
    given `frames`, and never raise for a page: what cannot be read has a status. A digest
    without a key does not look at `frames`.
    """

    @property
    def name(self) -> str:
        """The backend: ``native`` or ``numba``."""

    @property
    def digest(self) -> str:
        """The digest: a name of `DIGESTS`."""

    @property
    def digest_bytes(self) -> int:
        """Size of a digest."""

    @property
    def form(self) -> str:
        """Digest and implementation that are in use, such as ``nh4aes/avx2``."""

    @property
    def threads(self) -> int:
        """Threads that share the work of a call."""

    def hash_pages(self, pages: Buffer, *, frames: Frames | None = None) -> tuple[Bytes, Bytes]:
        """Digests and statuses of pages that stand one behind the other.

        `pages` is contiguous: an array of shape (n, PAGE_SIZE), or any buffer of n pages.
        """

    def hash_view(
        self, data: memoryview, offsets: Offsets, *, frames: Frames | None = None
    ) -> tuple[Bytes, Bytes]:
        """Digests and statuses of the pages at `offsets` of `data`.

        `data` may be a mapping that shrinks meanwhile: such a page is LINK_DOWN. An offset
        that leaves no room for a whole page is HOLE.
        """

    def compare_pages(
        self,
        pages: Buffer,
        expected: Bytes,
        indices_max: int = INDICES_MAX,
        *,
        frames: Frames | None = None,
    ) -> Comparison:
        """Hold pages as in `hash_pages` against `expected`, shape (n, digest_bytes)."""

    def compare_view(
        self,
        data: memoryview,
        offsets: Offsets,
        expected: Bytes,
        indices_max: int = INDICES_MAX,
        *,
        frames: Frames | None = None,
    ) -> Comparison:
        """Hold pages as in `hash_view` against `expected`, shape (n, digest_bytes)."""

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
    _check("pages", pages, _UINT8, (*pages.shape[:1], PAGE_SIZE))
    if not pages.flags.c_contiguous:
        raise ValueError("pages: the array is not contiguous")
    return pages


def as_output(pages: Bytes, count: int) -> Bytes:
    """`pages` as a writable array of shape (count, PAGE_SIZE), without a copy."""
    _check("pages", pages, _UINT8, (count, PAGE_SIZE))
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
    _check("offsets", offsets, _UINT64, offsets.shape[:1])
    return np.ascontiguousarray(offsets)


def as_frames(frames: Frames | None, kind: DigestKind, count: int) -> Frames | None:
    """`frames` as a contiguous array of shape (count,); None where `kind` takes none."""
    if not kind.keyed:
        return None
    if frames is None:
        raise ValueError(f"frames: {kind.name} needs the frame number of every page")
    _check("frames", frames, _UINT64, (count,))
    return np.ascontiguousarray(frames)


def as_expected(expected: Bytes, kind: DigestKind, count: int) -> Bytes:
    """`expected` as a contiguous array of shape (count, kind.size)."""
    _check("expected", expected, _UINT8, (count, kind.size))
    return np.ascontiguousarray(expected)


def as_values(values: Offsets, count: int) -> Offsets:
    """Expected values of a watch list as a contiguous array of shape (count,)."""
    _check("values", values, _UINT64, (count,))
    return np.ascontiguousarray(values)


def as_indices_max(indices_max: int, count: int) -> int:
    """How many indices a comparison of `count` pages can list."""
    if indices_max < 0:
        raise ValueError(f"indices_max: {indices_max} is negative")
    return min(indices_max, count)


def _check(name: str, array: NDArray[Any], kind: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `array` has this dtype and shape."""
    if array.shape != shape or (array.dtype is not kind and array.dtype != kind):
        raise ValueError(
            f"{name}: {array.dtype} of shape {array.shape} given, {kind} of shape {shape} needed"
        )
