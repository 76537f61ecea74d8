"""Read-only data in memory: exact bytes, and tables that the kernel sorts in place."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from units import build_unit, rows

from pyscan.approved.unit import RELOCATION, Slot, SlotKind, Table, TableKind
from pyscan.validate.placed import place
from pyscan.validate.rodata import RDT_OPTIONS, InitRange, RodataComparer, RodataResult

BASE = 0xFFFF_FFFF_C010_0000
START, END = 0x1000, 0x2000  # of the read-only data
INIT = 0xFFFF_FFFF_C090_0000
SECOND = 0x1800  # where a second table begins
INIT_FLAG = 2


def compare(
    package: dict[int, bytes],
    memory: dict[int, bytes],
    *tables: Table,
    relocations: Sequence[tuple[int, int, SlotKind]] = (),
    init: InitRange | None = None,
    init_known: bool = True,
    trampolines: dict[int, int] | None = None,
    unread: range = range(0),
) -> RodataResult:
    """Compare read-only data of a module; `memory` is put over what is expected."""
    image = np.zeros(0x3000, dtype=np.uint8)
    for offset, data in package.items():
        image[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)
    slots = (Slot(SlotKind.BASE), Slot(SlotKind.INIT), Slot(SlotKind.INIT, relative=True))
    kinds = {SlotKind.BASE: 0, SlotKind.INIT: 1}
    columns = {
        width: [
            (offset, kinds[kind] + (kind is SlotKind.INIT and width == 4))
            for each, offset, kind in relocations
            if each == width
        ]
        for width in (4, 8)
    }
    unit = replace(
        build_unit("made"), image=image, tables=tables, slots=slots,
        relocations32=rows(RELOCATION, *columns[4]), relocations64=rows(RELOCATION, *columns[8]),
    )  # fmt: skip
    placed = place(unit, BASE, lambda _slot: INIT if init_known else None)
    actual = placed.relocated(START, END)[0]
    for offset, data in memory.items():
        actual[offset - START : offset - START + len(data)] = np.frombuffer(data, dtype=np.uint8)
    keys = trampolines or {}
    comparer = RodataComparer(placed, init or InitRange(), lambda key: keys.get(key, key))
    result = RodataResult()
    mask = np.zeros(END - START, dtype=bool)
    mask[unread.start : unread.stop] = True
    legal = comparer.compare(START, actual, mask, result)
    assert np.array_equal(legal[~mask], actual[~mask]) == (result.code.total == 0)
    return result


def test_equal_data_is_legal() -> None:
    result = compare({0x1100: b"data"}, {})
    assert (result.code.total, result.code.bytes, result.unknown_bytes) == (0, 0x1000, 0)


def test_any_other_byte_is_a_difference() -> None:
    result = compare({0x1100: b"data"}, {0x1102: b"T", 0x1FFF: b"\1"})
    assert result.code.total == 2
    first = result.code.differences[0]
    assert (first.offset, first.site, first.expected, first.actual) == (0x1102, "", b"t", b"T")


def test_bytes_that_were_not_read_are_left_out() -> None:
    result = compare({}, {0x1002: b"\1\1\1\1"}, unread=range(0, 4))
    assert (result.code.total, result.code.bytes) == (1, 0x1000 - 4)
    assert result.code.differences[0].offset == 0x1004


def test_options_that_the_kernel_cuts_at_their_commas() -> None:
    """set_rdt_options(), arch/x86/kernel/cpu/resctrl/core.c, by way of strsep()."""
    package = {0x1100: RDT_OPTIONS}
    for cut in (RDT_OPTIONS.replace(b",", b"\0"), RDT_OPTIONS.replace(b",", b"\0", 1)):
        result = compare(package, {0x1100: cut})
        assert (result.code.total, result.code.settled) == (0, {"resctrl options": 1})
    assert compare(package, {0x1100: RDT_OPTIONS.replace(b",", b"!", 1)}).code.total == 1
    assert compare(package, {0x1101: b"\0"}).code.total == 1


def test_references_to_what_is_gone_are_counted_not_judged() -> None:
    relocations = [(8, 0x1100, SlotKind.INIT)]
    memory = {0x1100: struct.pack("<Q", 0x1234), 0x1200: b"\1"}
    result = compare({}, memory, relocations=relocations, init_known=False)
    assert result.unknown_bytes == 8
    assert [each.offset for each in result.code.differences] == [0x1200]
    assert compare({}, memory, relocations=relocations).code.total == 2


# Tables


def jumps(*entries: tuple[int, int, int], start: int = START) -> bytes:
    """struct jump_entry: code, target, key with flags, as offsets of the unit."""
    data = b""
    for number, (code, target, key) in enumerate(entries):
        at = start + 16 * number
        data += struct.pack("<iiq", code - at, target - (at + 4), key - (at + 8))
    return data


JUMPS = ((0x10, 0x20, 0x3100), (0x30, 0x44, 0x3101), (0x50, 0x66, 0x3000))
JUMP_TABLE = Table(TableKind.JUMP_TABLE, START, 48, 16)


def test_a_jump_table_is_sorted_by_its_keys() -> None:
    """jump_label_sort_entries(): whole rows change places, and their references with them."""
    first, second, third = JUMPS
    result = compare({START: jumps(*JUMPS)}, {START: jumps(third, first, second)}, JUMP_TABLE)
    assert (result.code.total, result.code.settled) == (0, {"jump-table table": 1})


@pytest.mark.parametrize(
    "changed",
    [
        (JUMPS[0], JUMPS[1], (0x50, 0x67, 0x3000)),  # another target
        (JUMPS[0], JUMPS[1], (0x51, 0x66, 0x3000)),
        (JUMPS[0], JUMPS[1], (0x50, 0x66, 0x3008)),
        (JUMPS[0], JUMPS[1], (0x50, 0x66, 0x3001)),  # the branch flag
        (JUMPS[0], JUMPS[1], (0x50, 0x66, 0x3002)),  # in no init code
        (JUMPS[0], JUMPS[1], JUMPS[1]),  # a row twice
        (JUMPS[2], JUMPS[1], JUMPS[1]),
        (JUMPS[0], JUMPS[1], (0x50, 0x9000_0000, 0x3000)),  # out of the unit
    ],
)
def test_a_jump_table_of_other_rows_is_different(changed: tuple[tuple[int, int, int], ...]) -> None:
    if changed[2][1] > 0x7FFF_FFFF:
        changed = (*changed[:2], (0x50, 0x7000_0000, 0x3000))
    assert compare({START: jumps(*JUMPS)}, {START: jumps(*changed)}, JUMP_TABLE).code.total > 0


def test_of_a_sorted_table_only_the_changed_row_is_different() -> None:
    first, _, third = JUMPS
    bad = (0x30, 0x44, 0x3105)
    result = compare({START: jumps(*JUMPS)}, {START: jumps(third, bad, first)}, JUMP_TABLE)
    (difference,) = result.code.differences
    # The key of the second row, where the missing row's would be.
    assert (difference.offset, len(difference.actual)) == (START + 16 + 8, 1)
    assert difference.actual[0] - difference.expected[0] == 4
    doubled = compare({START: jumps(*JUMPS)}, {START: jumps(third, first, first)}, JUMP_TABLE)
    assert doubled.code.total >= 1
    assert all(each.offset >= START + 32 for each in doubled.code.differences)


def test_rows_of_init_code_carry_a_flag() -> None:
    """jump_entry_set_init(), by init_section_contains(): for vmlinux a range of the image."""
    first, second, third = JUMPS
    flagged = (first, (second[0], second[1], second[2] | INIT_FLAG), third)
    init = InitRange(0x30, 0x40)
    assert compare({START: jumps(*JUMPS)}, {START: jumps(*flagged)}, JUMP_TABLE,
                   init=init).code.total == 0  # fmt: skip
    assert compare({START: jumps(*JUMPS)}, {START: jumps(*flagged)}, JUMP_TABLE).code.total == 1


def test_rows_of_a_modules_init_code_are_exact_where_its_place_is_known() -> None:
    # code and target lie in the init layout: S + A - P, and P is in the addend.
    package = struct.pack("<iiq", 0x10 - START, 0x20 - (START + 4), 0x3000 - (START + 8))
    relocations = [(4, START, SlotKind.INIT), (4, START + 4, SlotKind.INIT)]
    table = Table(TableKind.JUMP_TABLE, START, 16, 16)
    far = INIT - BASE

    def memory(code: int, target: int) -> dict[int, bytes]:
        return {START: jumps((code, target, 0x3000 | INIT_FLAG))}

    good = memory(far + 0x10, far + 0x20)
    for known in (True, False):
        result = compare({START: package}, good, table, relocations=relocations, init_known=known)
        assert result.code.total == 0
    bad = memory(far + 0x10, far + 0x24)
    assert compare({START: package}, bad, table, relocations=relocations).code.total > 0


def calls(*entries: tuple[int, int], start: int = START) -> bytes:
    """struct static_call_site: site and key with flags, as offsets of the unit."""
    data = b""
    for number, (site, key) in enumerate(entries):
        at = start + 8 * number
        data += struct.pack("<ii", site - at, key - (at + 4))
    return data


def test_static_calls_are_sorted_and_trampolines_become_keys() -> None:
    """static_call_sort_entries(); static_call_add_module() replaces what names a trampoline."""
    table = Table(TableKind.STATIC_CALLS, START, 24, 8)
    package = {START: calls((0x10, 0x3000), (0x20, 0x4000 | 1), (0x30, 0x3000))}
    keys = {BASE + 0x4000: BASE + 0x2800}
    legal = calls((0x20, 0x2800 | 1), (0x30, 0x3000), (0x10, 0x3000))
    result = compare(package, {START: legal}, table, trampolines=keys)
    assert (result.code.total, result.code.settled) == (0, {"static-calls table": 1})
    for bad in (
        calls((0x20, 0x2800), (0x30, 0x3000), (0x10, 0x3000)),
        calls((0x20, 0x2808 | 1), (0x30, 0x3000), (0x10, 0x3000)),
        calls((0x20, 0x2800 | 1), (0x30, 0x3000), (0x30, 0x3000)),
        calls((0x20, 0x2800 | 1), (0x31, 0x3000), (0x10, 0x3000)),
    ):
        assert compare(package, {START: bad}, table, trampolines=keys).code.total > 0


def exceptions(*entries: tuple[int, int, int]) -> bytes:
    """struct exception_table_entry: instruction, fixup, data."""
    data = b""
    for number, (instruction, fixup, what) in enumerate(entries):
        at = START + 12 * number
        data += struct.pack("<iii", instruction - at, fixup - (at + 4), what)
    return data


def test_exceptions_are_sorted_by_instruction() -> None:
    table = Table(TableKind.EXCEPTIONS, START, 24, 12)
    package = {START: exceptions((0x30, 0x40, 3), (0x10, 0x50, 0x101))}
    legal = exceptions((0x10, 0x50, 0x101), (0x30, 0x40, 3))
    assert compare(package, {START: legal}, table).code.settled == {"exceptions table": 1}
    for bad in (
        exceptions((0x10, 0x40, 3), (0x30, 0x50, 0x101)),  # fixups that changed places
        exceptions((0x10, 0x50, 0x101), (0x30, 0x40, 4)),
        exceptions((0x10, 0x50, 0x101), (0x30, 0x44, 3)),
        exceptions((0x10, 0x50, 0x101), (0x10, 0x50, 0x101)),
    ):
        result = compare(package, {START: bad}, table)
        assert 0 < result.code.total <= 4


def orc(*entries: tuple[int, bytes]) -> dict[int, bytes]:
    """The two tables of the unwinder: relative addresses, and 6 bytes for each."""
    ips = b"".join(
        struct.pack("<i", ip - (START + 4 * number)) for number, (ip, _) in enumerate(entries)
    )
    return {START: ips, SECOND: b"".join(entry for _, entry in entries)}


ORC_TABLES = (Table(TableKind.ORC_IP, START, 12, 4), Table(TableKind.ORC_ENTRY, SECOND, 18, 6))


def test_the_unwinders_tables_are_sorted_together() -> None:
    package = orc((0x30, b"three!"), (0x10, b"first!"), (0x20, b"second"))
    legal = orc((0x10, b"first!"), (0x20, b"second"), (0x30, b"three!"))
    assert compare(package, legal, *ORC_TABLES).code.settled == {"orc-ip table": 1}
    apart = {**legal, SECOND: package[SECOND]}
    assert compare(package, apart, *ORC_TABLES).code.total > 0
    assert compare(package, {**package, SECOND: legal[SECOND]}, *ORC_TABLES).code.total > 0
    changed = orc((0x10, b"first!"), (0x20, b"secona"), (0x30, b"three!"))
    (difference,) = compare(package, changed, *ORC_TABLES).code.differences
    assert (difference.offset, difference.expected, difference.actual) == (SECOND + 11, b"d", b"a")


def test_call_locations_are_sorted() -> None:
    table = Table(TableKind.MCOUNT, START, 24, 8)
    package = {START: struct.pack("<3Q", 0x30, 0x10, 0x20)}
    relocations = [(8, START + 8 * number, SlotKind.BASE) for number in range(3)]

    def memory(*offsets: int) -> dict[int, bytes]:
        return {START: struct.pack("<3Q", *(BASE + offset for offset in offsets))}

    result = compare(package, memory(0x10, 0x20, 0x30), table, relocations=relocations)
    assert (result.code.total, result.code.settled) == (0, {"mcount table": 1})
    for bad in ((0x10, 0x20, 0x31), (0x10, 0x10, 0x30), (0x10, 0x20, 0x10_0030)):
        assert compare(package, memory(*bad), table, relocations=relocations).code.total > 0


def test_a_location_out_of_the_module_is_not_any_other_out_of_it() -> None:
    """Of a module with init code, whose addresses are known."""
    table = Table(TableKind.MCOUNT, START, 16, 8)
    package = {START: struct.pack("<2Q", 0x40, 0x10)}
    relocations = [(8, START, SlotKind.INIT), (8, START + 8, SlotKind.BASE)]

    def memory(first: int, second: int) -> dict[int, bytes]:
        return {START: struct.pack("<2Q", first, second)}

    legal = memory(BASE + 0x10, INIT + 0x40)
    assert compare(package, legal, table, relocations=relocations).code.total == 0
    for bit in (0x10, 1 << 32, 1 << 63):
        bad = memory(BASE + 0x10, (INIT + 0x40) ^ bit)
        assert compare(package, bad, table, relocations=relocations).code.total > 0
