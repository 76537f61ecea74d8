"""Units as bytes: what comes back, and every unit that is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from units import (
    LENGTH,
    assert_same_unit,
    build_sites,
    build_symbols,
    build_unit,
    offsets,
    rows,
    use_unit,
)

from pyscan.approved.check import IMAGE_BYTES_MAX
from pyscan.approved.encode import ALIGNMENT, COLUMNS, decode_unit, encode_unit
from pyscan.approved.unit import (
    ALTERNATIVE,
    ALTERNATIVE_RUN,
    JUMP_LABEL,
    PARAVIRT,
    RELOCATION,
    RETPOLINE,
    STATIC_CALL,
    TRAMPOLINE,
    Section,
    Segment,
    SegmentKind,
    Slot,
    SlotKind,
    Symbols,
    Table,
    TableKind,
)
from pyscan.cose import decode_cbor, encode_cbor
from pyscan.errors import ApprovedFileError, InternalError

# --- units ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vmlinux", "loop"])
def test_a_unit_comes_back_equal(name: str) -> None:
    unit = build_unit(name)
    blob = encode_unit(unit)
    assert len(blob) % ALIGNMENT == 0
    assert encode_unit(unit) == blob
    decoded = decode_unit(memoryview(blob))
    assert_same_unit(unit, decoded)
    assert encode_unit(decoded) == blob


def test_arrays_are_views_that_cannot_be_written() -> None:
    blob = encode_unit(build_unit())
    unit = decode_unit(memoryview(blob))
    for array in (unit.image, unit.sites.returns, unit.symbols.names, unit.relocations64):
        assert not array.flags.writeable
        assert np.shares_memory(array, np.frombuffer(blob, dtype=np.uint8))


def test_an_empty_unit() -> None:
    empty = {name: np.empty(0, dtype) for name, dtype in COLUMNS.items()}
    sites = replace(
        build_sites(), **{name: empty[name] for name in COLUMNS if hasattr(build_sites(), name)}
    )
    unit = build_unit(
        "empty",
        image=empty["image"],
        segments=(),
        sections=(),
        tables=(),
        relocations32=empty["relocations32"],
        relocations64=empty["relocations64"],
        symbols=build_symbols([]),
        exports=(),
        sites=sites,
    )
    assert_same_unit(unit, decode_unit(memoryview(encode_unit(unit))))


def symbols_with(**changes: Any) -> Symbols:
    return replace(build_unit().symbols, **changes)


U1 = np.dtype("u1")
BAD_UNITS: list[tuple[dict[str, Any], str]] = [
    ({"length": IMAGE_BYTES_MAX + 1}, "more than"),
    ({"init_function": IMAGE_BYTES_MAX + 1}, "init function"),
    ({"length": 0x2FFF}, "outside the image"),
    ({"segments": (Segment(SegmentKind.TEXT, 0x2FFF, 2),)}, "text at 0x2fff lies outside"),
    ({"segments": (Segment(SegmentKind.TEXT, 0, 0),)}, "empty"),
    (
        {"segments": (Segment(SegmentKind.TEXT, 0, 8), Segment(SegmentKind.RODATA, 7, 8))},
        "overlap",
    ),
    ({"sections": (Section(".bss", LENGTH - 1, 2),)}, r"\.bss at 0x3fff lies outside"),
    ({"sections": (Section("", 0, 1),)}, "sections.*empty"),
    ({"sections": (Section("\x1b[2J", 0, 1),)}, "not printable"),
    ({"tables": (Table(TableKind.MCOUNT, 0x2FF9, 8, 8),)}, "outside"),
    ({"tables": (Table(TableKind.MCOUNT, 0, 12, 8),)}, "whole entries"),
    ({"tables": (Table(TableKind.MCOUNT, 0, 8, 0),)}, "whole entries"),
    ({"tables": (Table(TableKind.MCOUNT, 0, 130, 65),)}, "whole entries"),
    ({"slots": ()}, "slot 0"),
    ({"slots": (Slot(SlotKind.PERCPU),)}, "slot 0"),
    ({"slots": (Slot(SlotKind.BASE, relative=True),)}, "slot 0"),
    ({"slots": (Slot(SlotKind.BASE, "x"),)}, "has a name"),
    ({"slots": (Slot(SlotKind.BASE), Slot(SlotKind.SYMBOL))}, "should have one"),
    ({"slots": (Slot(SlotKind.BASE),)}, "slot"),
    ({"exports": (("a", 4, 0),)}, "export refers to a slot"),
    ({"exports": (("a", 0, 0), ("a", 1, 0))}, "exported twice"),
    ({"exports": (("", 0, 0),)}, "empty or not printable"),
    ({"exports": (("\x07", 0, 0),)}, "empty or not printable"),
    ({"exports": (("a\0b", 0, 0),)}, "empty or not printable"),
    ({"exports": (("\xe9", 0, 0),)}, "empty or not printable"),
    ({"exports": (("a", -1, 0),)}, "export refers to a slot"),
    ({"exports": (("a", 0, 1 << 63),)}, "more than 64 bits"),
    ({"name": ""}, "name"),
    ({"link_address": -1}, "link address"),
    ({"length": -1}, "negative"),
    ({"sizes": (0, 1 << 32)}, "too large"),
    ({"sizes": (0,) * 9}, "9 rows"),
    ({"tables": (Table(TableKind.MCOUNT, -8, 8, 8),)}, "outside"),
    ({"relocations32": rows(RELOCATION, (0x2FFD, 0))}, "relocations32 lie outside"),
    ({"relocations64": rows(RELOCATION, (0x2FF9, 0))}, "relocations64 lie outside"),
    ({"relocations64": rows(RELOCATION, ((1 << 32) - 4, 0))}, "relocations64 lie outside"),
    ({"relocations32": rows(RELOCATION, (8, 0), (11, 0))}, "relocations32 overlap"),
    ({"relocations32": rows(RELOCATION, (8, 0), (0, 0))}, "relocations32 overlap or are out of"),
    ({"relocations32": rows(RELOCATION, (8, 4))}, "slots of relocations32: 4"),
    ({"symbols": symbols_with(kinds=np.zeros(5, U1))}, "differ in length"),
    ({"symbols": symbols_with(offsets=np.arange(6, 0, -1, dtype="<i8"))}, "not ascending"),
    ({"symbols": symbols_with(kinds=np.full(6, 2, U1))}, "neither data nor function"),
    ({"symbols": build_symbols([(0, 0, "a b")])}, "not printable ASCII"),
    ({"symbols": build_symbols([(0, 0, "\xe9")])}, "not printable ASCII"),
    ({"symbols": build_symbols([(0, 0, "")])}, "empty"),
    ({"symbols": build_symbols([(0, 0, "x" * 1024)])}, "more than 1023"),
    ({"symbols": symbols_with(names=np.frombuffer(b"abc", U1))}, "no end"),
    ({"symbols": symbols_with(names=np.empty(0, U1))}, "starts of symbol names"),
    ({"symbols": symbols_with(starts=np.full(6, 999, "<u4"))}, "starts of symbol names"),
    ({"symbols": symbols_with(starts=np.full(6, 1, "<u4"))}, "does not begin"),
]
BAD_SITES: list[tuple[dict[str, Any], str]] = [
    ({"mcount": offsets(0x2FFC)}, "mcount sites lie outside"),
    ({"mcount": offsets((1 << 32) - 1)}, "mcount sites lie outside"),
    ({"mcount": offsets(0, 4)}, "mcount sites overlap"),
    ({"returns": offsets(0x2FFC)}, "return sites lie outside"),
    ({"returns": offsets(8, 0)}, "return sites overlap or are out of order"),
    ({"locks": offsets(0x3000)}, "locks lie outside"),
    ({"locks": offsets(7, 7)}, "locks overlap"),
    ({"retpolines": rows(RETPOLINE, (0, 16, 0, 5, 0))}, "registers of retpolines"),
    ({"retpolines": rows(RETPOLINE, (0, 0, 3, 5, 0))}, "forms of retpolines"),
    ({"retpolines": rows(RETPOLINE, (0, 0, 0, 7, 2))}, "prefixes of retpolines"),
    ({"retpolines": rows(RETPOLINE, (0, 0, 2, 5, 0))}, "another length than its form"),
    ({"retpolines": rows(RETPOLINE, (0x2FFC, 0, 0, 5, 0))}, "retpolines lie outside"),
    ({"paravirt": rows(PARAVIRT, (0, 0, 0))}, "paravirt site is empty"),
    ({"paravirt": rows(PARAVIRT, (0, 0, 8), (7, 0, 8))}, "paravirt sites overlap"),
    ({"paravirt": rows(PARAVIRT, (0x2FFF, 0, 2))}, "paravirt sites lie outside"),
    ({"jump_labels": rows(JUMP_LABEL, (0, 0, 4, 0, 0, 5))}, "slots of jump labels"),
    ({"jump_labels": rows(JUMP_LABEL, (0, LENGTH, 0, 0, 0, 5))}, "targets of jump labels"),
    ({"jump_labels": rows(JUMP_LABEL, (0, 0, 0, 0, 2, 5))}, "branches of jump labels"),
    ({"jump_labels": rows(JUMP_LABEL, (0, 0, 0, 0, 0, 4))}, "not 2 or 5"),
    ({"jump_labels": rows(JUMP_LABEL, (0x2FFC, 0, 0, 0, 0, 5))}, "jump labels lie outside"),
    ({"static_calls": rows(STATIC_CALL, (0, 4, 0, 0, 5, 0))}, "slots of static calls"),
    ({"static_calls": rows(STATIC_CALL, (0, 0, 0, 2, 5, 0))}, "tails of static calls"),
    ({"static_calls": rows(STATIC_CALL, (0, 0, 0, 0, 7, 0))}, "not 5 or 6"),
    ({"static_calls": rows(STATIC_CALL, (0, 0, 0, 0, 5, 2))}, "trampolines of static calls"),
    ({"static_calls": rows(STATIC_CALL, (0x2FFB, 0, 0, 0, 6, 0))}, "static calls lie outside"),
    ({"trampolines": rows(TRAMPOLINE, (0, 4, 0))}, "slots of trampolines"),
    ({"trampolines": rows(TRAMPOLINE, (0, 0, 0), (7, 0, 0))}, "trampolines overlap"),
    ({"trampolines": rows(TRAMPOLINE, (0x2FF9, 0, 0))}, "trampolines lie outside"),
    ({"alternatives": rows(ALTERNATIVE, (0x2FFD, 0, 0, 4, 0, 0, 3))}, "alternatives lie outside"),
    ({"alternatives": rows(ALTERNATIVE, (0, 0x2FFD, 0, 4, 4, 0, 3))}, "replacements lie outside"),
    ({"alternatives": rows(ALTERNATIVE, (0, 9, 0, 4, 5, 0, 3))}, "longer than what it replaces"),
    ({"alternatives": rows(ALTERNATIVE, (0, 9, 0, 99, 5, 0, 2))}, "one alternative each"),
    ({"alternatives": rows(ALTERNATIVE, (0, 9, 0, 99, 5, 0, 1 << 31))}, "one alternative each"),
    ({"alternatives": rows(ALTERNATIVE, (0, 9, 0, 99, 5, 1, 3))}, "one alternative each"),
    ({"alternatives": rows(ALTERNATIVE, (0, 9, 0, 11, 5, 0, 3))}, "leaves its alternative"),
    (
        {"alternative_runs": rows(ALTERNATIVE_RUN, (0, 2, 2), (0, 2, 0), (0, 2, 0))},
        "runs of nops: 2",
    ),
    (
        {"alternative_runs": rows(ALTERNATIVE_RUN, (0, 1, 1), (0, 2, 0), (0, 2, 0))},
        "less than two",
    ),
    (
        {"alternative_runs": rows(ALTERNATIVE_RUN, (255, 255, 1), (0, 2, 0), (0, 2, 0))},
        "leaves its alternative",
    ),
]


@pytest.mark.parametrize(("changes", "match"), BAD_UNITS)
def test_a_unit_that_must_not_be(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InternalError, match=match):
        encode_unit(replace(build_unit(), **changes))


@pytest.mark.parametrize(("changes", "match"), BAD_SITES)
def test_sites_that_must_not_be(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InternalError, match=match):
        encode_unit(build_unit(sites=build_sites(**changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"image": np.zeros(0x3000, dtype=np.int64)},
        {"image": np.zeros((0x1000, 3), dtype=np.uint8)},
        {"relocations32": np.zeros(1, dtype=JUMP_LABEL)},
        {"sites": build_sites(mcount=np.array([1], dtype=np.int64))},
    ],
)
def test_a_column_of_another_type_is_a_defect(changes: dict[str, Any]) -> None:
    with pytest.raises(InternalError, match="unit vmlinux: column"):
        encode_unit(build_unit(**changes))


def header_of(blob: bytes) -> tuple[dict[str, Any], int]:
    """A unit's header, and where its arrays begin."""
    end = 8 + int.from_bytes(blob[:8], "little")
    header = decode_cbor(blob[8:end], end)
    assert isinstance(header, dict)
    return header, end + -end % ALIGNMENT


