"""Captures: what is written, what a crash leaves, and that no change to one goes unseen."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyscan import protocol
from pyscan.cose import sign1
from pyscan.errors import EvidenceError, FileFormatError, InternalError, UsageError
from pyscan.evidence import (
    CaptureWriter,
    EvidenceLog,
    finished_capture,
    message_body,
    verify_directory,
)
from pyscan.evidence.dump import MemoryDump
from pyscan.evidence.manifest import CONTENT_TYPE, EXTERNAL_AAD
from pyscan.keys import KeyRing, SigningKey
from pyscan.records import Action, Command, Report, ReportState

ROOT = Path(__file__).parents[2]
KEY, OTHER_KEY, CONTROL_KEY = (SigningKey.generate() for _ in range(3))
HOST = "host-7"
COMMAND = Command(
    id="01ARZ3NDEKTSV4RRFFQ69G5FA0",
    issuer="control",
    audience=HOST,
    sequence=1,
    issued_s=1_800_000_000,
    expires_s=1_800_000_030,
    action=Action.CAPTURE,
    vm="vm-1",
)
REPORT = Report(
    id="01ARZ3NDEKTSV4RRFFQ69G5FA1",
    command=COMMAND.id,
    host=HOST,
    vm="vm-1",
    action=Action.CAPTURE,
    state=ReportState.STARTED,
    at_ns=1_800_000_001_000_000_000,
)
COMMAND_BODY = message_body(
    COMMAND.id,
    protocol.command_topic(HOST, "vm-1"),
    protocol.encode_command(COMMAND, CONTROL_KEY),
)
REPORT_BODY = message_body(
    REPORT.id, protocol.report_topic(HOST, COMMAND.id), protocol.encode_report(REPORT, KEY)
)
FACTS = {"host": HOST, "vm": "vm-1", "command": COMMAND.id, "vm_cpus": 1}
PAGES = [bytes([number]) * 4096 for number in range(1, 9)]


def core_file(*ranges: tuple[int, list[bytes]], count: int | None = None) -> bytes:
    """An ELF core file with a segment for each run of pages at a frame."""
    table, data = b"", b""
    start = 64 + 56 * len(ranges)
    for frame, pages in ranges:
        content = b"".join(pages)
        where = (start + len(data), frame << 12, frame << 12, len(content), len(content), 0)
        table += struct.pack("<IIQQQQQQ", 1, 0, *where)
        data += content
    head = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01", 4, 62, 1, 0, 64, 0, 0, 64, 56),
        *(len(ranges) if count is None else count, 0, 0, 0),
    )
    return head + table + data


def write_capture(
    directory: Path, key: SigningKey = KEY, name: str = HOST, log: EvidenceLog | None = None
) -> Path:
    scratch = directory.with_name("scratch")
    scratch.write_bytes(core_file((0, PAGES[:4]), (0x100, PAGES[4:])))
    writer = CaptureWriter(directory, FACTS)
    writer.add_file("memory.elf", scratch)
    writer.add_bytes("screen.png", b"\x89PNG")
    writer.add_json("devices.json", {"query-status": {"running": False}})
    assert writer.add_pages("memory.elf", [2, 0x101, 0x200]) == [0x200]
    writer.add_message("command", COMMAND_BODY)
    writer.add_message("report", REPORT_BODY)
    return writer.finish(key, name, log)


@pytest.fixture
def captured(tmp_path: Path) -> Path:
    directory = tmp_path / "captures" / COMMAND.id
    directory.parent.mkdir()
    write_capture(directory)
    return directory


def refused(directory: Path, ring: KeyRing | None = None) -> str:
    with pytest.raises(EvidenceError) as error:
        verify_directory(directory, ring)
    message = str(error.value)
    assert str(directory) in message
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------- what it holds


def test_a_capture_verifies_and_can_be_read_by_others(captured: Path) -> None:
    summary = verify_directory(captured.parent, KeyRing.of({HOST: KEY.public}))
    assert summary.logs == ()
    (capture,) = summary.captures
    assert (capture.directory, capture.writer, capture.key_id) == (captured, HOST, KEY.key_id)
    assert (summary.messages, summary.messages_unverified) == (2, 1)
    assert summary.to_json()["captures"][0]["bytes"] == capture.bytes_total
    assert finished_capture(captured) == captured / "manifest.cose"
    # The same with another CBOR implementation and with the shell's tools.
    payload = cbor2.loads(cbor2.loads((captured / "manifest.cose").read_bytes()).value[2])
    assert payload["facts"] == FACTS
    assert payload["writer"] == HOST
    assert 0 < payload["started"] <= payload["finished"]
    assert payload["log"] is None
    files = {name: (file["size"], file["sha256"].hex()) for name, file in payload["files"].items()}
    found = [path for path in captured.rglob("*") if path.is_file()]
    assert {str(path.relative_to(captured)) for path in found} == {*files, "manifest.cose"}
    for name, (size, digest) in files.items():
        listed = subprocess.run(
            ["sha256sum", captured / name], capture_output=True, text=True, check=True
        )
        assert listed.stdout.split()[0] == digest
        assert (captured / name).stat().st_size == size
    assert json.loads((captured / "devices.json").read_bytes())["query-status"] == {
        "running": False
    }


def test_pages_come_out_of_the_dump(captured: Path) -> None:
    assert (captured / "pages" / "0x2").read_bytes() == PAGES[2]
    assert (captured / "pages" / "0x101").read_bytes() == PAGES[5]
    assert len(list((captured / "pages").iterdir())) == 2


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../memory.elf", "/etc/passwd", "a/../b", "pages/", "a/b/c", ".hidden"),
        *("a//b", "a\0b", "a\nb", "-rf", "x" * 129, "manifest.cose", "devices.json", "pages/../x"),
    ],
)
def test_names_that_lead_elsewhere_or_are_taken(tmp_path: Path, name: str) -> None:
    writer = CaptureWriter(tmp_path / "capture", {})
    writer.add_bytes("devices.json", b"{}")
    with pytest.raises(UsageError, match="cannot name a file"):
        writer.add_bytes(name, b"x")
    (tmp_path / "source").write_bytes(b"x")
    with pytest.raises(UsageError, match="cannot name a file"):
        writer.add_file(name, tmp_path / "source")
    writer.finish(KEY, HOST)
    assert verify_directory(tmp_path).captures[0].files == 2
    assert (tmp_path / "source").read_bytes() == b"x"


def test_what_is_no_part_of_a_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CaptureWriter(tmp_path / "capture", {})
    (tmp_path / "link").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "pipe")
    for source in ("link", "pipe", "missing"):
        with pytest.raises(UsageError, match="not a regular file"):
            writer.add_file("memory.elf", tmp_path / source)
    with pytest.raises(UsageError, match="no kind of a signed message"):
        writer.add_message("finding", COMMAND_BODY)
    with pytest.raises(InternalError):
        writer.add_message("command", {"id": "x"})
    writer.add_bytes("memory.elf", b"not a core")
    with pytest.raises(EvidenceError, match=r"memory\.elf: not a 64-bit"):
        writer.add_pages("memory.elf", [1])
    monkeypatch.setattr("pyscan.evidence.capture.FILES_MAX", 1)
    with pytest.raises(UsageError, match="at most 1 files"):
        writer.add_bytes("another", b"")
    for facts in ({"": 1}, {"A": 1}, {"a": "x" * 513}, {"a": True}, {"a": 1.0}, {"a": None}):
        with pytest.raises(UsageError, match="not facts"):
            CaptureWriter(tmp_path / "facts", facts)


def test_a_name_is_taken_once(captured: Path) -> None:
    with pytest.raises(FileExistsError):
        CaptureWriter(captured, FACTS)
    verify_directory(captured)


def test_a_large_file_is_never_in_memory_whole(tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    with dump.open("wb") as file:
        file.truncate(256 << 20)
    writer = CaptureWriter(tmp_path / "capture", {})
    tracemalloc.start()
    try:
        writer.add_file("memory.elf", dump)
        writer.finish(KEY, HOST)
        assert verify_directory(tmp_path).captures[0].bytes_total > 256 << 20
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


# ---------------------------------------------------------------------------------- every change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "memory.elf").unlink(), "memory.elf: in the manifest, and missing"),
        (lambda d: shutil.rmtree(d / "pages"), "pages: in the manifest, and missing"),
        (lambda d: (d / "pages" / "0x2").unlink(), "pages/0x2: in the manifest, and missing"),
        (lambda d: os.truncate(d / "memory.elf", 100), "memory.elf: cut off: it has 100 bytes"),
        (lambda d: os.truncate(d / "memory.elf", 1 << 40), "memory.elf: longer than it was"),
        (lambda d: (d / "screen.png").write_bytes(b"\x89PMG"), "screen.png: altered"),
        (lambda d: (d / "pages" / "0x2").write_bytes(PAGES[3]), "pages/0x2: altered"),
        (lambda d: (d / "notes").write_bytes(b""), "notes: not in the manifest"),
        (lambda d: (d / ".x.partial").write_bytes(b""), "partial: not in the manifest"),
        (lambda d: (d / "pages" / "0x3").write_bytes(b""), "pages/0x3: not in the manifest"),
        (lambda d: (d / "more").mkdir(), "more: not in the manifest"),
        (lambda d: (d / "pages" / "more").mkdir(), "pages/more: not in the manifest"),
        (lambda d: (d / "link").symlink_to("memory.elf"), "link: not in the manifest"),
        (lambda d: (d / "log.cborseq").write_bytes(b""), "log.cborseq: not in the manifest"),
        (lambda d: linked(d / "screen.png"), "screen.png: cannot be read"),
        (lambda d: linked(d / "pages"), "pages: not a directory"),
        (lambda d: linked(d / "writer.pub"), "writer.pub: cannot be read"),
        (lambda d: linked(d / "manifest.cose"), "manifest.cose: cannot be read"),
        (lambda d: piped(d / "screen.png"), "screen.png: not a regular file"),
        (lambda d: piped(d / "manifest.cose"), "manifest.cose: not a regular file"),
        (lambda d: piped(d / "messages.cborseq"), "messages.cborseq: not a regular file"),
        (lambda d: ((d / "screen.png").unlink(), (d / "screen.png").mkdir()), "screen.png"),
        (lambda d: swapped(d / "pages" / "0x2", d / "pages" / "0x101"), "pages/0x101: altered"),
        (lambda d: (d / "writer.pub").unlink(), "cannot read the key"),
        (lambda d: (d / "manifest.cose").unlink(), "no capture"),
        (lambda d: os.truncate(d / "manifest.cose", 40), "manifest.cose: does not verify"),
        (lambda d: (d / "manifest.cose").write_bytes(b""), "manifest.cose: does not verify"),
        (lambda d: os.truncate(d / "manifest.cose", 1 << 40), "at most 1048576 are accepted"),
    ],
)
def test_every_change_is_named(
    captured: Path, change: Callable[[Path], object], message: str
) -> None:
    for path in captured.iterdir():
        path.chmod(0o700)
    for path in (captured / "pages").iterdir():
        path.chmod(0o600)
    change(captured)
    assert message in refused(captured)


def linked(path: Path) -> None:
    """Move it away and leave a symbolic link to it."""
    path.rename(path.parent.parent.parent / path.name)
    path.symlink_to(path.parent.parent.parent / path.name)


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swapped(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def test_another_key_or_another_name(captured: Path) -> None:
    assert "not pinned" in refused(captured, KeyRing.of({HOST: OTHER_KEY.public}))
    assert "with the key of host-8" in refused(captured, KeyRing.of({"host-8": KEY.public}))
    (captured / "writer.pub").chmod(0o600)
    (captured / "writer.pub").write_bytes(OTHER_KEY.public.pem())
    assert "does not verify" in refused(captured)


def test_a_capture_by_a_stranger_with_his_own_key(captured: Path, tmp_path: Path) -> None:
    ring = KeyRing.of({HOST: KEY.public})
    write_capture(tmp_path / "forged", OTHER_KEY)
    assert "not pinned" in refused(tmp_path, ring)
    verify_directory(tmp_path / "forged")  # fits together; whose it is shows with pinned keys


def manifest_of(captured: Path) -> dict[str, Any]:
    message = cbor2.loads((captured / "manifest.cose").read_bytes())
    return cbor2.loads(message.value[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": 2}, "not a manifest of version 1"),
        ({"more": 1}, "not a manifest"),
        ({"writer": "a/b"}, "its writer is not a name"),
        ({"writer": 1}, "its writer is not a name"),
        ({"started": True}, "a number that is none"),
        ({"finished": -1}, "out of its range"),
        ({"facts": []}, "facts are no map"),
        ({"facts": {"a": b""}}, "fact a is no number or short text"),
        ({"facts": {"a" * n: 1 for n in range(1, 66)}}, "more than 64 facts"),
        ({"files": []}, "its files are no map"),
        ({"files": {"../evil": {"size": 0, "sha256": bytes(32)}}}, "'../evil' cannot be a file"),
        ({"files": {"/etc/passwd": {"size": 0, "sha256": bytes(32)}}}, "cannot be a file"),
        ({"files": {"manifest.cose": {"size": 0, "sha256": bytes(32)}}}, "cannot be a file"),
        ({"files": {7: {"size": 0, "sha256": bytes(32)}}}, "7 cannot be a file"),
        ({"files": {"a": {"size": 0}}}, "a is listed without exactly size and SHA-256"),
        ({"files": {"a": {"size": 1 << 47, "sha256": bytes(32)}}}, "out of its range"),
        ({"files": {"a": {"size": 0, "sha256": b""}}}, "a SHA-256 that is none"),
        ({"log": 1}, "the place in the log is not one"),
        ({"log": {"n": 0, "sha256": b""}}, "a SHA-256 that is none"),
    ],
)
def test_a_signed_manifest_that_is_nonsense(
    captured: Path, change: dict[str, object], message: str
) -> None:
    """Whoever has the key can sign anything; it must not lead the verifier astray."""
    path = captured / "manifest.cose"
    payload = cbor2.dumps(manifest_of(captured) | change, canonical=True)
    path.unlink()
    path.write_bytes(sign1(payload, KEY, CONTENT_TYPE, EXTERNAL_AAD))
    assert message in refused(captured)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture whose manifest is changed and put back."""
    path = write_capture(tmp_path_factory.mktemp("sealed") / "capture")
    path.chmod(0o600)
    return path


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0), bit=st.integers(0, 7))
def test_no_bit_of_the_manifest_can_be_changed(sealed: Path, at: int, bit: int) -> None:
    good = sealed.read_bytes()
    changed = bytearray(good)
    changed[at % len(changed)] ^= 1 << bit
    sealed.write_bytes(changed)
    try:
        assert "manifest.cose: does not verify" in refused(sealed.parent)
    finally:
        sealed.write_bytes(good)
    verify_directory(sealed.parent)


