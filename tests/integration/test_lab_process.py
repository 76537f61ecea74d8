"""Children end with their parent, and nothing is left behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyscan.errors import LabError
from pyscan.lab.process import Child, RunDirectory

#: Starts a child, tells its number and its RAM file, and waits to be ended.
PARENT = """
import signal
from pathlib import Path
from pyscan.lab.process import Child, RunDirectory, unwind_on

with unwind_on(signal.SIGTERM), RunDirectory() as run:
    ram = run.ram_file("ram", 4096)
    with Child("sleeper", ["sleep", "600"], log=run.path / "log") as child:
        print(child.pid, run.path, ram, flush=True)
        signal.pause()
"""


@pytest.mark.parametrize(
    ("number", "cleans"), [(signal.SIGKILL, False), (signal.SIGTERM, True), (signal.SIGINT, True)]
)
def test_children_end_with_their_parent(number: signal.Signals, cleans: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        pid, *paths = parent.stdout.readline().decode().split()
        child = os.pidfd_open(int(pid))
        parent.send_signal(number)
        assert select.select([child], [], [], 10)[0], "the child lives on"
        os.close(child)
        parent.wait(10)
    left = [path for path in map(Path, paths) if path.exists()]
    assert bool(left) != cleans
    for path in left:  # what SIGKILL leaves is this test's own to remove
        if path.is_dir():
            (path / "log").unlink()
            path.rmdir()
        else:
            path.unlink()


def test_child_that_ignores_sigterm_is_killed(run_directory: RunDirectory) -> None:
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
    output = run_directory.path / "output"
    child = Child(
        "stubborn",
        [sys.executable, "-c", f"{script}; signal.pause()"],
        log=run_directory.path / "log",
        output=output,
    )
    with child:
        child.wait_until(lambda: output.stat().st_size > 0, timeout_s=10, what="its start")
        assert child.stop(grace_s=0.1) == -signal.SIGKILL


def test_early_end_is_reported_with_the_log(run_directory: RunDirectory) -> None:
    with (
        Child(
            "broken", ["sh", "-c", "echo sorry >&2; exit 7"], run_directory.path / "log"
        ) as child,
        pytest.raises(LabError, match=r"status 7 before its port.*sorry"),
    ):
        child.wait_until(lambda: False, timeout_s=10, what="its port")


def test_missing_program_says_what_to_do(run_directory: RunDirectory) -> None:
    with pytest.raises(LabError, match="no-such-program is not installed: run `make setup`"):
        Child("absent", ["no-such-program"], run_directory.path / "log")


def test_socket_paths_stay_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("deep" * 20)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with RunDirectory() as run:
        assert len(os.fsencode(run.path / ("s" * 40))) < 108
