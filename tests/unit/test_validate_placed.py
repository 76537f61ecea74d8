"""Units at their place: values of slots, relocated bytes, and what nobody can know."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
from units import LINK_ADDRESS, build_unit, offsets, rows

from pyscan.approved.unit import RELOCATION, Slot, SlotKind, Unit
from pyscan.validate.placed import EDGE, Placed, place, within

BASE = 0xFFFF_FFFF_C010_0000
PERCPU, FAR, NEAR, INIT = 0x2_5000, 0xFFFF_FFFF_9012_3456, 0xFFFF_FFFF_C020_0000, 0
SLOTS = (
    Slot(SlotKind.BASE),
    Slot(SlotKind.NEGATED_BASE),
    Slot(SlotKind.PERCPU),
    Slot(SlotKind.SYMBOL, "far"),
    Slot(SlotKind.SYMBOL, "near", relative=True),
    Slot(SlotKind.INIT),
)


def value(slot: Slot) -> int | None:
    if slot.kind is SlotKind.INIT:
        return None
    return {"far": FAR, "near": NEAR, "": PERCPU}[slot.name]


def unit(name: str = "made", **changes: object) -> Unit:
    made = build_unit(name)
    plain = replace(
        made,
        image=np.zeros(0x1000, dtype=np.uint8),
        slots=SLOTS,
        relocations32=rows(RELOCATION),
        relocations64=rows(RELOCATION),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_values_of_slots() -> None:
    placed = place(unit(), BASE, value)
    wanted = [BASE, -BASE, PERCPU, FAR, NEAR - BASE, 0]
    assert placed.values.tolist() == [each & ((1 << 64) - 1) for each in wanted]
    assert placed.known.tolist() == [True] * 5 + [False]
    assert placed.end == BASE + placed.unit.length
    # The kernel's base is what it was moved by.
    assert place(unit("vmlinux"), LINK_ADDRESS + 0x20_0000, value).values[0] == 0x20_0000


def test_references_are_resolved_or_zero() -> None:
    placed = place(unit(), BASE, value)
    slots = np.array([0, 3, 5], dtype=np.uint32)
    addends = np.array([0x10, -1, 0x10], dtype=np.int64)
    assert placed.resolve(slots, addends).tolist() == [BASE + 0x10, FAR - 1, 0]


def relocated(at32: dict[int, int], at64: dict[int, int], content: dict[int, bytes]) -> Placed:
    image = np.zeros(0x1000, dtype=np.uint8)
    for offset, data in content.items():
        image[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)
    columns = [rows(RELOCATION, *sorted(each.items())) for each in (at32, at64)]
    made = unit(image=image, relocations32=columns[0], relocations64=columns[1])
    return place(made, BASE, value)


def test_relocations_add_modulo_their_width() -> None:
    placed = relocated(
        {0x10: 0, 0x20: 1, 0x30: 4},
        {0x40: 3},
        {
            0x10: struct.pack("<i", -0x10),
            0x20: struct.pack("<i", 0x1000),
            0x30: struct.pack("<i", -4 - 0x30),
            0x40: struct.pack("<q", 8),
        },
    )
    data, unknown = placed.relocated(0, 0x100)
    assert data[0x10:0x14].tobytes() == struct.pack("<I", (BASE - 0x10) & 0xFFFF_FFFF)
    assert data[0x20:0x24].tobytes() == struct.pack("<I", (0x1000 - BASE) & 0xFFFF_FFFF)
    assert data[0x30:0x34].tobytes() == struct.pack("<I", (NEAR - BASE - 4 - 0x30) & 0xFFFF_FFFF)
    assert data[0x40:0x48].tobytes() == struct.pack("<Q", FAR + 8)
    assert not unknown.any()
    assert not data[0x14:0x20].any()
    assert not data[0x48:].any()


def test_what_nobody_can_know_is_marked() -> None:
    placed = relocated({0x10: 5}, {0x20: 5}, {})
    _, unknown = placed.relocated(0, 0x100)
    assert np.flatnonzero(unknown).tolist() == [*range(0x10, 0x14), *range(0x20, 0x28)]


@pytest.mark.parametrize("end", [0x101, 0x102, 0x107, 0x108, 0x120])
def test_relocations_across_an_edge_are_whole(end: int) -> None:
    placed = relocated({0x0FE: 0}, {0x102: 3}, {})
    whole, _ = placed.relocated(0, 0x1000)
    for start in (0, 0x0FF, 0x100):
        part, unknown = placed.relocated(start, end)
        assert part.tobytes() == whole[start:end].tobytes()
        assert len(unknown) == end - start


def test_behind_the_image_are_zeros() -> None:
    placed = relocated({0xFFC: 0}, {}, {})
    data, _ = placed.relocated(0xFF0, 0x1100)
    assert len(data) == 0x110
    assert data[0xC:0x10].any()
    assert not data[0x10:].any()
    far, unknown = placed.relocated(0x3000, 0x3010)
    assert not far.any()
    assert not unknown.any()


def test_rows_within_a_range() -> None:
    column = offsets(0, 4, 8, 8, 12)
    assert within(column, column, 4, 8).tolist() == [4, 8, 8]
    assert within(column, column, 5, 7).tolist() == []
    assert within(column, column, -EDGE, 0).tolist() == [0]
    assert within(column, column, 8, 4).tolist() == []
    assert within(column, column, -8, -1).tolist() == []
    assert within(column, column, 13, 99).tolist() == []
