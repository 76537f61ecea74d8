"""The memory that contenders go over: random content, in the kinds of mapping that exist.

Content is random, so no page is a zero page and nothing compresses; where a pass begins is
random too, so no contender profits from one lucky placement.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.bench.peers import Unavailable
from pyscan.digest import open_digester
from pyscan.lab.process import RunDirectory
from pyscan.records import PAGE_SIZE

_FILL_BYTES: Final = 16 << 20
_CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")
_MEMORY: Final = Path("/proc/meminfo")
_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage")


class Backing(StrEnum):
    """Where memory comes from."""

    ANONYMOUS = "anonymous"
    SHARED = "shared"  # a file in /dev/shm, as the RAM of a virtual machine is


@dataclass(frozen=True, slots=True)
class Memory:
    """Writable memory full of random bytes; `path` is its file when it has one."""

    data: memoryview
    path: Path | None


@contextmanager
def filled(
    size_bytes: int, backing: Backing, huge: bool, random: np.random.Generator
) -> Iterator[Memory]:
    """Memory of `size_bytes`. Raises Unavailable where huge pages cannot be had.

    The mapping goes with the last reference to it; its file, when the context is left.
    """
    with RunDirectory() as run:
        if backing is Backing.ANONYMOUS:
            path = None
            mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            path = run.ram_file("bench", size_bytes)
            with path.open("r+b") as file:
                mapping = mmap.mmap(file.fileno(), size_bytes)
        _ask_for_pages(mapping, backing, huge)
        data = memoryview(mapping)
        words = np.frombuffer(data, dtype=np.uint64)
        for start in range(0, len(words), _FILL_BYTES // 8):
            part = words[start : start + _FILL_BYTES // 8]
            part[:] = random.integers(0, 1 << 64, size=len(part), dtype=np.uint64)
        yield Memory(data, path)


def huge_page_settings() -> dict[Backing, str]:
    """The kernel's settings of transparent huge pages, "never" where there are none."""
    names = {Backing.ANONYMOUS: "enabled", Backing.SHARED: "shmem_enabled"}
    return {backing: _chosen(_HUGE_PAGES / name) for backing, name in names.items()}


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first processor; 0 where it is not told."""
    sizes = [0]
    for path in _CACHES.glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes)


def available_bytes() -> int:
    """Memory that can be had without driving others out (MemAvailable, proc(5))."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMORY.read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def evictor() -> Callable[[], None]:
    """A function that pushes everything else out of the caches."""
    words = np.zeros(max(256 << 20, 4 * last_level_cache_bytes()) // 8, dtype=np.uint64)

    def evict() -> None:
        np.add(words, np.uint64(1), out=words)

    return evict


@dataclass(frozen=True)
class Workload:
    """Pages of one memory that every contender goes over.

    `offsets` (n,) uint64, in bytes; `contiguous` when they follow one another, so that a
    contender may take them as one range. `chunk_pages` is how many pages those contenders
    take at a time that copy memory in.
    """

    memory: Memory
    offsets: NDArray[np.uint64]
    contiguous: bool
    chunk_pages: int

    @property
    def pages(self) -> int:
        """Number of pages."""
        return len(self.offsets)

    @cached_property
    def frames(self) -> NDArray[np.uint64]:
        """Frame number of every page: where it lies in the memory."""
        return self.offsets // np.uint64(PAGE_SIZE)

    @cached_property
    def starts(self) -> list[int]:
        """`offsets` as plain integers, for loops in Python."""
        return [int(offset) for offset in self.offsets]

    @cached_property
    def sha256(self) -> NDArray[np.uint8]:
        """SHA-256 of every page, (n, 32)."""
        return open_digester("native").hash_view(self.memory.data.toreadonly(), self.offsets)[0]

    @cached_property
    def golden(self) -> NDArray[np.uint8]:
        """A packed copy of all pages, (n, PAGE_SIZE)."""
        pages = np.frombuffer(self.memory.data, dtype=np.uint8).reshape(-1, PAGE_SIZE)
        return pages[self.frames]

    @property
    def path(self) -> Path:
        """The file behind the memory. Raises Unavailable when there is none."""
        if self.memory.path is None:
            raise Unavailable("reads a file, and this memory has none")
        return self.memory.path


def workload(
    memory: Memory, random: np.random.Generator, *, scattered_pages: int = 0, chunk_pages: int = 256
) -> Workload:
    """All pages of `memory`, or so many distinct ones at random places, ascending."""
    count = len(memory.data) // PAGE_SIZE
    frames = np.arange(count, dtype=np.uint64)
    if scattered_pages:
        frames = np.sort(random.choice(frames, size=min(scattered_pages, count), replace=False))
    return Workload(memory, frames * np.uint64(PAGE_SIZE), not scattered_pages, chunk_pages)


def _ask_for_pages(mapping: mmap.mmap, backing: Backing, huge: bool) -> None:
    setting = huge_page_settings()[backing]
    if huge and setting not in {"always", "madvise", "advise", "within_size", "force"}:
        raise Unavailable(f"transparent huge pages are {setting!r} for {backing} memory here")
    if setting != "never":
        mapping.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)


def _chosen(path: Path) -> str:
    """The bracketed word of a sysfs setting such as ``always [madvise] never``."""
    try:
        found = re.search(r"\[(\S+)\]", path.read_text())
    except OSError:
        return "never"
    return found[1] if found else "never"
