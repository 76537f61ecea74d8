"""Writing evidence: one open log."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Self

from pyscan.cose import decode_cbor, sign1
from pyscan.errors import EvidenceError, FileFormatError, InternalError, UsageError
from pyscan.evidence.chain import (
    BLOB,
    BLOBS_NAME,
    CHECKPOINT,
    CLOSED,
    CONTENT_TYPE,
    KIND,
    LOG_NAME,
    MESSAGE_KINDS,
    OPENED,
    PUBLIC_KEY_NAME,
    RECORD_BYTES_MAX,
    RECOVERED,
    RESERVED_KINDS,
    WRITER,
    Chain,
    LogMark,
    Record,
    blob_body,
    check_blob,
    external_aad,
    frame,
    opened_body,
    quoted_message,
    stored_key,
)
from pyscan.keys import PARTIAL_SUFFIX, PublicKey, SigningKey, create_file, sync_directory


class EvidenceLog:
    """The open log of one program. Thread-safe; one process at a time.

    After a failed write it takes nothing more: the program must stop, and `open` repairs.
    """

    def __init__(self, directory: Path, key: SigningKey, file: FileIO, chain: Chain) -> None:
        self._directory = directory
        self._key = key
        self._file = file
        self._chain = chain
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path, key: SigningKey, writer: str) -> Self:
        """Open or create the log of `writer` in `directory` [3.1].

        An incomplete last record, as a crash leaves it, is moved to a blob, and a record
        says so. Raises EvidenceError when what is there does not verify or is another
        writer's (nothing is changed then), UsageError when the directory is not usable.
        """
        if not WRITER.fullmatch(writer):
            raise UsageError(f"{writer!r} cannot name a writer; use {WRITER.pattern}")
        try:
            file = _open_for_writing(directory, key.public)
        except BlockingIOError as error:
            raise UsageError(f"{directory}: another process writes evidence here") from error
        except OSError as error:
            raise UsageError(f"{directory}: cannot hold evidence: {error.strerror}") from error
        log = cls(directory, key, file, Chain(directory / LOG_NAME, key.public, writer))
        try:
            log._resume()
        except BaseException:
            file.close()
            raise
        return log

    def append(self, kind: str, body: Mapping[str, object]) -> str:
        """Write one record to the disk; returns its SHA-256 in hex.

        `body` holds None, bool, int, bytes, str, list and dict only. Raises EvidenceError
        when it cannot be written, InternalError when it must not be.
        """
        _check_entry(kind, body)
        with self._lock:
            return self._append(kind, body).hex()

    def append_all(self, entries: Iterable[tuple[str, Mapping[str, object]]]) -> None:
        """Write records, (kind, body) each as for `append`, and wait for the disk once."""
        entries = list(entries)
        for kind, body in entries:
            _check_entry(kind, body)
        if not entries:
            return
        with self._lock:
            data = bytearray()
            try:
                for kind, body in entries:
                    record = self._next(kind, body)
                    encoded = _encoded(record)
                    self._chain.advance(record, encoded)
                    data += frame(encoded)
            except BaseException:
                self._file.close()  # the chain is ahead of the file now
                raise
            self._write_synced(bytes(data))

    def attach(self, data: bytes) -> str:
        """Store `data` as a blob and record it; returns its SHA-256 in hex, for other records.

        Data that was attached before is neither stored nor recorded again.
        """
        body = blob_body(data)
        name = hashlib.sha256(data).hexdigest()
        with self._lock:
            if name not in self._chain.blobs:
                self._store(name, data)
                self._append(BLOB, body)
                self._chain.blobs[name] = self._chain.count - 1
        return name

    def checkpoint(self) -> LogMark:
        """Sign all that was recorded; returns the record that holds the signature."""
        with self._lock:
            self._append_signed(CHECKPOINT)
            return self._chain.mark

    def close(self) -> None:
        """Sign, mark the log as complete and release it. Idempotent."""
        with self._lock:
            if self._file.closed:
                return
            try:
                self._append_signed(CLOSED)
            finally:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _resume(self) -> None:
        """Walk what is there, take a torn end away, and say that the log goes on."""
        chain, writer = self._chain, self._chain.writer
        for record in chain.walk(self._file):
            if record.writer != writer:
                raise EvidenceError(
                    f"{chain.path}: the log of {record.writer}, not of {writer}; "
                    "give each program its own directory"
                )
        torn = chain.torn(self._file)
        if torn:
            # First the copy, then the cut: a crash in between only repeats both.
            self._store(hashlib.sha256(torn).hexdigest(), torn)
            self._file.truncate(chain.size)
        crashed = bool(torn) or not chain.closed
        if chain.closed:
            self._append(OPENED, opened_body(self._key.public))
        if crashed:
            self._append(RECOVERED, blob_body(torn))

    def _append_signed(self, kind: str) -> bytes:
        record = self._next(kind, {})
        signature = sign1(
            record.signed_payload(), self._key, CONTENT_TYPE, external_aad(record.writer)
        )
        record.body["signature"] = signature
        return self._write(record)

    def _append(self, kind: str, body: Mapping[str, object]) -> bytes:
        return self._write(self._next(kind, body))

    def _next(self, kind: str, body: Mapping[str, object]) -> Record:
        chain = self._chain
        return Record(chain.count, time.time_ns(), kind, chain.writer, chain.last_hash, dict(body))

    def _write(self, record: Record) -> bytes:
        """Put a record behind the others and wait for the disk; returns its hash."""
        encoded = _encoded(record)
        self._write_synced(frame(encoded))
        self._chain.advance(record, encoded)
        return self._chain.last_hash

    def _write_synced(self, data: bytes) -> None:
        path = self._chain.path
        if self._file.closed:
            raise EvidenceError(f"{path}: closed, or a write failed; restart the program")
        try:
            self._write_all(data)
            os.fdatasync(self._file.fileno())
        except OSError as error:
            self._file.close()
            raise EvidenceError(
                f"{path}: cannot be written: {error.strerror}; make room and restart the program"
            ) from error

    def _write_all(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]

    def _store(self, name: str, data: bytes) -> None:
        path = self._directory / BLOBS_NAME / name
        try:
            create_file(path, data, 0o600)
        except FileExistsError:
            check_blob(path)
        except OSError as error:
            raise EvidenceError(f"{path}: cannot be written: {error.strerror}") from error


def _check_entry(kind: str, body: Mapping[str, object]) -> None:
    if kind in RESERVED_KINDS or not KIND.fullmatch(kind):
        raise InternalError(f"{kind!r} cannot be the kind of an evidence record")
    if kind in MESSAGE_KINDS:
        quoted_message(body)


def _encoded(record: Record) -> bytes:
    """The bytes of a record. Raises InternalError: what cannot be read again breaks the log."""
    encoded = record.encode()
    try:
        decode_cbor(encoded, RECORD_BYTES_MAX)
    except FileFormatError as error:
        raise InternalError(f"evidence that could not be read again: {error}") from error
    return encoded


def _open_for_writing(directory: Path, key: PublicKey) -> FileIO:
    """Make the directory and its files, and lock the log. Raises OSError, EvidenceError."""
    blobs = directory / BLOBS_NAME
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    blobs.mkdir(mode=0o700, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    # Unbuffered: after a failed write nothing may follow when the file is closed.
    file = FileIO(os.open(directory / LOG_NAME, flags, 0o600), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for place in (directory, blobs):
            for left_over in place.glob(f".*{PARTIAL_SUFFIX}"):
                left_over.unlink()
        try:
            create_file(directory / PUBLIC_KEY_NAME, key.pem(), 0o644)
        except FileExistsError:
            stored = stored_key(directory)
            if stored != key:
                raise EvidenceError(
                    f"{directory}: evidence of key {stored.key_id.hex()}, "
                    f"not of {key.key_id.hex()}; choose another directory for a new key"
                ) from None
        sync_directory(directory)
    except BaseException:
        file.close()
        raise
    return file
