"""Access to a card's mailbox: a file when the card is emulated, a BAR when it is on this bus.

A file is read by preadv(2) and written by pwrite(2): a load from a mapping would fault when it
shrinks. A BAR cannot shrink, and its sysfs file can only be mapped (Linux
Documentation/PCI/sysfs-pci.rst, resource0..N).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from pathlib import Path
from typing import Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyscan.errors import FileFormatError, SourceUnavailable
from pyscan.sources.link import CARD_AT, CARD_PAGE, LOG_AT, LOG_BYTES, MAILBOX_BYTES, CardPage

Array: TypeAlias = NDArray[np.uint8]  # contiguous

_SYSFS: Final = Path("/sys")


class Mailbox(Protocol):
    """Bytes that the card and this program share. Safe for calls from several threads."""

    def read_into(self, offset: int, array: Array) -> None:
        """Fill a contiguous array. Raises SourceUnavailable when the mailbox is gone."""

    def read(self, offset: int, length: int) -> bytes:
        """Copy `length` bytes. Raises SourceUnavailable."""

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data`. Raises SourceUnavailable."""

    def close(self) -> None:
        """Release it. Not while it is in use."""


class FileMailbox(Mailbox):
    """The file behind an emulated card's BAR."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    def read_into(self, offset: int, array: Array) -> None:
        """See `Mailbox.read_into`."""
        try:
            count = os.preadv(self._fd, [array.data], offset)
        except OSError as error:
            raise self._gone(error) from error
        if count != array.nbytes:
            raise self._gone(None)

    def read(self, offset: int, length: int) -> bytes:
        """See `Mailbox.read`."""
        try:
            data = os.pread(self._fd, length, offset)
        except OSError as error:
            raise self._gone(error) from error
        if len(data) != length:
            raise self._gone(None)
        return data

    def write(self, offset: int, data: bytes) -> None:
        """See `Mailbox.write`. A file that was cut off is not made longer again."""
        try:
            if os.fstat(self._fd).st_size < MAILBOX_BYTES:
                raise self._gone(None)
            count = os.pwrite(self._fd, data, offset)
        except OSError as error:
            raise self._gone(error) from error
        if count != len(data):
            raise self._gone(None)

    def close(self) -> None:
        """See `Mailbox.close`."""
        os.close(self._fd)

    def _gone(self, error: OSError | None) -> SourceUnavailable:
        why = error.strerror if error is not None else "it is shorter now"
        return SourceUnavailable(f"{self._path}: the card's mailbox is lost: {why}; open it again")


class MappedMailbox(Mailbox):
    """A BAR of a card on this machine's own bus."""

    def __init__(self, path: Path, fd: int, *, writable: bool) -> None:
        try:
            self._memory = mmap.mmap(
                fd,
                MAILBOX_BYTES,
                prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0),
            )
        except (OSError, ValueError) as error:
            raise SourceUnavailable(
                f"{path}: the card's BAR cannot be mapped ({error}); unbind its driver, and enable "
                "the device"
            ) from error
        self._fd = fd

    def read_into(self, offset: int, array: Array) -> None:
        """See `Mailbox.read_into`."""
        array.data.cast("B")[:] = memoryview(self._memory)[offset : offset + array.nbytes]

    def read(self, offset: int, length: int) -> bytes:
        """See `Mailbox.read`."""
        return self._memory[offset : offset + length]

    def write(self, offset: int, data: bytes) -> None:
        """See `Mailbox.write`."""
        self._memory[offset : offset + len(data)] = data

    def close(self) -> None:
        """See `Mailbox.close`."""
        self._memory.close()
        os.close(self._fd)


def open_mailbox(path: Path, *, alone: bool = True) -> Mailbox:
    """Open the mailbox of a card, `alone` as its one host program, or else to look only.

    Raises SourceUnavailable when it cannot be opened or has a host already, FileFormatError
    when it is no mailbox.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        flags = (os.O_RDWR if alone else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(path, flags)
    except OSError as error:
        raise SourceUnavailable(
            f"{path}: cannot open the card's mailbox: {error.strerror}; check the path, and that "
            "the card is there"
        ) from error
    try:
        _check(path, fd)
        if alone:
            _lock(path, fd)
        if path.resolve().is_relative_to(_SYSFS):
            return MappedMailbox(path, fd, writable=alone)
    except BaseException:
        os.close(fd)
        raise
    return FileMailbox(path, fd)


def read_card(mailbox: Mailbox) -> CardPage:
    """What the card says of itself now. Raises SourceUnavailable."""
    return CARD_PAGE.decode(mailbox.read(CARD_AT, CARD_PAGE.size))


def read_log(mailbox: Mailbox, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of all that the card has logged, as far as they are still there.

    Raises SourceUnavailable.
    """
    ring = mailbox.read(LOG_AT, LOG_BYTES)
    start = max(start, end - LOG_BYTES)
    return bytes(ring[at % LOG_BYTES] for at in range(start, end))


def _check(path: Path, fd: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size < MAILBOX_BYTES:
        raise FileFormatError(
            f"{path}: not a card's mailbox, which has {MAILBOX_BYTES} bytes; name its file, or "
            "the resource file of the card's BAR in /sys/bus/pci/devices"
        )


def _lock(path: Path, fd: int) -> None:
    """Two hosts would end each other's sessions for ever (flock(2); it ends with the process)."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise SourceUnavailable(
            f"{path}: another program uses this card ({error.strerror}); a card has one host "
            "program at a time"
        ) from error
