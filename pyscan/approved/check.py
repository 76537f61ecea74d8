"""What a unit must satisfy so that code may index with everything in it, unchecked.

Clauses: docs/spec/approved.md section 5. All functions raise ApprovedFileError.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pyscan.approved.fields import check_text
from pyscan.approved.unit import Section, Segment, Sites, SlotKind, Symbols, Table, Unit
from pyscan.errors import ApprovedFileError

Array = NDArray[Any]
I64 = NDArray[np.int64]

#: Above any kernel; keeps every sum of two offsets far below 2^32.
IMAGE_BYTES_MAX: Final = 512 << 20
#: Of a symbol; KSYM_NAME_LEN (include/linux/kallsyms.h) is 512.
NAME_BYTES_MAX: Final = 1023
MCOUNT_BYTES: Final = 5
RETURN_BYTES: Final = 5
TRAMPOLINE_BYTES: Final = 8
ENTRY_BYTES_MAX: Final = 64
SEGMENTS_MAX: Final = 64
SECTIONS_MAX: Final = 1 << 14
TABLES_MAX: Final = 1 << 16
#: Far above the largest module's.
SLOTS_MAX: Final = 1 << 18
SIZES_MAX: Final = 8


def check_unit(unit: Unit) -> None:
    """Refuse a unit that breaks a clause of docs/spec/approved.md section 5."""
    _check_header(unit)
    if len(unit.image) > IMAGE_BYTES_MAX or unit.length > IMAGE_BYTES_MAX:
        raise ApprovedFileError(f"an image of more than {IMAGE_BYTES_MAX} bytes")
    if unit.init_function is not None and unit.init_function > IMAGE_BYTES_MAX:
        raise ApprovedFileError("the init function lies beyond any image")
    reach = max(len(unit.image), unit.length)
    _check_parts(unit, reach)
    _check_slots(unit)
    _check_exports(unit)
    _check_symbols(unit.symbols)
    for name, column, width in (
        ("relocations32", unit.relocations32, 4),
        ("relocations64", unit.relocations64, 8),
    ):
        _check_places(name, column["offset"], width, len(unit.image))
        _check_below(f"slots of {name}", column["slot"], len(unit.slots))
    _check_sites(unit.sites, len(unit.image), len(unit.slots), reach)


def _check_header(unit: Unit) -> None:
    """Names are printable, lists bounded, numbers fit their fields."""
    for key, count, limit in (
        ("segments", len(unit.segments), SEGMENTS_MAX),
        ("sections", len(unit.sections), SECTIONS_MAX),
        ("tables", len(unit.tables), TABLES_MAX),
        ("slots", len(unit.slots), SLOTS_MAX),
        ("sizes", len(unit.sizes), SIZES_MAX),
    ):
        if count > limit:
            raise ApprovedFileError(f"field {key!r}: {count} rows; at most {limit} may be")
    check_text("name", unit.name)
    for section in unit.sections:
        check_text("sections", section.name)
    for slot in unit.slots:
        check_text("slots", slot.name, empty=True)
    if not 0 <= unit.link_address < 1 << 64:
        raise ApprovedFileError("the link address is no unsigned 64-bit number")
    sizes = (unit.length, unit.init_function or 0, *unit.sizes)
    if not all(0 <= size < 1 << 32 for size in sizes):
        raise ApprovedFileError("a size of the unit is negative or too large")


def _check_parts(unit: Unit, reach: int) -> None:
    """Segments and tables lie in the image; sections in what is in memory."""
    end = 0
    for segment in unit.segments:
        if segment.offset < end or segment.length == 0:
            raise ApprovedFileError("the segments are empty, overlap or are out of order")
        _check_part(segment.kind, segment, min(len(unit.image), unit.length))
        end = segment.offset + segment.length
    for table in unit.tables:
        _check_part(table.kind, table, len(unit.image))
        if not 0 < table.entry <= ENTRY_BYTES_MAX or table.length % table.entry:
            raise ApprovedFileError(f"table {table.kind} is not whole entries")
    for section in unit.sections:
        _check_part(section.name, section, reach)


def _check_part(name: str, part: Segment | Section | Table, limit: int) -> None:
    if part.offset < 0 or part.length < 0 or part.offset + part.length > limit:
        raise ApprovedFileError(f"{name} at {part.offset:#x} lies outside the image")


def _check_slots(unit: Unit) -> None:
    """Slot 0 is BASE; only symbols have names."""
    if not unit.slots or unit.slots[0].kind is not SlotKind.BASE or unit.slots[0].relative:
        raise ApprovedFileError("slot 0 is not the unit's base")
    for slot in unit.slots:
        if bool(slot.name) != (slot.kind is SlotKind.SYMBOL):
            raise ApprovedFileError(f"a slot of kind {slot.kind} has a name, or should have one")


def _check_exports(unit: Unit) -> None:
    names = {name for name, _, _ in unit.exports}
    if len(names) != len(unit.exports):
        raise ApprovedFileError("a symbol is exported twice")
    if not all(name and name.isascii() and name.isprintable() for name in names):
        raise ApprovedFileError("the name of an export is empty or not printable ASCII")
    if not all(-(1 << 63) <= addend < 1 << 63 for _, _, addend in unit.exports):
        raise ApprovedFileError("the addend of an export has more than 64 bits")
    if any(not 0 <= slot < len(unit.slots) for _, slot, _ in unit.exports):
        raise ApprovedFileError("an export refers to a slot that does not exist")


def _check_symbols(symbols: Symbols) -> None:
    """Columns of one length, ascending; every name printable, not empty and with its NUL."""
    count, names, starts = len(symbols.offsets), symbols.names, symbols.starts
    if not count == len(symbols.kinds) == len(starts):
        raise ApprovedFileError("the columns of the symbols differ in length")
    if np.any(symbols.offsets[1:] < symbols.offsets[:-1]):
        raise ApprovedFileError("the symbols are not ascending")
    if np.any(symbols.kinds > 1):
        raise ApprovedFileError("a symbol is neither data nor function")
    if len(names) and names[-1]:
        raise ApprovedFileError("the last symbol name has no end")
    if np.any((names != 0) & ((names <= 0x20) | (names >= 0x7F))):
        raise ApprovedFileError("a symbol name is not printable ASCII")
    ends = np.flatnonzero(names == 0)
    if np.any(np.diff(ends, prepend=-1) > NAME_BYTES_MAX + 1):
        raise ApprovedFileError(f"a symbol name has more than {NAME_BYTES_MAX} bytes")
    _check_below("starts of symbol names", starts, len(names))
    if np.any(names[starts] == 0) or np.any(names[starts[starts > 0] - 1]):
        raise ApprovedFileError("a symbol name is empty, or does not begin where it should")


def _check_sites(sites: Sites, image: int, slots: int, reach: int) -> None:
    """Sites lie in the image and, within a class, ascend without touching each other."""
    for name, offsets, lengths in (
        ("mcount sites", sites.mcount, MCOUNT_BYTES),
        ("return sites", sites.returns, RETURN_BYTES),
        ("locks", sites.locks, 1),
        ("retpolines", sites.retpolines["offset"], _lengths(sites.retpolines)),
        ("paravirt sites", sites.paravirt["offset"], _lengths(sites.paravirt)),
        ("jump labels", sites.jump_labels["offset"], _lengths(sites.jump_labels)),
        ("static calls", sites.static_calls["offset"], _lengths(sites.static_calls)),
        ("trampolines", sites.trampolines["offset"], TRAMPOLINE_BYTES),
    ):
        _check_places(name, offsets, lengths, image)
    for name, column in (
        ("jump labels", sites.jump_labels),
        ("static calls", sites.static_calls),
        ("trampolines", sites.trampolines),
    ):
        _check_below(f"slots of {name}", column["key_slot"], slots)
    _check_forms(sites, reach)
    _check_alternatives(sites, image)


def _check_forms(sites: Sites, reach: int) -> None:
    """Fields that select a form have one of its values."""
    retpolines, jumps, calls = sites.retpolines, sites.jump_labels, sites.static_calls
    forms = retpolines["form"]
    _check_below("registers of retpolines", retpolines["register"], 16)
    _check_below("forms of retpolines", forms, 3)
    _check_below("prefixes of retpolines", retpolines["prefix"], 2)
    # Displacement and opcode; a conditional jump has an opcode of two bytes.
    wanted = 5 + retpolines["prefix"].astype(np.int64) + (forms == 2)
    if np.any(retpolines["length"] != wanted):
        raise ApprovedFileError("a retpoline has another length than its form")
    _check_below("targets of jump labels", jumps["target"], reach)
    _check_below("branches of jump labels", jumps["branch"], 2)
    if np.any((jumps["length"] != 2) & (jumps["length"] != 5)):
        raise ApprovedFileError("a jump label is not 2 or 5 bytes long")
    _check_below("tails of static calls", calls["tail"], 2)
    _check_below("trampolines of static calls", calls["trampoline"], 2)
    if np.any((calls["length"] != 5) & (calls["length"] != 6)):
        raise ApprovedFileError("a static call is not 5 or 6 bytes long")
    if np.any(sites.paravirt["length"] == 0):
        raise ApprovedFileError("a paravirt site is empty")


def _check_alternatives(sites: Sites, image: int) -> None:
    """Both places lie in the image; each run of nops belongs to one alternative, inside it."""
    column, nops = sites.alternatives, sites.alternative_runs
    lengths = _lengths(column)
    replaced = column["replacement_length"].astype(np.int64)
    _check_inside("alternatives", column["offset"].astype(np.int64) + lengths, image)
    _check_inside("replacements", column["replacement"].astype(np.int64) + replaced, image)
    if np.any(replaced > lengths):
        raise ApprovedFileError("a replacement is longer than what it replaces")
    counts = column["runs"].astype(np.int64)
    # Alternatives without runs say nothing about where they would begin.
    first = np.cumsum(counts) - counts
    if int(counts.sum()) != len(nops) or np.any((column["first_run"] != first) & (counts > 0)):
        raise ApprovedFileError("the runs of nops do not belong to one alternative each")
    _check_below("runs of nops", nops["replaced"], 2)
    if np.any(nops["length"] < 2):
        raise ApprovedFileError("a run of nops has less than two")
    if np.any(nops["start"].astype(np.int64) + nops["length"] > np.repeat(lengths, counts)):
        raise ApprovedFileError("a run of nops leaves its alternative")


def _lengths(column: Array) -> I64:
    return column["length"].astype(np.int64)


def _check_places(name: str, offsets: Array, lengths: int | I64, image: int) -> None:
    """Places of some length lie in the image, ascending, none reaching into the next."""
    # In 64 bits: the sum of a hostile column must not wrap.
    starts = offsets.astype(np.int64)
    ends = starts + lengths
    _check_inside(name, ends, image)
    if np.any(ends[:-1] > starts[1:]):
        raise ApprovedFileError(f"{name} overlap or are out of order")


def _check_inside(name: str, ends: I64, image: int) -> None:
    if len(ends) and int(ends.max()) > image:
        raise ApprovedFileError(f"{name} lie outside the image")


def _check_below(name: str, values: Array, limit: int) -> None:
    if len(values) and int(values.max()) >= limit:
        raise ApprovedFileError(f"{name}: {int(values.max())} is out of range")
