"""The kernel's patching, against bytes worked out by hand from its sources (6.1).

Places are virtual: the unit lies at BASE, so a branch at offset o reaches BASE + o + 5 + d.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from units import build_sites, build_unit, offsets, rows

from pyscan.approved.unit import (
    ALTERNATIVE,
    ALTERNATIVE_NOT,
    ALTERNATIVE_RUN,
    JUMP_LABEL,
    PARAVIRT,
    RELOCATION,
    RETPOLINE,
    STATIC_CALL,
    TRAMPOLINE,
    Section,
)
from pyscan.validate import patch
from pyscan.validate.patch import Window
from pyscan.validate.placed import Placed, place
from pyscan.validate.predict import Keys, Predictor, own_text, section_range
from pyscan.validate.state import (
    INDIRECT_THUNK_ITS,
    RETHUNK,
    RETPOLINE_LFENCE,
    PatchState,
)
from pyscan.validate.state import RETPOLINE as RETPOLINE_FEATURE

BASE = 0xFFFF_FFFF_C010_0000
THUNK = BASE + 0x10_0000
ITS_THUNK = BASE + 0x10_0100
RETURN0 = BASE + 0x10_0200
RETURN1 = BASE + 0x10_0300
NOP = BASE + 0x10_0400
BUG = BASE + 0x10_0500
FUNCTION = BASE + 0x20_0000
FEATURE = 9 * 32 + 20

NONE: dict[str, NDArray[Any]] = {
    "mcount": offsets(),
    "returns": offsets(),
    "locks": offsets(),
    "retpolines": rows(RETPOLINE),
    "paravirt": rows(PARAVIRT),
    "alternatives": rows(ALTERNATIVE),
    "alternative_runs": rows(ALTERNATIVE_RUN),
    "jump_labels": rows(JUMP_LABEL),
    "static_calls": rows(STATIC_CALL),
    "trampolines": rows(TRAMPOLINE),
}


def state(*features: int, **changes: Any) -> PatchState:
    """A state with these features and no others."""
    flags = np.zeros(24 * 32, dtype=bool)
    flags[list(features)] = True
    plain = PatchState(
        features=flags,
        indirect_its=INDIRECT_THUNK_ITS in features,
        return_thunk=THUNK,
        its_return_thunk=ITS_THUNK,
        static_call_return=RETURN1,
        static_call_return0=RETURN0,
        uniprocessor=False,
        paravirt=np.array([0, FUNCTION, NOP], dtype="<u8"),
        paravirt_nop=NOP,
        paravirt_bug=BUG,
    )
    return replace(plain, **changes)


def at_base(code: dict[int, bytes] | None = None, **columns: NDArray[Any]) -> Placed:
    """A module of one page of zeros as text, with some code and only these sites."""
    unit = build_unit("made", sites=build_sites(**{**NONE, **columns}))
    image = np.zeros(len(unit.image), dtype=np.uint8)
    for offset, data in (code or {}).items():
        image[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)
    unit = replace(
        unit,
        image=image,
        relocations32=rows(RELOCATION),
        relocations64=rows(RELOCATION),
        sections=(Section(".text", 0, 0x800), Section(".altinstr_replacement", 0xC00, 0x200)),
    )
    return place(unit, BASE, lambda _slot: None)


def window(placed: Placed, start: int = 0, end: int = 0x1000) -> Window:
    """The unit's bytes as the package has them."""
    data, _ = placed.relocated(start, end)
    return Window(placed, start, data)


def branch(opcode: int, offset: int, target: int) -> bytes:
    """A branch of 5 bytes at an offset of the unit."""
    return bytes([opcode]) + struct.pack("<I", (target - (BASE + offset) - 5) & 0xFFFF_FFFF)


# Nops: x86_nops of arch/x86/include/asm/nops.h, add_nops() of alternative.c


def test_nops_are_as_few_as_possible() -> None:
    assert patch.nops(0) == b""
    assert patch.nops(1) == b"\x90"
    assert patch.nops(5).hex() == "0f1f440000"
    assert patch.nops(8).hex() == "0f1f840000000000"
    assert patch.nops(11).hex() == "0f1f840000000000" + "0f1f00"
    assert patch.nops(16).hex() == "0f1f840000000000" * 2


