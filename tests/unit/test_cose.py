"""COSE_Sign1 and strict CBOR, against other implementations and hostile bytes."""

from __future__ import annotations

from typing import Any

import cbor2
import cwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from hypothesis import given
from hypothesis import strategies as st

from pyscan.cose import (
    DEPTH_MAX,
    decode_cbor,
    decode_first,
    encode_cbor,
    sign1,
    to_be_signed,
    verify1,
)
from pyscan.errors import FileFormatError, InternalError, SignatureInvalid
from pyscan.keys import KeyRing, PublicKey, SigningKey
from pyscan.protocol import RejectReason

TYPE = "application/vnd.pyscan.test+cbor"
AAD = b"pyscan/v1/test"
PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = SigningKey(PRIVATE)
RING = KeyRing.of({"tester": KEY.public}, "test")
PROTECTED = {1: -8, 3: TYPE, 4: KEY.key_id}
SIZE_MAX = 4096


def _message(
    protected: object = None,
    *,
    unprotected: object = None,
    payload: object = b"payload",
    tag: int = 18,
    extra: tuple[object, ...] = (),
) -> bytes:
    """A message whose signature is good, however odd the rest is."""
    header = protected if isinstance(protected, bytes) else cbor2.dumps(protected or PROTECTED)
    signed = cbor2.dumps(["Signature1", header, AAD, payload])
    parts = [header, unprotected or {}, payload, KEY.sign(signed), *extra]
    return cbor2.dumps(cbor2.CBORTag(tag, parts))


def _refusal(message: bytes, **changes: Any) -> str:
    arguments = {"content_type": TYPE, "external_aad": AAD, "size_max": SIZE_MAX, "ring": RING}
    with pytest.raises(SignatureInvalid) as refused:
        verify1(message, **(arguments | changes))
    return refused.value.reason


def test_what_is_signed_verifies() -> None:
    message = sign1(b"payload", KEY, TYPE, AAD)
    verified = verify1(message, RING, TYPE, AAD, SIZE_MAX)
    assert (verified.payload, verified.signer) == (b"payload", "tester")
    assert verified.key_id == KEY.key_id
    assert message == _message()  # Ed25519 is deterministic, so are the bytes


def test_working_group_vector() -> None:
    """eddsa-sig-01 of github.com/cose-wg/Examples, with the key of RFC 8032, test 1.

    It has the key id in the unprotected header, so only the signature is for us.
    """
    vector = bytes.fromhex(
        "d28445a201270300a10442313154546869732069732074686520636f6e74656e742e58407142fd2ff9"
        "6d56db85bee905a76ba1d0b7321a95c8c4d3607c5781932b7afb8711497dfa751bf40b58b3bcc32300"
        "b1487f3db34085eef013bf08f4a44d6fef0d"
    )
    raw = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    key = PublicKey(Ed25519PublicKey.from_public_bytes(raw))
    protected, _, payload, signature = cbor2.loads(vector).value
    assert payload == b"This is the content."
    key.verify(signature, to_be_signed(protected, b"", payload))
    assert _refusal(vector) == "malformed"


def test_another_implementation_reads_ours() -> None:
    pem = KEY.public.pem()
    key = cwt.COSEKey.from_pem(pem, kid=KEY.key_id)
    message = sign1(b"payload", KEY, TYPE, AAD)
    assert cwt.COSE.new().decode(message, key, external_aad=AAD) == b"payload"
    with pytest.raises(cwt.VerifyError):
        cwt.COSE.new().decode(message, key, external_aad=AAD + b"x")


def test_ours_reads_another_implementation() -> None:
    pem = PRIVATE.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    message = cwt.COSE.new().encode_and_sign(
        b"payload",
        cwt.COSEKey.from_pem(pem, kid=KEY.key_id),
        protected=PROTECTED,
        external_aad=AAD,
    )
    assert verify1(message, RING, TYPE, AAD, SIZE_MAX).payload == b"payload"


def _unsigned_part(message: bytes, index: int, value: object) -> bytes:
    parts = list(cbor2.loads(message).value)
    parts[index] = value
    return cbor2.dumps(cbor2.CBORTag(18, parts))


