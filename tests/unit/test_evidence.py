"""Evidence: what a log holds, what it survives, and that no change to it goes unseen."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyscan import protocol
from pyscan.errors import EvidenceError, InternalError, UsageError
from pyscan.evidence import EvidenceLog, message_body, verify_directory
from pyscan.keys import KeyRing, SigningKey
from pyscan.records import Action, Command, Report, ReportState

ROOT = Path(__file__).parents[2]
KEY, OTHER_KEY = SigningKey.generate(), SigningKey.generate()
PAGE = bytes(range(256)) * 16


def _records(directory: Path) -> list[dict[str, object]]:
    """The records, read with another CBOR implementation."""
    records = []
    with (directory / "log.cborseq").open("rb") as file:
        while file.peek(1):
            records.append(cbor2.loads(cbor2.load(file)))
    return records


def _frames(directory: Path) -> list[bytes]:
    data = (directory / "log.cborseq").read_bytes()
    frames = []
    while data:
        end = 5 + int.from_bytes(data[1:5])
        frames.append(data[:end])
        data = data[end:]
    return frames


def _write_small_log(directory: Path, key: SigningKey = KEY, writer: str = "monitor") -> None:
    with EvidenceLog.open(directory, key, writer) as log:
        name = log.attach(PAGE)
        log.append("finding", {"blob": name, "address": 0xFFFF_FFFF_8100_0000})
        log.checkpoint()
        log.append("note", {"text": "after the checkpoint"})


@pytest.fixture
def small(tmp_path: Path) -> Path:
    directory = tmp_path / "monitor"
    _write_small_log(directory)
    return directory


def _refused(directory: Path, ring: KeyRing | None = None) -> str:
    with pytest.raises(EvidenceError) as refused:
        verify_directory(directory, ring)
    message = str(refused.value)
    assert str(directory) in message
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------- what it holds


def test_a_log_verifies_and_can_be_read_by_others(small: Path) -> None:
    summary = verify_directory(small.parent, KeyRing.of({"monitor": KEY.public}))
    (log,) = summary.logs
    assert (log.directory, log.writer, log.key_id) == (small, "monitor", KEY.key_id)
    assert (log.records, log.signatures, log.blobs) == (6, 2, 1)
    records = _records(small)
    assert [record["kind"] for record in records] == [
        "opened",
        "blob",
        "finding",
        "checkpoint",
        "note",
        "closed",
    ]
    assert [record["n"] for record in records] == list(range(6))
    assert {record["writer"] for record in records} == {"monitor"}
    assert records[4]["body"] == {"text": "after the checkpoint"}
    assert summary.to_json()["records"] == 6
    assert summary == verify_directory(small)


def test_records_are_on_the_disk_when_append_returns(tmp_path: Path) -> None:
    log = EvidenceLog.open(tmp_path, KEY, "monitor")
    name = log.attach(PAGE)
    assert (tmp_path / "blobs" / name).read_bytes() == PAGE
    first = log.append("note", {"n": 1})
    assert _records(tmp_path)[-1]["body"] == {"n": 1}
    log.append("note", {"n": 2})
    assert _records(tmp_path)[-1]["prev"] == bytes.fromhex(first)
    log.close()
    log.close()
    with pytest.raises(EvidenceError, match="closed"):
        log.append("note", {})


def test_the_same_blob_is_stored_once(tmp_path: Path) -> None:
    with EvidenceLog.open(tmp_path, KEY, "monitor") as log:
        assert log.attach(PAGE) == log.attach(PAGE)
        log.attach(b"")
    with EvidenceLog.open(tmp_path, KEY, "monitor") as log:
        log.attach(PAGE)
    assert [record["kind"] for record in _records(tmp_path)].count("blob") == 2
    assert verify_directory(tmp_path).logs[0].blobs == 2


def test_a_closed_log_goes_on(small: Path) -> None:
    with EvidenceLog.open(small, KEY, "monitor") as log:
        log.append("note", {})
    kinds = [record["kind"] for record in _records(small)]
    assert kinds[5:] == ["closed", "opened", "note", "closed"]
    assert verify_directory(small).logs[0].records == 9


def test_threads_share_a_log(tmp_path: Path) -> None:
    with EvidenceLog.open(tmp_path, KEY, "monitor") as log:

        def work(number: int) -> None:
            for count in range(10):
                log.append("note", {"thread": number, "count": count})

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    assert verify_directory(tmp_path).logs[0].records == 42


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("closed", {}),
        ("opened", {}),
        ("blob", {}),
        ("Note", {}),
        ("", {}),
        ("note", {"ratio": 0.5}),
        ("note", {"thing": object()}),
        ("note", {"large": bytes(1 << 20)}),
        ("note", {"deep": [[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]}),
        ("verdict", {}),
        ("command", {"id": "x", "topic": "x", "envelope": "text"}),
        ("report", {"id": "x", "topic": "x", "envelope": b"", "more": 1}),
    ],
)
def test_what_could_not_be_verified_is_not_written(
    tmp_path: Path, kind: str, body: dict[str, object]
) -> None:
    with EvidenceLog.open(tmp_path, KEY, "monitor") as log:
        with pytest.raises(InternalError):
            log.append(kind, body)
        log.append("note", {"still": "good"})
    assert verify_directory(tmp_path).logs[0].records == 3


# -------------------------------------------------------------------------------- what it sees


def test_no_changed_byte_goes_unseen(small: Path) -> None:
    ring = KeyRing.of({"monitor": KEY.public})
    for path in (path for path in sorted(small.rglob("*")) if path.is_file()):
        good = path.read_bytes()
        stride = 1 if len(good) < 4096 else 97
        for at in range(0, len(good), stride):
            changed = bytearray(good)
            changed[at] ^= 1 << (at % 8)
            path.write_bytes(changed)
            _refused(small, ring)
        path.write_bytes(good)
    verify_directory(small, ring)


@settings(max_examples=60)
@given(data=st.data())
def test_no_rearranged_record_goes_unseen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("log")
    _write_small_log(directory)
    frames = _frames(directory)
    picked = data.draw(st.lists(st.sampled_from(frames), max_size=8))
    (directory / "log.cborseq").write_bytes(b"".join(picked))
    if picked == frames:
        verify_directory(directory)
    else:
        _refused(directory)


def test_what_is_wrong_is_named(small: Path) -> None:
    frames = _frames(small)
    log = small / "log.cborseq"

    def with_frames(*picked: bytes) -> str:
        log.write_bytes(b"".join(picked))
        return _refused(small)

    assert "record 2 says it is number 3" in with_frames(*frames[:2], *frames[3:])
    assert "record 2 says it is number 1" in with_frames(*frames[:2], frames[1], *frames[2:])
    assert "not closed after record 4" in with_frames(*frames[:5])
    assert "record 5 is cut off" in with_frames(*frames[:5], frames[5][:-1])
    assert "record 5 is cut off" in with_frames(*frames[:5], frames[5][:3])
    assert "record 6 does not begin" in with_frames(*frames, b"\0")
    assert "record 0 claims 4294967295 bytes" in with_frames(b"\x5a\xff\xff\xff\xff")
    assert "record 0 is damaged" in with_frames(b"\x5a\x00\x00\x00\x01\xa0")
    assert "empty" in with_frames()
    assert "cannot follow" in with_frames(*frames, _chained([*frames, frames[5]])[6])


def _reframed(frame: bytes, **changes: object) -> bytes:
    """A record with other content, in a frame that fits."""
    encoded = cbor2.dumps(cbor2.loads(frame[5:]) | changes, canonical=True)
    return b"\x5a" + len(encoded).to_bytes(4) + encoded


def _chained(frames: list[bytes]) -> list[bytes]:
    """The same records with numbers and hashes that fit together."""
    chained: list[bytes] = []
    for number, frame in enumerate(frames):
        previous = hashlib.sha256(chained[-1][5:]).digest() if chained else bytes(32)
        chained.append(_reframed(frame, n=number, prev=previous))
    return chained


def test_a_consistent_chain_without_the_key_is_seen(small: Path) -> None:
    frames = _frames(small)
    assert _chained(frames) == frames
    for edited in (
        [*frames[:2], _reframed(frames[2], body={"address": 0}), *frames[3:]],
        [*frames[:2], *frames[3:]],
        [*frames[:3], *frames[4:]],
        [*frames[:4], frames[4], *frames[4:]],
        [*frames[:5], _reframed(frames[5], t=1)],
    ):
        (small / "log.cborseq").write_bytes(b"".join(_chained(edited)))
        assert "has a signature that was made for another record" in _refused(small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda blob: blob.unlink(), "record 1 names blob .*, which is missing"),
        (lambda blob: blob.write_bytes(PAGE[:-1]), "the blob was changed"),
        (lambda blob: blob.write_bytes(b""), "the blob was changed"),
        (lambda blob: blob.with_name("0" * 64).write_bytes(PAGE), "the blob was changed"),
        (lambda blob: blob.with_name("notes.txt").write_bytes(b""), "not a blob of the log"),
        (lambda blob: blob.rename(blob.with_suffix(".old")), "not a blob of the log"),
        (lambda blob: (blob.unlink(), blob.symlink_to("/dev/zero")), "cannot be read"),
        (lambda blob: (blob.unlink(), os.mkfifo(blob)), "not a regular file"),
        (lambda blob: (blob.unlink(), blob.mkdir()), "Is a directory|not a regular file"),
        (lambda blob: shutil.rmtree(blob.parent), "cannot be read"),
    ],
)
def test_blobs_are_as_they_were(
    small: Path, change: Callable[[Path], object], message: str
) -> None:
    (blob,) = (small / "blobs").iterdir()
    change(blob)
    with pytest.raises(EvidenceError, match=message):
        verify_directory(small)


def test_the_ring_pins_the_writers(small: Path) -> None:
    assert "not pinned" in _refused(small, KeyRing.of({"monitor": OTHER_KEY.public}))
    message = _refused(small, KeyRing.of({"control": KEY.public}))
    assert "of monitor, with the key of control" in message


def test_another_key_beside_the_log_is_seen(small: Path) -> None:
    (small / "writer.pub").write_bytes(OTHER_KEY.public.pem())
    assert "another key than writer.pub" in _refused(small)
    (small / "writer.pub").write_bytes(KEY.public.pem() + b"\n")
    assert "not as it was written" in _refused(small)
    (small / "writer.pub").unlink()
    assert "cannot read the key" in _refused(small)


def test_two_writers_cannot_have_one_key(small: Path) -> None:
    _write_small_log(small.parent / "other", KEY, "other")
    assert "other has the key of monitor" in _refused(small.parent)


def test_where_there_is_no_evidence(tmp_path: Path) -> None:
    assert "no evidence log" in _refused(tmp_path)
    assert "cannot be read: No such file" in _refused(tmp_path / "missing")
    (tmp_path / "log.cborseq").mkdir()
    assert "no evidence log" in _refused(tmp_path)


def test_a_tree_without_end_is_not_walked(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyscan.evidence.found.DIRECTORIES_MAX", 2)
    verify_directory(small)
    (small / "more").mkdir()
    assert "more than 2 directories" in _refused(small)


def test_a_number_that_is_a_truth_value_is_damage(tmp_path: Path) -> None:
    _write_small_log(tmp_path)
    frames = _frames(tmp_path)
    for change in ({"n": False}, {"t": True}):
        (tmp_path / "log.cborseq").write_bytes(_reframed(frames[0], **change))
        assert "record 0 is damaged" in _refused(tmp_path)


# ------------------------------------------------------------------------------ crash and restart


WRITER = """
import sys
from pathlib import Path
from pyscan.evidence import EvidenceLog
from pyscan.keys import SigningKey
directory = Path(sys.argv[1])
log = EvidenceLog.open(directory / "log", SigningKey.load(directory / "key"), "monitor")
number = 0
while True:
    print(log.append("note", {"number": number, "page": log.attach(number.to_bytes(4096))}))
    sys.stdout.flush()
    number += 1
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    KEY.save(tmp_path / "key")
    for session in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        acknowledged = [process.stdout.readline().strip() for _ in range(5 + session)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
        process.wait()
        process.stdout.close()
        with EvidenceLog.open(tmp_path / "log", KEY, "monitor") as log:
            log.append("note", {"after": "the crash"})
        records = _records(tmp_path / "log")
        hashes = {record["prev"].hex() for record in records}
        assert hashes.issuperset(acknowledged)
        assert [record["kind"] for record in records].count("recovered") == session + 1
        verify_directory(tmp_path / "log")


def test_every_torn_end_is_cut_off_and_kept(tmp_path: Path) -> None:
    original = tmp_path / "original"
    log = EvidenceLog.open(original, KEY, "monitor")
    log.append("note", {"number": 1})
    kept = len((original / "log.cborseq").read_bytes())
    log.append("note", {"number": 2})
    whole = (original / "log.cborseq").read_bytes()
    log.close()
    for end in range(kept, len(whole)):
        directory = tmp_path / str(end)
        shutil.copytree(original, directory)
        (directory / "log.cborseq").write_bytes(whole[:end])
        with EvidenceLog.open(directory, KEY, "monitor") as log:
            log.append("note", {"number": 3})
        torn = whole[kept:end]
        _, _, recovered, note, _ = _records(directory)
        assert recovered["kind"] == "recovered"
        assert recovered["body"]["bytes"] == len(torn)
        assert note["body"] == {"number": 3}
        blobs = [path.read_bytes() for path in (directory / "blobs").iterdir()]
        assert blobs == ([torn] if torn else [])
        verify_directory(directory)
        for blob in (directory / "blobs").iterdir():
            blob.unlink()
            assert "which is missing" in _refused(directory)


@pytest.mark.parametrize("end", [0, 1, 4, 5, 20])
def test_a_crash_in_the_first_record(tmp_path: Path, end: int) -> None:
    log = EvidenceLog.open(tmp_path, KEY, "monitor")
    path = tmp_path / "log.cborseq"
    path.write_bytes(path.read_bytes()[:end])
    del log
    with EvidenceLog.open(tmp_path, KEY, "monitor") as log:
        log.append("note", {})
    kinds = [record["kind"] for record in _records(tmp_path)]
    assert kinds == ["opened", *(["recovered"] if end else []), "note", "closed"]
    verify_directory(tmp_path)


def test_left_over_partial_files_are_cleared(small: Path) -> None:
    (small / "blobs" / ".abc.0123.partial").write_bytes(b"half")
    assert "not a blob of the log" in _refused(small)
    EvidenceLog.open(small, KEY, "monitor").close()
    verify_directory(small)


def test_a_damaged_log_is_refused_and_left_alone(small: Path) -> None:
    path = small / "log.cborseq"
    good = path.read_bytes()
    # An edit of the last signed record itself can turn it into one without a signature: see
    # docs/spec/evidence.md section 6. Verification sees that, as tested above.
    for at in range(len(good) - len(_frames(small)[-1])):
        changed = bytearray(good)
        changed[at] ^= 1 << (at % 8)
        path.write_bytes(changed)
        with pytest.raises(EvidenceError, match=r"log\.cborseq: "):
            EvidenceLog.open(small, KEY, "monitor")
        assert path.read_bytes() == changed


def test_a_log_of_someone_else_is_refused(small: Path) -> None:
    before = (small / "log.cborseq").read_bytes()
    with pytest.raises(EvidenceError, match="the log of monitor, not of control"):
        EvidenceLog.open(small, KEY, "control")
    with pytest.raises(EvidenceError, match="choose another directory"):
        EvidenceLog.open(small, OTHER_KEY, "monitor")
    (small / "writer.pub").unlink()
    with pytest.raises(EvidenceError, match="another key"):
        EvidenceLog.open(small, OTHER_KEY, "monitor")
    assert (small / "log.cborseq").read_bytes() == before


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = EvidenceLog.open(tmp_path, KEY, "monitor")
    with pytest.raises(UsageError, match="another process writes"):
        EvidenceLog.open(tmp_path, KEY, "monitor")
    first.close()
    EvidenceLog.open(tmp_path, KEY, "monitor").close()


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot hold evidence"):
        EvidenceLog.open(tmp_path / "file", KEY, "monitor")
    with pytest.raises(UsageError, match="cannot name a writer"):
        EvidenceLog.open(tmp_path, KEY, "../monitor")


def test_a_full_disk_stops_the_log_and_damages_nothing(tmp_path: Path) -> None:
    """The limit on the file's size plays the full disk, in a process of its own."""
    KEY.save(tmp_path / "key")
    script = """
import resource, signal, sys
from pathlib import Path
from pyscan.errors import EvidenceError
from pyscan.evidence import EvidenceLog
from pyscan.keys import SigningKey
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
directory = Path(sys.argv[1])
log = EvidenceLog.open(directory / "log", SigningKey.load(directory / "key"), "monitor")
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
for attempt in (1, 2):
    try:
        while True:
            log.append("note", {"text": "x" * 1000})
    except EvidenceError as error:
        print(error)
log.close()
"""
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = run.stdout.splitlines()
    assert "cannot be written" in first
    assert "restart the program" in second
    assert (tmp_path / "log" / "log.cborseq").stat().st_size == 3000
    EvidenceLog.open(tmp_path / "log", KEY, "monitor").close()
    kinds = [record["kind"] for record in _records(tmp_path / "log")]
    assert kinds == ["opened", "note", "note", "recovered", "closed"]
    verify_directory(tmp_path / "log")


# ------------------------------------------------------------------------------- between the logs


COMMAND = Command(
    id="01ARZ3NDEKTSV4RRFFQ69G5FA0",
    issuer="control",
    audience="host-7",
    sequence=1,
    issued_s=1_800_000_000,
    expires_s=1_800_000_030,
    action=Action.FREEZE,
    vm="vm-1",
)
REPORT = Report(
    id="01ARZ3NDEKTSV4RRFFQ69G5FA1",
    command=COMMAND.id,
    host="host-7",
    vm="vm-1",
    action=Action.FREEZE,
    state=ReportState.SUCCEEDED,
    at_ns=1_800_000_001_000_000_000,
)
CONTROL_KEY, AGENT_KEY = KEY, OTHER_KEY
COMMAND_BODY = message_body(
    COMMAND.id,
    protocol.command_topic("host-7", "vm-1"),
    protocol.encode_command(COMMAND, CONTROL_KEY),
)
REPORT_BODY = message_body(
    REPORT.id,
    protocol.report_topic("host-7", COMMAND.id),
    protocol.encode_report(REPORT, AGENT_KEY),
)
Quotes = list[tuple[str, dict[str, object]]]
BOTH: Quotes = [("command", COMMAND_BODY), ("report", REPORT_BODY)]


def _two_logs(directory: Path, control: Quotes, agent: Quotes) -> Path:
    for writer, key, quotes in (
        ("control", CONTROL_KEY, control),
        ("host-7", AGENT_KEY, agent),
    ):
        with EvidenceLog.open(directory / writer, key, writer) as log:
            for kind, body in quotes:
                log.append(kind, body)
    return directory


def test_logs_that_agree(tmp_path: Path) -> None:
    _two_logs(tmp_path, BOTH, [*BOTH, BOTH[1]])
    summary = verify_directory(tmp_path)
    assert (len(summary.logs), summary.messages, summary.messages_unverified) == (2, 2, 0)
    alone = verify_directory(tmp_path / "control")
    assert (alone.messages, alone.messages_unverified) == (2, 1)
    ring = KeyRing.of({"control": CONTROL_KEY.public, "host-7": AGENT_KEY.public})
    assert verify_directory(tmp_path / "control", ring).messages_unverified == 0


def test_a_cut_off_end_shows_in_the_other_log(tmp_path: Path) -> None:
    _two_logs(tmp_path, BOTH, BOTH[:1])
    assert "the log of its signer does not" in _refused(tmp_path)
    verify_directory(tmp_path / "control")
    verify_directory(tmp_path / "host-7")


def _last_bit_flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("command", {"envelope": _last_bit_flipped(COMMAND_BODY["envelope"])}, "does not verify"),
        ("command", {"topic": protocol.command_topic("host-7", "vm-2")}, "does not verify"),
        ("command", {"id": REPORT.id}, "quotes another message"),
        ("report", {}, "does not verify"),
        ("command", {"envelope": b""}, "does not verify"),
    ],
)
def test_a_misquoted_message_is_seen(
    tmp_path: Path, kind: str, change: dict[str, object], message: str
) -> None:
    _two_logs(tmp_path, [*BOTH, (kind, COMMAND_BODY | change)], BOTH)
    assert message in _refused(tmp_path)


def test_two_versions_of_a_message_are_seen(tmp_path: Path) -> None:
    """Somebody with the agent's key signs two reports under one id."""
    other = replace(REPORT, state=ReportState.FAILED)
    twin = REPORT_BODY | {"envelope": protocol.encode_report(other, AGENT_KEY)}
    _two_logs(tmp_path, [BOTH[0], ("report", twin)], BOTH)
    message = _refused(tmp_path)
    assert "host-7/log.cborseq: record 2 has another report 01ARZ3NDEKTSV4RRFFQ69G5FA1" in message
    assert "control/log.cborseq: record 2" in message