def test_a_branch_wraps_at_32_bits() -> None:
    assert patch.branch(0xE8, 0x1000, 0x1005).hex() == "e800000000"
    assert patch.branch(0xE9, 0x1000, 0x0FFF).hex() == "e9faffffff"


# Returns: patch_return(), cpu_wants_rethunk_at()


def test_returns_without_a_return_thunk() -> None:
    here = window(at_base({0x10: b"\xe9\x01\x02\x03\x04"}, returns=offsets(0x10)))
    patch.patch_returns(here, state())
    assert here.bytes_at(0x10, 6).hex() == "c3cccccccc00"


def test_returns_through_the_chosen_thunk() -> None:
    here = window(at_base(returns=offsets(0x10, 0x30)))
    patch.patch_returns(here, state(RETHUNK))
    assert here.bytes_at(0x10, 5) == branch(0xE9, 0x10, THUNK)
    assert here.bytes_at(0x30, 5) == branch(0xE9, 0x30, THUNK)


def test_returns_with_its_go_through_it_in_the_lower_half_of_a_line() -> None:
    here = window(at_base(returns=offsets(0x1F, 0x3F, 0x60, 0x80)))
    patch.patch_returns(here, state(RETHUNK, return_thunk=ITS_THUNK))
    assert here.bytes_at(0x1F, 5) == branch(0xE9, 0x1F, ITS_THUNK)
    assert here.bytes_at(0x3F, 5).hex() == "c3cccccccc"
    assert here.bytes_at(0x60, 5).hex() == "c3cccccccc"
    assert here.bytes_at(0x80, 5) == branch(0xE9, 0x80, ITS_THUNK)


# Retpolines: patch_retpoline(), emit_indirect()


