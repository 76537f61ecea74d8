"""Sources that read by a bus master on the target's own bus: what is common to them.

An engine is reached over QEMU's qtest socket, and lays what it read into a file that this
side reads. Files are read by preadv(2) and written by pwrite(2), never mapped: a load from
a mapping faults when the file shrinks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pyscan.errors import SourceUnavailable, UsageError
from pyscan.records import MemoryMap, PageStatus
from pyscan.sources.base import (
    Frames,
    Pages,
    Source,
    Statuses,
    check_request,
    find_regions,
    poison,
)
from pyscan.sources.layout import Layout
from pyscan.sources.pci import PciBus, Registers, Slot
from pyscan.sources.qtest import QtestClient, QtestTimeout
from pyscan.sources.uri import SourceUri

#: QEMU's ivshmem-plain: its BAR 2 is the card's own memory.
_MEMORY_ID = (0x1AF4, 0x1110)
_MEMORY_BAR = 2

#: Pages between two looks at whether the source was closed.
_BATCH_PAGES = 8192


class EngineStopped(Exception):
    """The engine cannot read now; `status` is what becomes of the pages.

    After it the engine is taken apart: nothing that it may still answer is believed.
    """

    def __init__(self, status: PageStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Engine(Protocol):
    """A running engine and its connection."""

    def check(self) -> None:
        """Raise SourceUnavailable unless the engine still answers."""

    def read(self, frames: Frames, buffer: Pages, rows: NDArray[np.intp]) -> Statuses:
        """Read page `frames[i]` into `buffer[rows[i]]`; one status per frame.

        Rows ascend. Raises EngineStopped or SourceUnavailable; nothing counts as read then.
        """

    def close(self) -> None:
        """Release everything."""


class EngineSource(Source):
    """A source whose pages an engine fetches, one caller at a time.

    When the engine stops, the next read connects anew: a server that came back is read, and
    one that did not gives LINK_DOWN.
    """

    def __init__(self, uri: str, layout: Layout, connect: Callable[[], Engine]) -> None:
        """Connect. Raises UsageError and SourceUnavailable; a refusal by the bus is no error."""
        self._uri = uri
        self._layout = layout
        self._connect = connect
        self._lock = Lock()
        self._closed = False
        self._engine: Engine | None = None
        try:
            self._engine = connect()
        except EngineStopped as stop:
            if stop.status is not PageStatus.BLOCKED:
                raise SourceUnavailable(f"{uri}: {stop}") from stop

    @property
    def uri(self) -> str:
        """The URI that names this source."""
        return self._uri

    def regions(self) -> MemoryMap:
        """The memory map.

        Raises SourceUnavailable when closed, and when the server does not answer.
        """
        with self._lock:
            if self._closed:
                raise SourceUnavailable(f"{self._uri}: closed; open the source again")
            try:
                self._running().check()
            except EngineStopped as stop:
                self._drop()
                if stop.status is not PageStatus.BLOCKED:
                    raise SourceUnavailable(f"{self._uri}: {stop}") from stop
            except (SourceUnavailable, UsageError) as error:
                self._drop()
                raise SourceUnavailable(str(error)) from error
        return self._layout.memory_map

    def read(self, frames: Frames, buffer: Pages) -> Statuses:
        """See `Source.read`."""
        check_request(frames, buffer)
        statuses = np.full(len(frames), PageStatus.LINK_DOWN, dtype=np.uint8)
        listed = find_regions(self._layout.memory_map, frames) >= 0
        rows = np.flatnonzero(listed)
        with self._lock:
            if not self._closed:
                statuses[~listed] = PageStatus.HOLE
                self._read(frames[rows], buffer, rows, statuses)
        poison(buffer, statuses)
        return statuses

    def view(self) -> None:
        """None: every page comes over the bus."""

    def close(self) -> None:
        """See `Source.close`. Waits for at most one batch that is under way."""
        self._closed = True
        with self._lock:
            self._drop()

    def _read(
        self, frames: Frames, buffer: Pages, rows: NDArray[np.intp], statuses: Statuses
    ) -> None:
        """Fill `buffer` and `statuses` at `rows`, batch by batch."""
        for start in range(0, len(rows), _BATCH_PAGES):
            batch = slice(start, start + _BATCH_PAGES)
            if self._closed:
                return
            try:
                statuses[rows[batch]] = self._running().read(frames[batch], buffer, rows[batch])
            except EngineStopped as stop:
                self._drop()
                statuses[rows[start:]] = stop.status
                return
            except QtestTimeout:
                self._drop()
                statuses[rows[start:]] = PageStatus.TIMEOUT
                return
            except (SourceUnavailable, UsageError):
                self._drop()
                return

    def _running(self) -> Engine:
        """The engine, connected when there is none."""
        if self._engine is None:
            self._engine = self._connect()
        return self._engine

    def _drop(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


class BackingFile:
    """A file that the card's side reads and writes at page granularity; `length` in bytes."""

    def __init__(self, path: Path, what: str) -> None:
        """Open it. Raises SourceUnavailable."""
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise SourceUnavailable(
                f"{path}: cannot open the {what} file: {error.strerror}; check the path, and that "
                "the server exists"
            ) from error
        try:
            self.length = os.lseek(self.fd, 0, os.SEEK_END)
        except OSError as error:
            os.close(self.fd)
            raise UsageError(f"{path}: not a file; name the {what} file") from error

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data`. Raises EngineStopped."""
        try:
            written = os.pwrite(self.fd, data, offset)
        except OSError as error:
            raise EngineStopped(PageStatus.LINK_DOWN, f"{self.path}: {error.strerror}") from error
        if written != len(data):
            raise EngineStopped(PageStatus.LINK_DOWN, f"{self.path}: is full")

    def read_into(self, buffers: list[memoryview], offset: int) -> None:
        """Fill all of `buffers`. Raises EngineStopped."""
        wanted = sum(buffer.nbytes for buffer in buffers)
        try:
            count = os.preadv(self.fd, buffers, offset)
        except OSError as error:
            raise EngineStopped(PageStatus.LINK_DOWN, f"{self.path}: {error.strerror}") from error
        if count != wanted:
            raise EngineStopped(PageStatus.LINK_DOWN, f"{self.path}: is shorter now")

    def read(self, length: int, offset: int) -> bytes:
        """Read `length` bytes. Raises EngineStopped."""
        data = bytearray(length)
        self.read_into([memoryview(data)], offset)
        return bytes(data)

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


class CardMemory:
    """The card's own memory: this side has its file, the bus sees it at `address`."""

    def __init__(self, file: BackingFile, registers: Registers) -> None:
        """Make sure that both are the same. Raises UsageError when they are not."""
        self.file = file
        self.address = registers.address
        mark = os.urandom(8)
        file.write(mark, 0)
        if registers.load(0, 8).to_bytes(8, "little") != mark:
            raise UsageError(
                f"{file.path}: is not the memory of the card on the bus; name the file of "
                "-object memory-backend-file,share=on of the server's ivshmem-plain"
            )

    @classmethod
    def open(
        cls, client: QtestClient, bus: PciBus, path: Path, slot: Slot | None, stack: ExitStack
    ) -> CardMemory:
        """Find the card's memory on the bus, and open its file, which `stack` closes.

        Raises UsageError, SourceUnavailable.
        """
        found = bus.find(*_MEMORY_ID, "ivshmem-plain", slot)
        file = BackingFile(path, "card's memory")
        stack.callback(file.close)
        return cls(file, bus.registers(found, _MEMORY_BAR, file.length))


def parse_slot(uri: SourceUri, name: str) -> Slot | None:
    """The slot that parameter `name` holds, or None. Raises UsageError."""
    return Slot.parse(uri.parameters[name]) if name in uri.parameters else None
