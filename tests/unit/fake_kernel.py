"""A synthetic Linux in synthetic memory: only what discovery looks at."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tables import NX, PRESENT, TABLE, WRITE, Memory

from pyscan.kernel import KernelImage
from pyscan.translate import X86_64, PagingFormat

MIB = 1 << 20
DIRECT_MAP = {4: 0xFFFF_8A40_0000_0000, 5: 0xFF12_0080_0000_0000}
TRAMPOLINE = 0x9_9000


@dataclass
class FakeKernel:
    """2 MiB of text, of read-only data and of data, which holds the tables."""

    memory: Memory
    levels: int = 4
    virtual: int = 0xFFFF_FFFF_9A00_0000
    physical: int = 16 * MIB

    def __post_init__(self) -> None:
        self.text, self.rodata, self.data = (self.physical + part * 2 * MIB for part in range(3))
        self.root = self.data + 0x1_0000
        self.level4, self.level3, self.level2 = (self.root + 0x4000 + n * 0x1000 for n in range(3))
        self.below = self.level4 if self.levels == 5 else self.level3
        self.pointer = self.data + 0x100 * 8
        rights = {self.text: PRESENT, self.rodata: PRESENT | NX, self.data: PRESENT | WRITE | NX}
        self.memory.set_entry(self.root, 511, self.below | TABLE)
        if self.levels == 5:
            self.memory.set_entry(self.level4, 511, self.level3 | TABLE)
        self.memory.set_entry(self.level3, 510, self.level2 | TABLE)
        for gpa, bits in rights.items():
            self.memory.map(self.form, self.root, self.address(gpa), gpa, bits, shift=21)
        for gpa in range(0, self.memory.size, 2 * MIB):
            bits = PRESENT | NX if gpa in (self.text, self.rodata) else PRESENT | WRITE | NX
            self.memory.map(self.form, self.root, self.direct(gpa), gpa, bits, shift=21)
        self.memory.write(self.pointer, struct.pack("<Q", self.address(self.root)))
        self.boot()

    @property
    def form(self) -> PagingFormat:
        return X86_64[self.levels]

    @property
    def image(self) -> KernelImage:
        return KernelImage(self.root, self.levels, self.virtual, self.physical, 6 * MIB)

    def address(self, gpa: int) -> int:
        return self.virtual + gpa - self.physical

    def direct(self, gpa: int) -> int:
        return DIRECT_MAP[self.levels] + gpa

    def boot(self) -> None:
        """Write the real-mode trampoline's table, as every boot does."""
        self.memory.set_entry(TRAMPOLINE, 511, self.below | TABLE)

    def process(self, table: int) -> None:
        """A process: its own table with the kernel's half."""
        for index in range(256, 512):
            entry = self.memory.read_entry(self.root, index)
            if entry:
                self.memory.set_entry(table, index, entry)
        self.memory.set_entry(table, 3, self.memory.table() | TABLE)
