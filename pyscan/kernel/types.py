"""Layouts of the kernel's types, out of its BTF data (Documentation/bpf/btf.rst).

    types = Types(btf)
    types.offset("task_struct.mm")            # bytes from the start of the struct
    types.offset("module.core_layout.base")   # through members that are structs
    types.offset("module.mem[1].base")        # and arrays; without index: the first element
    types.size("module")

Anonymous structs and unions are looked through, as C does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import IntEnum
from struct import Struct
from typing import Final

from pyscan.errors import PackageError

_MAGIC: Final = 0xEB9F
_VERSION: Final = 1
_HEADER: Final = Struct("<HBBIIIII")
_TYPE: Final = Struct("<III")  # btf_type: name, info, size or type
_MEMBER: Final = Struct("<III")  # btf_member: name, type, offset
_ARRAY: Final = Struct("<III")  # btf_array: type, index type, number of elements
_ENUM: Final = Struct("<Ii")  # btf_enum: name, value
_ENUM64: Final = Struct("<III")  # btf_enum64: name, value, upper half of value

_POINTER_BYTES: Final = 8
_TYPES_MAX: Final = 1 << 20  # BTF_MAX_TYPE, include/uapi/linux/btf.h
_NAME_BYTES_MAX: Final = 1024

_BTF_BYTES_MAX: Final = 64 << 20  # kernels of distributions have 4 to 8 MiB

#: Typedefs, qualifiers or arrays in a row.
_CHAIN_MAX: Final = 32

#: Names in a path, types of one name (real kernels: 3), and members looked at for one name
#: of a path (of the largest struct of a real kernel: 270).
_PATH_MAX: Final = 8
_SAME_NAME_MAX: Final = 8
_MEMBERS_MAX: Final = 1 << 16

#: An absurd array's size stops here: no address is greater.
_SIZE_MAX: Final = 1 << 48

_STEP: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:\[([0-9]{1,9})\])?", re.ASCII)


class Kind(IntEnum):
    """BTF_KIND_*, include/uapi/linux/btf.h."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


#: Bytes behind a type's header: once, and for each of its members.
_EXTRA: Final = {
    Kind.INT: (4, 0),
    Kind.PTR: (0, 0),
    Kind.ARRAY: (12, 0),
    Kind.STRUCT: (0, 12),
    Kind.UNION: (0, 12),
    Kind.ENUM: (0, 8),
    Kind.FWD: (0, 0),
    Kind.TYPEDEF: (0, 0),
    Kind.VOLATILE: (0, 0),
    Kind.CONST: (0, 0),
    Kind.RESTRICT: (0, 0),
    Kind.FUNC: (0, 0),
    Kind.FUNC_PROTO: (0, 8),
    Kind.VAR: (4, 0),
    Kind.DATASEC: (0, 12),
    Kind.FLOAT: (0, 0),
    Kind.DECL_TAG: (4, 0),
    Kind.TYPE_TAG: (0, 0),
    Kind.ENUM64: (0, 12),
}

_COMPOSITE: Final = frozenset({Kind.STRUCT, Kind.UNION})
_ALIASES: Final = frozenset({Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG})
_ENUMS: Final = frozenset({Kind.ENUM, Kind.ENUM64})
_SIZED: Final = _COMPOSITE | _ENUMS | {Kind.INT, Kind.FLOAT}
_NAMED: Final = _SIZED | {Kind.TYPEDEF}

#: C has two spaces of names: a struct is found before a typedef of the same name.
_TAGGED: Final = _COMPOSITE | _ENUMS


