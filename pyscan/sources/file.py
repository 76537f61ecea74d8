"""``file:`` - a RAM file or a raw memory image."""

from __future__ import annotations

import errno
import mmap
import os
import select
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from threading import Condition

import numpy as np

from pyscan.errors import FileFormatError, SourceUnavailable, UsageError
from pyscan.records import PAGE_SIZE, MemoryMap, MemoryRegion, PageStatus
from pyscan.sources.base import (
    NO_OFFSET,
    Frames,
    Offsets,
    Pages,
    Source,
    Statuses,
    View,
    check_request,
    poison,
)
from pyscan.sources.layout import Layout, Segment
from pyscan.sources.machines import uri_layout
from pyscan.sources.uri import SourceUri

#: A gap in a sparse file shorter than this is read rather than remembered, and after this
#: many extents the rest counts as data: both bound what a fragmented file can cost.
_GAP_BYTES_MIN = 1 << 20
_SEEKS_MAX = 1 << 16


class Access(StrEnum):
    """Whether the file is also offered as a zero-copy view."""

    MAP = "map"
    PREAD = "pread"


@dataclass(frozen=True, slots=True)
class FileView:
    """A read-only mapping of a RAM file; unmapped when the last reference goes."""

    data: memoryview
    layout: Layout

    def offsets(self, frames: Frames) -> Offsets:
        """Byte offset in `data` of each frame; NO_OFFSET where the frame is not mapped."""
        return self.layout.offsets(frames)


class FileSource(Source):
    """A RAM file, opened O_RDONLY.

    Reads go through preadv(2): unlike a load from a mapping it cannot fault when the file
    shrinks, and it does not make the holes of a sparse file resident. The mapping serves
    `view` alone. A page that the file no longer holds is LINK_DOWN.
    """

    def __init__(
        self,
        uri: str,
        path: Path,
        layout: Layout,
        access: Access = Access.MAP,
        pidfd: int | None = None,
    ) -> None:
        """Open `path`.

        `pidfd` (pidfd_open(2)), which the source takes over, is the process whose memory
        the file is: when it ends, the way to the memory is gone, though the file is not.
        Raises SourceUnavailable when the file cannot be opened, UsageError when it is no
        file of bytes, FileFormatError when it is shorter than the layout.
        """
        self._uri = uri
        self._path = path
        self._layout = layout
        # A process keeps its memory when the file's name goes; without one the name counts.
        self._by_name = pidfd is None
        self._readers = 0
        self._idle = Condition()
        self._view: FileView | None = None
        with ExitStack() as stack:
            if pidfd is not None:
                stack.callback(os.close, pidfd)
            self._fd = _open(path)
            stack.callback(os.close, self._fd)
            _check(path, self._fd, layout.file_bytes)
            self._process = select.poll()
            if pidfd is not None:
                self._process.register(pidfd, select.POLLIN)
            if access is Access.MAP:
                self._view = FileView(_map(path, self._fd, layout.file_bytes), layout)
            self._descriptors: ExitStack | None = stack.pop_all()

    @property
    def uri(self) -> str:
        """The URI that names this source."""
        return self._uri

    def regions(self) -> MemoryMap:
        """The memory map.

        Raises SourceUnavailable when closed, when the process has ended, or when the path
        names another file by now: the old one is nobody's memory any more.
        """
        with self._reading() as fd:
            if fd is None or (self._by_name and not _is_named(self._path, fd)):
                raise SourceUnavailable(
                    f"{self._uri}: the memory is gone (virtual machine ended, file replaced, or "
                    "source closed); open the source again"
                )
        return self._layout.memory_map

    def read(self, frames: Frames, buffer: Pages) -> Statuses:
        """See `Source.read`."""
        check_request(frames, buffer)
        statuses = np.full(len(frames), PageStatus.LINK_DOWN, dtype=np.uint8)
        offsets = self._layout.offsets(frames)
        with self._reading() as fd:
            if fd is not None:
                statuses[offsets == NO_OFFSET] = PageStatus.HOLE
                for start, stop in _runs(offsets):
                    _read_run(fd, int(offsets[start]), buffer[start:stop], statuses[start:stop])
        poison(buffer, statuses)
        return statuses

    def view(self) -> View | None:
        """The mapping; None with access=pread, and when there is no memory any more."""
        with self._reading() as fd:
            return None if fd is None else self._view

    def populated(self) -> MemoryMap:
        """The memory map without the file's holes (lseek(2), SEEK_DATA)."""
        with self._reading() as fd:
            # What a shrunken file has lost must be read, and found to be LINK_DOWN.
            if fd is None or os.lseek(fd, 0, os.SEEK_END) < self._layout.file_bytes:
                return self._layout.memory_map
            return MemoryMap.of(
                region for segment in self._layout.segments for region in _data_regions(fd, segment)
            )

    def close(self) -> None:
        """See `Source.close`. Waits for reads that are under way."""
        with self._idle:
            descriptors, self._descriptors = self._descriptors, None
            self._view = None  # a scanner may still hold it; the mapping goes with it
            self._idle.wait_for(lambda: self._readers == 0)
        if descriptors is not None:
            descriptors.close()

    @contextmanager
    def _reading(self) -> Iterator[int | None]:
        """The file's descriptor, or None when there is no memory any more.

        It stays open meanwhile: the number of a closed one may be in use again.
        """
        with self._idle:
            if self._descriptors is None:
                alive = False
            else:
                alive = not self._process.poll(0)
                self._readers += alive
        try:
            yield self._fd if alive else None
        finally:
            if alive:
                with self._idle:
                    self._readers -= 1
                    self._idle.notify_all()


