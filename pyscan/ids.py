"""Identifiers: ULIDs as text, so that ids sort by the time they were made.

https://github.com/ulid/spec: 48 bits of milliseconds, 80 random bits, 26 characters of
Crockford's base 32 in capitals. Ids of the same millisecond are in no order.
"""

from __future__ import annotations

import re

from ulid import ULID

#: The whole text of an id. The first character holds three bits, hence 0 to 7.
ID_PATTERN = r"[0-7][0-9A-HJKMNP-TV-Z]{25}"

_ID = re.compile(ID_PATTERN)


def new_id() -> str:
    """A fresh id: 26 characters."""
    return str(ULID())


def is_id(text: str) -> bool:
    """Whether `text` is an id in its one canonical spelling."""
    return _ID.fullmatch(text) is not None
