"""Child processes and scratch files that leave nothing behind.

A child runs in its own session, so that Ctrl-C reaches only this program, which then ends
its children in order. If this program dies without unwinding, the kernel ends them
(PR_SET_PDEATHSIG, prctl(2), set by setpriv(1) before it becomes the program; a shell then
looks whether this program was alive at that moment).

That signal belongs to the *thread* that started the child: start children from a thread
that lives as long as they shall, in practice the main thread.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Self

from pyscan.errors import LabError

#: How long a child may take to end after SIGTERM before it gets SIGKILL.
GRACE_S = 5.0

#: Interval at which a condition is looked at again while waiting for it.
POLL_S = 0.01

#: sun_path of struct sockaddr_un holds 108 bytes with the closing zero, unix(7). What a
#: socket's own name needs is kept free.
_SOCKET_DIRECTORY_BYTES_MAX = 108 - 1 - 40

#: Where programs are looked for; brokers live where a plain user's PATH does not reach.
_SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

#: Runs behind setpriv with our process number and the program: the signal is set by now, but
#: we may have died before it was, and then another process is the parent.
_GUARD = 'test "$PPID" = "$1" && shift && exec "$@"'

#: Directory of RAM files: memory, never a disk, tmpfs(5).
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - files are opened with O_EXCL and mode 0600

#: Most of a log that is shown in an error message.
_LOG_TAIL_BYTES = 500


class Child:
    """A running program; leaving the context ends it.

    with Child("broker", ["mosquitto", "-c", "broker.conf"], log=Path("broker.log")) as child:
        child.wait_until(lambda: port_is_open(), timeout_s=5, what="its port")
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path,
        environment: Mapping[str, str] | None = None,
        output: Path | None = None,
    ) -> None:
        """Start `command`; raises LabError if that program does not exist.

        Standard error goes to `log`, appended; standard output to `output`, or to `log`
        as well. `environment` replaces this process's own.
        """
        program = shutil.which(command[0], path=_SEARCH_PATH)
        if program is None:
            raise LabError(f"{command[0]} is not installed: run `make setup`")
        self.name = name
        self.log = log
        with log.open("ab") as errors, (output or log).open("ab") as standard:
            self._process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "sh", "-c", _GUARD, "sh"),
                    *(str(os.getpid()), program, *map(str, command[1:])),
                ],
                stdin=subprocess.DEVNULL,
                stdout=standard,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        self._pidfd = os.pidfd_open(self._process.pid)
        self._closed = False

    @property
    def pid(self) -> int:
        """Process number; it stays the same from setpriv to the program."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int:
        """Wait for the end and return the exit status. Raises LabError when it runs on."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise LabError(
                f"{self.name} still runs after {timeout_s:g} s; see {self.log}"
            ) from error

    def wait_until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until `condition()` holds. Raises LabError when the child ends or time is up."""
        deadline = monotonic() + timeout_s
        while not condition():
            if self.exit_status is not None:
                raise self.failure(f"ended with status {self.exit_status} before {what}")
            if monotonic() > deadline:
                raise self.failure(f"did not reach {what} within {timeout_s:g} s")
            select.select([self._pidfd], [], [], POLL_S)

    def wait_readable(self, reader: int, timeout_s: float) -> bool:
        """Wait until descriptor `reader` is readable or the child ends; False when time is up."""
        return bool(select.select([reader, self._pidfd], [], [], max(0.0, timeout_s))[0])

    def failure(self, what: str) -> LabError:
        """An error about this child that quotes the end of its log."""
        text = self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        lines = " | ".join(line for line in text.splitlines() if line.strip())
        return LabError(f"{self.name} {what}; log {self.log}: {lines or 'empty'}")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when it has ended."""
        self._process.send_signal(number)

    def stop(self, grace_s: float = GRACE_S) -> int:
        """SIGTERM, then SIGKILL after `grace_s`. Idempotent; returns the exit status."""
        self._process.terminate()
        try:
            return self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """SIGKILL and wait for the end. Idempotent; returns the exit status."""
        self._process.kill()
        return self._process.wait()

    def close(self) -> None:
        """Stop the child and release what watches it. Idempotent."""
        self.stop()
        if not self._closed:
            self._closed = True
            os.close(self._pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class RunDirectory:
    """A private directory with a short path, and RAM files; leaving the context removes all.

    RAM files lie in /dev/shm: memory that a guest and a reader share must not go through a
    disk.
    """

    def __init__(self) -> None:
        temporary = tempfile.gettempdir()
        if len(os.fsencode(temporary)) > _SOCKET_DIRECTORY_BYTES_MAX - len("/pyscan-12345678"):
            temporary = "/tmp"  # noqa: S108 - mkdtemp makes a private directory in it
        self.path = Path(tempfile.mkdtemp(prefix="pyscan-", dir=temporary))
        self._ram_files: list[Path] = []

    def ram_file(self, name: str, length: int) -> Path:
        """Create a private file of `length` bytes of shared memory and return its path."""
        path = _SHARED_MEMORY / f"{self.path.name}-{name}"
        self._ram_files.append(path)  # first: an interrupt may come at any moment
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(descriptor, length)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise LabError(f"cannot create RAM file {path}: {error.strerror}") from error
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for path in self._ram_files:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def unwind_on(*numbers: signal.Signals) -> Iterator[None]:
    """Let the first of these signals unwind the main thread, so that contexts clean up.

    The others, and the same again, are ignored from then on: cleaning up must not be cut
    short by a second Ctrl-C. The exit status is 128 + the signal's number, as a shell
    gives it; SIGINT unwinds as KeyboardInterrupt.
    """
    previous = {number: signal.getsignal(number) for number in numbers}

    def leave(number: int, _frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
