"""A small physical memory with page tables, for tests of translation and discovery."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from pyscan.records import PAGE_SIZE, MemoryRegion
from pyscan.sources.base import Source
from pyscan.sources.file import FileSource
from pyscan.sources.layout import Layout, Segment
from pyscan.translate import PagingFormat

PRESENT = 1 << 0
WRITE = 1 << 1
USER = 1 << 2
LARGE = 1 << 7
NX = 1 << 63

TABLE = PRESENT | WRITE  # of entries that lead to a table: all rights, the leaf restricts


@dataclass
class Memory:
    """Sparse RAM that is written to a file, and a bump allocator for tables."""

    path: Path
    size: int
    above_4g: int = 0  # bytes of RAM that lie at 4 GiB, behind the others in the file
    next_table: int = 0x10_0000

    def __post_init__(self) -> None:
        with self.path.open("wb") as file:
            file.truncate(self.size + self.above_4g)

    def layout(self) -> Layout:
        segments = [Segment(MemoryRegion(0, self.size), 0)]
        if self.above_4g:
            segments.append(Segment(MemoryRegion(4 << 30, self.above_4g), self.size))
        return Layout.of(segments)

    def source(self) -> Source:
        return FileSource(f"file:{self.path}", self.path, self.layout())

    def write(self, gpa: int, data: bytes) -> None:
        offset = gpa if gpa < self.size else gpa - (4 << 30) + self.size
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def read_entry(self, table: int, index: int) -> int:
        offset = table if table < self.size else table - (4 << 30) + self.size
        with self.path.open("rb") as file:
            file.seek(offset + 8 * index)
            return int(struct.unpack("<Q", file.read(8))[0])

    def set_entry(self, table: int, index: int, entry: int) -> None:
        self.write(table + 8 * index, struct.pack("<Q", entry & ((1 << 64) - 1)))

    def table(self) -> int:
        """A new, empty table outside any image."""
        self.next_table += PAGE_SIZE
        return self.next_table - PAGE_SIZE

    def map(
        self,
        form: PagingFormat,
        root: int,
        address: int,
        gpa: int,
        bits: int = TABLE,
        *,
        shift: int = 12,
        large: bool = True,
    ) -> None:
        """Set the entry for 2**shift bytes, making tables on the way; not `large`: a table."""
        table = root
        for level in form.levels:
            index = (address >> level.shift) & 511
            if level.shift == shift:
                self.set_entry(table, index, gpa | bits | (LARGE if shift > 12 and large else 0))
                return
            entry = self.read_entry(table, index)
            if not entry & PRESENT:
                entry = self.table() | TABLE
                self.set_entry(table, index, entry)
            table = entry & form.address
