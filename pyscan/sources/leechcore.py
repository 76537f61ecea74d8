"""``leechcore:`` - a LeechCore device: PCILeech hardware, or a dump file that it understands.

Needs the optional package leechcorepyc. Only its scattered read is used: `read` fails as a
whole where a page is missing, or pads with zeros. The scattered read drops such pages without
a word, so what came is matched by address.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pyscan.errors import FileFormatError, SourceUnavailable, UsageError
from pyscan.records import PAGE_SIZE, MemoryMap, MemoryRegion, PageStatus
from pyscan.sources.base import (
    NO_OFFSET,
    Frames,
    Offsets,
    Pages,
    Source,
    Statuses,
    check_request,
    poison,
)
from pyscan.sources.layout import ADDRESS_END, MAP_REGIONS_MAX, Layout, Segment
from pyscan.sources.machines import uri_layout
from pyscan.sources.uri import SourceUri

PACKAGE: Final = "leechcorepyc"

#: Pages that a device is asked for at a time; they are fastest with modest batches.
BATCH_PAGES: Final = 512

#: A page that did not come is asked for once more before it counts as missing.
ATTEMPTS: Final = 2

#: Longest device string (leechcore.h, LC_CONFIG.szDevice): what is longer would be cut off.
DEVICE_BYTES_MAX: Final = 259

_FILE: Final = "file://"
_HOW_TO_INSTALL: Final = "pip install 'pyscan[leechcore]' (x86-64 only)"


class LeechCoreSource(Source):
    """A LeechCore device. One read at a time: its handle may not be closed under a reader."""

    def __init__(self, uri: str, device: Any, layout: Layout) -> None:
        """`device` is an open leechcorepyc.LeechCore, which the source takes over.

        `layout` holds for offsets the addresses that the device is asked for.
        """
        self._uri = uri
        self._layout = layout
        self._lock = Lock()
        self._device: Any | None = device

    @property
    def uri(self) -> str:
        """The URI that names this source."""
        return self._uri

    def regions(self) -> MemoryMap:
        """The memory map. Raises SourceUnavailable when closed."""
        with self._lock:
            if self._device is None:
                raise SourceUnavailable(f"{self._uri}: the source is closed; open the source again")
        return self._layout.memory_map

    def read(self, frames: Frames, buffer: Pages) -> Statuses:
        """See `Source.read`. LeechCore does not say why a page did not come: LINK_DOWN."""
        check_request(frames, buffer)
        statuses = np.full(len(frames), PageStatus.LINK_DOWN, dtype=np.uint8)
        addresses = self._layout.offsets(frames)
        listed = np.flatnonzero(addresses != NO_OFFSET)
        for start in range(0, len(listed), BATCH_PAGES):
            self._read(listed[start : start + BATCH_PAGES], addresses, buffer, statuses)
        with self._lock:
            if self._device is not None:
                statuses[addresses == NO_OFFSET] = PageStatus.HOLE
        poison(buffer, statuses)
        return statuses

    def _read(
        self, batch: NDArray[np.int64], addresses: Offsets, buffer: Pages, statuses: Statuses
    ) -> None:
        """Read the pages at the indices `batch`; those that come become OK."""
        missing: list[tuple[int, int]] = [(int(index), int(addresses[index])) for index in batch]
        for _ in range(ATTEMPTS):
            came = self._scatter(address for _, address in missing)
            for index, address in missing:
                if address in came:
                    buffer[index] = np.frombuffer(came[address], dtype=np.uint8)
                    statuses[index] = PageStatus.OK
            missing = [(index, address) for index, address in missing if address not in came]
            if not missing:
                return

    def _scatter(self, addresses: Iterable[int]) -> Mapping[int, bytes]:
        """The pages that the device gives of those asked for, by address."""
        with self._lock:
            if self._device is None:
                return {}
            try:
                answers = self._device.read_scatter(list(addresses))
            except RuntimeError:
                return {}
        return {
            answer["addr"]: answer["data"] for answer in answers if len(answer["data"]) == PAGE_SIZE
        }

    def view(self) -> None:
        """None: the memory is behind a library."""

    def close(self) -> None:
        """See `Source.close`. Waits for the batch that is under way."""
        with self._lock:
            device, self._device = self._device, None
            if device is not None:
                device.close()


def open_leechcore(uri: SourceUri) -> LeechCoreSource:
    """Open ``leechcore:DEVICE``, a device string of LeechCore such as ``file:///dump.lime``.

    A dump brings its memory map along. A device that reads living memory does not know which
    addresses are RAM, and needs ``?map=FILE`` (offsets are the addresses to ask for) or
    ``?machine=NAME&size=SIZE``. Raises UsageError, FileFormatError, SourceUnavailable.
    """
    uri.allow("map", "machine", "size")
    layout = None
    if uri.parameters:
        layout = uri_layout(uri)
        layout = layout if "map" in uri.parameters else layout.linear()
    device = _open(uri)
    try:
        if layout is None:
            layout = _device_layout(uri, device)
        return LeechCoreSource(uri.text, device, layout)
    except BaseException:
        device.close()
        raise


def probe_leechcore() -> str:
    """The version of the package, which is not imported for it."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f"{PACKAGE} is not installed: {_HOW_TO_INSTALL}"
    try:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} of unknown version"