STRANGER = SigningKey.generate()
GOOD = _message()
BAD_MESSAGES = {
    "empty": (b"", RejectReason.MALFORMED),
    "no tag": (GOOD[1:], RejectReason.MALFORMED),
    "tag of COSE_Mac0": (_message(tag=17), RejectReason.MALFORMED),
    "tag in two bytes": (b"\xd8\x12" + GOOD[1:], RejectReason.MALFORMED),
    "tag twice": (b"\xd2" + GOOD, RejectReason.MALFORMED),
    "trailing byte": (GOOD + b"\0", RejectReason.MALFORMED),
    "cut": (GOOD[:-1], RejectReason.MALFORMED),
    "three parts": (cbor2.dumps(cbor2.CBORTag(18, [b"", {}, b""])), RejectReason.MALFORMED),
    "five parts": (_message(extra=(b"",)), RejectReason.MALFORMED),
    "a map": (cbor2.dumps(cbor2.CBORTag(18, {1: 2})), RejectReason.MALFORMED),
    "detached payload": (_message(payload=None), RejectReason.MALFORMED),
    "text payload": (_message(payload="payload"), RejectReason.MALFORMED),
    "unprotected header": (_message(unprotected={4: KEY.key_id}), RejectReason.MALFORMED),
    "unprotected is no map": (_unsigned_part(GOOD, 1, []), RejectReason.MALFORMED),
    "protected is no map": (_message(cbor2.dumps([1, 2])), RejectReason.MALFORMED),
    "protected is empty": (_message(b""), RejectReason.MALFORMED),
    "protected is long": (_message(PROTECTED | {3: "x" * 300}), RejectReason.MALFORMED),
    "no algorithm": (_message({3: TYPE, 4: KEY.key_id}), RejectReason.MALFORMED),
    "no key id": (_message({1: -8, 3: TYPE}), RejectReason.MALFORMED),
    "no content type": (_message({1: -8, 4: KEY.key_id}), RejectReason.MALFORMED),
    "critical header": (_message({1: -8, 2: [3], 3: TYPE, 4: KEY.key_id}), RejectReason.MALFORMED),
    "duplicate algorithm": (
        _message(b"\xa4\x01\x27" + cbor2.dumps(PROTECTED)[1:]),
        RejectReason.MALFORMED,
    ),
    "headers out of order": (
        _message(cbor2.dumps({3: TYPE, 1: -8, 4: KEY.key_id})),
        RejectReason.MALFORMED,
    ),
    "algorithm as text": (_message(PROTECTED | {1: "EdDSA"}), RejectReason.MALFORMED),
    "algorithm as bool": (_message(PROTECTED | {1: True}), RejectReason.MALFORMED),
    "key id as text": (_message(PROTECTED | {4: "key"}), RejectReason.MALFORMED),
    "content type as number": (_message(PROTECTED | {3: 0}), RejectReason.MALFORMED),
    "ES256": (_message(PROTECTED | {1: -7}), RejectReason.WRONG_ALGORITHM),
    "Ed25519 by its new number": (_message(PROTECTED | {1: -19}), RejectReason.WRONG_ALGORITHM),
    "unknown key": (_message(PROTECTED | {4: STRANGER.key_id}), RejectReason.UNKNOWN_KEY),
    "unknown key and algorithm": (
        _message({1: -7, 3: TYPE, 4: STRANGER.key_id}),
        RejectReason.UNKNOWN_KEY,
    ),
    "empty key id": (_message(PROTECTED | {4: b""}), RejectReason.UNKNOWN_KEY),
    "another content type": (_message(PROTECTED | {3: "text/plain"}), "wrong_content_type"),
    "short signature": (_unsigned_part(GOOD, 3, b"\0" * 63), RejectReason.MALFORMED),
    "zero signature": (_unsigned_part(GOOD, 3, b"\0" * 64), RejectReason.BAD_SIGNATURE),
    "another payload": (_unsigned_part(GOOD, 2, b"other"), RejectReason.BAD_SIGNATURE),
    "signed by a stranger": (
        sign1(b"payload", STRANGER, TYPE, AAD).replace(STRANGER.key_id, KEY.key_id),
        RejectReason.BAD_SIGNATURE,
    ),
    "deep": (b"\xd2" + b"\x81" * 2000 + b"\0", RejectReason.MALFORMED),
    "huge array": (b"\xd2\x9b\x7f" + b"\xff" * 7, RejectReason.MALFORMED),
    "too large": (sign1(b"x" * SIZE_MAX, KEY, TYPE, AAD), RejectReason.TOO_LARGE),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_a_bad_message_is_refused_with_its_reason(name: str) -> None:
    message, reason = BAD_MESSAGES[name]
    assert _refusal(message) == reason


def test_what_is_not_sent_is_bound_too() -> None:
    assert _refusal(GOOD, external_aad=AAD + b"/other") == "bad_signature"
    assert _refusal(GOOD, content_type="text/plain") == "wrong_content_type"
    assert _refusal(GOOD, ring=KeyRing.of({}, "test")) == "unknown_key"
    assert _refusal(GOOD, size_max=len(GOOD) - 1) == "too_large"
    assert verify1(GOOD, RING, TYPE, AAD, len(GOOD)).payload == b"payload"


@given(st.data())
def test_no_changed_byte_verifies(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(GOOD) - 1))
    change = data.draw(st.integers(1, 255))
    changed = bytearray(GOOD)
    changed[at] ^= change
    assert _refusal(bytes(changed)) in set(RejectReason)


