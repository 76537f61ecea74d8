"""Read-only data in memory against the package's.

Bytes are compared exactly, but for tables that the kernel sorts or completes in place: those
must hold the same entries. References to what is gone (a module's init sections) cannot be
known; they are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.approved.unit import Table, TableKind
from pyscan.validate.code import CodeResult, add_differences
from pyscan.validate.placed import Placed

I64 = NDArray[np.int64]
Bytes = NDArray[np.uint8]

#: In a table's entry: a place outside the unit, of which the package cannot know the address.
_OUTSIDE: Final = -1
_INIT_FLAG: Final = 2  # in a key: the site lies in init code (JUMP_TYPE..., static_call_types.h)
_BRANCH_FLAG: Final = 1
_ORC_BYTES: Final = 6  # sizeof(struct orc_entry), arch/x86/include/asm/orc_types.h
#: The options of the kernel's own default string that set_rdt_options() cuts at its commas
#: (arch/x86/kernel/cpu/resctrl/core.c): the string lies in read-only data and is written.
RDT_OPTIONS: Final = b"!cmt,!mbmtotal,!mbmlocal,!l3cat\0"


@dataclass(frozen=True, slots=True)
class InitRange:
    """Offsets of a unit's init code, where it lies in the image (vmlinux); else empty."""

    start: int = 0
    end: int = 0


@dataclass(slots=True)
class RodataResult:
    """What a comparison of read-only data found."""

    code: CodeResult = field(default_factory=CodeResult)
    unknown_bytes: int = 0  # references to what is gone


