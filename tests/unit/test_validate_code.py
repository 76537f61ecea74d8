"""Text in memory against its prediction: what is settled, and what is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_validate_patch import (
    BASE,
    FUNCTION,
    ITS_THUNK,
    NONE,
    THUNK,
    at_base,
    branch,
    state,
)
from units import build_unit, offsets, rows

from pyscan.approved.unit import (
    ALTERNATIVE,
    JUMP_LABEL,
    PARAVIRT,
    RETPOLINE,
    STATIC_CALL,
    TRAMPOLINE,
    VMLINUX,
)
from pyscan.validate.code import (
    CONTEXT,
    DIFFERENCES_MAX,
    Allowed,
    CodeResult,
    Probe,
    TextComparer,
    site_at,
)
from pyscan.validate.patch import NOP5, RETURN
from pyscan.validate.placed import Placed, place
from pyscan.validate.predict import Keys, Predictor
from pyscan.validate.state import INDIRECT_THUNK_ITS, RETHUNK, PatchState

TRACER, HANDLER, SLOT = BASE + 0x40_0000, BASE + 0x40_0100, BASE + 0x40_0200
NOTHING = Allowed(np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64), (), ())


def allowed(**changes: Any) -> Allowed:
    return replace(NOTHING, **changes)


def addresses(*values: int) -> NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


def in_vmlinux(placed: Placed) -> Placed:
    """The same as a part of the kernel itself."""
    return Placed(replace(placed.unit, name=VMLINUX), placed.address, placed.values, placed.known)


def compare(
    placed: Placed,
    edits: dict[int, bytes],
    what: Allowed = NOTHING,
    how: PatchState | None = None,
    *,
    function: int = FUNCTION,
    part: tuple[int, int] = (0, 0x1000),
) -> CodeResult:
    """Compare predicted text with these edits, all of it or [start, end) with context."""
    keys = Keys(
        lambda keys: np.zeros(len(keys), dtype=bool),
        lambda keys: np.full(len(keys), function, dtype=np.uint64),
    )
    predictor = Predictor(how or state(), keys)
    memory = predictor.text(placed, 0, 0x1000)
    for offset, code in edits.items():
        memory[offset : offset + len(code)] = np.frombuffer(code, dtype=np.uint8)
    start, end = part
    low, high = max(0, start - CONTEXT), min(0x1000, end + CONTEXT)
    result = CodeResult()
    comparer = TextComparer(predictor, placed, what)
    legal = comparer.compare(
        low, memory[low:high].copy(), np.zeros(high - low, dtype=bool), result,
        slice(start - low, end - low),
    )  # fmt: skip
    assert len(legal) == end - start
    assert np.array_equal(legal, memory[start:end]) == (result.total == 0)
    return result


def test_equal_text_is_legal_and_counted() -> None:
    result = compare(at_base({0x10: b"\x55"}), {})
    assert (result.total, result.bytes, result.settled) == (0, 0x1000, {})


def test_a_difference_says_where_and_what() -> None:
    placed = at_base({0x100: b"\x55\x48\x89\xe5"}, returns=offsets(0x180))
    result = compare(placed, {0x101: b"\x90", 0x103: b"\x90", 0x182: b"\x90"})
    first, second = result.differences
    assert result.total == 2
    assert (first.unit, first.offset, first.address) == ("made", 0x101, BASE + 0x101)
    assert (first.site, first.expected, first.actual) == ("", b"\x48\x89\xe5", b"\x90\x89\x90")
    assert (second.site, second.offset, second.place) == ("return", 0x182, b"\xc3\xcc\x90\xcc\xcc")


def test_differences_are_bounded_and_all_are_counted() -> None:
    result = compare(at_base(), dict.fromkeys(range(0, 4096, 16), b"\x90"))
    assert (result.total, len(result.differences)) == (256, DIFFERENCES_MAX)


def test_bytes_that_were_not_read_are_left_out() -> None:
    placed = at_base()
    keys = Keys(lambda keys: np.zeros(len(keys), bool), lambda keys: keys)
    result = CodeResult()
    memory = np.full(0x1000, 0xAA, dtype=np.uint8)
    unread = np.ones(0x1000, dtype=bool)
    unread[0x800:] = False
    memory[0x800:] = 0
    legal = TextComparer(Predictor(state(), keys), placed, NOTHING).compare(
        0, memory, unread, result
    )
    assert (result.total, result.bytes) == (0, 0x800)
    assert not legal.any()


# Tracing


def test_traced_functions_call_registered_tracers_only() -> None:
    placed = at_base(mcount=offsets(0x40, 0x60))
    call = {0x40: branch(0xE8, 0x40, TRACER)}
    result = compare(placed, call, allowed(tracers=addresses(TRACER)))
    assert (result.total, result.traced) == (0, 1)
    assert compare(placed, call).total == 1
    assert compare(placed, call, allowed(tracers=addresses(TRACER + 16))).total == 1
    # A jump there, or a call from elsewhere, is none of the tracer's.
    assert compare(placed, {0x60: branch(0xE9, 0x60, TRACER)},
                   allowed(tracers=addresses(TRACER))).total == 1  # fmt: skip
    assert compare(placed, {0x80: branch(0xE8, 0x80, TRACER)},
                   allowed(tracers=addresses(TRACER))).total == 1  # fmt: skip


def test_the_tracers_own_call_leads_to_what_is_registered() -> None:
    placed = at_base({0x40: NOP5})
    what = allowed(core=addresses(HANDLER), core_sites=(BASE + 0x40,))
    result = compare(placed, {0x40: branch(0xE8, 0x40, HANDLER)}, what)
    assert (result.total, result.settled) == (0, {"ftrace": 1})
    assert compare(placed, {0x40: branch(0xE9, 0x40, HANDLER)}, what).total == 0
    assert compare(placed, {0x40: branch(0xE8, 0x40, HANDLER + 1)}, what).total == 1
    assert compare(placed, {0x50: branch(0xE8, 0x50, HANDLER)}, what).total == 1


# Static calls


def test_tail_calls_of_nothing_may_be_older_than_the_thunk_in_the_kernel() -> None:
    placed = at_base(
        static_calls=rows(STATIC_CALL, (0x40, 0, 0, 1, 5, 0), (0x60, 0, 0, 0, 5, 0)),
        trampolines=rows(TRAMPOLINE, (0x80, 0, 0)),
    )
    with_thunk = state(RETHUNK)
    for offset in (0x40, 0x80):
        early = {offset: RETURN}
        result = compare(in_vmlinux(placed), early, how=with_thunk, function=0)
        assert (result.total, result.settled) == (0, {"static call": 1})
        # Modules are loaded later; a call that is no tail call is a nop; a function is called.
        assert compare(placed, early, how=with_thunk, function=0).total == 1
        assert compare(in_vmlinux(placed), early, how=with_thunk).total == 1
    assert compare(in_vmlinux(placed), {0x60: RETURN}, how=with_thunk, function=0).total == 1
    assert compare(in_vmlinux(placed), {0x40: b"\xc3\xcc\xcc\xcc\x90"}, how=with_thunk,
                   function=0).total == 1  # fmt: skip


def test_a_trampoline_of_nothing_may_be_as_it_was_built() -> None:
    built = b"\xc3\xcc\x90\x90\x90\x0f\xb9\xcc"
    placed = at_base({0x40: built}, trampolines=rows(TRAMPOLINE, (0x40, 0, 0)))
    assert compare(placed, {0x40: built}, function=0).total == 0
    # Its key has a function: whoever put it back cut the call.
    result = compare(placed, {0x40: built})
    assert result.total == 1
    assert result.differences[0].site == "static call trampoline"


# Thunks in pages of their own


def test_its_thunks_are_those_of_the_sites_register() -> None:
    column = rows(RETPOLINE, (0x40, 0, 0, 5, 0), (0x80, 8, 1, 5, 0))
    placed = at_base(retpolines=column)
    its = state(INDIRECT_THUNK_ITS)
    what = allowed(its={ITS_THUNK: 0, ITS_THUNK + 0x40: 8})
    legal = {0x40: branch(0xE8, 0x40, ITS_THUNK), 0x80: branch(0xE9, 0x80, ITS_THUNK + 0x40)}
    result = compare(placed, legal, what, its)
    assert (result.total, result.settled) == (0, {"ITS thunk": 2})
    assert compare(placed, {0x40: branch(0xE8, 0x40, ITS_THUNK + 0x40)}, what, its).total == 1
    assert compare(placed, {0x40: branch(0xE9, 0x40, ITS_THUNK)}, what, its).total == 1
    assert compare(placed, legal, NOTHING, its).total == 2
    assert compare(placed, legal, what).total == 2


def test_each_site_has_an_its_thunk_of_its_own() -> None:
    placed = at_base(retpolines=rows(RETPOLINE, (0x40, 0, 0, 5, 0), (0x80, 0, 0, 5, 0)))
    what = allowed(its={ITS_THUNK: 0, ITS_THUNK + 3: 0})
    apart = {0x40: branch(0xE8, 0x40, ITS_THUNK), 0x80: branch(0xE8, 0x80, ITS_THUNK + 3)}
    assert compare(placed, apart, what, state(INDIRECT_THUNK_ITS)).total == 0
    shared = {offset: branch(0xE8, offset, ITS_THUNK) for offset in (0x40, 0x80)}
    assert compare(placed, shared, what, state(INDIRECT_THUNK_ITS)).total == 1


def test_its_thunks_behind_a_cs_prefix() -> None:
    """__emit_trampoline(): 6 bytes are a CS prefix and the branch behind it."""
    placed = at_base(retpolines=rows(RETPOLINE, (0x40, 8, 0, 6, 1)))
    what = allowed(its={ITS_THUNK: 8})
    code = b"\x2e" + branch(0xE8, 0x41, ITS_THUNK)
    assert compare(placed, {0x40: code}, what, state(INDIRECT_THUNK_ITS)).total == 0
    plain = branch(0xE8, 0x40, ITS_THUNK) + b"\x90"
    assert compare(placed, {0x40: plain}, what, state(INDIRECT_THUNK_ITS)).total == 1


# Probes


CODE = b"\x55\x48\x89\xe5\x41"


def test_a_probe_is_a_breakpoint_over_the_opcode_that_it_saved() -> None:
    placed = at_base({0x100: CODE})
    what = allowed(probes=(Probe(BASE + 0x100, 0x55, 0, b""),))
    result = compare(placed, {0x100: b"\xcc"}, what)
    assert (result.total, result.settled) == (0, {"kprobe": 1})
    assert compare(placed, {0x101: b"\xcc"}, what).total == 1
    other = allowed(probes=(Probe(BASE + 0x100, 0x56, 0, b""),))
    assert compare(placed, {0x100: b"\xcc"}, other).total == 1


def test_an_optimised_probe_jumps_to_its_own_slot() -> None:
    placed = at_base({0x100: CODE})
    what = allowed(probes=(Probe(BASE + 0x100, 0x55, SLOT, CODE[1:]),))
    jump = branch(0xE9, 0x100, SLOT)
    result = compare(placed, {0x100: jump}, what)
    assert (result.total, result.settled) == (0, {"optimised kprobe": 1})
    assert compare(placed, {0x100: branch(0xE9, 0x100, SLOT + 1)}, what).total == 1
    # It would put back something else than the package's code.
    other = allowed(probes=(Probe(BASE + 0x100, 0x55, SLOT, b"\0\0\0\0"),))
    assert compare(placed, {0x100: jump}, other).total == 1
    unoptimised = allowed(probes=(Probe(BASE + 0x100, 0x55, 0, CODE[1:]),))
    assert compare(placed, {0x100: jump}, unoptimised).total == 1


# Parts


@pytest.mark.parametrize("edge", range(0x1F8, 0x210))
def test_what_straddles_an_edge_is_settled_as_in_the_whole(edge: int) -> None:
    """Every kind of place lies across an edge once; each part is as legal as the whole."""
    placed = at_base(
        {0x204: CODE},
        mcount=offsets(0x1FD),
        retpolines=rows(RETPOLINE, (0x209, 8, 0, 6, 1)),
    )
    what = allowed(
        tracers=addresses(TRACER),
        its={ITS_THUNK: 8},
        probes=(Probe(BASE + 0x204, 0x55, SLOT, CODE[1:]),),
    )
    edits = {
        0x1FD: branch(0xE8, 0x1FD, TRACER),
        0x204: branch(0xE9, 0x204, SLOT),
        0x209: b"\x2e" + branch(0xE8, 0x20A, ITS_THUNK),
    }
    how = state(INDIRECT_THUNK_ITS)
    assert compare(placed, edits, what, how).total == 0
    assert compare(placed, edits, what, how, part=(0x100, edge)).total == 0
    assert compare(placed, edits, what, how, part=(edge, 0x300)).total == 0
    # Context is not judged.
    edits[0x300] = edits[0xFF] = b"\x01"
    assert compare(placed, edits, what, how, part=(0x100, 0x300)).total == 0
    assert compare(placed, edits, what, how).total == 2


def test_names_of_sites() -> None:
    columns = {
        **NONE,
        "mcount": offsets(0x10),
        "returns": offsets(0x20),
        "locks": offsets(0x30),
        "retpolines": rows(RETPOLINE, (0x40, 0, 0, 6, 1)),
        "paravirt": rows(PARAVIRT, (0x50, 1, 7)),
        "alternatives": rows(ALTERNATIVE, (0x60, 0xC00, 3, 9, 0, 0, 0)),
        "jump_labels": rows(JUMP_LABEL, (0x70, 0x80, 0, 0, 0, 2)),
        "static_calls": rows(STATIC_CALL, (0x80, 0, 0, 0, 5, 0)),
        "trampolines": rows(TRAMPOLINE, (0x90, 0, 0)),
    }
    unit = build_unit("made", sites=at_base(**columns).unit.sites)
    names = {
        0x10: ("ftrace call", 5),
        0x20: ("return", 5),
        0x30: ("lock", 1),
        0x40: ("retpoline", 6),
        0x50: ("paravirt call", 7),
        0x60: ("alternative", 9),
        0x70: ("jump label", 2),
        0x80: ("static call", 5),
        0x90: ("static call trampoline", 8),
    }
    for start, (name, length) in names.items():
        found = [site_at(unit, offset) for offset in range(start - 1, start + length + 1)]
        assert found == ["", *[name] * length, ""]


def test_placing_does_not_matter() -> None:
    """The same comparison of the kernel at another address."""
    unit = replace(at_base(mcount=offsets(0x40)).unit, name=VMLINUX, link_address=BASE)
    placed = place(unit, BASE + 0x20_0000, lambda _slot: None)
    assert compare(placed, {0x41: b"\x20"}).total == 1
    assert THUNK
