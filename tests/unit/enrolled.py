"""A synthetic kernel that is good, can be enrolled, and can then be tampered with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fake_kernel import MIB, FakeKernel
from tables import PRESENT, TABLE, Memory

from pyscan.approved import Snapshot, enrol
from pyscan.digest import open_digester
from pyscan.keys import SigningKey
from pyscan.records import PAGE_SIZE, MemoryMap
from pyscan.sources import Source, View, build_uri
from pyscan.sources.base import Frames, Pages, Statuses
from pyscan.sources.file import Access, FileSource

SIZE = 64 * MIB
CREATED_NS = 1_700_000_000_000_000_000
APPROVER = SigningKey.generate()


@dataclass
class Target:
    """512 pages of text, mapped one by one, and 512 of read-only data, mapped as one."""

    kernel: FakeKernel
    text_table: int  # that maps the pages of text

    @classmethod
    def make(cls, path: Path, levels: int = 4) -> Target:
        memory = Memory(path, SIZE)
        target = cls(FakeKernel(memory, levels), memory.table())
        words = np.arange(4 * MIB // 8, dtype="<u8")  # so that no page is like another
        memory.write(target.kernel.text, words.tobytes())
        target.map(0, target.text_table, TABLE, shift=21)
        pages = np.arange(512, dtype="<u8") * PAGE_SIZE + target.gpa(0)
        memory.write(target.text_table, (pages | PRESENT).tobytes())
        return target

    @property
    def memory(self) -> Memory:
        return self.kernel.memory

    @property
    def path(self) -> Path:
        return self.memory.path

    @property
    def uri(self) -> str:
        return build_uri("file", self.path, machine="q35", size=str(SIZE))

    def open(self, access: Access = Access.MAP) -> FileSource:
        return FileSource(f"file:{self.path}", self.path, self.memory.layout(), access)

    def gpa(self, page: int) -> int:
        """Where watched page 0 to 1023 lies."""
        return self.kernel.text + page * PAGE_SIZE

    def frame(self, page: int) -> int:
        return self.gpa(page) // PAGE_SIZE

    def address(self, page: int) -> int:
        """Virtual address of a watched page."""
        return self.kernel.address(self.gpa(page))

    def map(self, page: int, gpa: int, bits: int, shift: int = 12) -> None:
        """Let the address of a watched page lead to `gpa`."""
        self.memory.map(
            self.kernel.form,
            self.kernel.root,
            self.address(page),
            gpa,
            bits,
            shift=shift,
            large=False,
        )

    def content(self, page: int, pages: int = 1) -> bytes:
        """The bytes of watched pages, as the file holds them."""
        with self.path.open("rb") as file:
            file.seek(self.gpa(page))
            return file.read(pages * PAGE_SIZE)

    def flip(self, page: int, offset: int = 5) -> None:
        """Change one bit of a watched page, and back when done again."""
        with self.path.open("r+b") as file:
            file.seek(self.gpa(page) + offset)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))

    def enrol(self) -> Snapshot:
        with self.open() as source:
            return enrol(source, open_digester(), CREATED_NS)


class Wrapped(Source):
    """A source whose reads are preceded and followed by a call."""

    def __init__(
        self,
        source: Source,
        *,
        before: Callable[[Frames], None] = lambda _frames: None,
        after: Callable[[Frames, Pages], None] = lambda _frames, _pages: None,
    ) -> None:
        self._source = source
        self._before = before
        self._after = after

    @property
    def uri(self) -> str:
        return self._source.uri

    def regions(self) -> MemoryMap:
        return self._source.regions()

    def read(self, frames: Frames, buffer: Pages) -> Statuses:
        self._before(frames)
        statuses = self._source.read(frames, buffer)
        self._after(frames, buffer)
        return statuses

    def view(self) -> View | None:
        return self._source.view()

    def close(self) -> None:
        self._source.close()
