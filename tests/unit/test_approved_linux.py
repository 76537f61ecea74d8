"""Files of kind linux: the container, modules on demand, and everything that is refused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from enrolled import APPROVER
from units import (
    assert_same_linux,
    build_linux,
    build_unit,
)

from pyscan.approved import (
    LinuxApproved,
    container,
    load_approved,
    save_linux,
)
from pyscan.approved.container import MAGIC
from pyscan.approved.envelope import seal
from pyscan.approved.linux import Anchor, Provenance
from pyscan.cose import decode_cbor
from pyscan.errors import ApprovedFileError, InternalError
from pyscan.keys import KeyRing, SigningKey

RING = KeyRing.of({"approver": APPROVER.public}, "approver")
HEAD_BYTES = 64


def load(path: Path) -> LinuxApproved:
    approved, approver = load_approved(path, RING)
    assert isinstance(approved, LinuxApproved)
    assert approver == "approver"
    return approved


def assert_refused(path: Path, match: str | None = None) -> None:
    """Neither the file nor, when it opens, all of its modules can be had."""
    with pytest.raises(ApprovedFileError, match=match) as caught:
        list(load(path).modules.values())
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good file."""
    path = tmp_path / "linux.approved"
    save_linux(build_linux(), path, APPROVER)
    return path


# --- the file -------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    approved = build_linux(["nf_tables", "loop", "x_tables"])
    assert save_linux(approved, path, APPROVER) == path.stat().st_size
    assert_same_linux(approved, load(path))


def test_a_kernel_without_modules(tmp_path: Path) -> None:
    save_linux(build_linux([]), tmp_path / "f", APPROVER)
    assert len(load(tmp_path / "f").modules) == 0


