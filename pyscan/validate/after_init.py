"""Data that is read-only after init: against the package, and by type where it is set at boot.

What the boot sets can be foretold only by running it. So a series' list says of each variable
what becomes of it (`Series.after_init`); all others must be as the package has them. Words
that differ are typed: one that leads into code must be a function's entry, and only where
functions are expected. What remains is counted as unverified; a monitor pins it at attach.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.errors import ApprovedFileError
from pyscan.kernel.after_init import AfterInit, Part
from pyscan.kernel.series import SERIES
from pyscan.records import PAGE_SIZE
from pyscan.translate import EXECUTABLE, WRITABLE
from pyscan.validate.context import Target
from pyscan.validate.placed import Placed
from pyscan.validate.rodata import RodataComparer, RodataResult
from pyscan.validate.state import PatchState
from pyscan.validate.vdso import patched_vdso

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]

_WORD: Final = 8
#: Low bits of static_key.entries: how it starts, and that modules use it, too
#: (include/linux/jump_label.h).
_KEY_LINKED: Final = 2
_KEY_FLAGS: Final = 3
#: The section of a module that holds such variables; around it are tables and padding.
_MODULE_SECTION: Final = ".data..ro_after_init"
_UNLISTED: Final = -1
_KINDS: Final = tuple(AfterInit)
_TYPED: Final = frozenset(_KINDS) - {AfterInit.VALUE, AfterInit.FUNCTIONS, AfterInit.VDSO}


@dataclass(slots=True)
class AfterInitResult:
    """Bytes of data that is read-only after init, by what is known of them."""

    verified: int = 0  # as the package implies
    typed: int = 0  # addresses, of a kind that may be there
    unverified: int = 0  # numbers that only the boot knows

    @property
    def bytes(self) -> int:
        """All that was compared and found legal."""
        return self.verified + self.typed + self.unverified


@dataclass(frozen=True, slots=True, eq=False)
class _Listed:
    """The variables of a segment: `starts` (n,) ascending, `ends` and indices in _KINDS."""

    starts: I64
    ends: I64
    kinds: NDArray[np.int8]

    def kind_at(self, offsets: I64) -> NDArray[np.int8]:
        """Kind of the variable at each offset, or _UNLISTED."""
        if not len(self.starts):
            return np.full(len(offsets), _UNLISTED, dtype=np.int8)
        row = np.maximum(np.searchsorted(self.starts, offsets, side="right") - 1, 0)
        inside = (self.starts[row] <= offsets) & (offsets < self.ends[row])
        return np.where(inside, self.kinds[row], np.int8(_UNLISTED)).astype(np.int8)


class AfterInitComparer:
    """Compares the read-only-after-init data of one placed unit, segment by segment."""

    def __init__(
        self,
        target: Target,
        placed: Placed,
        rodata: RodataComparer,
        state: PatchState,
    ) -> None:
        """`rodata` compares the unit's tables. Raises ApprovedFileError: an unknown series."""
        self._target = target
        self._placed = placed
        self._rodata = rodata
        self._state = state
        self._listed = _listed(target.approved.series)

    def compare(
        self,
        start: int,
        actual: Bytes,
        unread: Flags,
        result: RodataResult,
        counts: AfterInitResult,
    ) -> Bytes:
        """Hold the bytes from offset `start` on against the package's; gives legal bytes.

        Differences are added to `result`. The `unread` bytes, shape (n,), are left out.
        """
        package, unknown = self._placed.relocated(start, start + len(actual))
        changed = (package != actual) & ~unread & ~unknown
        offsets = np.flatnonzero(changed) + start
        kinds = self._variables(start, start + len(actual)).kind_at(offsets)
        legal, typed = self._judge(start, actual, offsets, kinds)
        image = kinds == _KINDS.index(AfterInit.VDSO)
        legal |= image & self._as_patched(start, actual, offsets, image)
        settled = np.zeros(len(actual), dtype=bool)
        settled[offsets[legal] - start] = True
        compared = result.code.bytes
        found = self._rodata.compare(start, actual, unread | settled, result)
        result.code.bytes = compared + len(actual) - int(unread.sum())
        found[settled] = actual[settled]
        counts.typed += int((legal & typed).sum())
        counts.unverified += int((legal & ~typed & ~image).sum())
        known = (found == actual) & ~unread & ~settled
        counts.verified += int(known.sum()) + int((legal & image).sum())
        return found

    def _variables(self, start: int, end: int) -> _Listed:
        """The listed variables that begin in a segment."""
        rows: list[tuple[int, int, int]] = []
        if self._placed.unit is not self._target.approved.vmlinux:
            rows = [
                (section.offset, section.offset + section.length, _KINDS.index(AfterInit.FUNCTIONS))
                for section in self._placed.unit.sections
                if section.name == _MODULE_SECTION
            ]
        else:
            for name, offset in self._target.names.ending("", start, end):
                last = min(self._target.names.end(offset) or end, end)
                for part in self._listed.get(name, ()):
                    first = offset + part.offset
                    behind = min(last, first + part.length) if part.length else last
                    rows.append((first, behind, _KINDS.index(part.kind)))
        column = np.array(sorted(set(rows)), dtype=np.int64).reshape(-1, 3)
        return _Listed(column[:, 0], column[:, 1], column[:, 2].astype(np.int8))

    def _judge(
        self, start: int, actual: Bytes, offsets: I64, kinds: NDArray[np.int8]
    ) -> tuple[Flags, Flags]:
        """Which changed bytes lie in a word that its kind allows, and which of them are typed."""
        words, inverse = np.unique(offsets // _WORD * _WORD, return_inverse=True)
        inside = (words >= start) & (words + _WORD <= start + len(actual))
        at = np.where(inside, words - start, 0)[:, None] + np.arange(_WORD)
        values = actual[at].copy().view("<u8")[:, 0] if len(words) else np.zeros(0, dtype="<u8")
        code = flagged(self._target, values, EXECUTABLE)
        null = values == 0
        pointers = np.isin(words, self._placed.unit.relocations64["offset"])
        memory = self._in_kernel(values) & ~code
        data = self._in_image(values) & ~code
        allowed = {
            AfterInit.VALUE: ~code & ~pointers,
            AfterInit.POINTER: (null | (memory & (values % _WORD == 0))) & ~pointers,
            AfterInit.PER_CPU: memory & ~data & (values % PAGE_SIZE == 0),
            AfterInit.OBJECT: null | data,
            AfterInit.FUNCTIONS: np.where(
                code, self._target.are_functions(values), null | ~pointers
            ),
            AfterInit.STATIC_KEY: self._are_key_words(values) & ~pointers,
            AfterInit.HOOKS: (null | (data & ~flagged(self._target, values, WRITABLE))) & ~pointers,
        }
        legal, typed = np.zeros((2, len(offsets)), dtype=bool)
        for kind, words_allowed in allowed.items():
            mine = kinds == _KINDS.index(kind)
            legal[mine] = (words_allowed & inside)[inverse[mine]]
            typed[mine] = kind in _TYPED
            if kind is AfterInit.FUNCTIONS:
                typed[mine] = code[inverse[mine]]
        return legal, typed

    def _in_image(self, values: U64) -> Flags:
        first, end = np.uint64(self._target.virtual_base), np.uint64(self._target.image_end)
        found: Flags = (values >= first) & (values < end)
        return found

    def _in_kernel(self, values: U64) -> Flags:
        """Which values are addresses of mapped kernel memory."""
        _, mapped = self._target.memory.translate(values)
        return mapped

    def _are_key_words(self, values: U64) -> Flags:
        """A count, or the address of the first of the key's jump entries."""
        small: Flags = values < np.uint64(1 << 31)
        linked = (values & np.uint64(_KEY_LINKED)) != 0
        linked &= self._in_kernel(values) & ~flagged(self._target, values, EXECUTABLE)
        found: Flags = small | linked
        if not self._target.has("__start___jump_table"):
            return found
        entries = values & ~np.uint64(_KEY_FLAGS)
        first = np.uint64(self._target.address("__start___jump_table"))
        last = np.uint64(self._target.address("__stop___jump_table"))
        found |= (entries >= first) & (entries < last)
        return found

    def _as_patched(self, start: int, actual: Bytes, offsets: I64, image: Flags) -> Flags:
        """Which bytes of images of the vDSO are as their alternatives imply."""
        found = np.zeros(len(offsets), dtype=bool)
        if not image.any():
            return found
        names = self._target.names
        for name, offset in names.ending("", start, start + len(actual)):
            if not any(part.kind is AfterInit.VDSO for part in self._listed.get(name, ())):
                continue
            end = min(names.end(offset) or offset, start + len(actual))
            data = self._placed.unit.image[offset:end].tobytes()
            expected = np.frombuffer(patched_vdso(data, self._state), dtype=np.uint8)
            mine = np.flatnonzero(image & (offsets >= offset) & (offsets < end))
            found[mine] = expected[offsets[mine] - offset] == actual[offsets[mine] - start]
        return found


def _listed(name: str) -> Mapping[str, tuple[Part, ...]]:
    series = SERIES.get(name)
    if series is None:
        raise ApprovedFileError(
            f"approved configuration of kernel series {name!r}, which is not supported; known "
            f"series: {', '.join(sorted(SERIES))}"
        )
    return series.after_init


def flagged(target: Target, values: U64, flag: int) -> Flags:
    """Which values are an address of kernel memory whose mapping has a flag of `Leaves`."""
    leaves = target.memory.leaves
    if not len(leaves):
        return np.zeros(len(values), dtype=bool)
    row = np.searchsorted(leaves.address, values, side="right") - 1
    mapped = row >= 0
    row = np.maximum(row, 0)
    mapped &= values - leaves.address[row] < leaves.size[row]
    found: Flags = mapped & (leaves.flags[row] & np.uint8(flag) != 0)
    return found
