"""Digests by the native core; with key.py the only module that touches its functions.

Every method checks sizes, lends its buffers to one call, and turns a negative status into
an exception. cffi releases the GIL for the call. The arrays and views that are lent are
held by local names until it returns.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import replace
from threading import Lock
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pyscan.digest import base
from pyscan.digest._core import ffi, lib
from pyscan.digest.base import Buffer, Bytes, Comparison, DigestKind, Frames, Offsets
from pyscan.digest.key import DigestKey
from pyscan.errors import InternalError, UsageError

#: Environment variable that forces a form, for tests and measurements.
FORM_VARIABLE: Final = "PYSCAN_FORM"

_DIGESTS: Final[dict[str, int]] = {
    "sha256": lib.PS_DIGEST_SHA256,
    "nh4aes": lib.PS_DIGEST_NH4AES,
    "gf128aes": lib.PS_DIGEST_GF128AES,
}
_FORMS: Final[dict[str, int]] = {
    "portable": lib.PS_FORM_PORTABLE,
    "sse2": lib.PS_FORM_SSE2,
    "avx2": lib.PS_FORM_AVX2,
    "avx512": lib.PS_FORM_AVX512,
    "shani": lib.PS_FORM_SHANI,
    "pclmul": lib.PS_FORM_PCLMUL,
    "vpclmul": lib.PS_FORM_VPCLMUL,
    "neon": lib.PS_FORM_NEON,
}
_FORM_NAMES: Final = {form: name for name, form in _FORMS.items()}


def available_forms(digest: str) -> tuple[str, ...]:
    """Names of the forms in which this CPU can run `digest`; UsageError when it is unknown."""
    mask = lib.ps_forms_available(_DIGESTS[base.digest_kind(digest).name])
    return tuple(name for name, form in _FORMS.items() if mask & (1 << form))


class NativeDigester:
    """The backend ``native``: C, with the fastest form that the CPU has.

    PYSCAN_FORM forces a form when the digester is made. Raises UsageError when that is not
    one of the digest on this CPU, when the digest cannot run on this CPU at all, when a keyed
    digest has no key of its own, or when `threads` is not in 1 .. THREADS_MAX.
    """

    name: Final = "native"

    def __init__(
        self, digest: str = "sha256", key: DigestKey | None = None, threads: int = 1
    ) -> None:
        self._kind = base.digest_kind(digest)
        self._key = _checked_key(self._kind, key)
        self._threads = threads
        self._form = _wanted_form(digest)
        self._pool = _new_pool(threads)
        self._method = ffi.new("ps_method *")
        self._method.digest = _DIGESTS[digest]
        self._method.form = _FORMS[self._form]
        self._method.pool = self._pool
        if self._key is not None:
            self._method.key = self._key.pointer
        if self._pool != ffi.NULL:
            weakref.finalize(self, lib.ps_pool_free, self._pool)

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
        return f"{self._kind.name}/{self._form}"

    @property
    def threads(self) -> int:
        """See `Digester.threads`."""
        return self._threads

    def hash_pages(self, pages: Buffer, *, frames: Frames | None = None) -> tuple[Bytes, Bytes]:
        """See `Digester.hash_pages`. The pages may be a mapping that shrinks meanwhile."""
        pages = base.as_pages(pages)
        frames = base.as_frames(frames, self._kind, len(pages))
        digests, statuses = self._outputs(len(pages))
        result = lib.ps_digest_range(
            self._lent_method(),
            _bytes(pages),
            len(pages),
            _longs(frames),
            _bytes(digests),
            _bytes(statuses),
        )
        _check("ps_digest_range", result)
        return digests, statuses

    def hash_view(
        self, data: memoryview, offsets: Offsets, *, frames: Frames | None = None
    ) -> tuple[Bytes, Bytes]:
        """See `Digester.hash_view`."""
        data = base.as_data(data)
        offsets = base.as_offsets(offsets)
        frames = base.as_frames(frames, self._kind, len(offsets))
        digests, statuses = self._outputs(len(offsets))
        result = lib.ps_digest_list(
            self._lent_method(),
            *_scattered(data, offsets),
            _longs(frames),
            _bytes(digests),
            _bytes(statuses),
        )
        _check("ps_digest_list", result)
        return digests, statuses

    def compare_pages(
        self,
        pages: Buffer,
        expected: Bytes,
        indices_max: int = base.INDICES_MAX,
        *,
        frames: Frames | None = None,
    ) -> Comparison:
        """See `Digester.compare_pages`. The pages may be a mapping that shrinks meanwhile."""
        pages = base.as_pages(pages)
        frames = base.as_frames(frames, self._kind, len(pages))
        expected = base.as_expected(expected, self._kind, len(pages))
        report = _Report(len(pages), indices_max)
        result = lib.ps_compare_range(
            self._lent_method(),
            _bytes(pages),
            len(pages),
            _longs(frames),
            _bytes(expected),
            *report.lent(),
        )
        _check("ps_compare_range", result)
        return report.comparison()

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
        data = base.as_data(data)
        offsets = base.as_offsets(offsets)
        frames = base.as_frames(frames, self._kind, len(offsets))
        expected = base.as_expected(expected, self._kind, len(offsets))
        report = _Report(len(offsets), indices_max)
        result = lib.ps_compare_list(
            self._lent_method(),
            *_scattered(data, offsets),
            _longs(frames),
            _bytes(expected),
            *report.lent(),
        )
        _check("ps_compare_list", result)
        return report.comparison()

    def copy_view(self, data: memoryview, offsets: Offsets, pages: Bytes) -> Bytes:
        """See `Digester.copy_view`."""
        data = base.as_data(data)
        offsets = base.as_offsets(offsets)
        pages = base.as_output(pages, len(offsets))
        statuses = np.empty(len(offsets), dtype=np.uint8)
        result = lib.ps_copy_list(
            self._pool, *_scattered(data, offsets), _bytes(pages), _bytes(statuses)
        )
        _check("ps_copy_list", result)
        return statuses

    def _outputs(self, count: int) -> tuple[Bytes, Bytes]:
        digests = np.empty((count, self._kind.size), dtype=np.uint8)
        return digests, np.empty(count, dtype=np.uint8)

    def _lent_method(self) -> Any:
        """How the core is to digest. Raises ValueError when the key is closed."""
        if self._key is not None:
            self._key.pointer  # noqa: B018 (it raises when there is no key any more)
        return self._method


class WatchList:
    """64-bit values of a target and what they should be, made once and compared often.

    `offsets` as in `Digester.compare_view`, aligned or not; `values` is uint64 of the same
    shape, in the byte order of the target, little-endian. Both are copied. Raises ValueError
    when a shape or a type does not fit.
    """

    def __init__(
        self, offsets: Offsets, values: Offsets, indices_max: int = base.INDICES_MAX
    ) -> None:
        count = len(base.as_offsets(offsets))
        self._offsets = base.as_offsets(offsets).copy()
        self._values = base.as_values(values, count).copy()
        self._report = _Report(count, base.as_indices_max(indices_max, count))
        self._report_lock = Lock()
        self._lent = _longs(self._offsets), _longs(self._values), count, *self._report.lent()
        statuses, indices = np.zeros(count, dtype=np.uint8), np.empty(0, dtype=np.uint64)
        statuses.flags.writeable = False
        self._all_well = Comparison(statuses, indices, ok=count, mismatched=0, unreadable=0)

    def compare(self, data: memoryview) -> Comparison:
        """Hold the values in `data`, as in `Digester.compare_view`, against the list.

        As long as all is well that is always the same object, whose arrays are read-only: at
        some 100,000 compares a second, making one costs more than comparing.
        """
        lent_data = _bytes(base.as_data(data))
        with self._report_lock:
            result = lib.ps_watch_compare(lent_data, len(lent_data), *self._lent)
            _check("ps_watch_compare", result)
            if self._report.ok == self._all_well.ok:
                return self._all_well
            return self._report.comparison_copied()


def nh4aes_pairs(key: DigestKey) -> NDArray[np.uint64]:
    """K of an nh4aes key, shape (524,), two words each: a view of its locked memory, no copy.

    Valid until the key is closed.
    """
    words = lib.ps_key_nh_words(key.pointer)
    return np.frombuffer(ffi.buffer(words, lib.PS_NH_WORDS_SIZE), dtype="<u8")


def finish_nh4aes(key: DigestKey, sums: NDArray[np.uint64], frames: Frames, digests: Bytes) -> None:
    """Digests of nh4aes, shape (n, 16), from the four sums of each page, shape (n, 4)."""
    result = lib.ps_nh4aes_finish(
        key.pointer, _longs(sums), _longs(frames), len(sums), _bytes(digests)
    )
    _check("ps_nh4aes_finish", result)


class ReadLimit:
    """The yardstick of all scans: reads pages with nothing but loads, on `threads` threads."""

    def __init__(self, threads: int = 1, *, interleaved: bool = True) -> None:
        self._interleaved = interleaved
        self._pool = _new_pool(threads)
        if self._pool != ffi.NULL:
            weakref.finalize(self, lib.ps_pool_free, self._pool)

    def read_view(self, data: memoryview, offsets: Offsets) -> int:
        """The exclusive or of all 64-bit words of the pages at `offsets` of `data`.

        Interleaved over eight pages or one after the other: the limit is the better of both.
        Raises ValueError when a page cannot be read or a shape does not fit.
        """
        data = base.as_data(data)
        offsets = base.as_offsets(offsets)
        found = ffi.new("uint64_t *")
        result = lib.ps_read_limit(self._pool, *_scattered(data, offsets), self._interleaved, found)
        if result == lib.PS_ERR_ARGUMENT:
            raise ValueError("offsets: a page cannot be read")
        _check("ps_read_limit", result)
        return int(found[0])


class _Report:
    """The buffers that a compare call fills."""

    def __init__(self, count: int, indices_max: int) -> None:
        self._statuses = np.empty(count, dtype=np.uint8)
        self._indices = np.empty(base.as_indices_max(indices_max, count), dtype=np.uint64)
        self._tally = ffi.new("ps_tally *")

    def lent(self) -> tuple[Any, Any, int, Any]:
        """The last four arguments of the functions that compare."""
        return _bytes(self._statuses), _longs(self._indices), len(self._indices), self._tally

    @property
    def ok(self) -> int:
        """How many are as expected."""
        return int(self._tally.ok)

    def comparison_copied(self) -> Comparison:
        """What the call has found, where the buffers are going to be used again."""
        found = self.comparison()
        return replace(found, statuses=found.statuses.copy(), indices=found.indices.copy())

    def comparison(self) -> Comparison:
        """What the call has found."""
        return Comparison(
            statuses=self._statuses,
            indices=self._indices[: self._tally.listed],
            ok=self._tally.ok,
            mismatched=self._tally.mismatched,
            unreadable=self._tally.unreadable,
        )


def _checked_key(kind: DigestKind, key: DigestKey | None) -> DigestKey | None:
    if (key is not None) != kind.keyed:
        advice = "give it a DigestKey" if kind.keyed else "open it without one"
        raise UsageError(f"digest {kind.name!r} takes {'a' if kind.keyed else 'no'} key; {advice}")
    if key is not None and key.digest != kind.name:
        raise UsageError(f"a key of {key.digest} was given to digest {kind.name!r}; make its own")
    return key


def _wanted_form(digest: str) -> str:
    """The form that PYSCAN_FORM names, or else the fastest."""
    forms = available_forms(digest)
    wanted = os.environ.get(FORM_VARIABLE)
    if not forms:
        raise UsageError(f"digest {digest!r} needs instructions that this CPU lacks; use nh4aes")
    if wanted is None:
        return _FORM_NAMES[lib.ps_form_pick(_DIGESTS[digest], lib.PS_FORM_AUTO)]
    if wanted not in forms:
        raise UsageError(
            f"{FORM_VARIABLE}={wanted} is not a form of {digest} that this CPU can run; "
            f"unset it or use one of: {', '.join(forms)}"
        )
    return wanted


def _new_pool(threads: int) -> Any:
    """A pool that the caller frees; NULL for one thread."""
    if not 1 <= threads <= base.THREADS_MAX:
        raise UsageError(f"{threads} threads were asked for; use 1 to {base.THREADS_MAX}")
    if threads == 1:
        return ffi.NULL
    pool = lib.ps_pool_new(threads)
    if pool == ffi.NULL:
        raise InternalError(f"{threads} threads cannot be started; use fewer")
    return pool


def _scattered(data: memoryview, offsets: Offsets) -> tuple[Any, int, Any, int]:
    """The arguments of the functions that take a list of offsets."""
    return _bytes(data), data.nbytes, _longs(offsets), len(offsets)


def _bytes(buffer: Bytes | memoryview) -> Any:
    """`buffer` as a uint8_t pointer that keeps its owner alive."""
    return ffi.from_buffer("uint8_t[]", buffer)


def _longs(array: Offsets | None) -> Any:
    """`array` as a uint64_t pointer that keeps its owner alive; NULL for None."""
    return ffi.NULL if array is None else ffi.from_buffer("uint64_t[]", array)


def _check(function: str, result: int) -> None:
    if result != lib.PS_OK:
        raise InternalError(f"native core: {function} gave {result}; report this as a defect")
