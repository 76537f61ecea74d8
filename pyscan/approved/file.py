"""The file of an approved configuration: CBOR inside COSE_Sign1, whatever its kind.

Layout: docs/spec/approved.md. A file is read whole, verified, and only then decoded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from pyscan.approved.snapshot import Snapshot
from pyscan.cose import decode_cbor, encode_cbor, media_type, sign1, verify1
from pyscan.errors import ApprovedFileError, SignatureInvalid
from pyscan.keys import KeyRing, SigningKey

FORMAT: Final = "pyscan-approved"
VERSION: Final = 1
CONTENT_TYPE: Final = media_type("approved")
EXTERNAL_AAD: Final = b"pyscan/v1/approved"
FILE_BYTES_MAX: Final = 256 << 20


def save_approved(snapshot: Snapshot, path: Path, key: SigningKey) -> int:
    """Sign and write an approved configuration atomically; returns its size in bytes.

    Raises ApprovedFileError when the file cannot be written.
    """
    header = {"format": FORMAT, "version": VERSION, "kind": "snapshot"}
    payload = encode_cbor(header | snapshot.to_payload())
    message = sign1(payload, key, CONTENT_TYPE, EXTERNAL_AAD)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("xb") as stream:
            stream.write(message)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ApprovedFileError(f"{path}: cannot be written: {error.strerror}") from error
    return len(message)


def load_approved(path: Path, ring: KeyRing) -> tuple[Snapshot, str]:
    """Read and verify an approved configuration; returns it and the approver's name.

    Raises ApprovedFileError: not readable, oversize, truncated, edited, signed by an
    unknown key, or of another format, version or kind.
    """
    try:
        size = path.stat().st_size
        if size > FILE_BYTES_MAX:
            raise ApprovedFileError(f"{path}: {size} bytes; at most {FILE_BYTES_MAX} are read")
        message = path.read_bytes()
    except OSError as error:
        raise ApprovedFileError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        verified = verify1(message, ring, CONTENT_TYPE, EXTERNAL_AAD, FILE_BYTES_MAX)
        payload = decode_cbor(verified.payload, FILE_BYTES_MAX)
    except SignatureInvalid as error:
        raise ApprovedFileError(
            f"{path}: not a valid approved configuration: {error}; "
            "approve the target again, or pass the approver's public key"
        ) from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise ApprovedFileError(f"{path}: not an approved configuration")
    if payload.get("version") != VERSION or payload.get("kind") != "snapshot":
        raise ApprovedFileError(
            f"{path}: version {payload.get('version')!r}, kind {payload.get('kind')!r}: "
            f"this pyscan reads version {VERSION}, kind 'snapshot'"
        )
    try:
        return Snapshot.from_payload(payload), verified.signer
    except ApprovedFileError as error:
        raise ApprovedFileError(f"{path}: {error}") from error
