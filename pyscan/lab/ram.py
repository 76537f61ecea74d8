"""The guest's RAM file as the laboratory sees it: the only place that writes a target's memory.

It maps the file by itself and does not go through pyscan's sources, so that it can bear
witness to what they report.
"""

from __future__ import annotations

import mmap
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from pyscan.errors import LabError

_GIB = 1 << 30

#: How often a watched byte is looked at: the error of its time.
WATCH_INTERVAL_S = 0.0002


class Machine(StrEnum):
    """QEMU's x86 machine types."""

    Q35 = "q35"
    PC = "pc"


#: Machine -> (all RAM lies below 4 GiB when it is smaller than this, else that much does).
#: Source: QEMU hw/i386/pc_q35.c and pc_piix.c, `lowmem`.
_LOW_MEMORY = {
    Machine.Q35: (0xB000_0000, 0x8000_0000),
    Machine.PC: (0xE000_0000, 0xC000_0000),
}


class GuestRam:
    """A writable mapping of a guest's shared RAM file."""

    def __init__(self, path: Path, machine: Machine, length: int) -> None:
        limit, low = _LOW_MEMORY[machine]
        self._low_bytes = length if length < limit else low
        self._length = length
        with path.open("r+b") as file:
            self._mapping = mmap.mmap(file.fileno(), length)

    def offset(self, gpa: int) -> int:
        """Offset in the RAM file of a guest-physical address. Raises LabError for holes."""
        if 0 <= gpa < self._low_bytes:
            return gpa
        offset = gpa - 4 * _GIB + self._low_bytes
        if self._low_bytes <= offset < self._length:
            return offset
        raise LabError(f"guest-physical address {gpa:#x} is not RAM of this machine")

    def read(self, gpa: int, length: int) -> bytes:
        """`length` bytes that begin at `gpa`; both ends must lie in one range of RAM."""
        start = self.offset(gpa)
        if self.offset(gpa + length - 1) != start + length - 1:
            raise LabError(f"{length} bytes at {gpa:#x} are not one range of RAM")
        return self._mapping[start : start + length]

    def flip(self, gpa: int, mask: int) -> None:
        """Exclusive-or one byte with `mask`."""
        self._mapping[self.offset(gpa)] ^= mask

    def watch(self, gpa: int) -> ByteWatch:
        """A watch for one byte, to be used as a context; it is on once that is entered."""
        return ByteWatch(self._mapping, self.offset(gpa))

    def close(self) -> None:
        """Unmap. Idempotent."""
        self._mapping.close()


@dataclass(frozen=True, slots=True)
class ByteChange:
    """The first change of a watched byte; the change lies between the two times."""

    before: int
    after: int
    last_seen_before_ns: int
    first_seen_after_ns: int


class ByteWatch:
    """A thread that looks at one byte and keeps when it first changed."""

    def __init__(self, mapping: mmap.mmap, offset: int) -> None:
        self._mapping = mapping
        self._offset = offset
        self._before = mapping[offset]
        self._change: ByteChange | None = None
        self._seen = threading.Event()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, name="byte-watch", daemon=True)

    def wait(self, timeout_s: float) -> ByteChange:
        """Wait for the change. Raises LabError when there is none in time."""
        self._seen.wait(timeout_s)
        if self._change is None:
            raise LabError(f"the watched byte did not change within {timeout_s:g} s")
        return self._change

    def _run(self) -> None:
        last_ns = time.time_ns()
        while not self._leave.wait(WATCH_INTERVAL_S):
            value = self._mapping[self._offset]
            now_ns = time.time_ns()
            if value != self._before:
                self._change = ByteChange(self._before, value, last_ns, now_ns)
                self._seen.set()
                return
            last_ns = now_ns

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._leave.set()
        self._thread.join()