def with_header(blob: bytes, header: object) -> bytes:
    """The same arrays behind another header."""
    data = encode_cbor(header)
    data = len(data).to_bytes(8, "little") + data
    return data + bytes(-len(data) % ALIGNMENT) + blob[header_of(blob)[1] :]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": ""}, "name"),
        ({"name": 7}, "name"),
        ({"name": "a\nb"}, "not printable"),
        ({"link_address": -1}, "link_address"),
        ({"link_address": True}, "link_address"),
        ({"length": None}, "length"),
        ({"init_function": False}, "init_function"),
        ({"init_function": "0"}, "init_function"),
        ({"segments": None}, "segments"),
        ({"segments": [["text", 0, 1]] * 65}, "65 rows"),
        ({"segments": [["text", 0]]}, "not 3 values"),
        ({"segments": [["data", 0, 1]]}, "does not know"),
        ({"segments": [[[], 0, 1]]}, "does not know"),
        ({"segments": [["text", True, 1]]}, "number"),
        ({"segments": [["text", -1, 1]]}, "number"),
        ({"segments": [["text", 1 << 32, 1]]}, "number"),
        ({"sections": [[b".text", 0, 1]]}, "text that is none"),
        ({"tables": [["mcount", 0, 1, 1]] * 65537}, "65537 rows"),
        ({"slots": [["base", "", 0]]}, "flag"),
        ({"slots": 0}, "slots"),
        ({"sizes": [0] * 9}, "sizes"),
        ({"sizes": [True]}, "sizes"),
        ({"sizes": [-1]}, "sizes"),
        ({"counts": []}, "counts"),
        ({"counts": [0] * len(COLUMNS)}, "bytes too many"),
        ({"counts": [1 << 62] * len(COLUMNS)}, "cut off"),
        ({"counts": [-1] * len(COLUMNS)}, "cut off"),
        ({"counts": [True] * len(COLUMNS)}, "counts"),
    ],
)
def test_headers_that_must_not_be(changes: dict[str, Any], match: str) -> None:
    blob = encode_unit(build_unit())
    header, _ = header_of(blob)
    assert with_header(blob, header) == blob
    with pytest.raises(ApprovedFileError, match=match):
        decode_unit(memoryview(with_header(blob, header | changes)))


