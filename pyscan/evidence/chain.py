"""What a log is made of: records, their chain, blobs. Shared by writing and verifying."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader, FileIO
from pathlib import Path
from typing import BinaryIO, Final, Self

from pyscan.cose import decode_cbor, decode_first, encode_cbor, media_type, verify1
from pyscan.errors import (
    EvidenceError,
    FileFormatError,
    InternalError,
    SignatureInvalid,
    UsageError,
)
from pyscan.keys import KeyRing, PublicKey

LOG_NAME: Final = "log.cborseq"
BLOBS_NAME: Final = "blobs"
PUBLIC_KEY_NAME: Final = "writer.pub"

VERSION: Final = 1
RECORD_BYTES_MAX: Final = 1 << 20

# Records that the log writes itself [3].
OPENED: Final = "opened"
RECOVERED: Final = "recovered"
BLOB: Final = "blob"
CHECKPOINT: Final = "checkpoint"
CLOSED: Final = "closed"
RESERVED_KINDS: Final = frozenset({OPENED, RECOVERED, BLOB, CHECKPOINT, CLOSED})
#: Records that quote a signed message; their body is a `message_body` [4].
MESSAGE_KINDS: Final = frozenset({"verdict", "command", "approval", "report"})
#: A record that names a capture by the SHA-256 of its manifest, in hex [7.5].
CAPTURE: Final = "capture"

CONTENT_TYPE: Final = media_type("evidence")
_FRAME_TYPE: Final = 0x5A  # CBOR byte string whose length takes four bytes
FRAME_HEAD_BYTES: Final = 5
HASH_BYTES: Final = 32
_NO_PREVIOUS: Final = bytes(HASH_BYTES)
_SIGNATURE_BYTES_MAX: Final = 1024
PART_BYTES: Final = 1 << 20  # of a blob in memory at once
WRITER: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
KIND: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_BLOB_NAME: Final = re.compile(r"[0-9a-f]{64}")


def message_body(message_id: str, topic: str, envelope: bytes) -> dict[str, object]:
    """The body of a record of `MESSAGE_KINDS`: a signed message as it was sent or received."""
    return {"id": message_id, "topic": topic, "envelope": envelope}


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a log, in the order of [2.2]."""

    number: int
    time_ns: int
    kind: str
    writer: str
    previous: bytes  # SHA-256 of the encoded record before this one
    body: dict[str, object]

    def encode(self) -> bytes:
        """The bytes that are hashed and stored."""
        return encode_cbor(self._header() | {"body": self.body})

    def signed_payload(self) -> bytes:
        """What the signature in a checkpoint covers: all of the record but its body [3.4]."""
        return encode_cbor(self._header() | {"v": VERSION})

    def _header(self) -> dict[str, object]:
        return {
            "n": self.number,
            "t": self.time_ns,
            "kind": self.kind,
            "writer": self.writer,
            "prev": self.previous,
        }

    @classmethod
    def decode(cls, encoded: bytes) -> Self:
        """Raises FileFormatError unless these are the bytes of one record."""
        match decode_cbor(encoded, RECORD_BYTES_MAX):
            case {
                "n": int(number),
                "t": int(time_ns),
                "kind": str(kind),
                "writer": str(writer),
                "prev": bytes(previous),
                "body": dict(body),
                **others,
            } if not others:
                record = cls(number, time_ns, kind, writer, previous, body)
            case _:
                raise FileFormatError("not the map of a record")
        if bool in (type(number), type(time_ns)):  # an int to Python
            raise FileFormatError("its number or its time is none")
        if not (KIND.fullmatch(kind) and WRITER.fullmatch(writer)):
            raise FileFormatError("its kind or its writer is not a name")
        if not all(isinstance(key, str) for key in body):
            raise FileFormatError("its body has keys that are not text")
        return record


def quoted_message(body: Mapping[str, object]) -> tuple[str, str, bytes]:
    """Id, topic and envelope of a `message_body`. Raises InternalError."""
    match body:
        case {
            "id": str(message_id),
            "topic": str(topic),
            "envelope": bytes(envelope),
            **others,
        } if not others:
            return message_id, topic, envelope
    raise InternalError("a quoted message has exactly id, topic and envelope")


@dataclass(frozen=True, slots=True)
class LogMark:
    """A place in a log: a record's number and the SHA-256 of its encoded bytes."""

    number: int
    sha256: bytes