@pytest.mark.parametrize(
    ("row", "features", "expected"),
    [
        ((0, 0, 0, 5, 0), (), "ffd00f1f00"),  # call *%rax
        ((0, 11, 0, 5, 0), (), "41ffd36690"),  # call *%r11
        ((0, 11, 0, 6, 1), (), "41ffd30f1f00"),  # with the CS prefix
        ((0, 7, 1, 5, 0), (), "ffe7cc6690"),  # jmp *%rdi; int3
        ((0, 15, 1, 5, 0), (), "41ffe7cc90"),
        ((0, 0, 0, 5, 0), (RETPOLINE_FEATURE, RETPOLINE_LFENCE), "0faee8ffd0"),
        ((0, 8, 0, 6, 1), (RETPOLINE_FEATURE, RETPOLINE_LFENCE), "0faee841ffd0"),
        ((0, 0, 1, 5, 0), (RETPOLINE_FEATURE, RETPOLINE_LFENCE), "0faee8ffe0"),
        # It does not fit, or is conditional: the call of the thunk stays.
        ((0, 8, 0, 5, 0), (RETPOLINE_FEATURE, RETPOLINE_LFENCE), "e811223344"),
        ((0, 0, 2, 6, 0), (), "e811223344"),
        ((0, 0, 0, 5, 0), (RETPOLINE_FEATURE,), "e811223344"),
    ],
)
def test_retpolines(row: tuple[int, ...], features: tuple[int, ...], expected: str) -> None:
    column = rows(RETPOLINE, (0x40, *row[1:]))
    here = window(at_base({0x40: bytes.fromhex("e811223344")}, retpolines=column))
    patch.patch_retpolines(here, state(*features))
    assert here.bytes_at(0x40, len(expected) // 2).hex() == expected
    assert not here.bytes_at(0x40 + row[3], 8).strip(b"\0")


def test_its_thunks_are_wanted_where_the_branch_ends_in_the_lower_half() -> None:
    # cpu_wants_indirect_its_thunk_at(): address of the last byte of the branch, register >= 8
    # by one more; bit 5 of it.
    column = rows(RETPOLINE, (0x1E, 0, 0, 5, 0), (0x1F, 0, 0, 5, 0), (0x3E, 8, 0, 5, 0))
    placed = at_base(retpolines=column)
    its = state(INDIRECT_THUNK_ITS)
    assert patch.its_sites(placed, column, its).tolist() == [True, False, True]
    assert patch.its_sites(placed, column, state()).tolist() == [False] * 3
    here = window(placed)
    patch.patch_retpolines(here, its)
    assert here.bytes_at(0x1E, 1) == b"\0"  # left for its thunk
    assert here.bytes_at(0x1F, 2).hex() == "ffd0"


# Paravirt calls: paravirt_patch()


def test_paravirt_calls() -> None:
    column = rows(PARAVIRT, (0x40, 1, 7), (0x50, 2, 9), (0x60, 0, 7), (0x70, 200, 7))
    here = window(at_base(paravirt=column))
    patch.patch_paravirt(here, state())
    assert here.bytes_at(0x40, 7) == branch(0xE8, 0x40, FUNCTION) + b"\x66\x90"
    assert here.bytes_at(0x50, 9).hex() == "0f1f84000000000090"
    assert here.bytes_at(0x60, 7) == branch(0xE8, 0x60, BUG) + b"\x66\x90"
    # An index beyond pv_ops, which no package has, is as one without a function.
    assert here.bytes_at(0x70, 7) == branch(0xE8, 0x70, BUG) + b"\x66\x90"


# Alternatives: apply_alternatives(), recompute_jump(), optimize_nops()


def alternated(
    code: dict[int, bytes], *alternatives: tuple[int, ...], runs: tuple[tuple[int, ...], ...] = ()
) -> Window:
    placed = at_base(
        code,
        alternatives=rows(ALTERNATIVE, *alternatives),
        alternative_runs=rows(ALTERNATIVE_RUN, *runs),
    )
    here = window(placed)
    patch.patch_alternatives(here, window(placed, 0xC00, 0xE00), state(FEATURE))
    return here


def test_a_replacement_is_padded_and_its_nops_are_merged() -> None:
    code = {0x40: b"\x0f\xae\xf0\x90\x90\x90", 0xC10: b"\x0f\xae\xe8"}
    runs = ((3, 3, 0), (3, 3, 1))
    here = alternated(code, (0x40, 0xC10, FEATURE, 6, 3, 0, 2), runs=runs)
    assert here.bytes_at(0x40, 6).hex() == "0faee80f1f00"


def test_an_original_keeps_its_code_and_has_its_nops_merged() -> None:
    code = {0x40: b"\x0f\xae\xf0\x90\x90\x90", 0xC10: b"\x0f\xae\xe8"}
    runs = ((3, 3, 0), (3, 3, 1))
    here = alternated(code, (0x40, 0xC10, FEATURE + 1, 6, 3, 0, 2), runs=runs)
    assert here.bytes_at(0x40, 6).hex() == "0faef00f1f00"


def test_an_alternative_for_the_absence_of_a_feature() -> None:
    code = {0x40: b"\xaa\xaa\xaa", 0x50: b"\xaa\xaa\xaa", 0xC10: b"\xbb\xbb\xbb"}
    here = alternated(
        code,
        (0x40, 0xC10, FEATURE | ALTERNATIVE_NOT, 3, 3, 0, 0),
        (0x50, 0xC10, FEATURE + 1 | ALTERNATIVE_NOT, 3, 3, 0, 0),
    )
    assert here.bytes_at(0x40, 3).hex() == "aaaaaa"
    assert here.bytes_at(0x50, 3).hex() == "bbbbbb"


def test_the_last_alternative_that_applies_wins() -> None:
    code = {0x40: b"\xaa", 0xC10: b"\xbb\xcc\xdd"}
    always = FEATURE + 1 | ALTERNATIVE_NOT
    first, second = (0x40, 0xC10, always, 1, 1, 0, 0), (0x40, 0xC11, FEATURE, 1, 1, 0, 0)
    assert alternated(code, first, second).bytes_at(0x40, 1) == b"\xcc"
    assert alternated(code, second, first).bytes_at(0x40, 1) == b"\xbb"
    never = (0x40, 0xC12, FEATURE + 1, 1, 1, 0, 0)
    assert alternated(code, first, never).bytes_at(0x40, 1) == b"\xbb"


def test_a_call_in_a_replacement_keeps_its_target() -> None:
    code = {0x40: b"\x90" * 8, 0xC10: branch(0xE8, 0xC10, FUNCTION)}
    here = alternated(code, (0x40, 0xC10, FEATURE, 8, 5, 0, 0))
    assert here.bytes_at(0x40, 8) == branch(0xE8, 0x40, FUNCTION) + b"\x90\x90\x90"


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        (-2, "ebfe0f1f00"),  # to itself
        (0, "eb000f1f00"),
        (127, "eb7f0f1f00"),
        (128, None),  # out of reach of the short form
        (-3, None),  # backwards: always 5 bytes
        (-100, None),
    ],
)
def test_a_jump_in_a_replacement(distance: int, expected: str | None) -> None:
    target = BASE + 0x140 + 2 + distance
    code = {0x140: b"\x90" * 5, 0xC10: branch(0xE9, 0xC10, target)}
    here = alternated(code, (0x140, 0xC10, FEATURE, 5, 5, 0, 0))
    assert here.bytes_at(0x140, 5).hex() == (expected or branch(0xE9, 0x140, target).hex())