@pytest.mark.parametrize("field", sorted(header_of(encode_unit(build_unit()))[0]))
def test_every_field_of_a_header_is_needed(field: str) -> None:
    blob = encode_unit(build_unit())
    header, _ = header_of(blob)
    del header[field]
    with pytest.raises(ApprovedFileError):
        decode_unit(memoryview(with_header(blob, header)))


@pytest.mark.parametrize("header", [None, [], 0, "name", {1: 2}])
def test_a_header_that_is_something_else(header: object) -> None:
    blob = encode_unit(build_unit())
    with pytest.raises(ApprovedFileError):
        decode_unit(memoryview(with_header(blob, header)))


BLOB = encode_unit(build_unit("loop"))


@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(BLOB) - 1), st.integers(0, 255)), min_size=1, max_size=8
    ),
    cut=st.integers(0, 200),
)
def test_any_blob_is_refused_or_can_be_used(edits: list[tuple[int, int]], cut: int) -> None:
    blob = bytearray(BLOB[: len(BLOB) - cut] if cut % 4 == 0 else BLOB)
    for at, value in edits:
        blob[at % len(blob)] = value
    try:
        unit = decode_unit(memoryview(bytes(blob)))
    except ApprovedFileError:
        return
    use_unit(unit)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ApprovedFileError):
        decode_unit(memoryview(data))