def test_a_directory_with_very_many_files(captured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyscan.evidence.captured._ENTRIES_MAX", 6)
    assert "more than 6 files" in refused(captured)


# --------------------------------------------------------------------------- crash and log


WRITER = """
import os, sys, time
from pathlib import Path
from pyscan.evidence import CaptureWriter, EvidenceLog
from pyscan.keys import SigningKey
from pyscan.evidence import capture
directory, steps = Path(sys.argv[1]), int(sys.argv[2])
key = SigningKey.load(directory / "key")

def step():
    global steps
    steps -= 1
    if steps < 0:
        os.kill(os.getpid(), 9)

real_create, real_rename = capture.create_file, Path.rename
def create_file(*arguments):
    step()
    real_create(*arguments)
    step()
def rename(*arguments):
    step()
    result = real_rename(*arguments)
    step()
    return result
capture.create_file, Path.rename = create_file, rename
(directory / "scratch").write_bytes(b"m" * 10000)
with EvidenceLog.open(directory / "log", key, "host-7") as log:
    writer = CaptureWriter(directory / "captures" / "one", {"vm": "vm-1"})
    writer.add_file("memory.elf", directory / "scratch")
    writer.add_json("devices.json", {})
    step()
    writer.finish(key, "host-7", log)
"""


def test_killed_at_every_step_it_is_never_taken_for_whole(tmp_path: Path) -> None:
    KEY.save(tmp_path / "key")
    directory = tmp_path / "captures" / "one"
    crashes = 0
    for steps in range(20):
        run = subprocess.run(
            [sys.executable, "-c", WRITER, tmp_path, str(steps)], cwd=ROOT, check=False
        )
        whole = finished_capture(directory)
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL
        crashes += 1
        EvidenceLog.open(tmp_path / "log", KEY, HOST).close()
        if whole:  # killed behind the last step
            verify_directory(tmp_path)
            shutil.rmtree(directory)
        else:
            assert "one.unfinished: a capture that is not finished" in refused(tmp_path)
    assert crashes >= 6
    assert whole is not None
    assert verify_directory(tmp_path).captures[0].files == 3
    assert [path.name for path in directory.parent.iterdir()] == ["one"]


def test_capture_and_log_vouch_for_each_other(tmp_path: Path) -> None:
    with EvidenceLog.open(tmp_path / "log", KEY, HOST) as log:
        log.append("command", COMMAND_BODY)
        log.append("report", REPORT_BODY)
        manifest = write_capture(tmp_path / "capture", log=log)
        log.append("note", {})
    summary = verify_directory(tmp_path, KeyRing.of({HOST: KEY.public}))
    assert (len(summary.logs), len(summary.captures), summary.messages) == (1, 1, 2)
    mark = manifest_of(tmp_path / "capture")["log"]
    frames = split(tmp_path / "log" / "log.cborseq")
    assert hashlib.sha256(frames[mark["n"]][5:]).digest() == mark["sha256"]
    record = cbor2.loads(frames[mark["n"] + 1][5:])
    assert record["kind"] == "capture"
    assert record["body"]["manifest"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert record["body"]["facts"] == FACTS
    assert (summary.captures_elsewhere, len(summary.captures)) == (0, 1)
    assert verify_directory(tmp_path / "capture").captures_elsewhere == 0
    # Who takes a capture away leaves its name in the log.
    assert verify_directory(tmp_path / "log").captures_elsewhere == 1


def split(path: Path) -> list[bytes]:
    data, frames = path.read_bytes(), []
    while data:
        end = 5 + int.from_bytes(data[1:5])
        frames.append(data[:end])
        data = data[end:]
    return frames


def test_a_log_that_was_cut_back_before_the_capture(tmp_path: Path) -> None:
    with EvidenceLog.open(tmp_path / "log", KEY, HOST) as log:
        log.append("command", COMMAND_BODY)
        log.append("report", REPORT_BODY)
    short = (tmp_path / "log" / "log.cborseq").read_bytes()
    with EvidenceLog.open(tmp_path / "log", KEY, HOST) as log:
        write_capture(tmp_path / "capture", log=log)
    (tmp_path / "log" / "log.cborseq").write_bytes(short)
    assert "it was cut off or written anew" in refused(tmp_path)
    # Closed again at the mark: the record that names the capture is missing.
    shutil.rmtree(tmp_path / "capture")
    with EvidenceLog.open(tmp_path / "log", KEY, HOST) as log:
        write_capture(tmp_path / "capture", log=log)
        frames = split(tmp_path / "log" / "log.cborseq")
        number = manifest_of(tmp_path / "capture")["log"]["n"]
    (tmp_path / "log" / "log.cborseq").write_bytes(b"".join(frames[: number + 1]))
    EvidenceLog.open(tmp_path / "log", KEY, HOST).close()
    assert "does not name it: the end of that log is missing" in refused(tmp_path)


def test_a_capture_and_a_log_that_quote_one_message_differently(tmp_path: Path) -> None:
    other = Report(**{**{f: getattr(REPORT, f) for f in REPORT.__slots__}, "detail": "another"})
    twin = protocol.encode_report(other, KEY)
    with EvidenceLog.open(tmp_path / "log", KEY, HOST) as log:
        log.append("report", REPORT_BODY | {"envelope": twin})
    write_capture(tmp_path / "capture")
    assert f"has another report {REPORT.id}" in refused(tmp_path)


def test_a_message_in_a_capture_that_its_signer_never_recorded(tmp_path: Path) -> None:
    EvidenceLog.open(tmp_path / "control", CONTROL_KEY, "control").close()
    write_capture(tmp_path / "capture")
    assert "the log of its signer does not" in refused(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x5a\xff\xff\xff\xff", "message 0 is damaged"),
        (b"\x5a\0\0\0\x01\xa0", "message 0 is no quoted message"),
        (b"\x00", "message 0 is damaged"),
        (b"\x5a\0\0\0\x02\xa0", "message 0 is damaged"),
    ],
)
def test_messages_that_are_none(tmp_path: Path, data: bytes, message: str) -> None:
    writer = CaptureWriter(tmp_path / "capture", {})
    writer.add_bytes("messages.cborseq", data)
    writer.finish(KEY, HOST)
    assert message in refused(tmp_path)


# ----------------------------------------------------------------------------------- dumps


def test_a_dump_gives_its_pages() -> None:
    dump = MemoryDump(BytesIO(core_file((0, PAGES[:4]), (0x100, PAGES[4:]))))
    assert [dump.page(frame) for frame in (0, 3, 0x100, 0x103)] == [
        PAGES[0],
        PAGES[3],
        PAGES[4],
        PAGES[7],
    ]
    assert [dump.page(frame) for frame in (4, 0xFF, 0x104, 1 << 60)] == [None] * 4


def test_a_dump_with_its_number_of_segments_elsewhere() -> None:
    """PN_XNUM: more than 65534 segments, as QEMU writes them."""
    data = bytearray(core_file((5, PAGES[:1]), count=0xFFFF))
    struct.pack_into("<Q", data, 40, len(data))  # e_shoff
    data += struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, 1, 0, 0)
    assert MemoryDump(BytesIO(data)).page(5) == PAGES[0]
    with pytest.raises(FileFormatError, match="cut off"):
        MemoryDump(BytesIO(data[:-1]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a 64-bit"),
        (b"\x7fELF\x01\x01\x01" + bytes(57), "not a 64-bit"),
        (core_file()[:16] + b"\x02" + core_file()[17:], "not an ELF core"),
        (core_file(count=3), "cut off"),
        (core_file((0, PAGES[:1]))[:100], "cut off"),
        (core_file()[:32] + b"\xff" * 8 + core_file()[40:], "offset of"),
    ],
)
def test_what_is_no_dump(data: bytes, message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        MemoryDump(BytesIO(data))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_hostile_dump_is_refused_or_read_within_bounds(data: st.DataObject) -> None:
    content = bytearray(core_file((0, PAGES[:2]), (0x10, PAGES[2:4])))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, 64 + 2 * 56 - 1))] = data.draw(st.integers(0, 255))
    try:
        dump = MemoryDump(BytesIO(content))
        pages = [dump.page(frame) for frame in (0, 1, 0x10, 0x11)]
    except FileFormatError:
        return
    assert all(page is None or len(page) == 4096 for page in pages)
