"""Signed messages as a log or a capture quotes them [4]."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from pyscan.cose import decode_cbor, encode_cbor, media_type, verify1
from pyscan.errors import FileFormatError, InternalError, SignatureInvalid
from pyscan.evidence.chain import RECORD_BYTES_MAX, quoted_message
from pyscan.keys import KeyRing


@dataclass(frozen=True, slots=True)
class Quoted:
    """A message that is what it is quoted as; verified if its signer's key is at hand."""

    kind: str
    id: str
    topic: str
    digest: bytes  # SHA-256 of topic and envelope
    signer: str  # the name that the key is pinned to; empty: the key is not at hand
    signer_key: bytes | None  # key id; None: not at hand
    payload: Mapping[str, object]  # empty when nothing is verified


def read_quote(kind: str, body: Mapping[str, object], known: KeyRing) -> Quoted:
    """Check a quoted message by itself: its form, its signature, its id [4.1].

    Raises FileFormatError: what the record that quotes it does wrong.
    """
    try:
        message_id, topic, envelope = quoted_message(body)
        digest = hashlib.sha256(encode_cbor([topic, envelope])).digest()
        verified = verify1(envelope, known, media_type(kind), topic.encode(), RECORD_BYTES_MAX)
        payload = decode_cbor(verified.payload, RECORD_BYTES_MAX)
    except SignatureInvalid as error:
        if error.reason != "unknown_key":
            raise FileFormatError(f"quotes a message that does not verify: {error}") from error
        return Quoted(kind, message_id, topic, digest, "", None, {})
    except (FileFormatError, InternalError) as error:
        raise FileFormatError(f"does not quote a message as it should: {error}") from error
    if not isinstance(payload, dict) or payload.get("id") != message_id:
        raise FileFormatError(f"quotes another message than {message_id!r}")
    fields = {str(name): value for name, value in payload.items()}
    return Quoted(kind, message_id, topic, digest, verified.signer, verified.key_id, fields)