class Types:
    """All types of one kernel. A path that cannot be followed raises PackageError."""

    def __init__(self, btf: bytes | memoryview) -> None:
        """Index the content of section .BTF. Raises PackageError: damaged or foreign."""
        data = bytes(btf)
        if not _HEADER.size <= len(data) <= _BTF_BYTES_MAX:
            raise _bad(f"it has {len(data)} bytes")
        magic, version, _, header, type_start, type_size, name_start, name_size = (
            _HEADER.unpack_from(data)
        )
        if magic != _MAGIC or version != _VERSION or header < _HEADER.size:
            raise _bad("it does not begin like BTF of version 1, little-endian")
        if header + name_start + name_size > len(data) or type_start + type_size > name_start:
            raise _bad("its parts lie outside of it or overlap")
        self._data = data[header + type_start : header + type_start + type_size]
        self._names = data[header + name_start : header + name_start + name_size]
        if self._names[:1] != b"\0" or self._names[-1:] != b"\0":
            raise _bad("its names have no end")
        self._starts = [-1]  # of each type's header, by number; 0 is void
        self._tagged: dict[str, list[int]] = {}
        self._plain: dict[str, list[int]] = {}
        self._index()

    def __len__(self) -> int:
        return len(self._starts)

    def offset(self, path: str) -> int:
        """Offset in bytes of a member: "struct.member", "struct.member.member", ...

        Raises PackageError: no such type or member, a way through a pointer, a bit field, or
        types of that name that disagree.
        """
        return self._agreed(path, lambda number, steps: self._follow(number, steps)[1])

    def size(self, path: str) -> int:
        """Size in bytes of a type or, of a path, of a member. Raises PackageError."""
        return self._agreed(path, lambda number, steps: self._size(self._follow(number, steps)[0]))

    def has(self, path: str) -> bool:
        """Whether the type or member is there, and at one place."""
        try:
            self.offset(path)
        except PackageError:
            return False
        return True

    def enum(self, name: str) -> dict[str, int]:
        """Names and values of an enumeration. Raises PackageError."""
        for number in self._tagged.get(name, ()):
            kind, count, flag, _ = self._read(number)
            if kind in _ENUMS:
                return dict(self._enumerators(number, kind, count, signed=flag))
        raise PackageError(f"the kernel's types: no enum {name}; the kernel is of another series")

    def _index(self) -> None:
        """Find all headers and the names of types."""
        data, position = self._data, 0
        while position < len(data):
            if position + _TYPE.size > len(data) or len(self._starts) >= _TYPES_MAX:
                raise _bad("a type lies outside of it")
            name, info, _ = _TYPE.unpack_from(data, position)
            kind = info >> 24 & 0x1F
            if kind not in _EXTRA:
                raise _bad(f"kind {kind} of types is not known")
            if name and kind in _NAMED:
                space = self._tagged if kind in _TAGGED else self._plain
                space.setdefault(self._name(name), []).append(len(self._starts))
            self._starts.append(position)
            once, each = _EXTRA[Kind(kind)]
            position += _TYPE.size + once + each * (info & 0xFFFF)
        if position != len(data):
            raise _bad("a type lies outside of it")

    def _name(self, start: int) -> str:
        end = self._names.find(b"\0", start, start + _NAME_BYTES_MAX + 1)
        name = self._names[start:end]
        if start >= len(self._names) or end < 0 or not name.isascii():
            raise _bad("a name lies outside of it or is too long")
        return name.decode("ascii")

    def _read(self, number: int) -> tuple[Kind, int, bool, int]:
        """Kind, number of members, kind_flag, and size or type of a type."""
        if not 0 < number < len(self._starts):
            if number == 0:
                return Kind.VOID, 0, False, 0
            raise _bad(f"there is no type {number}")
        _, info, size = _TYPE.unpack_from(self._data, self._starts[number])
        return Kind(info >> 24 & 0x1F), info & 0xFFFF, bool(info >> 31), size

    def _body(self, number: int) -> int:
        """Where the part behind a type's header begins."""
        return self._starts[number] + _TYPE.size

    def _resolve(self, number: int) -> int:
        """The type behind typedefs and qualifiers."""
        for _ in range(_CHAIN_MAX):
            kind, _, _, target = self._read(number)
            if kind not in _ALIASES:
                return number
            number = target
        raise _bad("a chain of typedefs without end")

    def _agreed(self, path: str, ask: Callable[[int, list[tuple[str, int]]], int]) -> int:
        """The answer that all types of the path's name give; those that have none are silent.

        Several source files of a kernel may define different structs of one name.
        """
        first, *steps = _parse(path)
        name, index = first
        numbers = self._tagged.get(name) or self._plain.get(name)
        if not numbers or index:
            raise PackageError(
                f"the kernel's types: no type {name}; the kernel is of another series"
            )
        answers: set[int] = set()
        failure: PackageError | None = None
        if len(numbers) > _SAME_NAME_MAX:
            raise PackageError(f"the kernel's types: {name} means too many things")
        for number in numbers:
            try:
                answers.add(ask(number, steps))
            except PackageError as error:
                failure = failure or error
        if len(answers) > 1:
            raise PackageError(f"the kernel's types: {path} means several things")
        if not answers:
            raise PackageError(f"the kernel's types: {path}: {failure}") from failure
        return answers.pop()

    def _follow(self, number: int, steps: list[tuple[str, int]]) -> tuple[int, int]:
        """Type and offset of what `steps` lead to from a type."""
        offset = 0
        for name, index in steps:
            number, distance = self._member(self._element(number), name)
            offset += distance
            if index:
                number, distance = self._index_array(number, index)
                offset += distance
        return number, offset

    def _element(self, number: int) -> int:
        """The struct or union that a type is, or is an array of."""
        for _ in range(_CHAIN_MAX):
            number = self._resolve(number)
            kind = self._read(number)[0]
            if kind in _COMPOSITE:
                return number
            if kind != Kind.ARRAY:
                raise PackageError(f"a {kind.name.lower()} has no members")
            number = _ARRAY.unpack_from(self._data, self._body(number))[0]
        raise _bad("an array without end")

    def _index_array(self, number: int, index: int) -> tuple[int, int]:
        """Type and offset of an array's element."""
        number = self._resolve(number)
        if self._read(number)[0] != Kind.ARRAY:
            raise PackageError("only arrays have an index")
        element, _, count = _ARRAY.unpack_from(self._data, self._body(number))
        if index >= count:
            raise PackageError(f"the array has {count} elements")
        return element, index * self._size(element)

    def _member(self, number: int, name: str) -> tuple[int, int]:
        """Type and offset of a member, also of anonymous members; each type is seen once."""
        wanted = name.encode("ascii") + b"\0"
        seen = {number}
        todo = [(number, 0)]
        left = _MEMBERS_MAX
        while todo:
            number, base = todo.pop()
            left -= self._read(number)[1]
            if left < 0:
                raise _bad("a struct with too many members")
            for start, kind, bit, width in self._members(number):
                if start and self._names.startswith(wanted, start):
                    if bit % 8 or width:
                        raise PackageError(f"{name} is a bit field")
                    return kind, base + bit // 8
                if not start and (inner := self._anonymous(kind)) and inner not in seen:
                    seen.add(inner)
                    todo.append((inner, base + bit // 8))
        raise PackageError(f"there is no member {name}; the kernel is of another series")

    def _anonymous(self, number: int) -> int:
        """The struct or union that an unnamed member is of; 0 when it is padding."""
        number = self._resolve(number)
        return number if self._read(number)[0] in _COMPOSITE else 0

    def _members(self, number: int) -> Iterator[tuple[int, int, int, int]]:
        """Name, type, offset in bits, and width in bits if it is a bit field."""
        _, count, packed, _ = self._read(number)
        start = self._body(number)
        rows = _MEMBER.iter_unpack(self._data[start : start + count * _MEMBER.size])
        for name, kind, place in rows:
            if packed:  # kind_flag
                yield name, kind, place & 0xFFFFFF, place >> 24
            else:
                yield name, kind, place, 0

    def _size(self, number: int) -> int:
        """Size of a type in bytes."""
        factor = 1
        for _ in range(_CHAIN_MAX):
            number = self._resolve(number)
            kind, _, _, size = self._read(number)
            if kind in _SIZED:
                return factor * size
            if kind == Kind.PTR:
                return factor * _POINTER_BYTES
            if kind != Kind.ARRAY:
                raise PackageError(f"a {kind.name.lower()} has no size")
            number, _, count = _ARRAY.unpack_from(self._data, self._body(number))
            factor = min(factor * count, _SIZE_MAX)
        raise _bad("an array without end")

    def _enumerators(
        self, number: int, kind: Kind, count: int, *, signed: bool
    ) -> Iterator[tuple[str, int]]:
        start = self._body(number)
        if kind == Kind.ENUM:
            form, bits = _ENUM, 32
        else:
            form, bits = _ENUM64, 64
        for name, value, *upper in form.iter_unpack(self._data[start : start + count * form.size]):
            whole = (value | upper[0] << 32 if upper else value) % (1 << bits)
            yield self._name(name), whole - (whole >> bits - 1 << bits if signed else 0)


def _parse(path: str) -> list[tuple[str, int]]:
    """Names of a path with their indices."""
    parts = path.split(".", _PATH_MAX)
    steps = [_STEP.fullmatch(part) for part in parts]
    if len(parts) > _PATH_MAX or None in steps:
        raise PackageError(f"the kernel's types: {path!r} is no path of names")
    return [(step[1], int(step[2] or 0)) for step in steps if step]


def _bad(why: str) -> PackageError:
    return PackageError(f"the kernel's types (.BTF) are damaged: {why}; get the package again")
