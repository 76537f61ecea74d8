"""Processes are told apart by more than their number."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyscan.agent.process import (
    Pidfile,
    ProcessHandle,
    identify,
    is_hypervisor,
    read_pidfile,
)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def test_identity_ends_with_the_process(sleeper: subprocess.Popen[bytes]) -> None:
    identity = identify(sleeper.pid)
    assert identity is not None
    assert identity.alive()
    assert identity == identify(sleeper.pid)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
    assert not identity.alive()
    sleeper.wait()
    assert not identity.alive()
    assert identify(sleeper.pid) is None


@pytest.mark.parametrize("change", ["start_ticks", "boot"])
async def test_another_process_with_the_same_number_is_not_hit(
    sleeper: subprocess.Popen[bytes], change: str
) -> None:
    identity = identify(sleeper.pid)
    assert identity is not None
    other = replace(identity, **{change: "x" if change == "boot" else identity.start_ticks - 1})
    with ProcessHandle(other) as handle:
        handle.kill()
        assert await handle.wait_gone(timeout_s=0.1)  # that one is gone
    assert identity.alive()


async def test_kill_is_confirmed_by_the_kernel(sleeper: subprocess.Popen[bytes]) -> None:
    identity = identify(sleeper.pid)
    assert identity is not None
    with ProcessHandle(identity) as handle:
        assert not await handle.wait_gone(timeout_s=0.05)
        handle.kill()
        assert await handle.wait_gone(timeout_s=10)
        handle.kill()
    assert not identity.alive()


def test_pidfile_of_a_living_process(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text(f"{sleeper.pid}\n")
    assert read_pidfile(path) == Pidfile(identify(sleeper.pid))


def test_pidfile_of_a_process_that_is_gone(
    sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "pid"
    path.write_text(f"{sleeper.pid}\n")
    sleeper.kill()
    sleeper.wait()
    assert read_pidfile(path) == Pidfile(gone=True)


def test_pidfile_older_than_its_process_says_nothing(
    sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "pid"
    path.write_text(f"{sleeper.pid}\n")
    before = time.time() - 60
    os.utime(path, (before, before))
    assert read_pidfile(path) == Pidfile()


def test_pidfile_of_a_zombie_names_a_process_that_is_gone(
    sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "pid"
    path.write_text(f"{sleeper.pid}\n")
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert read_pidfile(path) == Pidfile(gone=True)


@pytest.mark.parametrize("text", ["", "x", "-5", "0", "1", "99999999999999", "12 34"])
def test_pidfile_with_nonsense_says_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pid"
    path.write_text(text)
    assert read_pidfile(path) == Pidfile()


def test_missing_pidfile_says_nothing(tmp_path: Path) -> None:
    assert read_pidfile(tmp_path / "none") == Pidfile()


def test_only_qemu_is_a_hypervisor(sleeper: subprocess.Popen[bytes]) -> None:
    assert not is_hypervisor(sleeper.pid)
    assert not is_hypervisor(0)
