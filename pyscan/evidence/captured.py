"""Verifying a capture: its manifest, and every file against it [7]."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from pyscan.cose import decode_cbor, verify1
from pyscan.errors import EvidenceError, FileFormatError, SignatureInvalid
from pyscan.evidence.chain import (
    FRAME_HEAD_BYTES,
    MESSAGE_KINDS,
    PART_BYTES,
    RECORD_BYTES_MAX,
    frame,
    open_for_reading,
    stored_key,
)
from pyscan.evidence.manifest import (
    CONTENT_TYPE,
    EXTERNAL_AAD,
    FILES_MAX,
    MANIFEST_BYTES_MAX,
    MANIFEST_NAME,
    MESSAGES_NAME,
    CapturedFile,
    Manifest,
    capture_record,
)
from pyscan.evidence.quotes import Quoted, read_quote
from pyscan.keys import KeyRing, PublicKey

_ENTRIES_MAX: Final = 2 * FILES_MAX


@dataclass(frozen=True, slots=True)
class Capture:
    """A capture whose manifest is authentic; its files may be anything yet."""

    directory: Path
    key: PublicKey  # the writer's, stored with it
    manifest: Manifest
    digest: bytes  # SHA-256 of the signed manifest

    @property
    def path(self) -> Path:
        """The manifest."""
        return self.directory / MANIFEST_NAME

    def record(self) -> dict[str, object]:
        """What the log of its writer says of it [7.5]."""
        return capture_record(self.manifest, self.digest, self.directory.name)

    def check_files(self) -> None:
        """Every file is there, is what it was, and there is no other.

        Raises EvidenceError: which one, and what is wrong. Reads a part at a time.
        """
        files = self.manifest.files
        folders = {name.partition("/")[0] for name in files if "/" in name}
        places = [("", self.directory), *((f"{name}/", self.directory / name) for name in folders)]
        missing = dict(files)
        for prefix, place in sorted(places):
            for entry in _entries(place):
                name = prefix + entry.name
                if name == MANIFEST_NAME:
                    continue
                expected = missing.pop(name, None)
                if expected is not None:
                    _check_file(Path(entry.path), expected)
                elif name not in folders:
                    raise EvidenceError(
                        f"{entry.path}: not in the manifest: it was added afterwards"
                    )
        if missing:
            raise EvidenceError(f"{self.directory / min(missing)}: in the manifest, and missing")

    def messages(self, known: KeyRing) -> Iterator[tuple[int, Quoted]]:
        """The signed messages that the capture belongs to, numbered. Raises EvidenceError."""
        if MESSAGES_NAME not in self.manifest.files:
            return
        path = self.directory / MESSAGES_NAME
        _check_file(path, self.manifest.files[MESSAGES_NAME])
        with open_for_reading(path) as file:
            number = 0
            while head := file.read(FRAME_HEAD_BYTES):
                encoded = file.read(min(int.from_bytes(head[1:]), RECORD_BYTES_MAX))
                if frame(encoded)[:FRAME_HEAD_BYTES] != head:
                    raise EvidenceError(f"{path}: message {number} is damaged")
                try:
                    yield number, _read_message(encoded, known)
                except FileFormatError as error:
                    raise EvidenceError(f"{path}: message {number} {error}") from error
                number += 1


def read_capture(directory: Path) -> Capture:
    """Verify the manifest with the key beside it. Raises EvidenceError."""
    path = directory / MANIFEST_NAME
    key = stored_key(directory)
    with open_for_reading(path) as file:
        envelope = file.read(MANIFEST_BYTES_MAX + 1)
    ring = KeyRing.of({"writer": key}, "writer")
    try:
        verified = verify1(envelope, ring, CONTENT_TYPE, EXTERNAL_AAD, MANIFEST_BYTES_MAX)
        manifest = Manifest.decode(verified.payload)
    except (SignatureInvalid, FileFormatError) as error:
        raise EvidenceError(f"{path}: does not verify: {error}") from error
    return Capture(directory, key, manifest, hashlib.sha256(envelope).digest())


def _read_message(encoded: bytes, known: KeyRing) -> Quoted:
    match decode_cbor(encoded, RECORD_BYTES_MAX):
        case {"kind": str(kind), "body": dict(body), **others} if (
            not others and kind in MESSAGE_KINDS
        ):
            return read_quote(kind, body, known)
    raise FileFormatError("is no quoted message")


def _entries(place: Path) -> list[os.DirEntry[str]]:
    """What is in a directory, in order. Raises EvidenceError when it is too much or cannot be."""
    if place.is_symlink():
        raise EvidenceError(f"{place}: not a directory")
    try:
        with os.scandir(place) as entries:
            found = list(islice(entries, _ENTRIES_MAX + 1))
    except FileNotFoundError as error:
        raise EvidenceError(f"{place}: in the manifest, and missing") from error
    except OSError as error:
        raise EvidenceError(f"{place}: cannot be read: {error.strerror}") from error
    if len(found) > _ENTRIES_MAX:
        raise EvidenceError(f"{place}: more than {_ENTRIES_MAX} files: not those of a capture")
    return sorted(found, key=lambda entry: entry.name)


def _check_file(path: Path, expected: CapturedFile) -> None:
    with open_for_reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != expected.size:
            change = "cut off" if size < expected.size else "longer than it was"
            raise EvidenceError(
                f"{path}: {change}: it has {size} bytes, the manifest says {expected.size}"
            )
        digest = hashlib.sha256()
        while part := file.read(min(PART_BYTES, size)):
            digest.update(part)
            size -= len(part)
        if size or file.read(1):
            raise EvidenceError(f"{path}: changes while it is read")
    if digest.digest() != expected.sha256:
        raise EvidenceError(f"{path}: altered: its SHA-256 is {digest.hexdigest()}")
