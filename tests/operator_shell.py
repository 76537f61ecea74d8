"""The command line as an operator uses it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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
