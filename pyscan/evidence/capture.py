"""Writing a capture: files about one machine at one moment, with a signed manifest [7].

All is written into `{directory}.unfinished`, which gets its name when everything is on the
disk and signed. So what has its name is whole, and what a crash left can be told from it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from pyscan.cose import encode_cbor, sign1
from pyscan.errors import EvidenceError, FileFormatError, InternalError, UsageError
from pyscan.evidence.chain import (
    CAPTURE,
    MESSAGE_KINDS,
    PUBLIC_KEY_NAME,
    frame,
    open_for_reading,
    quoted_message,
)
from pyscan.evidence.dump import MemoryDump
from pyscan.evidence.log import EvidenceLog
from pyscan.evidence.manifest import (
    CONTENT_TYPE,
    EXTERNAL_AAD,
    FILES_MAX,
    MANIFEST_NAME,
    MESSAGES_NAME,
    CapturedFile,
    Manifest,
    capture_record,
    check_facts,
    is_capture_name,
    page_name,
    unfinished,
)
from pyscan.keys import SigningKey, create_file, sync_directory

_MODE = 0o400


class CaptureWriter:
    """One capture in the making. Raises UsageError for a bad name, OSError when a disk fails.

    What an interrupted one has left in the same place is removed: a capture is taken again,
    never mended.
    """

    def __init__(self, directory: Path, facts: Mapping[str, str | int]) -> None:
        """`directory` must not exist. `facts` say what was captured, why and how."""
        try:
            check_facts(facts)
        except FileFormatError as error:
            raise UsageError(f"{directory}: not facts of a capture: {error}") from error
        if os.path.lexists(directory):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(directory))
        self._name = directory
        self._directory = unfinished(directory)
        if os.path.lexists(self._directory):
            shutil.rmtree(self._directory)
        self._directory.mkdir(mode=0o700, parents=True)
        self._facts = dict(facts)
        self._files: dict[str, CapturedFile] = {}
        self._messages = bytearray()
        self._started_ns = time.time_ns()

    def add_file(self, path_inside: str, source: Path) -> None:
        """Move a file in; it is read once for its digest, and on the disk when this returns."""
        target = self._new(path_inside)
        if source.is_symlink() or not source.is_file():
            raise UsageError(f"{source}: not a regular file, so no part of a capture")
        shutil.move(source, target)
        with open_for_reading(target) as file:
            digest = hashlib.file_digest(file, "sha256").digest()  # type: ignore[arg-type]
            os.fsync(file.fileno())
            self._files[path_inside] = CapturedFile(file.tell(), digest)
        sync_directory(target.parent)

    def add_bytes(self, path_inside: str, data: bytes) -> None:
        """Write a file."""
        create_file(self._new(path_inside), data, _MODE)
        self._files[path_inside] = CapturedFile(len(data), hashlib.sha256(data).digest())

    def add_json(self, path_inside: str, document: object) -> None:
        """Write a JSON document, names in order."""
        text = json.dumps(document, indent=1, sort_keys=True) + "\n"
        self.add_bytes(path_inside, text.encode())

    def add_page(self, frame_number: int, page: bytes) -> None:
        """Write one page of memory apart; `frame_number` is its physical address / 4096."""
        self.add_bytes(page_name(frame_number), page)

    def add_pages(self, dump: str, frames: Iterable[int]) -> list[int]:
        """Write pages of an added memory dump apart; returns the frames that it does not have.

        Raises EvidenceError when it is no dump.
        """
        path = self._directory / dump
        missing = []
        with open_for_reading(path) as file:
            try:
                memory = MemoryDump(file)
            except FileFormatError as error:
                raise EvidenceError(f"{path}: {error}") from error
            for number in frames:
                page = memory.page(number)
                if page is None:
                    missing.append(number)
                else:
                    self.add_page(number, page)
        return missing

    def add_message(self, kind: str, body: Mapping[str, object]) -> None:
        """Quote a signed message that the capture belongs to; kind and body as in the log."""
        quoted_message(body)
        if kind not in MESSAGE_KINDS:
            raise UsageError(f"{kind!r} is no kind of a signed message")
        self._messages += frame(encode_cbor({"kind": kind, "body": dict(body)}))

    def finish(self, key: SigningKey, name: str, log: EvidenceLog | None = None) -> Path:
        """Sign the manifest in the writer's name; returns its path.

        `log` is the writer's log: the manifest tells where it stands, and it gets a record
        that names the manifest. Each then vouches for the other.
        """
        if self._messages:
            self.add_bytes(MESSAGES_NAME, bytes(self._messages))
        self.add_bytes(PUBLIC_KEY_NAME, key.public.pem())
        manifest = Manifest(
            writer=name,
            started_ns=self._started_ns,
            finished_ns=time.time_ns(),
            facts=self._facts,
            files=self._files,
            log=log.checkpoint() if log else None,
        )
        payload = manifest.encode()
        try:
            Manifest.decode(payload)
        except FileFormatError as error:
            raise InternalError(f"a manifest that could not be read again: {error}") from error
        envelope = sign1(payload, key, CONTENT_TYPE, EXTERNAL_AAD)
        create_file(self._directory / MANIFEST_NAME, envelope, _MODE)
        if log:
            # Before the name: a capture that is there is on record.
            digest = hashlib.sha256(envelope).digest()
            log.append(CAPTURE, capture_record(manifest, digest, self._name.name))
        self._directory.rename(self._name)
        sync_directory(self._name.parent)
        return self._name / MANIFEST_NAME

    def _new(self, name: str) -> Path:
        if not is_capture_name(name) or name in self._files:
            raise UsageError(f"{name!r} cannot name a file of a capture, or names one already")
        if len(self._files) >= FILES_MAX:
            raise UsageError(f"a capture has at most {FILES_MAX} files")
        path = self._directory / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        return path


def finished_capture(directory: Path) -> Path | None:
    """The manifest of a capture that was finished under this name; None: it was not."""
    manifest = directory / MANIFEST_NAME
    return manifest if manifest.is_file() else None
