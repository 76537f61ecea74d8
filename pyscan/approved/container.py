"""The file of an approved configuration of kind *linux*: docs/spec/approved.md section 3.

Hundreds of megabytes that are mapped, not read: head, the blobs of all units, and last a
signed manifest that names every blob with its length and SHA-256. Who asks for a unit gets
it only after its blob was checked against the manifest.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from pyscan.approved.encode import ALIGNMENT, decode_unit, encode_unit
from pyscan.approved.envelope import replacing, seal, unseal
from pyscan.approved.fields import rows, text, typed
from pyscan.approved.linux import Anchor, LinuxApproved, Provenance
from pyscan.approved.unit import VMLINUX, Unit
from pyscan.errors import ApprovedFileError, InternalError
from pyscan.keys import KeyRing, SigningKey

MAGIC: Final = b"PYSCANL1"
#: Magic, where the manifest begins, its length; zeros up to the first blob.
_HEAD: Final = struct.Struct("<8sQQ40x")
FILE_BYTES_MAX: Final = 4 << 30
MANIFEST_BYTES_MAX: Final = 16 << 20
UNITS_MAX: Final = 1 << 15
PROVENANCE_MAX: Final = 64
ANCHORS_MAX: Final = 64
ANCHOR_BYTES_MAX: Final = 4096
OFFSETS_MAX: Final = 1 << 16
DIGEST_BYTES: Final = 32
#: How the kernel spells a module (KBUILD_MODNAME, scripts/Makefile.lib).
_NAME: Final = re.compile(r"\w{1,255}", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a unit's blob lies in the file, and its SHA-256."""

    offset: int
    length: int
    sha256: bytes


class ModuleUnits(Mapping[str, Unit]):
    """The modules of a file. A unit is checked and decoded when it is first asked for.

    Asking for one raises ApprovedFileError when its blob is not what was signed.
    """

    def __init__(self, path: Path, blobs: memoryview, entries: Mapping[str, _Entry]) -> None:
        self._path = path
        self._blobs = blobs
        self._entries = entries
        self._units: dict[str, Unit] = {}

    def __getitem__(self, name: str) -> Unit:
        unit = self._units.get(name)
        if unit is None:
            entry = self._entries[name]
            with _naming(self._path):
                unit = self._units[name] = _load_unit(self._blobs, name, entry)
        return unit

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def save_linux(approved: LinuxApproved, path: Path, key: SigningKey) -> int:
    """Sign and write an approved configuration atomically; returns the file's size in bytes.

    Each module is asked for once, in the order of names. Raises ApprovedFileError when the
    file cannot be written, InternalError when a unit is not what it should be.
    """
    with replacing(path) as stream:
        stream.write(bytes(_HEAD.size))
        units = [_save_unit(stream, VMLINUX, approved.vmlinux)]
        units += [
            _save_unit(stream, name, approved.modules[name]) for name in sorted(approved.modules)
        ]
        start = stream.tell()
        manifest = seal("linux", _fields(approved) | {"units": units}, key)
        stream.write(manifest)
        if stream.tell() > FILE_BYTES_MAX or len(manifest) > MANIFEST_BYTES_MAX:
            raise ApprovedFileError(f"{path}: would be larger than {FILE_BYTES_MAX} bytes")
        stream.seek(0)
        stream.write(_HEAD.pack(MAGIC, start, len(manifest)))
    return start + len(manifest)


def load_linux(path: Path, descriptor: int, ring: KeyRing) -> tuple[LinuxApproved, str]:
    """Map and verify a file that begins with MAGIC; returns it and the approver's name.

    The kernel's own unit is checked at once, modules when they are asked for. Raises
    ApprovedFileError, also when anyone but the owner may write the file: what is mapped
    changes with it, after it was checked.
    """
    size = _check_owner(path, os.fstat(descriptor))
    data = memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ))
    start, length = _read_head(path, data)
    message = bytes(data[start : start + length])
    fields, approver = unseal(path, message, ring, "linux", MANIFEST_BYTES_MAX)
    with _naming(path):
        entries = _entries(fields, start)
        return _approved(path, fields, data[:start], entries), approver


@contextmanager
def _naming(place: Path | str) -> Iterator[None]:
    """Let errors say where they are."""
    try:
        yield
    except ApprovedFileError as error:
        raise ApprovedFileError(f"{place}: {error}") from error


def _save_unit(stream: BinaryIO, name: str, unit: Unit) -> list[object]:
    if unit.name != name or not _NAME.fullmatch(name):
        raise InternalError(f"unit {unit.name!r} is listed as {name!r}")
    blob = encode_unit(unit)
    stream.write(blob)
    return [name, len(blob), hashlib.sha256(blob).digest()]


def _load_unit(blobs: memoryview, name: str, entry: _Entry) -> Unit:
    blob = blobs[entry.offset : entry.offset + entry.length]
    if hashlib.sha256(blob).digest() != entry.sha256:
        raise ApprovedFileError(
            f"unit {name} is not what was signed; the file is damaged or was edited, "
            "compile it again"
        )
    with _naming(f"unit {name}"):
        unit = decode_unit(blob)
    if unit.name != name:
        raise ApprovedFileError(f"unit {name} holds {unit.name!r}")
    return unit