@dataclass(slots=True)
class Chain:
    """A walk along one log: checks each record against those before it [2], [3]."""

    path: Path
    key: PublicKey  # the writer's
    writer: str = ""
    count: int = 0
    size: int = 0  # bytes of the log that were walked
    last_hash: bytes = _NO_PREVIOUS
    last_kind: str = ""
    signatures: int = 0
    blobs: dict[str, int] = field(default_factory=dict)  # name -> record that names it

    @property
    def mark(self) -> LogMark:
        """The last record that was walked."""
        return LogMark(self.count - 1, self.last_hash)

    @property
    def closed(self) -> bool:
        """Whether the walk stands behind a `closed` record, or nothing was written yet."""
        return self.last_kind in ("", CLOSED)

    def walk(self, file: BinaryIO) -> Iterator[Record]:
        """Yield the records of the log; stops in front of an incomplete last record."""
        while encoded := self._frame(file):
            try:
                record = Record.decode(encoded)
            except FileFormatError as error:
                raise self.error(f"is damaged: {error}") from error
            self._check(record)
            self.advance(record, encoded)
            yield record

    def advance(self, record: Record, encoded: bytes) -> None:
        """Count a record that is known to be good."""
        self.writer = record.writer
        self.count += 1
        self.size += FRAME_HEAD_BYTES + len(encoded)
        self.last_hash = hashlib.sha256(encoded).digest()
        self.last_kind = record.kind

    def error(self, what: str, number: int | None = None) -> EvidenceError:
        """An error about the given record, or about the one where the walk stands."""
        return EvidenceError(
            f"{self.path}: record {self.count if number is None else number} {what}"
        )

    def _frame(self, file: BinaryIO) -> bytes:
        """The next encoded record; empty at the end and when the rest is incomplete [2.1]."""
        head = file.read(FRAME_HEAD_BYTES)
        if head and head[0] != _FRAME_TYPE:
            raise self.error("does not begin as a record does: the log was changed")
        if len(head) < FRAME_HEAD_BYTES:
            return b""
        length = int.from_bytes(head[1:])
        if not 0 < length <= RECORD_BYTES_MAX:
            raise self.error(f"claims {length} bytes: the log was changed")
        encoded = file.read(length)
        return encoded if len(encoded) == length else b""

    def torn(self, file: BinaryIO) -> bytes:
        """What a crash left behind the last whole record, after a walk; often nothing [3.5]."""
        file.seek(self.size)
        rest = file.read(FRAME_HEAD_BYTES + RECORD_BYTES_MAX)
        try:
            decode_first(rest[FRAME_HEAD_BYTES:])
        except FileFormatError:
            return rest
        # A whole record behind a length that says it is not: no crash does that.
        raise self.error("has another length than it claims: the log was changed")

    def _check(self, record: Record) -> None:
        if record.number != self.count:
            raise self.error(f"says it is number {record.number}: records are missing or moved")
        if record.previous != self.last_hash:
            raise self.error("does not follow from the one before it: one of the two was changed")
        if self.count and record.writer != self.writer:
            raise self.error(f"is by {record.writer}, the log by {self.writer}")
        if (record.kind == OPENED) != self.closed:
            raise self.error(f"({record.kind}) cannot follow {self.last_kind or 'nothing'}")
        if record.kind == OPENED and record.body != opened_body(self.key):
            raise self.error("opens a log of another version or of another key than writer.pub")
        if record.kind in (CHECKPOINT, CLOSED):
            self._check_signature(record)
        if record.kind in (BLOB, RECOVERED):
            self._note_blob(record)

    def _check_signature(self, record: Record) -> None:
        match record.body:
            case {"signature": bytes(signature), **others} if not others:
                pass
            case _:
                raise self.error("has no signature where one belongs")
        ring = KeyRing.of({record.writer: self.key}, "writer")
        try:
            verified = verify1(
                signature, ring, CONTENT_TYPE, external_aad(record.writer), _SIGNATURE_BYTES_MAX
            )
        except SignatureInvalid as error:
            raise self.error(f"has a signature that does not verify: {error}") from error
        if verified.payload != record.signed_payload():
            raise self.error("has a signature that was made for another record")
        self.signatures += 1

    def _note_blob(self, record: Record) -> None:
        match record.body:
            case {"bytes": int(size), "sha256": bytes(digest), **others} if (
                not others and len(digest) == HASH_BYTES
            ):
                if size or record.kind == BLOB:
                    self.blobs.setdefault(digest.hex(), record.number)
            case _:
                raise self.error("does not name a blob where it should")


def external_aad(writer: str) -> bytes:
    """What binds a signature to one writer's logs [3.4]."""
    return f"pyscan/v1/evidence/{writer}".encode()


def frame(encoded: bytes) -> bytes:
    """A record as it stands in the log [2.1]."""
    return bytes([_FRAME_TYPE]) + len(encoded).to_bytes(4) + encoded


def opened_body(key: PublicKey) -> dict[str, object]:
    """The body of an `opened` record [3.1]."""
    return {"v": VERSION, "key": key.key.public_bytes_raw()}


def blob_body(data: bytes) -> dict[str, object]:
    """The body of a `blob` or `recovered` record [3.2]."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).digest()}


def stored_key(directory: Path) -> PublicKey:
    """The key beside a log. Raises EvidenceError unless it is byte by byte as written."""
    path = directory / PUBLIC_KEY_NAME
    try:
        key = PublicKey.load(path)
    except UsageError as error:
        raise EvidenceError(str(error)) from error
    with open_for_reading(path) as file:
        if file.read() != key.pem():
            raise EvidenceError(f"{path}: not as it was written")
    return key


def check_blob(path: Path) -> None:
    """Raise EvidenceError unless the file's content is what its name says."""
    if not _BLOB_NAME.fullmatch(path.name):
        raise EvidenceError(f"{path}: not a blob of the log; move it away")
    with open_for_reading(path) as file:
        digest = hashlib.sha256()
        while part := file.read(PART_BYTES):
            digest.update(part)
    if digest.hexdigest() != path.name:
        raise EvidenceError(f"{path}: the blob was changed, SHA-256 is {digest.hexdigest()}")


def open_for_reading(path: Path) -> BinaryIO:
    """Open a regular file, and nothing that a hostile directory has in its place."""
    try:
        file = BufferedReader(FileIO(path, "rb", opener=_open_file))
    except OSError as error:
        raise EvidenceError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise EvidenceError(f"{path}: not a regular file")
    return file


def _open_file(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
