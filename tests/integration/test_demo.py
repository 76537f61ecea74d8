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


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A TMPDIR of the demonstration's own; at the end nothing may be left of it.

    Its path is short: one that is too long for sockets would not be used.
    """
    directory = Path(tempfile.mkdtemp(prefix="demo-", dir="/tmp"))
    before = set(Path("/dev/shm").iterdir())
    yield directory
    directory.rmdir()  # fails unless it is empty
    left = {path for path in Path("/dev/shm").iterdir() if path.name.startswith("pyscan-")}
    assert left <= before
    assert _processes_that_name(directory) == []


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


def _demo(scratch: Path, guest_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pyscan", "demo", "--guest", str(guest_dir), *arguments],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--action", "freeze", "--tamper", "text", "--machine", "q35"],
        ["--action", "kill", "--tamper", "syscall", "--machine", "pc"],
        ["--action", "freeze", "--tamper", "external", "--machine", "q35"],
    ],
    ids=lambda options: "-".join(options[1::2]),
)
def test_the_main_job(scratch: Path, guest_dir: Path, tmp_path: Path, options: list[str]) -> None:
    action, keep = options[1], tmp_path / "evidence"
    process = _demo(scratch, guest_dir, *options, "--keep", str(keep), "--json")
    output, steps = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, steps
    document = json.loads(output)
    assert document["verified"] is True
    assert set(document["checks"].values()) == {True}
    assert document["action"] == action
    assert document["source"].startswith("qemu:")
    finding = document["finding"]
    assert re.fullmatch(r"0x[0-9a-f]+", finding["physical_frame"])
    assert finding["expected"] != finding["actual"]
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("steps_seen", [0, 1, 2, 3])
def test_interrupted_at_any_step_it_leaves_nothing(
    scratch: Path, guest_dir: Path, number: signal.Signals, steps_seen: int
) -> None:
    process = _demo(scratch, guest_dir)
    assert process.stdout is not None
    if steps_seen == 0:
        deadline = time.monotonic() + TIMEOUT_S
        while not list(scratch.iterdir()):  # the run directory: the guest is being started
            assert time.monotonic() < deadline
            assert process.poll() is None
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


def test_a_missing_guest_is_one_line(scratch: Path, tmp_path: Path) -> None:
    process = _demo(scratch, tmp_path / "nowhere")
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 4
    assert errors.count("\n") == 1
    assert "make setup" in errors


def test_evidence_is_never_written_over(scratch: Path, guest_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    process = _demo(scratch, guest_dir, "--keep", str(tmp_path))
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert "not empty" in errors