class RodataComparer:
    """Compares the read-only data of one placed unit, segment by segment."""

    def __init__(self, placed: Placed, init: InitRange, key_of: Callable[[int], int]) -> None:
        """`key_of` gives the address of a static call's key by that of its trampoline."""
        self._placed = placed
        self._init = init
        self._key_of = key_of

    def compare(
        self, start: int, actual: Bytes, unread: NDArray[np.bool_], result: RodataResult
    ) -> Bytes:
        """Hold the bytes from offset `start` on against the package's; gives legal bytes.

        The `unread` bytes, shape (n,), are left out.
        """
        end = start + len(actual)
        expected, unknown = self._placed.relocated(start, end)
        actual = np.where(unread, expected, actual)
        result.code.bytes += len(actual) - int(unread.sum())
        if not np.array_equal(expected, actual):
            self._settle_literal(start, expected, actual, result)
            for table in self._placed.unit.tables:
                if start <= table.offset and table.offset + table.length <= end:
                    settled = self._settle_table(table, start, expected, actual, unknown)
                    result.code.count(f"{table.kind} table", int(settled))
            expected[unknown] = actual[unknown]
            result.unknown_bytes += int(unknown.sum())
            add_differences(self._placed, start, expected, actual, result.code)
        return expected

    def _settle_literal(
        self, start: int, expected: Bytes, actual: Bytes, result: RodataResult
    ) -> None:
        at = expected.tobytes().find(RDT_OPTIONS)
        if at < 0:
            return
        part = slice(at, at + len(RDT_OPTIONS))
        cut = (expected[part] == ord(",")) & (actual[part] == 0)
        expected[part][cut] = 0
        result.code.count("resctrl options", int(cut.any()))

    def _settle_table(
        self,
        table: Table,
        start: int,
        expected: Bytes,
        actual: Bytes,
        unknown: NDArray[np.bool_],
    ) -> bool:
        """Take over the rows that are in another order; whether there are no others."""
        part = slice(table.offset - start, table.offset - start + table.length)
        if np.array_equal(expected[part], actual[part]):
            return False
        if table.kind is TableKind.ORC_ENTRY:
            return False  # together with the addresses
        parts = [part]
        if table.kind is TableKind.ORC_IP:
            entries = next(
                (t for t in self._placed.unit.tables if t.kind is TableKind.ORC_ENTRY), None
            )
            if entries is None or not self._pair(table, entries, start, start + len(actual)):
                return False
            parts.append(slice(entries.offset - start, entries.offset - start + entries.length))
        read = _READERS[table.kind]
        ours = read(self, table, [expected[p] for p in parts], [unknown[p] for p in parts], True)
        theirs = read(self, table, [actual[p] for p in parts], [unknown[p] for p in parts], False)
        missing, stray = _unmatched(ours, theirs)
        if len(stray) and any(unknown[each].any() for each in parts):
            return False  # rows may differ in what nobody knows
        for each in parts:
            expected[each] = actual[each]
            unknown[each] = False
        for row, values in zip(stray.tolist(), ours[missing].tolist(), strict=True):
            for each, data in zip(parts, self._encoded(table, row, values), strict=True):
                at = each.start + row * len(data)
                expected[at : at + len(data)] = np.frombuffer(data, dtype=np.uint8)
        return not len(stray)

    def _encoded(self, table: Table, row: int, values: list[int]) -> list[bytes]:
        """The bytes of a row that should be in a table, a piece for each part of it."""
        place = table.offset + row * table.entry
        base = self._placed.address
        match table.kind:
            case TableKind.JUMP_TABLE:
                fields = [(values[0] - place, 4), (values[1] - place - 4, 4)]
                return [_packed(*fields, (values[2] - place - 8, 8))]
            case TableKind.STATIC_CALLS:
                return [_packed((values[0] - place, 4), (values[1] - place - 4, 4))]
            case TableKind.EXCEPTIONS:
                fields = [(values[0] - place, 4), (values[1] - place - 4, 4)]
                return [_packed(*fields, (values[2], 4))]
            case TableKind.ORC_IP:
                return [_packed((values[0] - place, 4)), _packed((values[1], _ORC_BYTES))]
            case _:
                return [_packed((values[0] + base, 8))]

    @staticmethod
    def _pair(table: Table, entries: Table, start: int, end: int) -> bool:
        """Whether entries lie in a range, and belong to the addresses of `table` one by one."""
        inside = start <= entries.offset and entries.offset + entries.length <= end
        return inside and entries.length * table.entry == table.length * entries.entry

    def _places(self, table: Table, field_at: int, entries: int) -> I64:
        return table.offset + field_at + table.entry * np.arange(entries, dtype=np.int64)

    def _known(self, offsets: I64, unknown: NDArray[np.bool_]) -> I64:
        """Offsets as they are; where the table has `unknown` bytes, _OUTSIDE beyond the unit.

        An unknown place is sorted to where nobody knows, so such a table's references out of
        the unit can only be counted.
        """
        if not unknown.any():
            return offsets
        return np.where(self._inside(offsets), offsets, _OUTSIDE)

    def _inside(self, offsets: I64) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = (offsets >= 0) & (offsets < self._placed.unit.length)
        return found

    def _jump_table(
        self, table: Table, parts: list[Bytes], unknown: list[NDArray[np.bool_]], built: bool
    ) -> I64:
        """Rows (code, target, key with flags)."""
        rows = parts[0].reshape(-1, 16)
        lost = unknown[0].reshape(-1, 16) if built else np.zeros(rows.shape, dtype=bool)
        words = rows[:, :8].copy().view("<i4").astype(np.int64)
        keys = rows[:, 8:].copy().view("<i8")[:, 0]
        code = self._known(words[:, 0] + self._places(table, 0, len(rows)), unknown[0])
        target = self._known(words[:, 1] + self._places(table, 4, len(rows)), unknown[0])
        code[lost[:, :4].any(axis=1)] = _OUTSIDE
        target[lost[:, 4:8].any(axis=1)] = _OUTSIDE
        keys = keys + self._places(table, 8, len(rows))
        if built:
            keys = self._with_init_flag(keys & ~_INIT_FLAG, code)
        return np.stack((code, target, keys), axis=1)

    def _static_calls(
        self, table: Table, parts: list[Bytes], unknown: list[NDArray[np.bool_]], built: bool
    ) -> I64:
        """Rows (site, key with flags); a module's table names a trampoline for some keys."""
        rows = parts[0].copy().view("<i4").reshape(-1, 2).astype(np.int64)
        site = self._known(rows[:, 0] + self._places(table, 0, len(rows)), unknown[0])
        keys = rows[:, 1] + self._places(table, 4, len(rows))
        if built:
            lost = unknown[0].reshape(-1, 8)[:, :4].any(axis=1)
            site[lost] = _OUTSIDE
            flags = keys & _BRANCH_FLAG
            base = self._placed.address
            named = [
                (self._key_of((base + key) & ((1 << 64) - 1)) - base)
                for key in (keys & ~(_BRANCH_FLAG | _INIT_FLAG)).tolist()
            ]
            wrapped = (np.array(named, dtype=object) % (1 << 64)).astype(np.uint64)
            keys = self._with_init_flag(wrapped.astype(np.int64) | flags, site)
        return np.stack((site, keys), axis=1)

    def _with_init_flag(self, keys: I64, sites: I64) -> I64:
        init = (sites >= self._init.start) & (sites < self._init.end) | ~self._inside(sites)
        found: I64 = keys | np.where(init, _INIT_FLAG, 0)
        return found

    def _exceptions(
        self, table: Table, parts: list[Bytes], unknown: list[NDArray[np.bool_]], built: bool
    ) -> I64:
        """Rows (instruction, fixup, data)."""
        rows = parts[0].copy().view("<i4").reshape(-1, 3).astype(np.int64)
        rows[:, 0] = self._known(rows[:, 0] + self._places(table, 0, len(rows)), unknown[0])
        rows[:, 1] = self._known(rows[:, 1] + self._places(table, 4, len(rows)), unknown[0])
        if built:
            lost = unknown[0].reshape(-1, 12)
            rows[:, 0][lost[:, :4].any(axis=1)] = _OUTSIDE
            rows[:, 1][lost[:, 4:8].any(axis=1)] = _OUTSIDE
        return rows

    def _orc(
        self, table: Table, parts: list[Bytes], unknown: list[NDArray[np.bool_]], built: bool
    ) -> I64:
        """Rows (instruction, six bytes of the entry)."""
        words = parts[0].copy().view("<i4").astype(np.int64)
        ip = self._known(words + self._places(table, 0, len(words)), unknown[0])
        if built:
            ip[unknown[0].reshape(-1, 4).any(axis=1)] = _OUTSIDE
        entries = parts[1].reshape(len(words), -1)
        value = np.zeros(len(words), dtype=np.int64)
        for index in range(entries.shape[1]):
            value |= entries[:, index].astype(np.int64) << (8 * index)
        return np.stack((ip, value), axis=1)

    def _mcount(
        self, table: Table, parts: list[Bytes], unknown: list[NDArray[np.bool_]], built: bool
    ) -> I64:
        """Rows (offset of the call)."""
        words = parts[0].copy().view("<u8") - np.uint64(self._placed.address)
        offsets = self._known(words.astype(np.int64), unknown[0])
        if built:
            offsets[unknown[0].reshape(-1, 8).any(axis=1)] = _OUTSIDE
        return offsets[:, None]


