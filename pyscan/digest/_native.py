"""Digests by the native core; the only module that touches its foreign function interface.

Every method checks sizes, lends its buffers to one call, and turns a negative status into
an exception. cffi releases the GIL for the call. The arrays and views that are lent are
held by local names until it returns.
"""

from __future__ import annotations

import os
from typing import Any, Final

import numpy as np

from pyscan.digest import base
from pyscan.digest._core import ffi, lib
from pyscan.digest.base import Buffer, Bytes, Comparison, Offsets
from pyscan.errors import InternalError, UsageError

#: Environment variable that forces a form, for tests and measurements.
FORM_VARIABLE: Final = "PYSCAN_FORM"

_FORMS: Final[dict[str, int]] = {"portable": lib.PS_FORM_PORTABLE, "shani": lib.PS_FORM_SHANI}


def available_forms() -> tuple[str, ...]:
    """Names of the SHA-256 forms that this CPU can run."""
    mask = lib.ps_forms_available()
    return tuple(name for name, form in _FORMS.items() if mask & (1 << form))


class NativeDigester:
    """The backend ``native``: C, with the fastest form that the CPU has.

    The form is one setting of the whole process; making a digester sets it anew from
    PYSCAN_FORM. Raises UsageError when that names a form that is unknown or not available.
    """

    name: Final = "native"

    def __init__(self) -> None:
        wanted = os.environ.get(FORM_VARIABLE)
        if wanted is not None and wanted not in available_forms():
            raise UsageError(
                f"{FORM_VARIABLE}={wanted} is not a form that this CPU can run; "
                f"unset it or use one of: {', '.join(available_forms())}"
            )
        form = lib.PS_FORM_AUTO if wanted is None else _FORMS[wanted]
        _check("ps_form_set", lib.ps_form_set(form))

    @property
    def form(self) -> str:
        """Algorithm and form in use now: ``sha256/shani`` or ``sha256/portable``."""
        names = {form: name for name, form in _FORMS.items()}
        return f"sha256/{names[lib.ps_form_get()]}"

    def hash_pages(self, pages: Buffer) -> tuple[Bytes, Bytes]:
        """See `Digester.hash_pages`. The pages may be a mapping that shrinks meanwhile."""
        pages = base.as_pages(pages)
        digests, statuses = _outputs(len(pages))
        result = lib.ps_digest_range(_bytes(pages), len(pages), _bytes(digests), _bytes(statuses))
        _check("ps_digest_range", result)
        return digests, statuses

    def hash_view(self, data: memoryview, offsets: Offsets) -> tuple[Bytes, Bytes]:
        """See `Digester.hash_view`."""
        data = base.as_data(data)
        offsets = base.as_offsets(offsets)
        digests, statuses = _outputs(len(offsets))
        result = lib.ps_digest_list(*_scattered(data, offsets), _bytes(digests), _bytes(statuses))
        _check("ps_digest_list", result)
        return digests, statuses

    def compare_pages(
        self, pages: Buffer, expected: Bytes, indices_max: int = base.INDICES_MAX
    ) -> Comparison:
        """See `Digester.compare_pages`. The pages may be a mapping that shrinks meanwhile."""
        pages = base.as_pages(pages)
        expected = base.as_expected(expected, len(pages))
        report = _Report(len(pages), indices_max)
        result = lib.ps_compare_range(_bytes(pages), len(pages), _bytes(expected), *report.lent())
        _check("ps_compare_range", result)
        return report.comparison()

    def compare_view(
        self,
        data: memoryview,
        offsets: Offsets,
        expected: Bytes,
        indices_max: int = base.INDICES_MAX,
    ) -> Comparison:
        """See `Digester.compare_view`."""
        data = base.as_data(data)
        offsets = base.as_offsets(offsets)
        expected = base.as_expected(expected, len(offsets))
        report = _Report(len(offsets), indices_max)
        result = lib.ps_compare_list(*_scattered(data, offsets), _bytes(expected), *report.lent())
        _check("ps_compare_list", result)
        return report.comparison()

    def copy_view(self, data: memoryview, offsets: Offsets, pages: Bytes) -> Bytes:
        """See `Digester.copy_view`."""
        data = base.as_data(data)
        offsets = base.as_offsets(offsets)
        pages = base.as_output(pages, len(offsets))
        statuses = np.empty(len(offsets), dtype=np.uint8)
        result = lib.ps_copy_list(*_scattered(data, offsets), _bytes(pages), _bytes(statuses))
        _check("ps_copy_list", result)
        return statuses


class _Report:
    """The buffers that a compare call fills."""

    def __init__(self, count: int, indices_max: int) -> None:
        self._statuses = np.empty(count, dtype=np.uint8)
        self._indices = np.empty(base.as_indices_max(indices_max, count), dtype=np.uint64)
        self._tally = ffi.new("ps_tally *")

    def lent(self) -> tuple[Any, Any, int, Any]:
        """The last four arguments of ps_compare_range() and ps_compare_list()."""
        indices = ffi.from_buffer("uint64_t[]", self._indices)
        return _bytes(self._statuses), indices, len(self._indices), self._tally

    def comparison(self) -> Comparison:
        """What the call has found."""
        return Comparison(
            statuses=self._statuses,
            indices=self._indices[: self._tally.listed],
            ok=self._tally.ok,
            mismatched=self._tally.mismatched,
            unreadable=self._tally.unreadable,
        )


def _outputs(count: int) -> tuple[Bytes, Bytes]:
    return np.empty((count, base.DIGEST_SIZE), dtype=np.uint8), np.empty(count, dtype=np.uint8)


def _scattered(data: memoryview, offsets: Offsets) -> tuple[Any, int, Any, int]:
    """The first four arguments of the functions that take a list of offsets."""
    return _bytes(data), data.nbytes, ffi.from_buffer("uint64_t[]", offsets), len(offsets)


def _bytes(buffer: Bytes | memoryview) -> Any:
    """`buffer` as a uint8_t pointer that keeps its owner alive."""
    return ffi.from_buffer("uint8_t[]", buffer)


def _check(function: str, result: int) -> None:
    if result != lib.PS_OK:
        raise InternalError(f"native core: {function} gave {result}; report this as a defect")