@given(st.binary(max_size=200))
def test_noise_is_refused_and_never_crashes(noise: bytes) -> None:
    assert _refusal(b"\xd2" + noise) in set(RejectReason)


# ---------------------------------------------------------------------------------- CBOR

KEYS = st.one_of(st.integers(-(2**64), 2**64 - 1), st.text())
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**64), 2**64 - 1),
        st.binary(),
        st.text(st.characters(exclude_categories=["Cs"])),
    ),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)


@given(VALUES)
def test_decoding_agrees_with_cbor2(value: object) -> None:
    encoded = encode_cbor(value)
    assert decode_cbor(encoded, len(encoded)) == value
    assert cbor2.loads(encoded) == value


@given(st.binary(max_size=100))
def test_what_decodes_encodes_to_the_same_bytes(data: bytes) -> None:
    try:
        value = decode_cbor(data, 100)
    except FileFormatError:
        return
    assert encode_cbor(value) == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "cut off"),
        ("0000", "bytes too many"),
        ("1817", "shortest"),
        ("1900ff", "shortest"),
        ("1a0000ffff", "shortest"),
        ("1b00000000ffffffff", "shortest"),
        ("5801ff", "shortest"),
        ("18", "cut off"),
        ("4201", "cut off"),
        ("8201", "cut off"),
        ("9affffffff", "cut off"),
        ("bb7fffffffffffffff", "cut off"),
        ("5f4100ff", "indefinite"),
        ("9f01ff", "indefinite"),
        ("bf0102ff", "indefinite"),
        ("1c", "reserved"),
        ("ff", "indefinite"),
        ("c11a00000000", "tag"),
        ("d81c80", "tag"),
        ("f93c00", "float"),
        ("fa3f800000", "float"),
        ("fb3ff0000000000000", "float"),
        ("f7", "simple"),
        ("e0", "simple"),
        ("f814", "simple"),
        ("62c328", "UTF-8"),
        ("63eda080", "UTF-8"),
        ("a201010102", "repeated"),
        ("a202000100", "out of order"),
        ("a2616200616100", "out of order"),
        ("a1810100", "map key"),
        ("a1f500", "map key"),
        ("a1410000", "map key"),
        ("a101", "cut off"),
    ],
)
def test_bad_cbor_is_refused(data: str, message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        decode_cbor(bytes.fromhex(data), 100)


def test_limits_of_size_and_depth() -> None:
    deepest = b"\x81" * DEPTH_MAX + b"\0"
    assert decode_cbor(deepest, len(deepest)) is not None
    with pytest.raises(FileFormatError, match="levels"):
        decode_cbor(b"\x81" + deepest, 100)
    with pytest.raises(FileFormatError, match="at most 16"):
        decode_cbor(deepest, 16)


def test_the_first_of_many_items() -> None:
    assert decode_first(bytes.fromhex("820102ff")) == ([1, 2], 3)


def test_what_cannot_be_encoded_is_our_own_mistake() -> None:
    with pytest.raises(InternalError):
        encode_cbor(object())
    with pytest.raises(InternalError):
        encode_cbor("\ud800")
