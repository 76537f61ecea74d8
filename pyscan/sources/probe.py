"""What of a source's needs is on this machine: one line, in bounded time, never an error."""

from __future__ import annotations

import subprocess
from functools import cache
from shutil import which
from typing import Final

QEMU: Final = "qemu-system-x86_64"

#: A program that does not say its version in this time is of no use either.
_TIMEOUT_S: Final = 10


@cache  # three sources ask
def probe_qemu() -> str:
    """The version of QEMU for x86-64, as it says itself."""
    path = which(QEMU)
    if path is None:
        return f"no {QEMU} on PATH; one that runs elsewhere only has to share its files"
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run ({type(error).__name__})"
    first, *_ = done.stdout.decode(errors="replace").splitlines() or ["no version"]
    return f"{path}: {first[:100]}"
