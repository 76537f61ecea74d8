"""Processes named so that a reused process id is never hit.

A process is its id, its start time and the boot it belongs to. A pidfd (pidfd_open(2))
pins it: once the start time has been compared behind an open pidfd, a signal through that
descriptor reaches this process or none, and the descriptor becomes readable at its end.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from pyscan.errors import DriverError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: /proc/stat's boot time is in whole seconds; a pidfile is written after its process began.
_PIDFILE_SLACK_S = 2.0
_PIDFILE_BYTES_MAX = 64
_PID_MAX = 1 << 22  # PID_MAX_LIMIT, include/linux/threads.h


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process of one boot."""

    pid: int
    start_ticks: int  # clock ticks after boot: field 22 of /proc/PID/stat, proc(5)
    boot: str

    def alive(self) -> bool:
        """Whether exactly this process still runs; one that waits to be reaped does not."""
        return identify(self.pid) == self


def identify(pid: int) -> ProcessIdentity | None:
    """The process that has this id now; None when there is none, or only its remains."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold anything; fields are counted behind the last one.
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[0] in {b"Z", b"X"}:
        return None
    return ProcessIdentity(pid, int(fields[19]), _BOOT_ID.read_text().strip())


def is_hypervisor(pid: int) -> bool:
    """Whether the process runs a QEMU executable.

    The peer of a monitor socket is who called listen(2): a manager that hands the socket
    over (libvirt) would be hit instead of its machine.
    """
    try:
        name = Path(os.readlink(f"/proc/{pid}/exe")).name
    except OSError:
        return False
    return "qemu" in name or "kvm" in name


@dataclass(frozen=True, slots=True)
class Pidfile:
    """What a pidfile says: a living process, or that it named one which is gone, or neither."""

    process: ProcessIdentity | None = None
    gone: bool = False


def read_pidfile(path: Path) -> Pidfile:
    """Read a pidfile, believing it only as far as it can be checked.

    A process that began after the file was written is not the one that it names.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_PIDFILE_BYTES_MAX)
            written_s = os.fstat(file.fileno()).st_mtime
    except OSError:
        return Pidfile()
    if not text.strip().isdigit() or not 1 < int(text) <= _PID_MAX:
        return Pidfile()
    process = identify(int(text))
    if process is None:
        return Pidfile(gone=_is_free(int(text)))
    if _started_s(process) > written_s + _PIDFILE_SLACK_S:
        return Pidfile()
    return Pidfile(process)


def _is_free(pid: int) -> bool:
    """Whether no process has this id; /proc alone may hide one (hidepid, proc(5))."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:
        return b") Z" in Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError:
        return False


def _started_s(process: ProcessIdentity) -> float:
    """Start time in seconds since the epoch."""
    for line in Path("/proc/stat").read_bytes().splitlines():
        if line.startswith(b"btime "):
            return int(line.split()[1]) + process.start_ticks / os.sysconf("SC_CLK_TCK")
    raise DriverError("unreachable", "/proc/stat has no btime; is /proc mounted?")


class ProcessHandle:
    """An open pidfd of a verified process.

    with ProcessHandle(identity) as process:
        process.kill()
        await process.wait_gone(timeout_s=5)
    """

    def __init__(self, identity: ProcessIdentity) -> None:
        self._identity = identity
        self._pidfd: int | None = None

    def __enter__(self) -> ProcessHandle:
        try:
            self._pidfd = os.pidfd_open(self._identity.pid)
        except ProcessLookupError:
            return self
        if not self._identity.alive():
            self._close()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def kill(self) -> None:
        """SIGKILL; without effect when the process is gone. Raises DriverError("refused")."""
        if self._pidfd is None:
            return
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return
        except PermissionError as error:
            raise DriverError(
                "refused",
                f"process {self._identity.pid} may not be killed by this user; "
                "run the agent as root or as the machine's user",
            ) from error

    async def wait_gone(self, timeout_s: float) -> bool:
        """Wait for the end of the process; False when it still runs after `timeout_s`."""
        if self._pidfd is None:
            return True
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._pidfd, ended.set)
        try:
            async with asyncio.timeout(timeout_s):
                await ended.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self._pidfd)
        return True
