"""QEMU's qtest protocol over a Unix socket: loads and stores on a running machine's bus.

Lines of text, one answer a command, in order (QEMU softmmu/qtest.c). It is how a card that
is no processor of its own reaches registers: configuration space and doorbells. Nothing
here touches a target's memory; that is read by the card's own DMA.

    with QtestClient(Path("/run/vm/qtest.sock")) as qtest:
        identity = qtest.load(0xB0048000, 4)
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Self

from pyscan.errors import SourceUnavailable

#: Longest line that an answer may have, and most lines about interrupts between two answers.
LINE_BYTES_MAX = 256
_INTERRUPT_LINES_MAX = 1024

#: Most commands in one transaction. QEMU takes 1024 bytes at a time (qtest_can_read), and a
#: command has at most 42 with its end.
COMMANDS_MAX = 24

_LETTERS = {1: "b", 2: "w", 4: "l", 8: "q"}
_ANSWER = re.compile(rb"OK(?: (0x[0-9a-fA-F]{1,16}))?")


class QtestTimeout(SourceUnavailable):
    """QEMU did not answer in time: stopped process, or another client holds the socket."""


def load(address: int, width: int) -> str:
    """The command that reads `width` bytes (1, 2, 4, 8) at a physical address."""
    return f"read{_LETTERS[width]} {address:#x}"


def store(address: int, width: int, value: int) -> str:
    """The command that writes `width` bytes at a physical address."""
    return f"write{_LETTERS[width]} {address:#x} {value:#x}"


def port_in(port: int, width: int) -> str:
    """The command that reads an I/O port of 1, 2 or 4 bytes."""
    return f"in{_LETTERS[width]} {port:#x}"


def port_out(port: int, width: int, value: int) -> str:
    """The command that writes an I/O port of 1, 2 or 4 bytes."""
    return f"out{_LETTERS[width]} {port:#x} {value:#x}"


class QtestClient:
    """One connection; QEMU serves one client per socket. Thread-safe.

    After an error it is closed: what comes later on the socket could be an answer to an
    earlier command.
    """

    def __init__(self, path: Path, timeout_s: float = 2.0) -> None:
        """Connect. Raises SourceUnavailable, of that QtestTimeout when nobody answers."""
        self.path = path
        self._timeout_s = timeout_s
        self._received = bytearray()
        self._lock = Lock()
        self._closed = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            self._closed = True
            raise SourceUnavailable(
                f"{path}: cannot reach QEMU ({error}); check that the virtual machine runs and "
                "that this is its -qtest socket"
            ) from error
        # An I/O port that nothing listens to: says whether there is a qtest server at all.
        self.transact([port_in(0x80, 1)])

    def load(self, address: int, width: int) -> int:
        """Read `width` bytes at a physical address. Raises SourceUnavailable."""
        return self.transact([load(address, width)])[0]

    def store(self, address: int, width: int, value: int) -> None:
        """Write `width` bytes at a physical address. Raises SourceUnavailable."""
        self.transact([store(address, width, value)])

    def transact(self, commands: Sequence[str]) -> list[int]:
        """Run commands in one go; their values, 0 for a command that has none.

        They are sent together, and QEMU runs what arrives together without letting a
        processor on its bus in between. At most COMMANDS_MAX. Raises SourceUnavailable.
        """
        if len(commands) > COMMANDS_MAX:
            raise ValueError(f"{len(commands)} commands; at most {COMMANDS_MAX}")
        with self._lock:
            if self._closed:
                raise SourceUnavailable(f"{self.path}: connection is closed; open it again")
            deadline_s = monotonic() + self._timeout_s
            try:
                self._socket.settimeout(self._timeout_s)
                self._socket.sendall("".join(f"{line}\n" for line in commands).encode())
                return [self._answer(command, deadline_s) for command in commands]
            except TimeoutError as error:
                self._shut()
                raise QtestTimeout(
                    f"{self.path}: QEMU did not answer within {self._timeout_s:g} s; check that it "
                    "is not stopped and that no other client holds this socket"
                ) from error
            except OSError as error:
                self._shut()
                raise SourceUnavailable(
                    f"{self.path}: connection to QEMU lost ({error}); open the source again"
                ) from error
            except SourceUnavailable:
                self._shut()
                raise

    def close(self) -> None:
        """Close the connection. Idempotent; a transaction under way in another thread fails."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the one who waits for an answer
        with self._lock:
            self._shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _shut(self) -> None:
        self._closed = True
        self._socket.close()

    def _answer(self, command: str, deadline_s: float) -> int:
        """The value of one answer; lines about interrupts, which come at any time, are skipped."""
        for _ in range(_INTERRUPT_LINES_MAX):
            line = self._line(deadline_s)
            if not line.startswith(b"IRQ "):
                break
        answer = _ANSWER.fullmatch(line)
        if answer is None:
            raise SourceUnavailable(
                f"{self.path}: not QEMU's qtest: {line[:60]!r} is no answer to {command!r}; check "
                "that this is the -qtest socket"
            )
        return int(answer[1], 16) if answer[1] else 0

    def _line(self, deadline_s: float) -> bytes:
        """One line without its end."""
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > LINE_BYTES_MAX:
                raise SourceUnavailable(
                    f"{self.path}: not QEMU's qtest: a line of more than {LINE_BYTES_MAX} bytes; "
                    "check that this is the -qtest socket"
                )
            left_s = deadline_s - monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._socket.settimeout(left_s)
            received = self._socket.recv(4096)
            if not received:
                raise ConnectionResetError("closed by QEMU")
            self._received += received
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line
