"""What a capture is made of, and its signed manifest [7]. Shared by writing and verifying."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from pyscan.cose import decode_cbor, encode_cbor, media_type
from pyscan.errors import FileFormatError
from pyscan.evidence.chain import HASH_BYTES, WRITER, LogMark

MANIFEST_NAME: Final = "manifest.cose"
#: The signed messages that a capture belongs to [7.4].
MESSAGES_NAME: Final = "messages.cborseq"
#: How the directory of a capture is called until it is whole [7.2].
UNFINISHED_SUFFIX: Final = ".unfinished"

VERSION: Final = 1
CONTENT_TYPE: Final = media_type("capture")
EXTERNAL_AAD: Final = b"pyscan/v1/capture"
MANIFEST_BYTES_MAX: Final = 1 << 20
FILES_MAX: Final = 1024
FILE_BYTES_MAX: Final = 1 << 46  # the most memory that QEMU gives to a machine
FACTS_MAX: Final = 64

#: A file, or a file in one directory. Nothing hidden, nothing that leads out.
_PART: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_NAME: Final = re.compile(rf"{_PART}(/{_PART})?")
_FACT: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_FACT_CHARACTERS_MAX: Final = 512
_TIME_NS_MAX: Final = (1 << 63) - 1
_KEYS: Final = {"v", "writer", "started", "finished", "facts", "files", "log"}

Facts = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class CapturedFile:
    """A file as it was when it was written; `size` in bytes."""

    size: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was captured, from when to when, by whom."""

    writer: str
    started_ns: int
    finished_ns: int
    facts: Facts
    files: Mapping[str, CapturedFile]
    log: LogMark | None  # where the writer's log stood; None: it kept none

    @property
    def bytes_total(self) -> int:
        """Sum of the sizes of all files."""
        return sum(file.size for file in self.files.values())

    def encode(self) -> bytes:
        """What is signed."""
        fields = {
            "v": VERSION,
            "writer": self.writer,
            "started": self.started_ns,
            "finished": self.finished_ns,
            "facts": dict(self.facts),
            "files": {
                name: {"size": file.size, "sha256": file.sha256}
                for name, file in self.files.items()
            },
            "log": self.log and {"n": self.log.number, "sha256": self.log.sha256},
        }
        return encode_cbor(fields)

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """Read a verified payload. Raises FileFormatError: what is wrong with it."""
        fields = decode_cbor(payload, MANIFEST_BYTES_MAX)
        if not isinstance(fields, dict) or fields.keys() != _KEYS or fields["v"] != VERSION:
            raise FileFormatError(f"not a manifest of version {VERSION}")
        writer = fields["writer"]
        if not isinstance(writer, str) or not WRITER.fullmatch(writer):
            raise FileFormatError("its writer is not a name")
        return cls(
            writer,
            _number(fields["started"], _TIME_NS_MAX),
            _number(fields["finished"], _TIME_NS_MAX),
            _facts(fields["facts"]),
            _files(fields["files"]),
            _mark(fields["log"]),
        )


def is_capture_name(name: str) -> bool:
    """Whether a file of a capture may be called so."""
    return _NAME.fullmatch(name) is not None and name != MANIFEST_NAME


def check_facts(facts: Mapping[str, object]) -> None:
    """Raises FileFormatError unless they are few, short, and have names."""
    if len(facts) > FACTS_MAX:
        raise FileFormatError(f"more than {FACTS_MAX} facts")
    for name, value in facts.items():
        if not isinstance(name, str) or not _FACT.fullmatch(name):
            raise FileFormatError(f"{name!r} cannot name a fact")
        if type(value) is not int and not (
            isinstance(value, str) and len(value) <= _FACT_CHARACTERS_MAX
        ):
            raise FileFormatError(f"fact {name} is no number or short text")


def page_name(frame: int) -> str:
    """The file that holds a page of memory; `frame` is its guest-physical address / 4096."""
    return f"pages/{frame:#x}"


def capture_record(manifest: Manifest, digest: bytes, name: str) -> dict[str, object]:
    """The body of the record of a capture; `digest` is of the signed manifest [7.5]."""
    return {
        "manifest": digest.hex(),
        "directory": name,
        "files": len(manifest.files),
        "bytes": manifest.bytes_total,
        "facts": dict(manifest.facts),
    }


def unfinished(directory: Path) -> Path:
    """Where a capture is written before it gets its name."""
    return directory.with_name(directory.name + UNFINISHED_SUFFIX)


def _number(value: object, highest: int) -> int:
    if type(value) is not int or not 0 <= value <= highest:
        raise FileFormatError("a number that is none, or out of its range")
    return value


def _digest(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) != HASH_BYTES:
        raise FileFormatError("a SHA-256 that is none")
    return value


def _facts(value: object) -> Facts:
    if not isinstance(value, dict):
        raise FileFormatError("its facts are no map")
    check_facts(value)
    return value


def _files(value: object) -> dict[str, CapturedFile]:
    if not isinstance(value, dict) or len(value) > FILES_MAX:
        raise FileFormatError(f"its files are no map of at most {FILES_MAX}")
    files = {}
    for name, file in value.items():
        if not isinstance(name, str) or not is_capture_name(name):
            raise FileFormatError(f"{name!r} cannot be a file of a capture")
        if not isinstance(file, dict) or file.keys() != {"size", "sha256"}:
            raise FileFormatError(f"{name} is listed without exactly size and SHA-256")
        files[name] = CapturedFile(_number(file["size"], FILE_BYTES_MAX), _digest(file["sha256"]))
    return files


def _mark(value: object) -> LogMark | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {"n", "sha256"}:
        raise FileFormatError("the place in the log is not one")
    return LogMark(_number(value["n"], _TIME_NS_MAX), _digest(value["sha256"]))
