"""The demonstration as a user runs it: it tells the truth, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.guest

TIMEOUT_S = 90


class Scratch:
    """A TMPDIR of the demonstration's own, with a path short enough for sockets."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="demo-", dir="/tmp"))
        self._runs: set[str] = set()

    def note_run(self) -> bool:
        """Note the names of run directories that are there now; whether there are any."""
        found = {entry.name for entry in self.path.iterdir()}
        self._runs |= found
        return bool(found)

    def assert_nothing_left(self) -> None:
        """RAM files are named after their run directory."""
        self.path.rmdir()  # fails unless it is empty
        assert self._runs
        assert [f for run in self._runs for f in Path("/dev/shm").glob(f"{run}*")] == []
        assert _processes_that_name(self.path) == []


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    directory = Scratch()
    yield directory
    if directory.path.exists():
        directory.path.rmdir()


def _processes_that_name(directory: Path) -> list[str]:
    """Command lines of processes that have a path below `directory` in them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it ended while we looked
                continue
            if str(directory) in line:
                found.append(line)
    return found


def _demo(scratch: Scratch, guest_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pyscan", "demo", "--guest", str(guest_dir), *arguments],
        env={**os.environ, "TMPDIR": str(scratch.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_run(scratch: Scratch, process: subprocess.Popen[str]) -> None:
    """Wait for the run directory: the guest is being started."""
    deadline = time.monotonic() + TIMEOUT_S
    while not scratch.note_run():
        assert time.monotonic() < deadline
        assert process.poll() is None


@pytest.mark.parametrize(
    "options",
    [
        ["--action", "freeze", "--tamper", "text", "--machine", "q35"],
        ["--action", "kill", "--tamper", "syscall", "--machine", "pc"],
        ["--action", "freeze", "--tamper", "external", "--machine", "q35"],
        ["--action", "freeze", "--tamper", "external", "--approve", "package"],
        ["--action", "freeze", "--tamper", "text", "--source", "card"],
    ],
    ids=lambda options: "-".join(options[1::2]),
)
def test_the_main_job(
    scratch: Scratch, guest_dir: Path, tmp_path: Path, options: list[str]
) -> None:
    action, keep = options[1], tmp_path / "evidence"
    process = _demo(scratch, guest_dir, *options, "--keep", str(keep), "--json")
    _wait_for_run(scratch, process)
    output, steps = process.communicate(timeout=TIMEOUT_S)
    scratch.assert_nothing_left()
    assert process.returncode == 0, steps
    document = json.loads(output)
    assert document["verified"] is True
    assert set(document["checks"].values()) == {True}
    assert document["action"] == action
    if "card" in options:
        assert document["source"].startswith("card:/dev/shm/")
        assert document["card"]["engine"] == "dma"
        assert document["card"]["pages"] >= document["coverage"]["pages_swept"]
        assert document["card"]["bus_accesses"] > 0
        assert "the monitor had no access to the guest's RAM file" in document["checks"]
    else:
        assert document["source"].startswith(f"qemu:{scratch.path}/")
        assert document["card"] is None
    finding = document["finding"]
    assert re.fullmatch(r"0x[0-9a-f]+", finding["physical_frame"])
    assert finding["expected"] != finding["actual"]
    if "package" in options:
        assert finding["kind"] == "code"
        assert re.search(r"\+0x[0-9a-f]+ \(\.text", finding["place"])
        assert " | " in finding["actual"]  # bytes and instructions
    assert document["report"]["state"] == "succeeded"
    assert document["report"]["vm_state"] == {"freeze": "paused", "kill": "gone"}[action]
    assert all(value > 0 for value in document["timings_ms"].values())
    check = subprocess.run(
        [sys.executable, "-m", "pyscan", "evidence", "verify", str(keep), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stderr
    evidence = json.loads(check.stdout)
    assert evidence["blobs"] == 1  # the suspect page
    assert {log["writer"] for log in evidence["logs"]} == {"card-1", "control-1", "host-1"}


def test_a_module_that_no_package_has_is_no_demonstration(guest_dir: Path) -> None:
    command = ["demo", "--approve", "package", "--guest", str(guest_dir)]
    found = subprocess.run(
        [sys.executable, "-m", "pyscan", *command], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert "--tamper external" in found.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("steps_seen", [0, 1, 2, 3])
def test_interrupted_at_any_step_it_leaves_nothing(
    scratch: Scratch, guest_dir: Path, number: signal.Signals, steps_seen: int
) -> None:
    process = _demo(scratch, guest_dir)
    assert process.stdout is not None
    _wait_for_run(scratch, process)
    seen = 0
    while seen < steps_seen:
        line = process.stdout.readline()
        assert line, "the demonstration ended before it was interrupted"
        seen += line.startswith(" ok ")
    process.send_signal(number)
    process.send_signal(number)  # impatience must not cut the cleaning short
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    scratch.assert_nothing_left()


def test_a_missing_guest_is_one_line(scratch: Scratch, tmp_path: Path) -> None:
    process = _demo(scratch, tmp_path / "nowhere")
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 4
    assert errors.count("\n") == 1
    assert "make setup" in errors


def test_evidence_is_never_written_over(scratch: Scratch, guest_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    process = _demo(scratch, guest_dir, "--keep", str(tmp_path))
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert "not empty" in errors
