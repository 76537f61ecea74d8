"""COSE_Sign1 with Ed25519 (RFC 9052, RFC 9053 section 2.2), and strict CBOR (RFC 8949).

docs/spec/wire.md section 2 gives the bytes. The profile is narrow on purpose: tag 18,
one protected header with exactly algorithm, content type and key id, an empty
unprotected header. A signature is verified over the received bytes; nothing is encoded
again. `decode_cbor` is the one CBOR decoder for everything that comes from outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import cbor2

from pyscan.errors import FileFormatError, InternalError, SignatureInvalid
from pyscan.keys import KeyRing, SigningKey

ALGORITHM_EDDSA = -8  # IANA COSE Algorithms
_LABEL_ALGORITHM, _LABEL_CONTENT_TYPE, _LABEL_KEY_ID = 1, 3, 4  # IANA COSE Header Parameters
_TAG_SIGN1 = b"\xd2"  # tag 18 in its one-byte form
_SIGNATURE_BYTES = 64
_PROTECTED_BYTES_MAX = 256

#: Containers inside containers; the deepest format of pyscan has four.
DEPTH_MAX = 16


def media_type(kind: str) -> str:
    """The content type of pyscan's signed data of one kind (wire.md section 2)."""
    return f"application/vnd.pyscan.{kind}+cbor"


@dataclass(frozen=True, slots=True)
class Verified:
    """The content of a message whose signature is good."""

    payload: bytes
    signer: str  # the name that the key is pinned to
    key_id: bytes


def sign1(payload: bytes, key: SigningKey, content_type: str, external_aad: bytes) -> bytes:
    """Wrap `payload` in a signed COSE_Sign1 message.

    `external_aad` is signed and not sent: the receiver must supply the same bytes.
    """
    protected = encode_cbor(
        {
            _LABEL_ALGORITHM: ALGORITHM_EDDSA,
            _LABEL_CONTENT_TYPE: content_type,
            _LABEL_KEY_ID: key.key_id,
        }
    )
    signature = key.sign(to_be_signed(protected, external_aad, payload))
    return _TAG_SIGN1 + encode_cbor([protected, {}, payload, signature])


def verify1(
    message: bytes, ring: KeyRing, content_type: str, external_aad: bytes, size_max: int
) -> Verified:
    """Verify a COSE_Sign1 message and return what it carries.

    Checks in the order size, form, key id pinned, algorithm, content type, signature.
    Raises SignatureInvalid, whose `reason` is the code of the first check that failed.
    """
    if len(message) > size_max:
        raise SignatureInvalid(
            "too_large", f"a message of {len(message)} bytes, at most {size_max} are accepted"
        )
    protected, payload, signature = _parts(message)
    algorithm, declared_type, key_id = _headers(protected)
    signer, key = ring.get(key_id)
    if algorithm != ALGORITHM_EDDSA:
        raise SignatureInvalid("wrong_algorithm", f"algorithm {algorithm}, only EdDSA is accepted")
    if declared_type != content_type:
        raise SignatureInvalid("wrong_content_type", f"content of another type than {content_type}")
    key.verify(signature, to_be_signed(protected, external_aad, payload))
    return Verified(payload, signer, key_id)


def to_be_signed(protected: bytes, external_aad: bytes, payload: bytes) -> bytes:
    """The Sig_structure of RFC 9052 section 4.4 for one signer."""
    return encode_cbor(["Signature1", protected, external_aad, payload])


def _parts(message: bytes) -> tuple[bytes, bytes, bytes]:
    """Protected header, payload and signature of a tagged COSE_Sign1 array."""
    if message[:1] != _TAG_SIGN1:
        raise SignatureInvalid("malformed", "not a COSE_Sign1 message (tag 18 is missing)")
    match _decode(message[1:]):
        case [bytes(protected), dict(unprotected), bytes(payload), bytes(signature)]:
            pass
        case _:
            raise SignatureInvalid("malformed", "the four parts of COSE_Sign1 are not as specified")
    if unprotected:
        raise SignatureInvalid("malformed", "the unprotected header is not empty")
    if len(signature) != _SIGNATURE_BYTES:
        raise SignatureInvalid("malformed", f"a signature of {len(signature)} bytes, not 64")
    return protected, payload, signature


def _headers(protected: bytes) -> tuple[int, str, bytes]:
    """Algorithm, content type and key id; no more and no fewer."""
    if len(protected) > _PROTECTED_BYTES_MAX:
        raise SignatureInvalid("malformed", "the protected header is too long")
    headers = _decode(protected)
    labels = {_LABEL_ALGORITHM, _LABEL_CONTENT_TYPE, _LABEL_KEY_ID}
    if not isinstance(headers, dict) or headers.keys() != labels:
        raise SignatureInvalid("malformed", "the protected header has not exactly labels 1, 3, 4")
    algorithm = headers[_LABEL_ALGORITHM]
    content_type = headers[_LABEL_CONTENT_TYPE]
    key_id = headers[_LABEL_KEY_ID]
    # bool is an int to Python, and to CBOR it is not.
    if (
        type(algorithm) is not int
        or not isinstance(content_type, str)
        or not isinstance(key_id, bytes)
    ):
        raise SignatureInvalid("malformed", "a protected header parameter has the wrong type")
    return algorithm, content_type, key_id


