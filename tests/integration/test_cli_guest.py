"""The commands on a real guest: approved as it is, scanned, tampered with, found out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyscan.lab.guest import Guest
from pyscan.records import PAGE_SIZE
from pyscan.sources import build_uri

pytestmark = pytest.mark.guest

BootGuest = Callable[..., Guest]
TIMEOUT_S = 60


def pyscan(home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command as an operator does, and show what it wrote if the test fails."""
    done = subprocess.run(
        [sys.executable, "-m", "pyscan", *map(str, arguments)],
        env={**os.environ, "PYSCAN_HOME": str(home)},
        text=True,
        check=False,
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    print(done.args, done.returncode, done.stdout, done.stderr, sep="\n")
    assert "Traceback" not in done.stderr
    return done


def test_a_flipped_byte_is_found(boot_guest: BootGuest, tmp_path: Path) -> None:
    guest = boot_guest()
    source = build_uri("qemu", guest.monitor_qmp)
    approved = tmp_path / "guest.approved"
    home = tmp_path / "home"

    def scan(uri: str = source) -> tuple[int, dict[str, Any]]:
        done = pyscan(home, "scan", uri, "--approved", approved, "--json")
        assert done.stderr == ""
        return done.returncode, json.loads(done.stdout)

    assert pyscan(home, "approve", "snapshot", source, "--out", approved).returncode == 0
    for _ in range(5):
        status, document = scan()
        assert (status, document["verdict"], document["findings"]) == (0, "approved", [])
        assert document["pages"]["watched"] == document["pages"]["ok"] > 1000

    physical = guest.text_physical()
    address = guest.symbol("machine_real_restart") + 0x10
    guest.ram.flip(physical, 0x01)
    status, document = scan()
    assert (status, document["verdict"]) == (1, "unapproved")
    (finding,) = document["findings"]
    assert (finding["kind"], finding["status"]) == ("digest", "ok")
    assert int(finding["address"], 16) == address - address % PAGE_SIZE
    assert int(finding["physical_frame"], 16) == physical // PAGE_SIZE
    offset = address - address % PAGE_SIZE - guest.symbol("_text")
    assert finding["place"] == f"kernel text +{offset:#x}"
    text = pyscan(home, "scan", source, "--approved", approved)
    assert text.returncode == 1
    assert f"finding  digest  kernel text +{offset:#x}" in text.stdout
    # The same memory as a plain file, without asking QEMU.
    size = f"{guest.options.memory_mib}M"
    assert scan(build_uri("file", guest.ram_file, machine=guest.options.machine, size=size))[0] == 1

    guest.ram.flip(physical, 0x01)
    assert scan()[0] == 0

    guest.close()
    status, document = scan()
    assert (status, document["verdict"]) == (3, "undecided")
