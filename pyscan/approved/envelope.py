"""What all files of approved configurations share: header, signature, and the file system.

Layout: docs/spec/approved.md section 1.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from pyscan.cose import decode_cbor, encode_cbor, media_type, sign1, verify1
from pyscan.errors import ApprovedFileError, FileFormatError, SignatureInvalid
from pyscan.keys import KeyRing, SigningKey

FORMAT: Final = "pyscan-approved"
VERSION: Final = 1
CONTENT_TYPE: Final = media_type("approved")
EXTERNAL_AAD: Final = b"pyscan/v1/approved"


def seal(kind: str, fields: Mapping[str, object], key: SigningKey) -> bytes:
    """The signed message that says `fields` of an approved configuration of one kind."""
    header = {"format": FORMAT, "version": VERSION, "kind": kind}
    return sign1(encode_cbor(header | dict(fields)), key, CONTENT_TYPE, EXTERNAL_AAD)


def unseal(
    path: Path, message: bytes, ring: KeyRing, kind: str, size_max: int
) -> tuple[dict[str, object], str]:
    """Verify a message of one kind; returns its fields and the approver's name.

    Raises ApprovedFileError: truncated, edited, signed by an unknown key, or of another
    format, version or kind.
    """
    try:
        verified = verify1(message, ring, CONTENT_TYPE, EXTERNAL_AAD, size_max)
        payload = decode_cbor(verified.payload, size_max)
    except (SignatureInvalid, FileFormatError) as error:
        raise ApprovedFileError(
            f"{path}: not a valid approved configuration: {error}; "
            "approve the target again, or pass the approver's public key"
        ) from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise ApprovedFileError(f"{path}: not an approved configuration")
    version, found = payload.get("version"), payload.get("kind")
    # True equals 1 to Python.
    if type(version) is not int or (version, found) != (VERSION, kind):
        raise ApprovedFileError(
            f"{path}: version {version!r}, kind {found!r}: "
            f"this pyscan reads version {VERSION}, kind {kind!r} in such a file"
        )
    return payload, verified.signer


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading. Raises ApprovedFileError, also for its errors."""
    try:
        with open(path, "rb", opener=_open_file) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ApprovedFileError(f"{path}: not a regular file")
            yield stream
    except OSError as error:
        raise ApprovedFileError(f"{path}: cannot be read: {error.strerror}") from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place whole when all went well; else what was there stays.

    Whoever has the old file open or mapped keeps its content. Only its owner may write the
    new one. Raises ApprovedFileError, also for errors of the file.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        with temporary.open("xb") as stream:
            try:
                yield stream
                stream.flush()
                mode = os.fstat(stream.fileno()).st_mode
                os.fchmod(stream.fileno(), stat.S_IMODE(mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
                os.fsync(stream.fileno())
                temporary.replace(path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
    except OSError as error:
        raise ApprovedFileError(f"{path}: cannot be written: {error.strerror}") from error


def _open_file(path: str, flags: int) -> int:
    # O_NONBLOCK: a FIFO in the file's place must not hang the program.
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
