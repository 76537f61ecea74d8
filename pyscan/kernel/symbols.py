"""The kernel's own symbol table, kallsyms, out of its read-only data.

scripts/kallsyms.c writes these tables, each aligned to 8 bytes:

* token table: 256 strings; token index: where each begins, 16 bits;
* names: a length (one byte, or two when bit 7 is set, since 6.1), then as many tokens; the
  first letter of a name is its type, as in nm(1);
* markers: where every 256th name begins, 32 bits; number of symbols, 32 bits;
* offsets, 32 bits: of symbols relative to a base, which is 64 bits.

Nothing points to them, and their order differs: up to 6.3 offsets, base, number, names,
markers, tokens; since 6.4 number, names, markers, tokens, offsets, base. So they are found by
what they must look like, starting with the token index, and each must agree with the rest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.errors import PackageError

#: Kernels of distributions have 80,000 to 300,000 symbols.
SYMBOLS_MAX: Final = 1 << 20
_SYMBOLS_MIN: Final = 256

#: KSYM_NAME_LEN of include/linux/kallsyms.h, and the letter of the type before the name.
_NAME_BYTES_MAX: Final = 512 + 1
_NAMES_BYTES_MAX: Final = 64 << 20  # of all names together

_TOKENS: Final = 256
_INDEX_BYTES: Final = 2 * _TOKENS
_TABLE_BYTES_MAX: Final = 1 << 16  # what 16 bits can index
_MARKER_STEP: Final = 256
_ALIGN: Final = 8

#: Digits stand for themselves in every kernel: no pair of characters is given their codes.
_DIGITS: Final = b"".join(b"%d\0" % digit for digit in range(10))
_ZERO: Final = ord("0")

#: Places that are looked at, and names that are read in all, before the data are given up.
_CANDIDATES_MAX: Final = 64
_NAMES_READ_MAX: Final = 8 * SYMBOLS_MAX


@dataclass(frozen=True, slots=True, eq=False)
class KernelSymbols:
    """All symbols of vmlinux, by link address.

    `addresses` (n,) uint64 ascending (of per-CPU symbols: offsets into the per-CPU area, so
    they come first), `kinds` (n,) uint8: the letter of the type in ASCII ("T", "t", "d", ...).
    """

    addresses: NDArray[np.uint64]
    kinds: NDArray[np.uint8]
    names: list[str]
    _first: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        first: dict[str, int] = {}
        global_names: dict[str, int] = {}
        letters = self.kinds.tobytes().decode("latin-1")
        rows = zip(self.names, self.addresses.tolist(), letters, strict=True)
        for name, address, letter in rows:
            (global_names if letter.isupper() else first).setdefault(name, address)
        object.__setattr__(self, "_first", first | global_names)

    def __len__(self) -> int:
        return len(self.names)

    def find(self, name: str) -> int | None:
        """Address of the symbol. Static symbols may share a name: then it is that of the
        global one, or else the lowest.
        """
        return self._first.get(name)

    def at(self, address: int) -> str:
        """What lies at an address, as "name" or "name+0x10"; hexadecimal below all symbols.

        Of several names for one address it is the first.
        """
        index = bisect_right(self.addresses, address) - 1
        if index < 0:
            return f"{address:#x}"
        base = int(self.addresses[index])
        name = self.names[int(np.searchsorted(self.addresses, self.addresses[index]))]
        return name if address == base else f"{name}+{address - base:#x}"


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The token table: where it begins, what it holds, where the index behind it ends."""

    start: int
    strings: list[bytes]
    end: int


@dataclass(frozen=True, slots=True)
class _Tables:
    """Where the other tables begin."""

    count: int
    names: int
    offsets: int


