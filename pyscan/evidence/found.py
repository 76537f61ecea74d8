"""Evidence in a tree of directories: where it is and whose [5.1]."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pyscan.errors import EvidenceError, SignatureInvalid
from pyscan.evidence.captured import Capture, read_capture
from pyscan.evidence.chain import (
    LOG_NAME,
    PUBLIC_KEY_NAME,
    Chain,
    open_for_reading,
    stored_key,
)
from pyscan.evidence.manifest import MANIFEST_NAME, UNFINISHED_SUFFIX
from pyscan.keys import KeyRing, PublicKey

#: Directories that are looked into; a larger tree is not one of ours.
DIRECTORIES_MAX: Final = 4096


@dataclass(slots=True)
class Found:
    """Directories with a log, with a capture, and with what was to become one."""

    logs: list[Path] = field(default_factory=list)
    captures: list[Path] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)


def find_evidence(directory: Path) -> Found:
    """Walk in and below `directory`. Raises EvidenceError when there is nothing, OSError."""

    def refuse(error: OSError) -> None:
        # os.walk would leave out what it cannot list, and evidence with it.
        raise error

    found = Found()
    for count, (place, names, files) in enumerate(os.walk(directory, onerror=refuse)):
        if count >= DIRECTORIES_MAX:
            raise EvidenceError(f"{directory}: more than {DIRECTORIES_MAX} directories")
        names.sort()
        if place.endswith(UNFINISHED_SUFFIX):
            found.unfinished.append(Path(place))
        elif MANIFEST_NAME in files:
            found.captures.append(Path(place))
        else:
            if LOG_NAME in files:
                found.logs.append(Path(place))
            continue
        names.clear()  # what is in it belongs to it
    if not (found.logs or found.captures or found.unfinished):
        raise EvidenceError(
            f"{directory}: no evidence log ({LOG_NAME}) and no capture ({MANIFEST_NAME}) "
            "here or below"
        )
    return found


@dataclass(frozen=True, slots=True)
class Whose:
    """Captures with authentic manifests, and the keys that what was found is verified with."""

    captures: list[Capture]
    log_keys: frozenset[bytes]  # key ids of the logs' writers
    known: KeyRing  # the pinned keys; without any, those of all writers


def identify(found: Found, ring: KeyRing | None) -> Whose:
    """The writers of everything; the ring, if there is one, must know their keys [5.4].

    Raises EvidenceError.
    """
    writers: dict[bytes, tuple[str, PublicKey]] = {}
    for place in found.logs:
        _add_writer(writers, place, *_log_writer(place), ring)
    log_keys = frozenset(writers)
    captures = [read_capture(place) for place in found.captures]
    for capture in captures:
        _add_writer(writers, capture.directory, capture.manifest.writer, capture.key, ring)
    return Whose(captures, log_keys, KeyRing("writer", writers) if ring is None else ring)


def _log_writer(directory: Path) -> tuple[str, PublicKey]:
    """The writer that a log names, and the key beside it."""
    key = stored_key(directory)
    chain = Chain(directory / LOG_NAME, key)
    with open_for_reading(chain.path) as file:
        record = next(chain.walk(file), None)
    if record is None:
        raise EvidenceError(f"{chain.path}: empty")
    return record.writer, key


def _add_writer(
    writers: dict[bytes, tuple[str, PublicKey]],
    directory: Path,
    writer: str,
    key: PublicKey,
    ring: KeyRing | None,
) -> None:
    if ring is not None:
        try:
            name, _ = ring.get(key.key_id)
        except SignatureInvalid as error:
            raise EvidenceError(f"{directory / PUBLIC_KEY_NAME}: {error}") from error
        if name != writer:
            raise EvidenceError(f"{directory}: of {writer}, with the key of {name}")
    if writers.setdefault(key.key_id, (writer, key))[0] != writer:
        raise EvidenceError(f"{directory}: {writer} has the key of {writers[key.key_id][0]}")
