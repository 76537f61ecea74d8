"""Signed payloads: the types of their fields, how they are sealed and how they are opened.

Implements sections 2 and 4 of docs/spec/wire.md and its clauses [5.1] to [5.5].
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar

import msgspec

from pyscan.cose import decode_cbor, encode_cbor, sign1, verify1
from pyscan.errors import FileFormatError, InternalError, Rejected, SignatureInvalid
from pyscan.ids import ID_PATTERN
from pyscan.keys import KeyRing, SigningKey
from pyscan.protocol.topics import (
    ARGUMENTS_MAX,
    LINE_CHARACTERS_MAX,
    NAME_PATTERN,
    PLACE_CHARACTERS_MAX,
    VERSION,
    RejectReason,
)

# Control characters, surrogates, and marks that reorder text on a terminal: free text is
# shown to people.
_UNSHOWABLE = "\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNSHOWABLE_CHARACTER = re.compile(f"[{_UNSHOWABLE}]")
_SHOWABLE_PATTERN = rf"\A[^{_UNSHOWABLE}]*\Z"

Version = Literal[1]
Id = Annotated[str, msgspec.Meta(pattern=rf"\A{ID_PATTERN}\Z")]
OptionalId = Annotated[str, msgspec.Meta(pattern=rf"\A(?:{ID_PATTERN})?\Z")]
Name = Annotated[str, msgspec.Meta(pattern=rf"\A{NAME_PATTERN}\Z")]
OptionalName = Annotated[str, msgspec.Meta(pattern=rf"\A(?:{NAME_PATTERN})?\Z")]
Code = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9_-]{0,64}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Line = Annotated[str, msgspec.Meta(max_length=LINE_CHARACTERS_MAX, pattern=_SHOWABLE_PATTERN)]
Place = Annotated[str, msgspec.Meta(max_length=PLACE_CHARACTERS_MAX, pattern=_SHOWABLE_PATTERN)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Seconds = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]  # the decoder ends at 64 bits
Integer = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
Arguments = Annotated[
    dict[
        Name,
        Annotated[str, msgspec.Meta(max_length=256, pattern=_SHOWABLE_PATTERN)] | Integer | bool,
    ],
    msgspec.Meta(max_length=ARGUMENTS_MAX),
]


class Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A payload map: these keys, all of them, no others. The fields are the limits."""


_W = TypeVar("_W", bound=Wire)


def seal(payload: Wire, key: SigningKey, content_type: str, topic: str, size_max: int) -> bytes:
    """Sign a payload for one topic. Raises InternalError when it breaks a limit."""
    plain = msgspec.to_builtins(payload)
    try:
        msgspec.convert(plain, type(payload))
    except msgspec.ValidationError as error:
        raise InternalError(f"a message for {topic} breaks its own format: {error}") from error
    data = sign1(encode_cbor(plain), key, content_type, topic.encode())
    if len(data) > size_max:
        raise InternalError(f"a message for {topic} of {len(data)} bytes, limit {size_max}")
    return data


def open_message(
    data: bytes, ring: KeyRing, wire: type[_W], *, content_type: str, topic: str, size_max: int
) -> tuple[_W, str]:
    """Verify a message [5.1] to [5.5]; returns the payload and the signer's name."""
    try:
        verified = verify1(data, ring, content_type, topic.encode(), size_max)
        plain = decode_cbor(verified.payload, size_max)
    except SignatureInvalid as error:
        raise Rejected(RejectReason(error.reason), str(error)) from error
    except FileFormatError as error:
        raise Rejected(RejectReason.MALFORMED, str(error)) from error
    version = plain.get("v") if isinstance(plain, dict) else None
    if type(version) is int and version != VERSION:
        raise Rejected(RejectReason.UNSUPPORTED_VERSION, f"version {version}, not {VERSION}")
    try:
        return msgspec.convert(plain, wire), verified.signer
    except msgspec.ValidationError as error:
        raise Rejected(RejectReason.MALFORMED, one_line(str(error), 200)) from error


def one_line(text: str, characters_max: int = LINE_CHARACTERS_MAX) -> str:
    """Free text made fit for a message: one line, showable, cut to length.

    An alarm must not fail to leave because its explanation is too long.
    """
    return _UNSHOWABLE_CHARACTER.sub("?", text)[:characters_max]