def test_same_content_same_bytes(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "again"
    save_linux(build_linux(["nf_tables", "loop"]), other, APPROVER)
    assert other.read_bytes() == path.read_bytes()
    save_linux(load(path), other, APPROVER)
    assert other.read_bytes() == path.read_bytes()


def test_modules_are_loaded_when_they_are_asked_for(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[-3000] ^= 1  # in the last module
    path.write_bytes(damaged)
    modules = load(path).modules
    assert (list(modules), len(modules)) == (["loop", "nf_tables"], 2)
    assert "nf_tables" in modules
    assert "vmlinux" not in modules
    assert modules["loop"] is modules["loop"]
    for _ in range(2):
        with pytest.raises(ApprovedFileError, match="unit nf_tables is not what was signed"):
            modules["nf_tables"]
    with pytest.raises(KeyError):
        modules["no_such"]
    assert modules.get("no_such") is None


def test_what_is_mapped_outlives_the_file(path: Path) -> None:
    approved = load(path)
    path.unlink()
    assert_same_linux(build_linux(), approved)


def test_the_old_file_stays_mapped_when_it_is_replaced(path: Path) -> None:
    approved = load(path)
    save_linux(build_linux(["tun"]), path, APPROVER)
    assert_same_linux(build_linux(), approved)
    assert list(load(path).modules) == ["tun"]


def test_every_97th_cut_is_noticed(path: Path) -> None:
    data = path.read_bytes()
    for length in range(0, len(data), 97):
        path.write_bytes(data[:length])
        assert_refused(path)


@pytest.mark.parametrize("more", [b"\0", bytes(64), b"\xf6", MAGIC])
def test_additions_are_noticed(path: Path, more: bytes) -> None:
    path.write_bytes(path.read_bytes() + more)
    assert_refused(path, "do not fit its head")


def test_flipped_bits_are_noticed(path: Path) -> None:
    data = path.read_bytes()
    start = int.from_bytes(data[8:16], "little")
    for at in [*range(HEAD_BYTES), *range(HEAD_BYTES, start, 61), *range(start, len(data))]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        assert_refused(path)


def test_a_foreign_signer(tmp_path: Path) -> None:
    save_linux(build_linux(), tmp_path / "foreign", SigningKey.generate())
    assert_refused(tmp_path / "foreign", "is not pinned")


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The fields of the manifest, and the blobs."""
    data = path.read_bytes()
    start = int.from_bytes(data[8:16], "little")
    message = decode_cbor(data[start + 1 :], len(data))
    assert isinstance(message, list)
    fields = decode_cbor(message[2], len(data))
    assert isinstance(fields, dict)
    return fields, data[HEAD_BYTES:start]


def write(path: Path, fields: dict[str, Any], blobs: bytes, kind: str = "linux") -> None:
    """A file with another manifest, signed by the approver."""
    manifest = seal(kind, fields, APPROVER)
    head = MAGIC + (HEAD_BYTES + len(blobs)).to_bytes(8, "little")
    head += len(manifest).to_bytes(8, "little")
    path.write_bytes(head + bytes(HEAD_BYTES - len(head)) + blobs + manifest)


Rows = list[list[Any]]


def without_the_last(units: Rows) -> Rows:
    return units[:-1]


def swapped(units: Rows) -> Rows:
    return [units[0], units[2], units[1]]


def vmlinux_last(units: Rows) -> Rows:
    return [*units[1:], units[0]]


def named(name: object) -> Callable[[Rows], Rows]:
    return lambda units: [*units[:-1], [name, *units[-1][1:]]]


def longer(by: int) -> Callable[[Rows], Rows]:
    return lambda units: [*units[:-1], [units[-1][0], units[-1][1] + by, units[-1][2]]]


def moved(by: int) -> Callable[[Rows], Rows]:
    """The border between the last two blobs at another place."""
    return lambda units: [
        units[0],
        [units[1][0], units[1][1] + by, units[1][2]],
        [units[2][0], units[2][1] - by, units[2][2]],
    ]


def hashed(digest: object) -> Callable[[Rows], Rows]:
    return lambda units: [*units[:-1], [*units[-1][:2], digest]]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without_the_last, "the units end at byte"),
        (swapped, "out of order"),
        (vmlinux_last, "the first unit is 'loop'"),
        (lambda units: [], "the units end"),
        (lambda units: [*units, units[-1]], "repeated"),
        (lambda units: [*units, units[0]], "is no module"),
        (lambda units: [row[:2] for row in units], "not 3 values"),
        (lambda units: {}, "units"),
        (lambda units: units * 11000, "33000 rows"),
        (named("other"), "unit other holds 'nf_tables'"),
        (named("nf/tables"), "is no module"),
        (named("nf\u00fctables"), "is no module"),
        (named(""), "empty"),
        (named(None), "text that is none"),
        (longer(64), "the units end"),
        (longer(-64), "the units end"),
        (longer(1), "not aligned"),
        (longer(1 << 63), "number"),
        (moved(64), "unit loop is not what was signed"),
        (moved(-64), "unit loop is not what was signed"),
        (hashed(bytes(32)), "unit nf_tables is not what was signed"),
        (hashed(bytes(31)), "too few"),
        (hashed("0" * 32), "too few"),
    ],
)
def test_wrong_tables_signed_by_a_good_key(
    path: Path, change: Callable[[Rows], Any], match: str
) -> None:
    fields, blobs = parts(path)
    write(path, fields, blobs)
    assert_same_linux(build_linux(), load(path))
    write(path, fields | {"units": change(fields["units"])}, blobs)
    assert_refused(path, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"release": ""}, "release"),
        ({"release": "6.1\x1b[2J"}, "not printable"),
        ({"banner": None}, "banner"),
        ({"banner": "x" * 1024}, "banner"),
        ({"series": 6}, "series"),
        ({"provenance": None}, "provenance"),
        ({"provenance": [["a", "1", "amd64", "0" * 63]]}, "SHA-256 that is none"),
        ({"provenance": [["a", "1", "amd64", "0" * 64]] * 65}, "65 rows"),
        ({"anchors": []}, "'anchors' is empty"),
        ({"anchors": [["a", 0, b""]]}, "too few"),
        ({"anchors": [["a", 0, bytes(4097)]]}, "too many"),
        ({"anchors": [["a", 0x2FFF, b"ab"]]}, "anchor a lies outside"),
        ({"anchors": [["a", 0, "b"]]}, "bytes"),
        ({"offsets": []}, "offsets"),
        ({"offsets": {"a": -1}}, "offsets"),
        ({"offsets": {"a": 1 << 32}}, "offsets"),
        ({"offsets": {"a": True}}, "offsets"),
        ({"offsets": {1: 1}}, "offsets"),
        ({"offsets": {str(n): n for n in range(65537)}}, "65537 type offsets"),
    ],
)
def test_wrong_fields_signed_by_a_good_key(path: Path, changes: dict[str, Any], match: str) -> None:
    fields, blobs = parts(path)
    write(path, fields | changes, blobs)
    assert_refused(path, match)


FIELDS = ("release", "banner", "series", "provenance", "anchors", "offsets", "units")


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_needed(path: Path, field: str) -> None:
    fields, blobs = parts(path)
    assert set(fields) == {*FIELDS, "format", "version", "kind"}
    del fields[field]
    write(path, fields, blobs)
    assert_refused(path, field)


def test_a_damaged_unit_signed_by_a_good_key(path: Path) -> None:
    fields, blobs = parts(path)
    start = fields["units"][0][1]
    blob = bytearray(blobs[start : start + fields["units"][1][1]])
    blob[:8] = (1 << 63).to_bytes(8, "little")
    units = [fields["units"][0], ["loop", len(blob), hashlib.sha256(blob).digest()]]
    write(path, fields | {"units": units}, blobs[:start] + blob)
    assert_refused(path, "unit loop: the unit's header is cut off")


def test_kinds_in_files_that_are_not_theirs(path: Path) -> None:
    fields, blobs = parts(path)
    write(path, {name: fields[name] for name in FIELDS}, blobs, kind="snapshot")
    assert_refused(path, "kind 'snapshot': this pyscan reads version 1, kind 'linux'")
    path.write_bytes(seal("linux", {name: fields[name] for name in FIELDS}, APPROVER))
    assert_refused(path, "kind 'linux': this pyscan reads version 1, kind 'snapshot'")


# --- the file system ------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o777, 0o664])
def test_a_file_that_others_may_write(path: Path, mode: int) -> None:
    path.chmod(mode)
    assert_refused(path, f"others may write to it .mode {mode:04o}.*chmod go-w")
    path.chmod(mode & ~0o022)
    load(path)


def test_a_file_of_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:
        os.chown(path, 65534, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 65534)
    assert_refused(path, "belongs to user .* copy it")


def test_what_is_written_can_be_read_whatever_the_umask(tmp_path: Path) -> None:
    for mask, mode in ((0, 0o644), (0o002, 0o644), (0o077, 0o600)):
        path = tmp_path / f"{mask:o}"
        before = os.umask(mask)
        try:
            save_linux(build_linux(), path, APPROVER)
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == mode
        load(path)


def test_oversize(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = path.stat().st_size
    monkeypatch.setattr(container, "FILE_BYTES_MAX", size)
    load(path)
    monkeypatch.setattr(container, "FILE_BYTES_MAX", size - 1)
    assert_refused(path, f"{size} bytes, not")
    before = path.read_bytes()
    with pytest.raises(ApprovedFileError, match="would be larger"):
        save_linux(build_linux(), path, APPROVER)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_nowhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(ApprovedFileError, match="cannot be written"):
        save_linux(build_linux(), tmp_path / "missing" / "file", APPROVER)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "approved",
    [
        build_linux([], modules={"other": build_unit("loop")}),
        build_linux([], vmlinux=build_unit("loop")),
        build_linux(["nf-tables"]),
        build_linux([], modules={"loop": build_unit("loop", slots=())}),
    ],
)
def test_a_defect_leaves_the_old_file(path: Path, approved: LinuxApproved) -> None:
    before = path.read_bytes()
    with pytest.raises(InternalError):
        save_linux(approved, path, APPROVER)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_fields_of_all_kinds(tmp_path: Path) -> None:
    package = Provenance("linux-modules", "1~rc1+b2", "amd64", "ab" * 32)
    approved = build_linux(
        provenance=(package, package),
        anchors=(Anchor("x", 0, b"\0\xff"),),
        offsets={"a": 0, "b.c": (1 << 32) - 1},
    )
    save_linux(approved, tmp_path / "f", APPROVER)
    assert_same_linux(approved, load(tmp_path / "f"))