def test_a_branch_of_other_length_is_copied_as_it_is() -> None:
    code = {0x40: b"\x90" * 7, 0xC10: branch(0xE8, 0xC10, FUNCTION) + b"\x31\xc0"}
    here = alternated(code, (0x40, 0xC10, FEATURE, 7, 7, 0, 0))
    assert here.bytes_at(0x40, 7) == code[0xC10]


# Locks: alternatives_smp_unlock()


def test_locks_of_one_processor_become_ds_prefixes_in_the_units_own_text() -> None:
    code = {0x10: b"\xf0", 0x20: b"\x3e", 0x900: b"\xf0"}
    placed = at_base(code, locks=offsets(0x10, 0x20, 0x900))
    here = window(placed)
    patch.patch_locks(here, state(), own_text(placed.unit))
    assert [here.bytes_at(at, 1).hex() for at in (0x10, 0x20, 0x900)] == ["f0", "3e", "f0"]
    patch.patch_locks(here, state(uniprocessor=True), own_text(placed.unit))
    # .text of a module ends at 0x800 here.
    assert [here.bytes_at(at, 1).hex() for at in (0x10, 0x20, 0x900)] == ["3e", "3e", "f0"]
    assert own_text(build_unit()) == (0, 0x1000)
    assert section_range(placed.unit, ".none") == (0, 0)


# Jump labels: __jump_label_patch()


def test_jump_labels() -> None:
    column = rows(
        JUMP_LABEL,
        (0x40, 0x90, 0, 0, 0, 5),
        (0x50, 0x20, 0, 0, 1, 5),
        (0x60, 0xA0, 0, 0, 0, 2),
        (0x70, 0x00, 0, 0, 1, 2),
    )
    here = window(at_base(jump_labels=column))
    patch.patch_jump_labels(here, np.zeros(4, dtype=bool), column)
    assert here.bytes_at(0x40, 5).hex() == "0f1f440000"
    assert here.bytes_at(0x50, 5) == branch(0xE9, 0x50, BASE + 0x20)
    assert here.bytes_at(0x60, 3).hex() == "669000"
    assert here.bytes_at(0x70, 3).hex() == "eb8e00"
    patch.patch_jump_labels(here, np.ones(4, dtype=bool), column)
    assert here.bytes_at(0x40, 5) == branch(0xE9, 0x40, BASE + 0x90)
    assert here.bytes_at(0x50, 5).hex() == "0f1f440000"
    assert here.bytes_at(0x60, 3).hex() == "eb3e00"
    assert here.bytes_at(0x70, 3).hex() == "669000"


# Static calls: __static_call_transform()


def call_site(tail: int, length: int, function: int, *features: int, before: str = "") -> bytes:
    column = rows(STATIC_CALL, (0x40, 0, 0, tail, length, 0))
    here = window(at_base({0x40: bytes.fromhex(before)}, static_calls=column))
    patch.patch_static_calls(here, np.array([function], dtype=np.uint64), column, state(*features))
    return here.bytes_at(0x40, length)


def test_static_call_sites() -> None:
    assert call_site(0, 5, FUNCTION) == branch(0xE8, 0x40, FUNCTION)
    assert call_site(0, 5, 0).hex() == "0f1f440000"
    assert call_site(0, 5, RETURN0).hex() == "2e2e2e31c0"  # xor5rax
    assert call_site(1, 5, FUNCTION) == branch(0xE9, 0x40, FUNCTION)
    assert call_site(1, 5, RETURN0) == branch(0xE9, 0x40, RETURN0)
    assert call_site(1, 5, 0).hex() == "c3cccccccc"
    assert call_site(1, 5, 0, RETHUNK) == branch(0xE9, 0x40, THUNK)