def parse_kallsyms(rodata: bytes | memoryview, address: int, link_base: int) -> KernelSymbols:
    """The symbol table in `rodata`, the content of vmlinux's .rodata.

    `address` is where that is linked to, `link_base` where the kernel is (_text, the base of
    the offsets). Raises PackageError: there is none that is whole.
    """
    if address % _ALIGN:
        raise PackageError(f"vmlinux: read-only data at {address:#x} are not aligned")
    data = bytes(rodata)
    left = _NAMES_READ_MAX
    for tokens in _find_tokens(data):
        for tables in _find_tables(data, tokens, link_base):
            left -= tables.count
            if left < 0:
                break
            addresses = _read_addresses(data, tables, link_base)
            names = _read_names(data, tokens, tables)
            if names is not None and not np.any(addresses[1:] < addresses[:-1]):
                return _make_symbols(addresses, names)
    raise PackageError(
        "vmlinux: no symbol table in its read-only data; only kernels with "
        "CONFIG_KALLSYMS_ALL whose format is known are supported"
    )


def _make_symbols(addresses: NDArray[np.uint64], names: list[bytes]) -> KernelSymbols:
    return KernelSymbols(
        addresses=addresses,
        kinds=np.frombuffer(b"".join(name[:1] for name in names), dtype=np.uint8),
        names=[name[1:].decode("ascii") for name in names],
    )


def _read_addresses(data: bytes, tables: _Tables, link_base: int) -> NDArray[np.uint64]:
    """Addresses of the offsets (kallsyms_sym_address, kernel/kallsyms.c); they ascend.

    With CONFIG_KALLSYMS_ABSOLUTE_PERCPU those from the base on are negative, -1 for the base
    itself, which always has a name; the others are absolute. Without, all are relative.
    """
    base = np.uint64(link_base)
    stored = np.frombuffer(data, dtype="<i4", count=tables.count, offset=tables.offsets)
    offsets = stored.astype(np.int64)
    if not np.any(offsets < 0):
        return offsets.astype(np.uint64) + base
    # ~offset is -1 - offset.
    return np.where(offsets < 0, (~offsets).astype(np.uint64) + base, offsets.astype(np.uint64))


def _find_tokens(data: bytes) -> Iterator[_Tokens]:
    """Token tables: places with ten digits in a row, and an index behind that fits them."""
    position = -1
    for _ in range(_CANDIDATES_MAX):
        position = data.find(_DIGITS, position + 1)
        if position < 0:
            return
        for index in _find_indexes(data, position):
            tokens = _check_tokens(data, position, index)
            if tokens is not None:
                yield tokens


