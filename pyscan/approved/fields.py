"""Typed access to decoded CBOR: what a signed document may hold, and nothing else.

Every function raises ApprovedFileError, which names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, TypeVar

from pyscan.errors import ApprovedFileError

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)

#: Longer than any release, banner, section or symbol name.
TEXT_MAX: Final = 1023


def typed(payload: Mapping[str, object], key: str, kind: type[T]) -> T:
    """The value of a field; an integer is an unsigned 64-bit number."""
    value = payload.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ApprovedFileError(f"field {key!r} is missing or not a {kind.__name__}")
    if isinstance(value, int) and not 0 <= value < 1 << 64:
        raise ApprovedFileError(f"field {key!r} is not an unsigned 64-bit number")
    return value


def text(payload: Mapping[str, object], key: str) -> str:
    """A field of printable text, not empty."""
    return check_text(key, typed(payload, key, str))


def rows(payload: Mapping[str, object], key: str, width: int, count_max: int) -> list[Row]:
    """A field that is an array of arrays of `width` items each."""
    found = typed(payload, key, list)
    if len(found) > count_max:
        raise ApprovedFileError(f"field {key!r}: {len(found)} rows; at most {count_max} may be")
    for row in found:
        if not isinstance(row, list) or len(row) != width:
            raise ApprovedFileError(f"field {key!r} has a row that is not {width} values")
    return [Row(key, row) for row in found]


class Row:
    """Reads the items of one row from the first to the last."""

    __slots__ = ("_items", "_key")

    def __init__(self, key: str, items: list[object]) -> None:
        self._key = key
        self._items = iter(items)

    def whole(self, limit: int = 1 << 32) -> int:
        """An integer from 0 to below `limit`."""
        value = next(self._items)
        if type(value) is not int or not 0 <= value < limit:
            raise ApprovedFileError(f"field {self._key!r} has a number that is none, or too large")
        return value

    def flag(self) -> bool:
        """False or true."""
        value = next(self._items)
        if not isinstance(value, bool):
            raise ApprovedFileError(f"field {self._key!r} has a flag that is none")
        return value

    def text(self, *, empty: bool = False) -> str:
        """Printable text."""
        value = next(self._items)
        if not isinstance(value, str):
            raise ApprovedFileError(f"field {self._key!r} has a text that is none")
        return check_text(self._key, value, empty=empty)

    def data(self, length_min: int, length_max: int) -> bytes:
        """A byte string of a bounded length."""
        value = next(self._items)
        if not isinstance(value, bytes) or not length_min <= len(value) <= length_max:
            raise ApprovedFileError(
                f"field {self._key!r} has bytes that are none, too few or too many"
            )
        return value

    def choice(self, kinds: type[E]) -> E:
        """One of the words of an enumeration."""
        value = next(self._items)
        for kind in kinds:
            if value == kind.value:
                return kind
        raise ApprovedFileError(f"field {self._key!r} has a kind that this pyscan does not know")


def check_text(key: str, value: str, *, empty: bool = False) -> str:
    """The same text, when it is printable and not too long."""
    # What is printed on a terminal later must not command it.
    if len(value) > TEXT_MAX or not value.isprintable() or not (value or empty):
        raise ApprovedFileError(f"field {key!r} has a text that is empty, long or not printable")
    return value
