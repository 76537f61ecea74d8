"""The file of an approved configuration: CBOR inside COSE_Sign1, whatever its kind.

Layout: docs/spec/approved.md. A file is read whole, verified, and only then decoded.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from pyscan.approved.snapshot import Snapshot
from pyscan.cose import decode_cbor, encode_cbor, media_type, sign1, verify1
from pyscan.errors import ApprovedFileError, FileFormatError, SignatureInvalid
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
    try:
        _replace(path, message)
    except OSError as error:
        raise ApprovedFileError(f"{path}: cannot be written: {error.strerror}") from error
    return len(message)


def _replace(path: Path, message: bytes) -> None:
    """Put the file in its place whole; what was there stays when that fails."""
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    with temporary.open("xb") as stream:
        try:
            stream.write(message)
            stream.flush()
            os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def load_approved(path: Path, ring: KeyRing) -> tuple[Snapshot, str]:
    """Read and verify an approved configuration; returns it and the approver's name.

    Raises ApprovedFileError: not readable, oversize, truncated, edited, signed by an
    unknown key, or of another format, version or kind.
    """
    message = _read(path)
    try:
        verified = verify1(message, ring, CONTENT_TYPE, EXTERNAL_AAD, FILE_BYTES_MAX)
        payload = decode_cbor(verified.payload, FILE_BYTES_MAX)
    except (SignatureInvalid, FileFormatError) as error:
        raise ApprovedFileError(
            f"{path}: not a valid approved configuration: {error}; "
            "approve the target again, or pass the approver's public key"
        ) from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise ApprovedFileError(f"{path}: not an approved configuration")
    version, kind = payload.get("version"), payload.get("kind")
    # True equals 1 to Python.
    if type(version) is not int or (version, kind) != (VERSION, "snapshot"):
        raise ApprovedFileError(
            f"{path}: version {version!r}, kind {kind!r}: "
            f"this pyscan reads version {VERSION}, kind 'snapshot'"
        )
    try:
        return Snapshot.from_payload(payload), verified.signer
    except ApprovedFileError as error:
        raise ApprovedFileError(f"{path}: {error}") from error


def _read(path: Path) -> bytes:
    """All of a regular file. Raises ApprovedFileError."""
    try:
        with open(path, "rb", opener=_open_file) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ApprovedFileError(f"{path}: not a regular file")
            message = stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ApprovedFileError(f"{path}: cannot be read: {error.strerror}") from error
    if len(message) > FILE_BYTES_MAX:
        raise ApprovedFileError(f"{path}: larger than {FILE_BYTES_MAX} bytes")
    return message


def _open_file(path: str, flags: int) -> int:
    # O_NONBLOCK: a FIFO in the file's place must not hang the program.
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