def _decode(data: bytes) -> object:
    try:
        return decode_cbor(data, len(data))
    except FileFormatError as error:
        raise SignatureInvalid("malformed", str(error)) from error


def encode_cbor(value: object) -> bytes:
    """Encode None, bool, int of 64 bits, bytes, str, list, tuple and dict deterministically.

    RFC 8949 section 4.2.3: shortest heads, definite lengths, map keys by length and then
    by bytes. What it makes of these types, `decode_cbor` reads. Raises InternalError for a
    value that CBOR has no place for.
    """
    try:
        return cbor2.dumps(value, canonical=True)
    except (cbor2.CBOREncodeError, UnicodeEncodeError) as error:
        raise InternalError(f"a value that cannot be encoded: {error}") from error


def decode_cbor(data: bytes, size_max: int) -> object:
    """Decode exactly one item of deterministic CBOR, from an untrusted hand.

    Gives None, bool, int, bytes, str, list and dict (keys: int or str). Refused, with
    FileFormatError naming the byte: more than `size_max` bytes, bytes behind the item, a
    cut item, more than `DEPTH_MAX` levels, tags, floats, indefinite lengths, heads
    that are not shortest, map keys that repeat or are out of order, text not in UTF-8.
    """
    if len(data) > size_max:
        raise FileFormatError(f"{len(data)} bytes of CBOR, at most {size_max} are accepted")
    value, end = decode_first(data)
    if end != len(data):
        raise FileFormatError(f"CBOR: {len(data) - end} bytes too many behind byte {end}")
    return value


def decode_first(data: bytes) -> tuple[object, int]:
    """As `decode_cbor`, for the item that `data` begins with; also gives where it ends."""
    return _item(data, 0, DEPTH_MAX)


# Major types, RFC 8949 section 3.1; 5, a map, is what is left.
_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _TAG, _SIMPLE = 0, 1, 2, 3, 4, 6, 7
_SIMPLE_VALUES = {20: False, 21: True, 22: None}


def _item(data: bytes, start: int, depth: int) -> tuple[object, int]:
    """Decode the item at `start`; returns it and the offset behind it."""
    major, argument, at = _head(data, start)
    if major in (_UNSIGNED, _NEGATIVE):
        return (argument if major == _UNSIGNED else -1 - argument), at
    if major == _SIMPLE:
        if argument not in _SIMPLE_VALUES or at != start + 1:
            raise FileFormatError(f"CBOR: a float or unknown simple value at byte {start}")
        return _SIMPLE_VALUES[argument], at
    if major == _TAG:
        raise FileFormatError(f"CBOR: a tag at byte {start}; none is accepted")
    # Every byte, and every element of a container, takes at least one byte of what is left.
    if argument > len(data) - at:
        raise FileFormatError(f"CBOR: the item at byte {start} is cut off")
    if major in (_BYTES, _TEXT):
        string = data[at : at + argument]
        return (string if major == _BYTES else _text(string, start)), at + argument
    if depth == 0:
        raise FileFormatError(f"CBOR: more than {DEPTH_MAX} levels at byte {start}")
    return (_array if major == _ARRAY else _map)(data, at, argument, depth - 1)


def _head(data: bytes, at: int) -> tuple[int, int, int]:
    """Major type, argument and the offset behind the head (RFC 8949 section 3)."""
    if at >= len(data):
        raise FileFormatError(f"CBOR: cut off at byte {at}")
    major, information = data[at] >> 5, data[at] & 31
    if information < 24:
        return major, information, at + 1
    if information > 27:
        raise FileFormatError(f"CBOR: indefinite or reserved length at byte {at}")
    width = 1 << (information - 24)
    end = at + 1 + width
    if end > len(data):
        raise FileFormatError(f"CBOR: cut off at byte {at}")
    argument = int.from_bytes(data[at + 1 : end])
    shortest = 24 if width == 1 else 1 << (4 * width)
    # The argument of a simple value or float is no number with a shortest form.
    if argument < shortest and major != _SIMPLE:
        raise FileFormatError(f"CBOR: not the shortest form at byte {at}")
    return major, argument, end


def _text(string: bytes, start: int) -> str:
    try:
        return string.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"CBOR: text that is not UTF-8 at byte {start}") from error


def _array(data: bytes, at: int, count: int, depth: int) -> tuple[object, int]:
    items = []
    for _ in range(count):
        item, at = _item(data, at, depth)
        items.append(item)
    return items, at


def _map(data: bytes, at: int, count: int, depth: int) -> tuple[object, int]:
    entries: dict[object, object] = {}
    previous = (0, b"")
    for _ in range(count):
        start = at
        key, at = _item(data, at, depth)
        if type(key) not in (int, str):
            raise FileFormatError(f"CBOR: a map key that is no number or text at byte {start}")
        order = (at - start, data[start:at])
        # Strictly rising keys cannot repeat.
        if order <= previous:
            raise FileFormatError(f"CBOR: map key repeated or out of order at byte {start}")
        previous = order
        entries[key], at = _item(data, at, depth)
    return entries, at