def _open(uri: SourceUri) -> Any:
    if len(uri.path.encode(errors="surrogateescape")) > DEVICE_BYTES_MAX:
        raise UsageError(
            f"{uri.text}: a device string has at most {DEVICE_BYTES_MAX} bytes; use a shorter path"
        )
    try:
        package: Any = importlib.import_module(PACKAGE)
    except ImportError as error:
        raise UsageError(
            f"{uri.text}: the package {PACKAGE} cannot be loaded ({error}); {_HOW_TO_INSTALL}"
        ) from error
    try:
        return package.LeechCore(uri.path)
    # TypeError is what it raises for everything; UnicodeError for a name that is not UTF-8.
    except (TypeError, RuntimeError, OSError, UnicodeError) as error:
        raise SourceUnavailable(
            f"{uri.text}: LeechCore does not open {uri.path!r}; check the device string, that the "
            "device is there, and that a dump file has at least 16 MiB"
        ) from error


def _device_layout(uri: SourceUri, device: Any) -> Layout:
    """The memory map that comes with a dump."""
    if device.is_volatile:
        raise UsageError(
            f"{uri.text}: this device does not know which addresses are RAM, and touching others "
            "can hang a machine; add ?map=FILE, or ?machine= and size="
        )
    entries = device.memmap
    if not 0 < len(entries) <= MAP_REGIONS_MAX:
        raise FileFormatError(
            f"{uri.text}: a memory map of {len(entries)} regions; 1 to {MAP_REGIONS_MAX} are taken"
        )
    _check_length(uri, max(entry["offset"] + entry["size"] for entry in entries))
    if max(entry["base"] + entry["size"] for entry in entries) > ADDRESS_END:
        raise FileFormatError(f"{uri.text}: its memory map reaches beyond 2**52")
    try:
        regions = [MemoryRegion(entry["base"], entry["size"]) for entry in entries]
        return Layout.of(Segment(region, region.gpa) for region in regions)
    except ValueError as error:
        raise FileFormatError(f"{uri.text}: no memory map: {error}; give one with map=") from error


def _check_length(uri: SourceUri, wanted: int) -> None:
    """See that a file holds all of its map.

    LeechCore does not check, and gives a raw image of odd length a map of 4 GiB.
    """
    if not uri.path.startswith(_FILE):
        return
    try:
        length = Path(uri.path.removeprefix(_FILE)).stat().st_size
    except OSError as error:
        raise SourceUnavailable(f"{uri.text}: {error.strerror}; check the path") from error
    if length < wanted:
        raise FileFormatError(
            f"{uri.text}: has {length} bytes, its memory map needs {wanted}; the dump is "
            "truncated, or a raw image that is no multiple of 4096 bytes"
        )
