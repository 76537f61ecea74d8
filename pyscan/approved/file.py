"""Files of approved configurations, whatever their kind: one way in.

Layout: docs/spec/approved.md. What is small is one signed message, read whole and verified
before it is decoded; kind *linux* is large and has a container of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pyscan.approved.container import MAGIC, load_linux
from pyscan.approved.envelope import reading, replacing, seal, unseal
from pyscan.approved.linux import LinuxApproved
from pyscan.approved.snapshot import Snapshot
from pyscan.errors import ApprovedFileError
from pyscan.keys import KeyRing, SigningKey

#: Of a file that is one message.
FILE_BYTES_MAX: Final = 256 << 20


def save_approved(snapshot: Snapshot, path: Path, key: SigningKey) -> int:
    """Sign and write a snapshot atomically; returns the file's size in bytes.

    Raises ApprovedFileError when the file cannot be written.
    """
    message = seal("snapshot", snapshot.to_payload(), key)
    with replacing(path) as stream:
        stream.write(message)
    return len(message)


def load_approved(path: Path, ring: KeyRing) -> tuple[Snapshot | LinuxApproved, str]:
    """Read and verify an approved configuration; returns it and the approver's name.

    Raises ApprovedFileError: not readable, oversize, truncated, edited, signed by an
    unknown key, or of another format, version or kind.
    """
    with reading(path) as stream:
        head = stream.read(len(MAGIC))
        if head == MAGIC:
            return load_linux(path, stream.fileno(), ring)
        message = head + stream.read(FILE_BYTES_MAX + 1 - len(head))
    if len(message) > FILE_BYTES_MAX:
        raise ApprovedFileError(f"{path}: larger than {FILE_BYTES_MAX} bytes")
    payload, approver = unseal(path, message, ring, "snapshot", FILE_BYTES_MAX)
    try:
        return Snapshot.from_payload(payload), approver
    except ApprovedFileError as error:
        raise ApprovedFileError(f"{path}: {error}") from error