def test_conditional_tail_calls_keep_their_condition() -> None:
    je = "0f84" + "11223344"
    assert call_site(1, 6, FUNCTION, before=je) == b"\x0f" + branch(0x84, 0x41, FUNCTION)
    assert call_site(1, 6, 0, before=je) == b"\x0f" + branch(0x84, 0x41, RETURN1)
    assert call_site(1, 6, 0, RETHUNK, before=je) == b"\x0f" + branch(0x84, 0x41, THUNK)


def test_static_call_trampolines_keep_their_mark() -> None:
    column = rows(TRAMPOLINE, (0x40, 0, 0), (0x48, 0, 0))
    placed = at_base({0x45: b"\x0f\xb9\xcc", 0x4D: b"\x0f\xb9\xcc"}, trampolines=column)
    here = window(placed)
    patch.patch_trampolines(here, np.array([FUNCTION, 0], dtype=np.uint64), column, state())
    assert here.bytes_at(0x40, 8) == branch(0xE9, 0x40, FUNCTION) + b"\x0f\xb9\xcc"
    assert here.bytes_at(0x48, 8).hex() == "c3cccccccc0fb9cc"


def test_ftrace_calls_are_nops() -> None:
    here = window(at_base({0x40: b"\xe8\1\2\3\4"}, mcount=offsets(0x40)))
    patch.patch_mcount(here)
    assert here.bytes_at(0x40, 6).hex() == "0f1f44000000"


# All of it


def test_what_lies_in_a_replacement_is_patched_before_it_is_copied() -> None:
    """Returns and thunk calls in .altinstr_replacement are sites of their own."""
    code = {0x40: b"\x90" * 5, 0xC10: b"\xe9\1\2\3\4"}
    placed = at_base(
        code,
        returns=offsets(0xC10),
        alternatives=rows(ALTERNATIVE, (0x40, 0xC10, FEATURE, 5, 5, 0, 0)),
    )
    assert predicted(placed, state(FEATURE), 0x40, 0x45).hex() == "c3cccccccc"
    with_thunk = predicted(placed, state(FEATURE, RETHUNK), 0x40, 0x45)
    assert with_thunk == branch(0xE9, 0x40, THUNK)


def test_a_lock_in_a_replacement_is_patched_where_it_was_copied_to() -> None:
    code = {0x40: b"\x90" * 4, 0xC10: b"\xf0\x0f\xb1\x0f"}
    placed = at_base(
        code,
        locks=offsets(0x40),
        alternatives=rows(ALTERNATIVE, (0x40, 0xC10, FEATURE, 4, 4, 0, 0)),
    )
    assert predicted(placed, state(FEATURE, uniprocessor=True), 0x40, 0x44).hex() == "3e0fb10f"


def predicted(placed: Placed, how: PatchState, start: int, end: int) -> bytes:
    return Predictor(how, keys()).text(placed, start, end).tobytes()


def keys() -> Keys:
    """Keys that are on and calls that lead somewhere, by their address."""
    return Keys(
        lambda addresses: (addresses >> np.uint64(3)) % np.uint64(2) == 0,
        lambda addresses: np.where(addresses % np.uint64(3) == 0, np.uint64(0), addresses),
    )


FEATURE_SETS = [
    state(),
    state(FEATURE, RETHUNK),
    state(FEATURE, RETHUNK, RETPOLINE_FEATURE, uniprocessor=True),
    state(RETPOLINE_FEATURE, RETPOLINE_LFENCE, 16),
    state(RETHUNK, INDIRECT_THUNK_ITS, return_thunk=ITS_THUNK),
]


@pytest.mark.parametrize("how", FEATURE_SETS)
def test_any_part_of_a_prediction_is_that_part_of_the_whole(how: PatchState) -> None:
    unit = build_unit("made")
    placed = place(unit, BASE, lambda slot: BASE + 0x30_0000 + len(slot.name))
    predictor = Predictor(how, keys())
    whole = predictor.text(placed, 0, 0x1000)
    for start in range(0x130):
        for length in (1, 2, 5, 16, 300):
            part = predictor.text(placed, start, start + length)
            assert part.tobytes() == whole[start : start + length].tobytes(), (start, length)
    assert whole.tobytes() != placed.relocated(0, 0x1000)[0].tobytes()