def open_file(uri: SourceUri) -> FileSource:
    """Open ``file:PATH?machine=NAME&size=SIZE`` or ``file:PATH?map=FILE``.

    Raises UsageError, FileFormatError, SourceUnavailable.
    """
    uri.allow("machine", "size", "map", "access")
    access = uri.parameters.get("access", Access.MAP)
    if access not in set(Access):
        raise UsageError(f"{uri.text}: access must be map or pread, not {access!r}")
    return FileSource(uri.text, Path(uri.path), uri_layout(uri), Access(access))


def _open(path: Path) -> int:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SourceUnavailable(
            f"{path}: cannot open the RAM file: {error.strerror}; check the path, and that "
            "the virtual machine exists"
        ) from error


def _is_named(path: Path, fd: int) -> bool:
    """Whether `path` still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except OSError:
        return False


def _check(path: Path, fd: int, bytes_min: int) -> None:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise UsageError(f"{path}: not a file; name a RAM file or a raw image")
    size = os.lseek(fd, 0, os.SEEK_END)
    if size < bytes_min:
        raise FileFormatError(
            f"{path}: has {size} bytes, its memory map needs {bytes_min}; the file is "
            "truncated, or size= or map= is wrong"
        )


def _map(path: Path, fd: int, length: int) -> memoryview:
    try:
        return memoryview(mmap.mmap(fd, length, prot=mmap.PROT_READ))
    except (OSError, ValueError) as error:
        raise SourceUnavailable(f"{path}: cannot be mapped ({error}); use access=pread") from error


def _runs(offsets: Offsets) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of `offsets` whose pages follow each other in the file."""
    listed = np.flatnonzero(offsets != NO_OFFSET)
    if not len(listed):
        return
    follows = (np.diff(listed) == 1) & (np.diff(offsets[listed]) == PAGE_SIZE)
    for run in np.split(listed, np.flatnonzero(~follows) + 1):
        yield int(run[0]), int(run[-1]) + 1


def _read_run(fd: int, offset: int, pages: Pages, statuses: Statuses) -> None:
    """Read consecutive pages; those that come whole become OK."""
    position = 0
    while position < len(pages):
        rest = pages[position:].data
        try:
            count = os.preadv(fd, [rest], offset + position * PAGE_SIZE) // PAGE_SIZE
        except OSError:
            position += 1  # one bad page (EIO) must not hide those behind it
            continue
        if count == 0:
            return  # end of file
        statuses[position : position + count] = PageStatus.OK
        position += count


def _data_regions(fd: int, segment: Segment) -> Iterator[MemoryRegion]:
    """The parts of a segment that hold data, page aligned; short gaps are included."""
    region = segment.region
    start = position = segment.offset
    for _ in range(_SEEKS_MAX):
        data, end = _next_extent(fd, position, segment.offset_end)
        if data - position >= _GAP_BYTES_MIN or data == segment.offset_end:
            if position > start:
                yield MemoryRegion(
                    region.gpa + start - segment.offset, position - start, region.kind
                )
            start = data
        position = end
        if data == segment.offset_end:
            return
    length = segment.offset_end - start
    yield MemoryRegion(region.gpa + start - segment.offset, length, region.kind)


def _next_extent(fd: int, position: int, limit: int) -> tuple[int, int]:
    """Start and end of the first data at or behind `position`; (limit, limit) if none."""
    try:
        start = os.lseek(fd, position, os.SEEK_DATA)
        end = os.lseek(fd, start, os.SEEK_HOLE)
    except OSError as error:
        # ENXIO: no data behind position. Else (a block device): it may all be data.
        return (limit, limit) if error.errno == errno.ENXIO else (position, limit)
    start = max(position, start - start % PAGE_SIZE)
    return min(start, limit), min(end + -end % PAGE_SIZE, limit)
