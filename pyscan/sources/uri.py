"""Source URIs: ``scheme:path?key=value&key=value``.

Path and values are percent-encoded where needed (RFC 3986, section 2.1): a space, `%`,
`?`, `&` and `#` in a file name. `+` stands for itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes

from pyscan.errors import UsageError

#: Longest URI taken; PATH_MAX of Linux is 4096, three characters each when encoded.
URI_CHARACTERS_MAX = 16384

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.ASCII)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SIZE = re.compile(r"([0-9]{1,20}|0x[0-9A-Fa-f]{1,16})([KMGT]?)", re.ASCII)
_UNIT_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True, slots=True)
class SourceUri:
    """A parsed URI; path and values are decoded."""

    text: str
    scheme: str
    path: str
    parameters: Mapping[str, str]

    def require(self, *names: str) -> None:
        """Raise UsageError naming every parameter of `names` that is missing."""
        missing = [name for name in names if name not in self.parameters]
        if missing:
            wanted = " and ".join(f"{name}=..." for name in missing)
            raise UsageError(f"{self.text}: {wanted} is missing; add it after '?' or '&'")

    def allow(self, *names: str) -> None:
        """Raise UsageError for a parameter that is none of `names`."""
        for name in self.parameters:
            if name not in names:
                known = ", ".join(names) or "no parameters"
                raise UsageError(f"{self.text}: unknown parameter {name!r}; it takes {known}")


def parse_uri(text: str) -> SourceUri:
    """Split and decode a URI. Raises UsageError that says what to write instead."""
    if len(text) > URI_CHARACTERS_MAX:
        raise UsageError(f"source URI of {len(text)} characters; at most {URI_CHARACTERS_MAX}")
    scheme = _SCHEME.match(text)
    if not scheme:
        raise UsageError(
            f"{text!r} is not a source; write scheme:path, for example "
            "file:/path/ram.img?machine=q35&size=512M ('pyscan sources' lists them)"
        )
    path, _, query = text[scheme.end() :].partition("?")
    if not path:
        raise UsageError(f"{text}: no path after {scheme.group()}")
    parameters: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{text}: {part!r} is not key=value")
        if name in parameters:
            raise UsageError(f"{text}: parameter {name!r} is given twice; keep one")
        parameters[name] = _decode(text, value)
    return SourceUri(text, scheme.group(1), _decode(text, path), parameters)


def build_uri(scheme: str, path: str | os.PathLike[str], **parameters: str) -> str:
    """The URI of a path and parameters; the inverse of `parse_uri`."""
    query = "&".join(f"{name}={quote(value, safe='/')}" for name, value in parameters.items())
    encoded = quote(os.fsencode(path), safe="/")
    return f"{scheme}:{encoded}?{query}" if query else f"{scheme}:{encoded}"


def parse_size(text: str) -> int:
    """Bytes of a size such as 536870912, 0x20000000, 512M or 6G (powers of 1024).

    Raises UsageError.
    """
    match = _SIZE.fullmatch(text)
    if not match:
        raise UsageError(f"size {text!r} is not a number of bytes; write for example 512M or 6G")
    return int(match[1], 0 if match[1].startswith("0x") else 10) << _UNIT_SHIFT[match[2]]


def _decode(uri: str, text: str) -> str:
    if _BAD_ESCAPE.search(text):
        raise UsageError(f"{uri}: '%' must be written as %25")
    raw = unquote_to_bytes(text)
    if b"\0" in raw:
        raise UsageError(f"{uri}: a NUL byte is not allowed")
    return os.fsdecode(raw)
