"""What the fuzzed machine may hold: a second account of it, made of finite lists.

It shares nothing with pyscan.validate but relocation: under one state every place of text and
read-only data has a few contents that are legal, and all others must be found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np
from fake_target import SYMBOLS
from fuzz.made_machine import NAMES
from numpy.typing import NDArray

from pyscan.approved.unit import VMLINUX, SegmentKind, Table, TableKind, Unit
from pyscan.records import PAGE_SIZE, PageStatus
from pyscan.validate import Validation
from pyscan.validate.placed import Placed

if TYPE_CHECKING:
    from fuzz.machine import Machine

Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Place = tuple[int, int]  # offset and length
#: A unit, the offset of its first byte, the bytes in memory and those of the package -> which
#: of them are not legal.
Judge = Callable[[Placed, int, Bytes, Bytes], Flags]

NOP5: Final = b"\x0f\x1f\x44\0\0"
RETURN: Final = b"\xc3\xcc\xcc\xcc\xcc"
CALL: Final = 0xE8
JUMP: Final = 0xE9
_CORE_SITES: Final = (SYMBOLS["ftrace_call"], SYMBOLS["ftrace_regs_call"])
#: A tail call and a trampoline of a key without a function.
_TAIL, _TRAMPOLINE = 0xA2C0, NAMES["none_trampoline"]


def branch(opcode: int, source: int, target: int) -> bytes:
    """A call or jump of 5 bytes."""
    return bytes([opcode]) + ((target - source - 5) & 0xFFFF_FFFF).to_bytes(4, "little")


def sites_of(unit: Unit) -> list[Place]:
    """Every place of a unit that a kernel writes, but for probes."""
    sites = unit.sites
    found = [(int(at), 5) for at in (*sites.mcount.tolist(), *sites.returns.tolist())]
    found += [(int(at), 1) for at in sites.locks.tolist()]
    found += [(int(row["offset"]), 8) for row in sites.trampolines]
    for column in (
        *(sites.jump_labels, sites.static_calls, sites.retpolines),
        *(sites.paravirt, sites.alternatives),
    ):
        found += [(int(row["offset"]), int(row["length"])) for row in column]
    if unit.name == VMLINUX:
        found += [(at, 5) for at in _CORE_SITES]
    return found


def table_groups(unit: Unit) -> list[tuple[Table, ...]]:
    """Tables of read-only data; two that are sorted together are one group."""
    (end,) = (s.offset + s.length for s in unit.segments if s.kind is SegmentKind.RODATA)
    tables = {table.kind: table for table in unit.tables if table.offset < end}
    entry = tables.pop(TableKind.ORC_ENTRY)
    return [
        (table, entry) if kind is TableKind.ORC_IP else (table,) for kind, table in tables.items()
    ]


#: Fields of an entry: (offset, bytes, whether it counts from its own place).
_FIELDS: Final = {
    TableKind.JUMP_TABLE: ((0, 4, True), (4, 4, True), (8, 8, True)),
    TableKind.STATIC_CALLS: ((0, 4, True), (4, 4, True)),
    TableKind.EXCEPTIONS: ((0, 4, True), (4, 4, True), (8, 4, False)),
    TableKind.ORC_IP: ((0, 4, True),),
    TableKind.ORC_ENTRY: ((0, 6, False),),
    TableKind.MCOUNT: ((0, 8, False),),
}


def entries_of(group: Iterable[Table], content: Bytes, first: int) -> list[tuple[int, ...]]:
    """The entries of tables that belong together, sorted and without their places."""
    columns = []
    for table in group:
        for offset, size, relative in _FIELDS[table.kind]:
            column = []
            for at in range(table.offset + offset, table.offset + table.length, table.entry):
                data = content[at - first : at - first + size].tobytes()
                value = int.from_bytes(data, "little", signed=True)
                column.append(value + (at if relative else 0))
            columns.append(column)
    return sorted(zip(*columns, strict=True))


def swapped(
    group: Iterable[Table], content: Bytes, first: int, one: int, other: int
) -> list[tuple[int, bytes]]:
    """Offsets and bytes that two entries of tables have when they change places."""
    found = []
    for table in group:
        count = table.length // table.entry
        starts = [table.offset + (row % count) * table.entry for row in (one, other)]
        for here, there in (starts, starts[::-1]):
            entry = bytearray()
            for offset, size, relative in _FIELDS[table.kind]:
                at = there + offset - first
                value = int.from_bytes(content[at : at + size].tobytes(), "little")
                moved = value + (there - here if relative else 0)
                entry += (moved & (1 << 8 * size) - 1).to_bytes(size, "little")
            found.append((here, bytes(entry)))
    return found


class Law:
    """What is legal in one machine."""

    def __init__(self, made: Machine) -> None:
        self._made = made
        self._units = {placed.unit.name: placed for placed in made.healthy.units.all}

    def breaches(self, validation: Validation, judge: Judge) -> set[tuple[str, int]]:
        """Pages (unit, offset) that hold what is not legal, by a judge of this law."""
        found = set()
        memory = validation.target.memory
        for placed in validation.units.all:
            for segment in placed.unit.segments:
                if segment.kind is SegmentKind.RO_AFTER_INIT:
                    continue
                first, length = segment.offset, segment.length
                actual, statuses = memory.read_range(placed.address + first, length)
                package, unknown = placed.relocated(first, first + length)
                bad = judge(placed, first, actual, package)
                if segment.kind is SegmentKind.RODATA:
                    bad &= ~unknown  # references to what is gone
                bad &= np.repeat(statuses == PageStatus.OK, PAGE_SIZE)[:length]
                pages = np.unique(np.flatnonzero(bad) // PAGE_SIZE).tolist()
                found |= {(placed.unit.name, first + page * PAGE_SIZE) for page in pages}
        return found

    def outside_sites(self, probes: Iterable[int]) -> Judge:
        """Where nothing is patched only the package's bytes are legal, under any state.

        But for `probes`, addresses: who can register one makes an int3 or a jump legal.
        """

        def judge(placed: Placed, first: int, actual: Bytes, package: Bytes) -> Flags:
            bad: Flags = actual != package
            places = sites_of(placed.unit)
            places += [(table.offset, table.length) for table in placed.unit.tables]
            places += [(address - placed.address, 5) for address in probes]
            for offset, length in places:
                bad[max(0, offset - first) : max(0, offset - first + length)] = False
            return bad

        return judge

    def everywhere(self, placed: Placed, first: int, actual: Bytes, package: Bytes) -> Flags:
        """Under the state of the healthy machine every byte is judged."""
        name, end = placed.unit.name, first + len(actual)
        healthy = self._made.content[name]
        bad: Flags = actual != healthy[first:end]
        for (offset, length), contents in self._places[name].items():
            part = slice(offset - first, offset - first + length)
            if first <= offset < end and actual[part].tobytes() in contents:
                bad[part] = False
        for group in table_groups(placed.unit):
            if not first <= group[0].offset < end:
                continue
            parts = [slice(t.offset - first, t.offset - first + t.length) for t in group]
            legal = all(np.array_equal(actual[part], package[part]) for part in parts)
            legal |= entries_of(group, actual, first) == entries_of(group, healthy, 0)
            for part in parts if legal else ():
                bad[part] = False
        return bad

    @cached_property
    def _places(self) -> Mapping[str, Mapping[Place, frozenset[bytes]]]:
        """Places that may hold something else than they do, and what."""
        return {name: self._places_of(placed) for name, placed in self._units.items()}

    def _places_of(self, placed: Placed) -> Mapping[Place, frozenset[bytes]]:
        base = placed.address
        ops = self._made.healthy.structures.ftrace[0]
        entries = (self._address("ftrace_caller"), self._address("ftrace_regs_caller"))
        found: dict[Place, Iterable[bytes]] = {
            (at, 5): [NOP5, *(branch(CALL, base + at, to) for to in (*entries, ops.trampoline))]
            for at in placed.unit.sites.mcount.tolist()
        }
        if placed.unit.name == VMLINUX:
            core = (self._address("ftrace_stub"), self._address("ftrace_ops_assist_func"), ops.func)
            for at in _CORE_SITES:
                found[at, 5] = [branch(code, base + at, to) for code in (CALL, JUMP) for to in core]
            thunk = self._address("__x86_return_thunk")
            for at in (_TAIL, _TRAMPOLINE):
                found[at, 5] = [RETURN, branch(JUMP, base + at, thunk)]
            found[_TRAMPOLINE, 8] = [placed.relocated(_TRAMPOLINE, _TRAMPOLINE + 8)[0].tobytes()]
            probe = self._made.healthy.structures.kprobes[0]
            found[probe.address - base, 1] = [b"\xcc", bytes([probe.opcode])]
        return {place: frozenset(contents) for place, contents in found.items()}

    def _address(self, symbol: str) -> int:
        return self._made.kernel.virtual_base + {**SYMBOLS, **NAMES}[symbol]
