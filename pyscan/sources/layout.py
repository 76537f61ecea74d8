"""Where a target's memory lies in a RAM file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyscan.errors import ConfigError, UsageError
from pyscan.records import PAGE_SHIFT, PAGE_SIZE, MemoryMap, MemoryRegion, RegionKind
from pyscan.sources.base import NO_OFFSET, Frames, Offsets, find_regions

#: Limits of a map file.
MAP_FILE_BYTES_MAX = 1 << 20
MAP_REGIONS_MAX = 4096

#: Physical addresses have at most 52 bits (Intel SDM vol. 3, 4.1.4).
ADDRESS_END = 1 << 52

_KEYS = {"gpa", "length", "offset"}


@dataclass(frozen=True, slots=True)
class Segment:
    """A memory region and its byte offset in the file."""

    region: MemoryRegion
    offset: int

    @property
    def offset_end(self) -> int:
        """First byte of the file behind the segment."""
        return self.offset + self.region.length


@dataclass(frozen=True, slots=True)
class Layout:
    """The segments of a RAM file, ascending by address. Raises ValueError on overlap."""

    segments: tuple[Segment, ...]
    memory_map: MemoryMap = field(init=False)
    _offsets: NDArray[np.uint64] = field(init=False, repr=False, compare=False)
    _starts: NDArray[np.uint64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        regions = tuple(segment.region for segment in self.segments)
        # The last entry stands for index -1, no region; its value is replaced.
        offsets = [segment.offset for segment in self.segments] + [0]
        starts = [region.gpa >> PAGE_SHIFT for region in regions] + [0]
        object.__setattr__(self, "memory_map", MemoryMap(regions))
        object.__setattr__(self, "_offsets", np.array(offsets, dtype=np.uint64))
        object.__setattr__(self, "_starts", np.array(starts, dtype=np.uint64))

    @classmethod
    def of(cls, segments: Iterable[Segment]) -> Layout:
        """Build a layout from segments in any order."""
        return cls(tuple(sorted(segments, key=lambda segment: segment.region.gpa)))

    def linear(self, base: int = 0) -> Layout:
        """The same memory where guest-physical address 0 lies at `base`, and all follows it."""
        return Layout(tuple(Segment(region, base + region.gpa) for region in self.memory_map))

    @property
    def file_bytes(self) -> int:
        """Length that the file must have."""
        return max((segment.offset_end for segment in self.segments), default=0)

    def offsets(self, frames: Frames) -> Offsets:
        """Byte offset in the file of each frame; NO_OFFSET where it is not in the map."""
        index = find_regions(self.memory_map, frames)
        inside = (frames - self._starts[index]) << np.uint64(PAGE_SHIFT)
        return np.where(index >= 0, self._offsets[index] + inside, NO_OFFSET)


def load_map(path: Path) -> Layout:
    """Read a map file: TOML with one ``[[region]]`` table per region.

    Keys ``gpa``, ``length``, ``offset`` (bytes, page aligned) and optionally ``kind``
    (``"ram"``, the default, or ``"rom"``). Raises UsageError when the file cannot be read,
    ConfigError when it says something impossible.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAP_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the memory map: {error.strerror}") from error
    if len(text) > MAP_FILE_BYTES_MAX:
        raise ConfigError(path, None, f"map file is longer than {MAP_FILE_BYTES_MAX} bytes")
    try:
        document = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(path, None, f"not a TOML file: {error}") from error
    tables = document.get("region")
    if set(document) != {"region"} or not isinstance(tables, list):
        raise ConfigError(path, None, "expected [[region]] tables and nothing else")
    if len(tables) > MAP_REGIONS_MAX:
        raise ConfigError(path, None, f"{len(tables)} regions; at most {MAP_REGIONS_MAX}")
    try:
        return Layout.of(_segment(number, table) for number, table in enumerate(tables, 1))
    except ValueError as error:
        raise ConfigError(path, None, str(error)) from error


def _segment(number: int, table: object) -> Segment:
    if not isinstance(table, Mapping) or set(table) - {"kind"} != _KEYS:
        raise ValueError(f"region {number}: needs gpa, length and offset, and may have kind")
    kind = table.get("kind", RegionKind.RAM)
    if kind not in tuple(RegionKind):
        raise ValueError(f"region {number}: kind must be 'ram' or 'rom', not {kind!r}")
    for key in sorted(_KEYS):
        value = table[key]
        if type(value) is not int or not 0 <= value < ADDRESS_END or value % PAGE_SIZE:
            raise ValueError(f"region {number}: {key} must be a multiple of 4096 below 2**52")
    region = MemoryRegion(table["gpa"], table["length"], RegionKind(kind))
    return Segment(region, table["offset"])
