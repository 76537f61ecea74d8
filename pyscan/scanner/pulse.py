"""Is this the running kernel, or what is left of it?

A machine that was reset keeps the memory of the kernel that ran before, until firmware and the
next kernel have written over it. What is found in such remains is no attack. They have no
pulse: the kernel's clock stands still.
"""

from __future__ import annotations

import time
from typing import Final, Self

from pyscan.errors import ApprovedFileError
from pyscan.records import PageStatus
from pyscan.validate import AccessFailed, Attached

#: Ticks a second that a kernel makes at most (CONFIG_HZ, kernel/Kconfig.hz), and how many
#: seconds' worth of them it may catch up on after it was idle.
_HZ_MAX: Final = 1000
_IDLE_S: Final = 60.0
#: The counter of ticks (kernel/time/jiffies.c); 8 bytes, little-endian.
_COUNTER: Final = "jiffies_64"


class Pulse:
    """The clock of one attached kernel from one moment on."""

    def __init__(self, attached: Attached, ticks: int | None) -> None:
        self._attached = attached
        self._ticks = ticks
        self._since_s = time.monotonic()

    @classmethod
    def of(cls, attached: Attached) -> Self:
        """Look at the clock now."""
        return cls(attached, _read(attached))

    def beats(self) -> bool:
        """Whether the clock has gone on, by no more than time has.

        A kernel whose clock cannot be read is taken for a running one.
        """
        if self._ticks is None:
            return True
        now = _read(self._attached)
        most = _HZ_MAX * (time.monotonic() - self._since_s + _IDLE_S)
        return now is not None and 0 < now - self._ticks <= most


def _read(attached: Attached) -> int | None:
    target = attached.target
    try:
        # Not `read`, which answers from what it has kept.
        data, statuses = target.memory.read_range(target.address(_COUNTER), 8)
    except (AccessFailed, ApprovedFileError):
        return None
    if (statuses != PageStatus.OK).any():
        return None
    return int.from_bytes(data.tobytes(), "little")