def _find_indexes(data: bytes, digits: int) -> list[int]:
    """Aligned places behind `digits` with 0 first and the right steps between the digits."""
    start = _align(digits + len(_DIGITS))
    end = min(len(data), digits + _TABLE_BYTES_MAX + _INDEX_BYTES)
    words = np.frombuffer(data[start : end - (end - start) % 2], dtype="<u2").astype(np.int32)
    if len(words) < _TOKENS:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(words, _TOKENS)[:: _ALIGN // 2]
    steps = np.diff(windows[:, _ZERO : _ZERO + 10], axis=1)
    found = np.flatnonzero((windows[:, 0] == 0) & (steps == 2).all(axis=1))
    return [start + place * _ALIGN for place in found[:_CANDIDATES_MAX].tolist()]


def _check_tokens(data: bytes, digits: int, index: int) -> _Tokens | None:
    """The table that has its digits and its index there, if there is one."""
    begins = np.frombuffer(data, dtype="<u2", count=_TOKENS, offset=index).astype(np.int64)
    start = digits - int(begins[_ZERO])
    last = start + int(begins[-1])
    if start < 0 or start % _ALIGN or np.any(np.diff(begins) <= 0) or last >= index:
        return None
    end = data.find(b"\0", last, index) + 1
    if not end or _align(end) != index:
        return None
    table = data[start:end]
    strings = table[:-1].split(b"\0")  # 256 strings, when each begins where the index says
    lengths = np.fromiter(map(len, strings), dtype=np.int64, count=len(strings))
    if len(strings) != _TOKENS or np.any(np.cumsum(lengths[:-1] + 1) != begins[1:]):
        return None
    if not table.isascii() or lengths.max() > _NAME_BYTES_MAX:
        return None
    return _Tokens(start, strings, index + _INDEX_BYTES)


def _find_tables(data: bytes, tokens: _Tokens, link_base: int) -> Iterator[_Tables]:
    """Where the other tables may be, by the base and the number of symbols."""
    words = np.frombuffer(data[: len(data) & -_ALIGN], dtype="<u8")
    bases = np.flatnonzero(words == np.uint64(link_base))[:_CANDIDATES_MAX] * _ALIGN
    for base in bases.tolist():
        if base < tokens.start:
            yield from _tables_before(words, base)
        elif base >= tokens.end:
            yield from _tables_around(words, base, tokens)


def _tables_before(words: NDArray[np.uint64], base: int) -> Iterator[_Tables]:
    """Offsets, base, number, names, markers, tokens."""
    if base // _ALIGN + 1 < len(words):
        count = int(words[base // _ALIGN + 1])
        offsets = base - _align(4 * count)
        if _SYMBOLS_MIN <= count <= SYMBOLS_MAX and offsets >= 0:
            yield _Tables(count, base + 2 * _ALIGN, offsets)


def _tables_around(words: NDArray[np.uint64], base: int, tokens: _Tokens) -> Iterator[_Tables]:
    """Number, names, markers, tokens, offsets, base."""
    offsets = _align(tokens.end)
    most = (base - offsets) // 4
    for count in (most, most - 1):  # the table is filled up to 8 bytes
        if not _SYMBOLS_MIN <= count <= SYMBOLS_MAX or _align(offsets + 4 * count) != base:
            continue
        places = np.flatnonzero(words[: tokens.start // _ALIGN] == np.uint64(count))
        for place in places[-_CANDIDATES_MAX:].tolist():
            yield _Tables(count, (place + 1) * _ALIGN, offsets)


def _read_names(data: bytes, tokens: _Tokens, tables: _Tables) -> list[bytes] | None:
    """All names with their type's letter before; None when they do not fit the markers."""
    limit = tokens.start
    names: list[bytes] = []
    begins: list[int] = []
    position, total = tables.names, 0
    expand = tokens.strings.__getitem__
    for _ in range(tables.count):
        begins.append(position)
        length, start = _name_length(data, position)
        position = start + length
        if not 0 < length <= _NAME_BYTES_MAX or position > limit:
            return None
        name = b"".join(map(expand, data[start:position]))
        total += len(name)
        if not 1 < len(name) <= _NAME_BYTES_MAX or total > _NAMES_BYTES_MAX:
            return None
        names.append(name)
    return names if _markers_fit(data, position, tokens, begins) else None


def _name_length(data: bytes, position: int) -> tuple[int, int]:
    """Number of tokens of the name at `position`, and where they begin."""
    head = data[position : position + 2]
    if len(head) < 2:
        return 0, position
    if head[0] & 0x80:
        return (head[0] & 0x7F) | head[1] << 7, position + 2
    return head[0], position + 1


def _markers_fit(data: bytes, position: int, tokens: _Tokens, begins: list[int]) -> bool:
    """Whether markers behind `position` say where every 256th name begins.

    Up to the tokens nothing follows but, in 6.2 and 6.3, three bytes for each name
    (kallsyms_seqs_of_names).
    """
    start = _align(position)
    marked = np.array(begins[::_MARKER_STEP]) - begins[0]
    end = start + 4 * len(marked)
    if tokens.start - _align(end) not in (0, _align(3 * len(begins))):
        return False
    markers = np.frombuffer(data[start:end], dtype="<u4")
    return not any(data[position:start]) and bool(np.array_equal(markers, marked))


def _align(value: int) -> int:
    return (value + _ALIGN - 1) & -_ALIGN