_READERS: Final = {
    TableKind.JUMP_TABLE: RodataComparer._jump_table,
    TableKind.STATIC_CALLS: RodataComparer._static_calls,
    TableKind.EXCEPTIONS: RodataComparer._exceptions,
    TableKind.ORC_IP: RodataComparer._orc,
    TableKind.MCOUNT: RodataComparer._mcount,
}


def _unmatched(ours: I64, theirs: I64) -> tuple[I64, I64]:
    """Indices of rows of each that the other has not, as often; both sorted by content."""
    if np.array_equal(_sorted(ours), _sorted(theirs)):  # the rule, and quicker
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    _, which = np.unique(np.concatenate((ours, theirs)), axis=0, return_inverse=True)
    mine, other = which.reshape(-1)[: len(ours)], which.reshape(-1)[len(ours) :]
    return _surplus(mine, other), _surplus(other, mine)


def _sorted(rows: I64) -> I64:
    return rows[np.lexsort(rows.T[::-1])]


def _surplus(rows: I64, others: I64) -> I64:
    """Indices of rows, by ascending number, beyond as many as are among the others."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    rank = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    counts = np.bincount(others, minlength=int(ordered[-1]) + 1 if len(ordered) else 0)
    return order[rank >= counts[ordered]]


def _packed(*fields: tuple[int, int]) -> bytes:
    """Little-endian integers of (value, bytes), modulo their width."""
    return b"".join(
        (value & ((1 << 8 * width) - 1)).to_bytes(width, "little") for value, width in fields
    )
