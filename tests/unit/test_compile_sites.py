"""Tables of patch sites: rows written by hand, as the build's tools lay them out."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pytest

from pyscan.approved.unit import Section, Sites, Slot, SlotKind
from pyscan.compile.draft import OWN, Draft, Slots, relocation_column
from pyscan.compile.sites import (
    THUNKS,
    SiteReader,
    nop_runs,
    table_between,
    trampoline_column,
)
from pyscan.errors import PackageError
from pyscan.kernel.series import SERIES

LINK = 0xFFFF_FFFF_8100_0000
TEXT = 0x400
TABLES = 0x400
RAX, R11 = THUNKS.index("__x86_indirect_thunk_rax"), THUNKS.index("__x86_indirect_thunk_r11")


def read(
    text: dict[int, bytes],
    *tables: tuple[str, bytes],
    link: int = LINK,
    slots: Sequence[tuple[int, int, Slot]] = (),
    thunks: dict[tuple[int, int], int] | None = None,
) -> Sites:
    """Sites of an image: 1 KiB of text, and the tables behind it, 256 bytes for each.

    `slots`: (width, offset, slot) of relocations.
    """
    image = np.zeros(TABLES + 0x100 * max(1, len(tables)), dtype=np.uint8)
    for offset, code in text.items():
        image[offset : offset + len(code)] = np.frombuffer(code, dtype=np.uint8)
    sections = []
    for number, (name, data) in enumerate(tables):
        start = TABLES + 0x100 * number
        image[start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)
        sections.append(Section(name, start, len(data)))
    known = Slots()
    columns = []
    for width in (4, 8):
        mine = [(at, known.index(slot)) for each, at, slot in slots if each == width]
        columns.append(relocation_column([at for at, _ in mine], [slot for _, slot in mine]))
    draft = Draft("unit", link, image, tuple(sections), known, columns[0], columns[1])
    reader = SiteReader(draft, SERIES["6.1"], [(0, TEXT)])
    return reader.read(thunks or {}, trampoline_column([]))


def places(*offsets: int, start: int = TABLES) -> bytes:
    """Self-relative 32-bit references (.return_sites, .retpoline_sites, .smp_locks)."""
    return b"".join(
        struct.pack("<i", offset - (start + 4 * number)) for number, offset in enumerate(offsets)
    )


def test_plain_sites_are_sorted_once_each_and_those_outside_text_left_out() -> None:
    sites = read({}, (".return_sites", places(0x30, 0x10, 0x30, TEXT - 5, TEXT - 4, -8, 0x900)))
    assert sites.returns.tolist() == [0x10, 0x30, TEXT - 5]
    sites = read({}, (".smp_locks", places(TEXT - 1, TEXT, 0)))
    assert sites.locks.tolist() == [0, TEXT - 1]


def test_a_site_in_sections_that_are_gone_is_left_out() -> None:
    init = Slot(SlotKind.INIT, relative=True)
    sites = read({}, (".return_sites", places(0x10, 0x20)), slots=[(4, TABLES + 4, init)])
    assert sites.returns.tolist() == [0x10]


def test_mcount_locations_are_addresses() -> None:
    table = struct.pack("<3Q", LINK + 0x40, LINK + 0x20, LINK + TEXT)
    base = Slot(SlotKind.BASE)
    slots = [(8, TABLES + 8 * number, base) for number in range(3)]
    assert read({}, ("__mcount_loc", table), slots=slots).mcount.tolist() == [0x20, 0x40]
    # Without a relocation it is a number, and no place.
    assert read({}, ("__mcount_loc", table)).mcount.tolist() == []


def test_retpolines_have_the_form_of_their_branch() -> None:
    def to(offset: int, prefix: int, thunk: int) -> bytes:
        return struct.pack("<i", thunk - (offset + prefix + 4))

    text = {
        0x00: b"\xe8" + to(0x00, 1, 0x200),  # call
        0x10: b"\xe9" + to(0x10, 1, 0x220),  # jmp
        0x20: b"\x0f\x85" + to(0x20, 2, 0x200),  # jne
        0x30: b"\x2e\xe8" + to(0x30, 2, 0x220),  # call with objtool's CS prefix
    }
    table = places(0x30, 0x20, 0x10, 0x00)
    thunks = {(OWN, 0x200): RAX, (OWN, 0x220): R11}
    sites = read(text, (".retpoline_sites", table), thunks=thunks)
    assert sites.retpolines.tolist() == [
        (0x00, RAX, 0, 5, 0),
        (0x10, R11, 1, 5, 0),
        (0x20, RAX, 2, 6, 0),
        (0x30, R11, 0, 6, 1),
    ]


def test_a_retpoline_of_a_module_leads_to_a_symbol() -> None:
    thunk = Slot(SlotKind.SYMBOL, THUNKS[RAX], relative=True)
    code = {0x10: b"\xe8\x00\x00\x00\x00"}
    # The place's own address is in the addend: S + A - P with A = -4 and P = 0x11.
    code[0x10] = b"\xe8" + struct.pack("<i", -4 - 0x11)
    sites = read(
        code,
        (".retpoline_sites", places(0x10)),
        link=0,
        slots=[(4, 0x11, thunk), (8, 0x300, Slot(SlotKind.SYMBOL, THUNKS[RAX]))],
        thunks={(2, 0): RAX},
    )
    assert sites.retpolines.tolist() == [(0x10, RAX, 0, 5, 0)]


@pytest.mark.parametrize("code", [b"\x90\x90\x90\x90\x90", b"\xe8\x00\x01\x00\x00", b"\x0f\x1f"])
def test_a_retpoline_that_is_no_branch_to_a_thunk_is_refused(code: bytes) -> None:
    with pytest.raises(PackageError, match=r"unit: no branch to a known thunk at 0x10"):
        read({0x10: code}, (".retpoline_sites", places(0x10)), thunks={(OWN, 0x200): RAX})


def test_paravirt_calls() -> None:
    # struct paravirt_patch_site: u8 *instr; u8 type; u8 len; padded to 16 bytes.
    table = struct.pack("<QBB6x", LINK + 0x60, 31, 12) + struct.pack("<QBB6x", LINK + 0x40, 24, 7)
    base = Slot(SlotKind.BASE)
    slots = [(8, TABLES, base), (8, TABLES + 16, base)]
    sites = read({}, (".parainstructions", table), slots=slots)
    assert sites.paravirt.tolist() == [(0x40, 24, 7), (0x60, 31, 12)]


def alternative(row: int, at: int, by: int, feature: int, lengths: tuple[int, int]) -> bytes:
    """struct alt_instr of 6.1: two self-relative offsets, feature, two lengths; 12 bytes."""
    start = TABLES + 12 * row
    return struct.pack("<iiHBB", at - start, by - (start + 4), feature, *lengths)


def test_alternatives_keep_their_order_and_know_their_runs_of_nops() -> None:
    text = {0x40: b"\x90" * 6, 0x50: b"\x0f\xae\xf0\x90\x90", 0x200: b"\xe8\x00\x00\x00\x00"}
    table = alternative(0, 0x50, 0x210, 9 * 32 + 3, (5, 0))
    table += alternative(1, 0x40, 0x200, 7, (6, 5))
    sites = read(text, (".altinstructions", table))
    assert sites.alternatives.tolist() == [
        (0x50, 0x210, 9 * 32 + 3, 5, 0, 0, 2),
        (0x40, 0x200, 7, 6, 5, 2, 1),
    ]
    # Originals first (0), then the padded replacements (1); one nop alone is no run.
    assert sites.alternative_runs.tolist() == [(3, 2, 0), (0, 5, 1), (0, 6, 0)]


@pytest.mark.parametrize(("by", "length", "replaced"), [(0x200, 4, 5), (0x4FE, 5, 5)])
def test_an_alternative_that_cannot_be_is_refused(by: int, length: int, replaced: int) -> None:
    table = alternative(0, 0x40, by, 7, (length, replaced))
    with pytest.raises(PackageError, match=r"\.altinstructions refers outside"):
        read({}, (".altinstructions", table))


def test_runs_of_nops_lie_at_instruction_boundaries() -> None:
    assert nop_runs(b"\x90") == []
    assert nop_runs(b"\x90\x90\x90") == [(0, 3)]
    assert nop_runs(b"\x89\xc8\x90\x90\x89\xc8\x90\x90\x90") == [(2, 2), (6, 3)]
    # The two bytes 90 90 of an immediate are no instructions.
    assert nop_runs(b"\xb8\x90\x90\x90\x90\xc3") == []
    assert nop_runs(b"\xb8\x90\x90\x90\x90\x90\x90") == [(5, 2)]


def jump(row: int, at: int, to: int, key: int) -> bytes:
    """struct jump_entry: three self-relative references; 16 bytes."""
    start = TABLES + 16 * row
    return struct.pack("<iiq", at - start, to - (start + 4), key - (start + 8))


def test_jump_labels() -> None:
    text = {0x40: b"\x66\x90", 0x50: b"\xeb\x10", 0x60: b"\x0f\x1f\x44\x00\x00", 0x70: b"\xe9"}
    table = b"".join(
        [
            jump(0, 0x70, 0x300, 0x500 | 1),
            jump(1, 0x40, 0x48, 0x500),
            jump(2, 0x50, 0x62, 0x508 | 2),  # the second bit is objtool's
            jump(3, 0x60, 0x10, 0x508 | 3),
            jump(4, 0x900, 0x910, 0x500),  # in code that is gone
        ]
    )
    link = LINK - (1 << 64)
    assert read(text, ("__jump_table", table)).jump_labels.tolist() == [
        (0x40, 0x48, 0, link + 0x500, 0, 2),
        (0x50, 0x62, 0, link + 0x508, 0, 2),
        (0x60, 0x10, 0, link + 0x508, 1, 5),
        (0x70, 0x300, 0, link + 0x500, 1, 5),
    ]


def test_a_jump_label_whose_key_is_another_units() -> None:
    key = Slot(SlotKind.SYMBOL, "a_key", relative=True)
    # R_X86_64_PC64 with an addend of 1: the branch flag.
    table = struct.pack("<iiq", 0x40 - TABLES, 0x80 - (TABLES + 4), 1 - (TABLES + 8))
    sites = read({}, ("__jump_table", table), link=0, slots=[(8, TABLES + 8, key)])
    # Slot 1 is the relative one; 2 gives the address itself.
    assert sites.jump_labels.tolist() == [(0x40, 0x80, 2, 0, 1, 5)]


def test_static_calls() -> None:
    text = {0x40: b"\xe8", 0x50: b"\xe9", 0x60: b"\x0f\x85"}

    def row(number: int, at: int, key: int) -> bytes:
        start = TABLES + 8 * number
        return struct.pack("<ii", at - start, key - (start + 4))

    table = row(0, 0x60, 0x500 | 1) + row(1, 0x50, 0x508 | 1) + row(2, 0x40, 0x500 | 2)
    link = LINK - (1 << 64)
    assert read(text, (".static_call_sites", table)).static_calls.tolist() == [
        (0x40, 0, link + 0x500, 0, 5, 0),
        (0x50, 0, link + 0x508, 1, 5, 0),
        (0x60, 0, link + 0x500, 1, 6, 0),
    ]


def test_a_static_call_of_a_module_may_name_the_trampoline() -> None:
    key = Slot(SlotKind.SYMBOL, "__SCT__cond_resched", relative=True)
    table = struct.pack("<ii", 0x40 - TABLES, -(TABLES + 4))
    sites = read({0x40: b"\xe8"}, (".static_call_sites", table), link=0,
                 slots=[(4, TABLES + 4, key)])  # fmt: skip
    assert sites.static_calls.tolist() == [(0x40, 2, 0, 0, 5, 1)]


def test_trampolines_are_sorted_and_tables_have_an_order() -> None:
    column = trampoline_column([(0x48, 0, 16), (0x40, 0, 8)])
    assert column.tolist() == [(0x40, 0, 8), (0x48, 0, 16)]
    assert table_between("t", 8, 8) == Section("t", 8, 0)
    with pytest.raises(PackageError, match="ends before it begins"):
        table_between("t", 9, 8)


def test_a_table_outside_the_image_is_refused() -> None:
    draft = Draft("unit", 0, np.zeros(64, np.uint8), (Section(".smp_locks", 60, 8),), Slots(),
                  relocation_column([], []), relocation_column([], []))  # fmt: skip
    with pytest.raises(PackageError, match=r"table \.smp_locks lies outside"):
        SiteReader(draft, SERIES["6.1"], [(0, 64)]).read({}, trampoline_column([]))
