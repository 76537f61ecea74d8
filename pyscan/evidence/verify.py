"""Verifying evidence: all logs below a directory, and against each other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyscan.cose import decode_cbor, encode_cbor, media_type, verify1
from pyscan.errors import EvidenceError, FileFormatError, InternalError, SignatureInvalid
from pyscan.evidence.chain import (
    BLOBS_NAME,
    LOG_NAME,
    MESSAGE_KINDS,
    PUBLIC_KEY_NAME,
    RECORD_BYTES_MAX,
    Chain,
    Record,
    check_blob,
    open_for_reading,
    quoted_message,
    stored_key,
)
from pyscan.keys import KeyRing, PublicKey

#: Directories that `verify_directory` looks into; a larger tree is not one of ours.
DIRECTORIES_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class LogSummary:
    """One verified log."""

    directory: Path
    writer: str
    key_id: bytes
    records: int
    signatures: int
    blobs: int


@dataclass(frozen=True, slots=True)
class EvidenceSummary:
    """What `verify_directory` found to be in order."""

    logs: tuple[LogSummary, ...]
    messages: int  # different signed messages that the logs quote
    messages_unverified: int  # of these: signed with a key that is not at hand

    def to_json(self) -> dict[str, object]:
        """The summary as a JSON document."""
        return {
            "records": sum(log.records for log in self.logs),
            "blobs": sum(log.blobs for log in self.logs),
            "messages": self.messages,
            "messages_unverified": self.messages_unverified,
            "logs": [
                {
                    "directory": str(log.directory),
                    "writer": log.writer,
                    "key_id": log.key_id.hex(),
                    "records": log.records,
                    "signatures": log.signatures,
                    "blobs": log.blobs,
                }
                for log in self.logs
            ],
        }


@dataclass(frozen=True, slots=True)
class _Quote:
    """A signed message as one record has it."""

    path: Path
    number: int
    log_key: bytes  # key id of the log's writer
    signer_key: bytes | None  # key id of the message's signer; None: not at hand
    digest: bytes


_Quotes = dict[tuple[str, str], list[_Quote]]  # by kind and message id


def verify_directory(directory: Path, ring: KeyRing | None = None) -> EvidenceSummary:
    """Verify all logs in and below `directory` [5].

    `ring` pins the writers' keys by name. Without it the keys beside the logs are taken,
    which shows that the logs are consistent, not whose they are. Raises EvidenceError
    that names the file, the record and what is wrong.
    """
    try:
        return _verify_logs(directory, ring)
    except OSError as error:
        raise EvidenceError(
            f"{error.filename or directory}: cannot be read: {error.strerror}"
        ) from error


def _verify_logs(directory: Path, ring: KeyRing | None) -> EvidenceSummary:
    directories = _find_logs(directory)
    writers: dict[bytes, tuple[str, PublicKey]] = {}
    for place in directories:
        writer, key = _identify(place, ring)
        if writers.setdefault(key.key_id, (writer, key))[0] != writer:
            raise EvidenceError(f"{place}: {writer} has the key of {writers[key.key_id][0]}")
    quotes: _Quotes = {}
    known = KeyRing("writer", writers) if ring is None else ring
    logs = tuple(_verify_log(place, known, quotes) for place in directories)
    for message, quoted in quotes.items():
        _compare_quotes(message, quoted, writers)
    unverified = sum(quoted[0].signer_key is None for quoted in quotes.values())
    return EvidenceSummary(logs, len(quotes), unverified)


def _find_logs(directory: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        # os.walk would leave out what it cannot list, and evidence with it.
        raise error

    found = []
    for count, (place, names, files) in enumerate(os.walk(directory, onerror=refuse)):
        if count >= DIRECTORIES_MAX:
            raise EvidenceError(f"{directory}: more than {DIRECTORIES_MAX} directories")
        names.sort()
        if LOG_NAME in files:
            found.append(Path(place))
    if not found:
        raise EvidenceError(f"{directory}: no evidence log ({LOG_NAME}) here or below")
    return found


def _identify(directory: Path, ring: KeyRing | None) -> tuple[str, PublicKey]:
    """The writer that a log names, and the key beside it, which the ring must know as his."""
    key = stored_key(directory)
    chain = Chain(directory / LOG_NAME, key)
    with open_for_reading(chain.path) as file:
        record = next(chain.walk(file), None)
    if record is None:
        raise EvidenceError(f"{chain.path}: empty")
    if ring is not None:
        try:
            name, _ = ring.get(key.key_id)
        except SignatureInvalid as error:
            raise EvidenceError(f"{directory / PUBLIC_KEY_NAME}: {error}") from error
        if name != record.writer:
            raise EvidenceError(f"{chain.path}: of {record.writer}, with the key of {name}")
    return record.writer, key


def _verify_log(directory: Path, known: KeyRing, quotes: _Quotes) -> LogSummary:
    chain = Chain(directory / LOG_NAME, stored_key(directory))
    with open_for_reading(chain.path) as file:
        for record in chain.walk(file):
            if record.kind in MESSAGE_KINDS:
                message, quote = _quote(record, chain, known)
                quotes.setdefault(message, []).append(quote)
        if chain.torn(file):
            raise chain.error("is cut off: a crash, or the end is missing")
    if not chain.closed:
        raise EvidenceError(
            f"{chain.path}: not closed after record {chain.count - 1}: its program still runs, "
            "was killed, or the end is missing"
        )
    blobs = _verify_blobs(directory / BLOBS_NAME, chain)
    return LogSummary(
        directory, chain.writer, chain.key.key_id, chain.count, chain.signatures, blobs
    )


def _quote(record: Record, chain: Chain, known: KeyRing) -> tuple[tuple[str, str], _Quote]:
    """Check a quoted message by itself: its form, its signature, its id [4.1]."""
    number = record.number
    try:
        message_id, topic, envelope = quoted_message(record.body)
        verified = verify1(
            envelope, known, media_type(record.kind), topic.encode(), RECORD_BYTES_MAX
        )
        payload = decode_cbor(verified.payload, RECORD_BYTES_MAX)
    except SignatureInvalid as error:
        if error.reason != "unknown_key":
            raise chain.error(f"quotes a message that does not verify: {error}", number) from error
        signer = None
    except (FileFormatError, InternalError) as error:
        raise chain.error(f"does not quote a message as it should: {error}", number) from error
    else:
        signer = verified.key_id
        if not isinstance(payload, dict) or payload.get("id") != message_id:
            raise chain.error(f"quotes another message than {message_id!r}", number)
    digest = hashlib.sha256(encode_cbor([topic, envelope])).digest()
    quote = _Quote(chain.path, number, chain.key.key_id, signer, digest)
    return (record.kind, message_id), quote


def _compare_quotes(
    message: tuple[str, str], quoted: list[_Quote], writers: Mapping[bytes, object]
) -> None:
    """The logs must agree, and who signed a message must have recorded it [4.2], [4.3]."""
    first = quoted[0]
    name = " ".join(message)
    for other in quoted[1:]:
        if other.digest != first.digest:
            raise EvidenceError(
                f"{other.path}: record {other.number} has another {name} "
                f"than record {first.number} of {first.path}"
            )
    if first.signer_key in writers and all(q.log_key != first.signer_key for q in quoted):
        raise EvidenceError(
            f"{first.path}: record {first.number} has {name}, "
            "and the log of its signer does not: the end of that log is missing"
        )


def _verify_blobs(directory: Path, chain: Chain) -> int:
    """All named blobs are there and every file is what its name says; returns their number."""
    with os.scandir(directory) as entries:
        found = {Path(entry.path) for entry in entries}
    for path in sorted(found):
        check_blob(path)
    for name, number in chain.blobs.items():
        if directory / name not in found:
            raise chain.error(f"names blob {name}, which is missing", number)
    return len(found)
