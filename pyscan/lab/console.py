"""The guest's serial line: waiting for its start, then a shell driven by a program.

The guest's init script (tests/guest/init) serves a shell that neither echoes nor prompts.
Each command is followed by a marker line with its number and exit status, so that the end
of its output is known.
"""

from __future__ import annotations

import re
import shlex
import socket
import threading
from collections import deque
from pathlib import Path
from time import monotonic

from pyscan.errors import LabError
from pyscan.lab.process import Child

#: What tests/guest/init prints when the guest has settled.
READY = re.compile(rb"PYSCAN-GUEST-READY\r?\n")

#: The line discipline of a terminal keeps at most 4096 bytes a line (N_TTY_BUF_SIZE,
#: drivers/tty/n_tty.c); one line carries the command and its marker.
COMMAND_BYTES_MAX = 4000

#: Longest text that ends a wait: a marker with its numbers.
MARKER_BYTES_MAX = 64

#: Output of one command; more is an error, not an ever growing buffer.
OUTPUT_BYTES_MAX = 4 << 20


class SerialConsole:
    """This end of the guest's first serial port. Thread-safe: one command at a time.

    It listens before QEMU starts and QEMU connects, so that no output can be missed.
    """

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._link: socket.socket | None = None
        self._pending = bytearray()
        self._commands = 0
        self._unanswered: deque[tuple[str, str]] = deque()  # marker, command
        self._lock = threading.Lock()

    def accept(self, child: Child, timeout_s: float) -> None:
        """Take QEMU's connection. Raises LabError when QEMU ends or does not connect."""
        if not child.wait_readable(self._listener.fileno(), timeout_s):
            raise child.failure(f"did not open its serial line within {timeout_s:g} s")
        self._listener.setblocking(False)
        try:
            self._link, _ = self._listener.accept()
        except BlockingIOError as error:
            raise child.failure("ended before it opened its serial line") from error

    def wait_ready(self, child: Child, timeout_s: float) -> None:
        """Wait until the guest has settled. Raises LabError."""
        with self._lock:
            self._read_until(READY, child, monotonic() + timeout_s, "the start of the guest")

    def shell(self, child: Child, command: str, timeout_s: float) -> str:
        """Run a shell command as root in the guest; returns its output, both streams.

        Raises LabError when it (or one that was only started before) fails, when it does
        not end in time, or when the guest dies.
        """
        deadline = monotonic() + timeout_s
        with self._lock:
            self._send(command)
            while True:
                output = self._answer(child, deadline)
                if not self._unanswered:
                    return output

    def start(self, command: str) -> None:
        """Run a shell command without waiting: the guest may be frozen before it answers.

        The next `shell` takes its answer first.
        """
        with self._lock:
            self._send(command)

    def close(self) -> None:
        """Close both ends. Idempotent."""
        self._listener.close()
        if self._link is not None:
            self._link.close()

    def _send(self, command: str) -> None:
        self._commands += 1
        marker = f"@pyscan-{self._commands}"
        line = f"sh -c {shlex.quote(command)} 2>&1; echo {marker}:$?\n".encode()
        if len(line) > COMMAND_BYTES_MAX:
            raise LabError(f"guest command of {len(line)} bytes is too long for a terminal")
        if self._link is None:
            raise LabError("the guest's serial line is not open; start the guest first")
        try:
            self._link.sendall(line)
        except ConnectionError as error:
            raise LabError(f"the guest is gone; cannot run {command!r} in it") from error
        self._unanswered.append((marker, command))

    def _answer(self, child: Child, deadline: float) -> str:
        """Output of the oldest command that is not answered. Raises LabError."""
        marker, command = self._unanswered[0]
        end = re.compile(rb"%s:(\d+)\r?\n" % marker.encode())
        output, groups = self._read_until(end, child, deadline, repr(command))
        self._unanswered.popleft()
        text = output.decode(errors="replace")
        status = int(groups[0])
        if status:
            raise LabError(f"guest command {command!r} failed with status {status}: {text.strip()}")
        return text

    def _read_until(
        self, pattern: re.Pattern[bytes], child: Child, deadline: float, what: str
    ) -> tuple[bytes, tuple[bytes, ...]]:
        """Read until `pattern`; returns what came before it and the pattern's groups."""
        if self._link is None:
            raise LabError("the guest's serial line is not open; start the guest first")
        searched = 0
        while (match := pattern.search(self._pending, searched)) is None:
            # A match may straddle two chunks; no marker is longer than this.
            searched = max(0, len(self._pending) - MARKER_BYTES_MAX)
            if not child.wait_readable(self._link.fileno(), deadline - monotonic()):
                raise child.failure(f"gave no end of {what} on its serial line in time")
            try:
                chunk = self._link.recv(1 << 16)
            except ConnectionError:
                chunk = b""
            if not chunk:
                raise child.failure(f"ended during {what}")
            self._pending += chunk
            if len(self._pending) > OUTPUT_BYTES_MAX:
                raise LabError(f"{what} gave more than {OUTPUT_BYTES_MAX} bytes of output")
        output = bytes(self._pending[: match.start()])
        groups = tuple(bytes(group) for group in match.groups())
        end = match.end()
        # The match exports the buffer, which cannot be resized while it does.
        del match, self._pending[:end]
        return output, groups
