"""A unit as bytes, and back without copying: docs/spec/approved.md section 4.

A blob is a small CBOR header followed by arrays, each at a multiple of ALIGNMENT. The arrays
of a decoded unit are views of the blob, read-only when the blob is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pyscan.approved.check import (
    SECTIONS_MAX,
    SEGMENTS_MAX,
    SIZES_MAX,
    SLOTS_MAX,
    TABLES_MAX,
    check_unit,
)
from pyscan.approved.fields import rows, text, typed
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
    Sites,
    Slot,
    SlotKind,
    Symbols,
    Table,
    TableKind,
    Unit,
)
from pyscan.cose import decode_cbor, encode_cbor
from pyscan.errors import ApprovedFileError, FileFormatError, InternalError

#: Of arrays and of the blob's length: a cache line, so no array straddles one needlessly.
ALIGNMENT: Final = 64
#: Far above the largest module's.
HEADER_BYTES_MAX: Final = 16 << 20

#: One export: its address is the value of slot `slot` plus `addend`.
_EXPORT: Final = np.dtype([("slot", "<u4"), ("addend", "<i8")])
_U1, _U4, _I8 = np.dtype("u1"), np.dtype("<u4"), np.dtype("<i8")
#: The arrays of a blob in their order, and the type of an element.
COLUMNS: Final[Mapping[str, np.dtype[Any]]] = {
    "image": _U1,
    "relocations32": RELOCATION,
    "relocations64": RELOCATION,
    "symbol_offsets": _I8,
    "symbol_kinds": _U1,
    "symbol_starts": _U4,
    "symbol_names": _U1,
    "exports": _EXPORT,
    "export_names": _U1,
    "mcount": _U4,
    "returns": _U4,
    "locks": _U4,
    "retpolines": RETPOLINE,
    "paravirt": PARAVIRT,
    "alternatives": ALTERNATIVE,
    "alternative_runs": ALTERNATIVE_RUN,
    "jump_labels": JUMP_LABEL,
    "static_calls": STATIC_CALL,
    "trampolines": TRAMPOLINE,
}
#: The names of `Sites`' columns.
SITE_CLASSES: Final = tuple(COLUMNS)[tuple(COLUMNS).index("mcount") :]
_LENGTH: Final = struct.Struct("<Q")

Array = NDArray[Any]


def encode_unit(unit: Unit) -> bytes:
    """The blob of a unit: the same unit gives the same bytes.

    Raises InternalError when the unit is not what pyscan.approved.unit says, so that no file
    is ever written that could not be read.
    """
    columns = _columns_of(unit)
    for name, column in columns.items():
        if column.dtype != COLUMNS[name] or column.ndim != 1:
            raise InternalError(
                f"unit {unit.name}: column {name} is {column.dtype}, not {COLUMNS[name]}"
            )
    try:
        check_unit(unit)
    except ApprovedFileError as error:
        raise InternalError(f"unit {unit.name}: {error}") from error
    columns |= _export_columns(unit)
    header = encode_cbor(_header(unit, columns))
    chunks = [*_padded(_LENGTH.pack(len(header)) + header)]
    for name in COLUMNS:
        chunks += _padded(columns[name].tobytes())
    return b"".join(chunks)


def decode_unit(blob: memoryview) -> Unit:
    """Read and check a blob; everything in the result may be indexed without a check.

    Raises ApprovedFileError.
    """
    if len(blob) < _LENGTH.size:
        raise ApprovedFileError(f"a unit of {len(blob)} bytes")
    (length,) = _LENGTH.unpack(blob[: _LENGTH.size])
    start = _LENGTH.size
    if length > min(len(blob) - start, HEADER_BYTES_MAX):
        raise ApprovedFileError("the unit's header is cut off")
    try:
        header = decode_cbor(bytes(blob[start : start + length]), HEADER_BYTES_MAX)
    except FileFormatError as error:
        raise ApprovedFileError(f"the unit's header: {error}") from error
    if not isinstance(header, dict):
        raise ApprovedFileError("the unit's header is not a map")
    unit = _unit(header, _read_columns(blob, start + length, header))
    check_unit(unit)
    return unit


def _padded(data: bytes) -> Iterator[bytes]:
    yield data
    yield bytes(-len(data) % ALIGNMENT)


def _header(unit: Unit, columns: Mapping[str, Array]) -> dict[str, object]:
    return {
        "name": unit.name,
        "link_address": unit.link_address,
        "length": unit.length,
        "segments": [[s.kind.value, s.offset, s.length] for s in unit.segments],
        "sections": [[s.name, s.offset, s.length] for s in unit.sections],
        "tables": [[t.kind.value, t.offset, t.length, t.entry] for t in unit.tables],
        "slots": [[s.kind.value, s.name, s.relative] for s in unit.slots],
        "sizes": list(unit.sizes),
        "init_function": unit.init_function,
        "counts": [len(columns[name]) for name in COLUMNS],
    }


def _columns_of(unit: Unit) -> dict[str, Array]:
    return {
        "image": unit.image,
        "relocations32": unit.relocations32,
        "relocations64": unit.relocations64,
        "symbol_offsets": unit.symbols.offsets,
        "symbol_kinds": unit.symbols.kinds,
        "symbol_starts": unit.symbols.starts,
        "symbol_names": unit.symbols.names,
        **{name: getattr(unit.sites, name) for name in SITE_CLASSES},
    }


def _export_columns(unit: Unit) -> dict[str, Array]:
    names = b"".join(name.encode("ascii") + b"\0" for name, _, _ in unit.exports)
    return {
        "exports": np.array([row[1:] for row in unit.exports], dtype=_EXPORT),
        "export_names": np.frombuffer(names, dtype=np.uint8),
    }


def _read_columns(blob: memoryview, at: int, header: Mapping[str, object]) -> dict[str, Array]:
    """The arrays behind a header that ends at `at`, as views; the blob has nothing else."""
    counts = typed(header, "counts", list)
    if len(counts) != len(COLUMNS) or not all(type(count) is int for count in counts):
        raise ApprovedFileError("field 'counts' is not one number for each array")
    columns: dict[str, Array] = {}
    at = _skip_padding(blob, at)
    for (name, dtype), count in zip(COLUMNS.items(), counts, strict=True):
        if not 0 <= count <= (len(blob) - at) // dtype.itemsize:
            raise ApprovedFileError(f"array {name} is cut off")
        columns[name] = np.frombuffer(blob, dtype=dtype, count=count, offset=at)
        at = _skip_padding(blob, at + count * dtype.itemsize)
    if at != len(blob):
        raise ApprovedFileError(f"{len(blob) - at} bytes too many behind the unit's arrays")
    return columns


def _skip_padding(blob: memoryview, at: int) -> int:
    """The next multiple of ALIGNMENT; the bytes up to there are zero."""
    end = at + -at % ALIGNMENT
    if blob[at:end] != bytes(end - at):
        raise ApprovedFileError(f"the padding at byte {at} of the unit is cut off or not zero")
    return end


def _unit(header: Mapping[str, object], columns: Mapping[str, Array]) -> Unit:
    # `init_function` is there, and a number or null.
    init_function = None
    if header.get("init_function", 0) is not None:
        init_function = typed(header, "init_function", int)
    return Unit(
        name=text(header, "name"),
        link_address=typed(header, "link_address", int),
        image=columns["image"],
        length=typed(header, "length", int),
        segments=tuple(
            Segment(row.choice(SegmentKind), row.whole(), row.whole())
            for row in rows(header, "segments", 3, SEGMENTS_MAX)
        ),
        sections=tuple(
            Section(row.text(), row.whole(), row.whole())
            for row in rows(header, "sections", 3, SECTIONS_MAX)
        ),
        tables=tuple(
            Table(row.choice(TableKind), row.whole(), row.whole(), row.whole())
            for row in rows(header, "tables", 4, TABLES_MAX)
        ),
        slots=tuple(
            Slot(row.choice(SlotKind), row.text(empty=True), row.flag())
            for row in rows(header, "slots", 3, SLOTS_MAX)
        ),
        relocations32=columns["relocations32"],
        relocations64=columns["relocations64"],
        symbols=Symbols(
            offsets=columns["symbol_offsets"],
            kinds=columns["symbol_kinds"],
            starts=columns["symbol_starts"],
            names=columns["symbol_names"],
        ),
        exports=_exports(columns["exports"], columns["export_names"]),
        sites=Sites(**{name: columns[name] for name in SITE_CLASSES}),
        sizes=_sizes(typed(header, "sizes", list)),
        init_function=init_function,
    )


def _sizes(values: list[object]) -> tuple[int, ...]:
    sizes = [value for value in values if type(value) is int and 0 <= value < 1 << 32]
    if len(sizes) != len(values) or len(sizes) > SIZES_MAX:
        raise ApprovedFileError(f"field 'sizes' is not at most {SIZES_MAX} sizes")
    return tuple(sizes)


def _exports(column: Array, names: Array) -> tuple[tuple[str, int, int], ...]:
    try:
        words = names.tobytes().decode("ascii").split("\0")
    except UnicodeDecodeError as error:
        raise ApprovedFileError("the name of an export is not ASCII") from error
    # Each name has a NUL behind it, so nothing follows the last.
    if words.pop() or len(words) != len(column):
        raise ApprovedFileError(f"{len(column)} exports have {len(words)} names")
    return tuple(zip(words, column["slot"].tolist(), column["addend"].tolist(), strict=True))
