"""The guest's kernel, approved by its package through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

TIMEOUT_S = 120


@dataclass(frozen=True)
class Operator:
    """Runs commands as an operator does, with a key of his own."""

    home: Path
    approved: Path  # of kind linux, of the guest's kernel

    @property
    def public_key(self) -> Path:
        return self.home / "approver.pub"

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, and show what it wrote if the test fails."""
        done = subprocess.run(
            [sys.executable, "-m", "pyscan", *map(str, arguments)],
            env={**os.environ, "PYSCAN_HOME": str(self.home)},
            text=True,
            check=False,
            capture_output=True,
            timeout=TIMEOUT_S,
        )
        print(done.args, done.returncode, done.stdout, done.stderr, sep="\n")
        assert "Traceback" not in done.stderr
        return done


@pytest.fixture(scope="session")
def operator(guest_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    """An operator who has approved the guest's kernel by its package."""
    directory = tmp_path_factory.mktemp("operator")
    operator = Operator(directory / "home", directory / "cloud.approved")
    (package,) = guest_dir.glob("linux-image-*.deb")
    done = operator.run("approve", "linux", package, "--out", operator.approved)
    assert done.returncode == 0
    return operator