def _check_owner(path: Path, status: os.stat_result) -> int:
    """The file's size, when it is bounded and only its trusted owner may write it."""
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ApprovedFileError(
            f"{path}: others may write to it (mode {stat.S_IMODE(status.st_mode):04o}), and it is "
            f"used while it is mapped; run: chmod go-w '{path}'"
        )
    if status.st_uid not in (0, os.geteuid()):
        raise ApprovedFileError(
            f"{path}: belongs to user {status.st_uid}, who may change it while it is used; "
            "copy it, so that it belongs to root or to the user that runs pyscan"
        )
    if not _HEAD.size < status.st_size <= FILE_BYTES_MAX:
        raise ApprovedFileError(
            f"{path}: {status.st_size} bytes, not {_HEAD.size} to {FILE_BYTES_MAX}; cut off?"
        )
    return status.st_size


def _read_head(path: Path, data: memoryview) -> tuple[int, int]:
    """Where the manifest is: it ends with the file."""
    head = bytes(data[: _HEAD.size])
    _magic, start, length = _HEAD.unpack(head)
    if head != _HEAD.pack(MAGIC, start, length):
        raise ApprovedFileError(f"{path}: not a valid approved configuration: damaged head")
    if start < _HEAD.size or start + length != len(data) or length > MANIFEST_BYTES_MAX:
        raise ApprovedFileError(
            f"{path}: not a valid approved configuration: {len(data)} bytes do not fit its head; "
            "the file is cut off or too long"
        )
    return start, length


def _fields(approved: LinuxApproved) -> dict[str, object]:
    """The fields of the manifest, without the common header and the units."""
    return {
        "release": approved.release,
        "banner": approved.banner,
        "series": approved.series,
        "provenance": [
            [p.package, p.version, p.architecture, p.sha256] for p in approved.provenance
        ],
        "anchors": [[a.name, a.offset, a.data] for a in approved.anchors],
        "offsets": dict(approved.offsets),
    }


def _entries(fields: Mapping[str, object], end: int) -> dict[str, _Entry]:
    """The units: vmlinux, then modules by name; their blobs fill the file up to `end`."""
    entries: dict[str, _Entry] = {}
    at = _HEAD.size
    previous = ""
    for row in rows(fields, "units", 3, UNITS_MAX):
        name, length = row.text(), row.whole(FILE_BYTES_MAX)
        sha256 = row.data(DIGEST_BYTES, DIGEST_BYTES)
        if length % ALIGNMENT:
            raise ApprovedFileError(f"unit {name} has a length that is not aligned")
        if not entries:
            if name != VMLINUX:
                raise ApprovedFileError(f"the first unit is {name!r}, not {VMLINUX}")
        elif name == VMLINUX or name <= previous or not _NAME.fullmatch(name):
            raise ApprovedFileError(f"unit {name!r} is no module, repeated or out of order")
        else:
            previous = name
        entries[name] = _Entry(at, length, sha256)
        at += length
    if not entries or at != end:
        raise ApprovedFileError(f"the units end at byte {at}, the manifest begins at {end}")
    return entries


def _approved(
    path: Path, fields: Mapping[str, object], blobs: memoryview, entries: Mapping[str, _Entry]
) -> LinuxApproved:
    vmlinux = _load_unit(blobs, VMLINUX, entries[VMLINUX])
    modules = {name: entry for name, entry in entries.items() if name != VMLINUX}
    return LinuxApproved(
        release=text(fields, "release"),
        banner=text(fields, "banner"),
        series=text(fields, "series"),
        provenance=_provenance(fields),
        anchors=_anchors(fields, len(vmlinux.image)),
        offsets=_offsets(typed(fields, "offsets", dict)),
        vmlinux=vmlinux,
        modules=ModuleUnits(path, blobs, modules),
    )


def _provenance(fields: Mapping[str, object]) -> tuple[Provenance, ...]:
    found = tuple(
        # A directory has neither version nor architecture.
        Provenance(row.text(), row.text(empty=True), row.text(empty=True), row.text())
        for row in rows(fields, "provenance", 4, PROVENANCE_MAX)
    )
    if not all(re.fullmatch("[0-9a-f]{64}", package.sha256) for package in found):
        raise ApprovedFileError("field 'provenance' has a SHA-256 that is none")
    return found


def _anchors(fields: Mapping[str, object], image: int) -> tuple[Anchor, ...]:
    found = tuple(
        Anchor(row.text(), row.whole(), row.data(1, ANCHOR_BYTES_MAX))
        for row in rows(fields, "anchors", 3, ANCHORS_MAX)
    )
    if not found:
        raise ApprovedFileError("field 'anchors' is empty: the kernel could not be found")
    for anchor in found:
        if anchor.offset + len(anchor.data) > image:
            raise ApprovedFileError(f"anchor {anchor.name} lies outside the image")
    return found


def _offsets(values: Mapping[object, object]) -> dict[str, int]:
    if len(values) > OFFSETS_MAX:
        raise ApprovedFileError(f"{len(values)} type offsets; at most {OFFSETS_MAX} may be")
    offsets: dict[str, int] = {}
    for path, offset in values.items():
        if not isinstance(path, str) or type(offset) is not int or not 0 <= offset < 1 << 32:
            raise ApprovedFileError("field 'offsets' has an entry that is no path with an offset")
        offsets[path] = offset
    return offsets
