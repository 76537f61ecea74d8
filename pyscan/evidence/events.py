"""What the evidence tells, in the order of time: for people and for other systems."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from pyscan.errors import EvidenceError, FileFormatError
from pyscan.evidence.captured import Capture
from pyscan.evidence.chain import (
    BLOB,
    CAPTURE,
    CHECKPOINT,
    LOG_NAME,
    MESSAGE_KINDS,
    Chain,
    Record,
    open_for_reading,
    stored_key,
)
from pyscan.evidence.found import find_evidence, identify
from pyscan.evidence.quotes import Quoted, read_quote
from pyscan.keys import KeyRing

#: Records that say nothing to anybody but a verifier.
_SILENT: Final = frozenset({BLOB, CHECKPOINT})
_NS_PER_S: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Event:
    """A record of a log, or what a capture without its log tells."""

    time_ns: int  # of the record, by its writer's clock
    writer: str
    number: int | None  # of the record; None: from a capture
    kind: str
    body: Mapping[str, object]  # of a verified message: its payload; of another: empty
    message: Quoted | None = None

    @property
    def happened_ns(self) -> int:
        """When it happened: what a verified message says of itself, else `time_ns`."""
        for name, unit in (("at", 1), ("iat", _NS_PER_S)):
            value = self.body.get(name)
            if self.message and type(value) is int and moment(value * unit):
                return value * unit
        return self.time_ns

    @property
    def verified(self) -> bool:
        """False for a message whose signer's key is not at hand."""
        return self.message is None or self.message.signer_key is not None


def read_events(directory: Path, ring: KeyRing | None = None) -> Iterator[Event]:
    """All events in and below `directory`; nothing is given before all of it was checked.

    Checked are the chains and all signatures, not blobs and captured files, and a log may
    still be written to. `ring` as for `verify_directory`. Raises EvidenceError.
    """
    try:
        deque(_events(directory, ring), maxlen=0)
        yield from _events(directory, ring)
    except OSError as error:
        raise EvidenceError(
            f"{error.filename or directory}: cannot be read: {error.strerror}"
        ) from error


def moment(time_ns: int) -> datetime | None:
    """A time of an event; None when it is none that a calendar has."""
    try:
        seconds, rest = divmod(time_ns, _NS_PER_S)
        return datetime.fromtimestamp(seconds, tz=UTC).replace(microsecond=rest // 1000)
    except (OverflowError, ValueError, OSError):
        return None


def plain(value: object, name: str = "") -> object:
    """A value fit for JSON: bytes in hex, and numbers that are addresses or too large for it."""
    if isinstance(value, bytes):
        return value.hex()
    if type(value) is int and (name in {"address", "frame"} or abs(value) >= 1 << 53):
        return f"{value:#x}"
    if isinstance(value, Mapping):
        return {str(key): plain(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item, name) for item in value]
    return value


def _events(directory: Path, ring: KeyRing | None) -> Iterator[Event]:
    found = find_evidence(directory)
    whose = identify(found, ring)
    streams = [_log_events(place, whose.known) for place in found.logs]
    streams += [_capture_events(capture, whose.known) for capture in whose.captures]
    seen: set[tuple[str, str, str]] = set()
    for event in heapq.merge(*streams, key=lambda event: event.time_ns):
        # A capture and the log of its writer tell the same twice.
        if event.message is not None:
            same = (event.writer, event.kind, event.message.id)
        elif event.kind == CAPTURE:
            same = (event.writer, event.kind, str(event.body.get("manifest")))
        else:
            yield event
            continue
        if same not in seen:
            seen.add(same)
            yield event


def _log_events(directory: Path, known: KeyRing) -> Iterator[Event]:
    chain = Chain(directory / LOG_NAME, stored_key(directory))
    with open_for_reading(chain.path) as file:
        for record in chain.walk(file):
            if record.kind in _SILENT:
                continue
            try:
                yield _record_event(record, known)
            except FileFormatError as error:
                raise chain.error(str(error), record.number) from error


def _record_event(record: Record, known: KeyRing) -> Event:
    message = None
    body: Mapping[str, object] = record.body
    if record.kind in MESSAGE_KINDS:
        message = read_quote(record.kind, record.body, known)
        body = message.payload
    return Event(record.time_ns, record.writer, record.number, record.kind, body, message)


def _capture_events(capture: Capture, known: KeyRing) -> Iterator[Event]:
    """Of the time when it was finished: the messages were there by then."""
    manifest = capture.manifest
    at_ns, writer = manifest.finished_ns, manifest.writer
    for _, message in capture.messages(known):
        yield Event(at_ns, writer, None, message.kind, message.payload, message)
    yield Event(at_ns, writer, None, CAPTURE, capture.record())
