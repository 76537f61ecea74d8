"""Verifying evidence: all logs and captures below a directory, and against each other."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from pyscan.errors import EvidenceError, FileFormatError
from pyscan.evidence.captured import Capture
from pyscan.evidence.chain import (
    BLOBS_NAME,
    CAPTURE,
    LOG_NAME,
    MESSAGE_KINDS,
    Chain,
    LogMark,
    check_blob,
    open_for_reading,
    stored_key,
)
from pyscan.evidence.found import find_evidence, identify
from pyscan.evidence.quotes import Quoted, read_quote
from pyscan.keys import KeyRing


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
class CaptureSummary:
    """One verified capture."""

    directory: Path
    writer: str
    key_id: bytes
    files: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class EvidenceSummary:
    """What `verify_directory` found to be in order."""

    logs: tuple[LogSummary, ...]
    captures: tuple[CaptureSummary, ...]
    captures_elsewhere: int  # that the logs name, and that are not here
    messages: int  # different signed messages that the logs quote
    messages_unverified: int  # of these: signed with a key that is not at hand

    def to_json(self) -> dict[str, object]:
        """The summary as a JSON document."""
        return {
            "records": sum(log.records for log in self.logs),
            "blobs": sum(log.blobs for log in self.logs),
            "captures_elsewhere": self.captures_elsewhere,
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
            "captures": [
                {
                    "directory": str(capture.directory),
                    "writer": capture.writer,
                    "key_id": capture.key_id.hex(),
                    "files": capture.files,
                    "bytes": capture.bytes_total,
                }
                for capture in self.captures
            ],
        }


@dataclass(frozen=True, slots=True)
class _Quote:
    """A signed message as one record, or one capture, has it."""

    where: str  # file and number, for a person
    log_key: bytes | None  # key id of the log's writer; None: quoted by a capture
    message: Quoted


@dataclass(slots=True)
class _Findings:
    """What a walk over everything gathers, to be compared afterwards."""

    quotes: dict[tuple[str, str], list[_Quote]] = field(default_factory=dict)
    wanted: set[tuple[bytes, LogMark]] = field(default_factory=set)  # key id; named by captures
    marks: set[tuple[bytes, LogMark]] = field(default_factory=set)  # of these: found in the logs
    captures: set[tuple[bytes, str]] = field(default_factory=set)  # key id, manifest; from logs

    def add(self, where: str, log_key: bytes | None, message: Quoted) -> None:
        quote = _Quote(where, log_key, message)
        self.quotes.setdefault((message.kind, message.id), []).append(quote)


def verify_directory(directory: Path, ring: KeyRing | None = None) -> EvidenceSummary:
    """Verify all logs and captures in and below `directory` [5].

    `ring` pins the writers' keys by name. Without it the keys beside the logs are taken,
    which shows that the logs are consistent, not whose they are. Raises EvidenceError
    that names the file, the record and what is wrong.
    """
    try:
        return _verify_all(directory, ring)
    except OSError as error:
        raise EvidenceError(
            f"{error.filename or directory}: cannot be read: {error.strerror}"
        ) from error


def _verify_all(directory: Path, ring: KeyRing | None) -> EvidenceSummary:
    found = find_evidence(directory)
    for place in found.unfinished:
        raise EvidenceError(
            f"{place}: a capture that is not finished: its program still writes it, or was "
            "killed and will take it again; no evidence of anything"
        )
    whose = identify(found, ring)
    findings = _Findings()
    for capture in whose.captures:
        if capture.manifest.log is not None:
            findings.wanted.add((capture.key.key_id, capture.manifest.log))
    logs = tuple(_verify_log(place, whose.known, findings) for place in found.logs)
    captures = tuple(_verify_capture(each, whose.known, findings) for each in whose.captures)
    for capture in whose.captures:
        if capture.key.key_id in whose.log_keys:
            _compare_capture(capture, findings)
    for quoted in findings.quotes.values():
        _compare_quotes(quoted, whose.log_keys)
    here = {capture.digest.hex() for capture in whose.captures}
    elsewhere = {name for _, name in findings.captures} - here
    unverified = sum(quoted[0].message.signer_key is None for quoted in findings.quotes.values())
    return EvidenceSummary(logs, captures, len(elsewhere), len(findings.quotes), unverified)


def _verify_log(directory: Path, known: KeyRing, findings: _Findings) -> LogSummary:
    chain = Chain(directory / LOG_NAME, stored_key(directory))
    key_id = chain.key.key_id
    with open_for_reading(chain.path) as file:
        for record in chain.walk(file):
            if (key_id, chain.mark) in findings.wanted:
                findings.marks.add((key_id, chain.mark))
            if record.kind == CAPTURE:
                findings.captures.add((key_id, str(record.body.get("manifest"))))
            if record.kind in MESSAGE_KINDS:
                try:
                    message = read_quote(record.kind, record.body, known)
                except FileFormatError as error:
                    raise chain.error(str(error), record.number) from error
                findings.add(f"{chain.path}: record {record.number}", key_id, message)
        if chain.torn(file):
            raise chain.error("is cut off: a crash, or the end is missing")
    if not chain.closed:
        raise EvidenceError(
            f"{chain.path}: not closed after record {chain.count - 1}: its program still runs, "
            "was killed, or the end is missing"
        )
    blobs = _verify_blobs(directory / BLOBS_NAME, chain)
    return LogSummary(directory, chain.writer, key_id, chain.count, chain.signatures, blobs)


def _verify_capture(capture: Capture, known: KeyRing, findings: _Findings) -> CaptureSummary:
    capture.check_files()
    for number, message in capture.messages(known):
        findings.add(f"{capture.directory}: message {number}", None, message)
    manifest = capture.manifest
    return CaptureSummary(
        capture.directory,
        manifest.writer,
        capture.key.key_id,
        len(manifest.files),
        manifest.bytes_total,
    )


def _compare_capture(capture: Capture, findings: _Findings) -> None:
    """The log of its writer is the one that the capture names, and names it [7.5]."""
    mark, key_id, writer = capture.manifest.log, capture.key.key_id, capture.manifest.writer
    if mark is None:
        return
    if (key_id, mark) not in findings.marks:
        raise EvidenceError(
            f"{capture.path}: made when record {mark.number} of the log of {writer} was another, "
            "or that log was longer: it was cut off or written anew"
        )
    if (key_id, capture.digest.hex()) not in findings.captures:
        raise EvidenceError(
            f"{capture.path}: the log of {writer} does not name it: the end of that log is missing"
        )


def _compare_quotes(quoted: list[_Quote], log_keys: frozenset[bytes]) -> None:
    """The logs must agree, and who signed a message must have recorded it [4.2], [4.3]."""
    first = quoted[0]
    name = f"{first.message.kind} {first.message.id}"
    for other in quoted[1:]:
        if other.message.digest != first.message.digest:
            raise EvidenceError(f"{other.where} has another {name} than {first.where}")
    signer = first.message.signer_key
    if signer in log_keys and all(quote.log_key != signer for quote in quoted):
        raise EvidenceError(
            f"{first.where} has {name}, "
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
