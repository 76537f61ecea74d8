"""A small machine with a kernel that validates clean, whose memory a fuzzer edits.

Its kernel is that of tests/unit/fake_validation.py, with patch sites of every class, a module,
and one of each structure that validation reads. `Machine.edited` lends its memory with edits.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
from fake_target import DATA, IMAGE_BYTES, SYMBOLS
from fuzz.legal import CALL, JUMP, NOP5, RETURN, branch, sites_of, swapped, table_groups
from fuzz.made_machine import MIB, NAMES, PACK, PACK_GPA, SLOTS, TRACER, MachineMaker
from numpy.typing import NDArray

from pyscan.approved.unit import VMLINUX, SegmentKind
from pyscan.kernel import KernelImage, find_kernel
from pyscan.records import PAGE_SHIFT, PAGE_SIZE, POISON, MemoryMap, MemoryRegion, PageStatus
from pyscan.validate import attach, validate

Pages = NDArray[np.uint8]


class EditedSource:
    """Memory in an array, whose pages may fail."""

    uri = "fuzz:machine"

    def __init__(self, pages: Pages, statuses: NDArray[np.uint8], written: MemoryMap) -> None:
        self._pages, self._statuses, self._written = pages, statuses, written

    def regions(self) -> MemoryMap:
        return MemoryMap.of([MemoryRegion(0, self._pages.size)])

    def populated(self) -> MemoryMap:
        return self._written

    def read(self, frames: NDArray[np.uint64], buffer: Pages) -> NDArray[np.uint8]:
        inside = frames < len(self._pages)
        rows = np.where(inside, frames, 0).astype(np.int64)
        statuses = np.where(inside, self._statuses[rows], PageStatus.HOLE).astype(np.uint8)
        np.take(self._pages, rows, axis=0, out=buffer)
        buffer[statuses != PageStatus.OK] = POISON
        return statuses

    def view(self) -> None:
        return None

    def close(self) -> None:
        return None

    def __enter__(self) -> EditedSource:
        return self

    def __exit__(self, *_exception: object) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Edit:
    """One change: what is done (`MODES`), a number that chooses the place, and its operand."""

    mode: int
    place: int
    value: int
    count: int

    FORM = struct.Struct("<BIQB")

    @property
    def signed(self) -> int:
        """`count` as a signed number."""
        return self.count - 256 if self.count > 127 else self.count

    def encode(self) -> bytes:
        """As an input has it."""
        return self.FORM.pack(self.mode, self.place, self.value, self.count)


#: Of text and read-only data: any bytes, branches and other forms at patch sites, tables.
CODE_MODES: Final = ("code", "branch", "form", "swap")
MODES: Final = ("write", "point", "flip", "add", "fail", "copy", "fill", *CODE_MODES)
_FORMS: Final = (
    *(NOP5, RETURN, b"\xcc", b"\xf0", b"\x3e", b"\x66\x90", b"\x90" * 8),
    b"\xeb\x10\x0f\x1f\x00",
    *(
        b"\x2e\x2e\x2e\x31\xc0",
        b"\xff\xd0\x0f\x1f\x00",
        b"\x41\xff\xe3\xcc",
        b"\x0f\xae\xe8\xff\xd0",
    ),
    b"\x0f\x1f\x80\0\0\0\0",
)
EDITS_MAX: Final = 64
_FIRST_CODE: Final = MODES.index(CODE_MODES[0])


def decode_edits(data: bytes) -> list[Edit]:
    """The edits that an input stands for."""
    size = Edit.FORM.size
    usable = min(len(data) // size, EDITS_MAX) * size
    return [
        Edit(mode % len(MODES), place, value, count)
        for mode, place, value, count in Edit.FORM.iter_unpack(data[:usable])
    ]


class Machine:
    """The machine; built once for each process."""

    def __init__(self) -> None:
        with TemporaryDirectory() as directory:
            made = MachineMaker(Path(directory) / "ram")
            self.approved = made.approved
            ram = np.fromfile(made.path, dtype=np.uint8)
        self.pages = ram.reshape(-1, PAGE_SIZE)
        self._statuses = np.zeros(len(self.pages), dtype=np.uint8)
        self._written = _nonzero(self.pages)
        self._settle(made)
        self._written = _nonzero(self.pages)
        with self.edited(()) as source:
            self.kernel: KernelImage = find_kernel(source)
            self.healthy = validate(attach(source, [self.approved]))
            memory = self.healthy.target.memory
            #: By unit: what the healthy machine has of its image.
            self.content = {
                placed.unit.name: memory.read_range(placed.address, len(placed.unit.image))[0]
                for placed in self.healthy.units.all
            }
        if not self.healthy.clean:
            raise RuntimeError(f"the machine is not clean: {self.healthy.problems.kept}")
        self.code = self._code()
        self.words = self._words()
        self.sites = self._sites()
        base = self.kernel.virtual_base
        near = [base + offset for offset in {**SYMBOLS, **NAMES}.values() if offset < DATA]
        self.targets = [*near, SLOTS, TRACER, PACK]
        units = [placed.unit for placed in self.healthy.units.all]
        self.tables = [(unit.name, group) for unit in units for group in table_groups(unit)]
        words = self.pages.reshape(-1).view("<u8")
        self.pointers = np.unique(words[self.words >> 3])

    def _settle(self, made: MachineMaker) -> None:
        """Write what the kernel would have patched, then what it has traced and probed."""
        with self.edited(()) as source:
            validation = validate(attach(source, [self.approved]))
            for extent in validation.extents:
                start = extent.placed.address + extent.offset
                steps = np.arange(len(extent.statuses), dtype=np.uint64) << np.uint64(PAGE_SHIFT)
                frames, mapped = validation.target.memory.frames(np.uint64(start) + steps)
                if not mapped.all():
                    raise RuntimeError(f"{extent.placed.unit.name} is not mapped")
                if extent.executable or extent.placed.unit.name != VMLINUX:
                    self.pages[frames.astype(np.int64)] = extent.legal.reshape(-1, PAGE_SIZE)
        for gpa, data in made.patches():
            flat = self.pages.reshape(-1)
            flat[gpa : gpa + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def _code(self) -> NDArray[np.int64]:
        """Physical address of every byte of text and read-only data that is in no dispute."""
        found = []
        memory = self.healthy.target.memory
        for placed in self.healthy.units.all:
            for segment in placed.unit.segments:
                if segment.kind is SegmentKind.RO_AFTER_INIT:
                    continue
                places = np.arange(segment.length, dtype=np.uint64)
                gpas, _ = memory.translate(np.uint64(placed.address + segment.offset) + places)
                found.append(gpas.astype(np.int64))
        return np.concatenate(found)

    def _gpa(self, name: str, offset: int) -> int:
        """Physical address of a unit's byte."""
        (address,) = (p.address for p in self.healthy.units.all if p.unit.name == name)
        memory = self.healthy.target.memory
        return int(memory.translate(np.array([address + offset], dtype=np.uint64))[0][0])

    def _sites(self) -> list[tuple[int, int]]:
        """Physical and virtual address of every patch site."""
        return [
            (self._gpa(placed.unit.name, offset), placed.address + offset)
            for placed in self.healthy.units.all
            for offset, _ in sites_of(placed.unit)
        ]

    def _words(self) -> NDArray[np.int64]:
        """Physical address of every word outside text that a structure or a table has."""
        base = self.kernel.physical_base
        words = self.pages.reshape(-1).view("<u8")
        used: NDArray[np.bool_] = words != 0
        code = np.concatenate([self.code, np.arange(PACK_GPA, PACK_GPA + 2 * MIB)])
        used[code >> 3] = False
        for offset in {**SYMBOLS, **NAMES}.values():
            if DATA <= offset < IMAGE_BYTES:
                first = (base + offset) >> 3
                used[first : first + 8] = True
        return np.flatnonzero(used) << 3

    @contextmanager
    def edited(self, edits: list[Edit] | tuple[()]) -> Iterator[EditedSource]:
        """The memory with edits, which are taken back at the end."""
        kept: dict[int, Pages] = {}
        failed: set[int] = set()
        flat = self.pages.reshape(-1)

        def write(gpa: int, data: bytes) -> None:
            end = min(gpa + len(data), flat.size)
            for frame in range(gpa >> PAGE_SHIFT, ((end - 1) >> PAGE_SHIFT) + 1):
                kept.setdefault(frame, self.pages[frame].copy())
            flat[gpa:end] = np.frombuffer(data[: end - gpa], dtype=np.uint8)

        try:
            for edit in edits:
                if MODES[edit.mode] == "fail":
                    frame = int(self.words[edit.place % len(self.words)]) >> PAGE_SHIFT
                    self._statuses[frame] = 1 + edit.value % (len(PageStatus) - 1)
                    failed.add(frame)
                else:
                    change = self._change if edit.mode < _FIRST_CODE else self._change_code
                    for gpa, new in change(edit):
                        write(gpa, new)
            written = self._written.copy()
            written[list(kept)] = True
            yield EditedSource(self.pages, self._statuses, _map_of(written))
        finally:
            for frame, page in kept.items():
                self.pages[frame] = page
            self._statuses[list(failed)] = PageStatus.OK

    def _change(self, edit: Edit) -> list[tuple[int, bytes]]:
        """Where an edit of structures writes, and what."""
        flat = self.pages.reshape(-1)
        gpa = int(self.words[edit.place % len(self.words)])
        now = int.from_bytes(flat[gpa : gpa + 8].tobytes(), "little")
        raw = edit.value.to_bytes(8, "little")
        match MODES[edit.mode]:
            case "write":
                return [(gpa, raw[: 1 + edit.count % 8])]
            case "point":
                now = int(self.pointers[edit.value % len(self.pointers)]) + edit.signed
            case "flip":
                now ^= 1 << edit.value % 64
            case "add":
                now += edit.signed
            case "copy":
                other = int(self.words[edit.value % len(self.words)])
                return [(gpa, flat[other : other + 8 * (1 + edit.count)].tobytes())]
            case _:
                return [(gpa & -PAGE_SIZE, raw[:1] * PAGE_SIZE)]
        return [(gpa, (now & (1 << 64) - 1).to_bytes(8, "little"))]

    def _change_code(self, edit: Edit) -> list[tuple[int, bytes]]:
        """Where an edit of text or read-only data writes, and what."""
        gpa, address = self.sites[edit.place % len(self.sites)]
        match MODES[edit.mode]:
            case "code":
                gpa = int(self.code[edit.place % len(self.code)])
                return [(gpa, edit.value.to_bytes(8, "little")[: 1 + edit.count % 8])]
            case "branch":
                target = self.targets[edit.value % len(self.targets)]
                return [(gpa, branch(JUMP if edit.count & 1 else CALL, address, target))]
            case "form":
                return [(gpa, _FORMS[edit.value % len(_FORMS)])]
            case _:
                name, group = self.tables[edit.place % len(self.tables)]
                rows = edit.count & 15, edit.count >> 4
                changes = swapped(group, self._now(name), 0, *rows)
                return [(self._gpa(name, offset), data) for offset, data in changes]

    def _now(self, name: str) -> Pages:
        """What a unit's image holds at the moment."""
        (placed,) = (p for p in self.healthy.units.all if p.unit.name == name)
        steps = np.arange(0, len(placed.unit.image), PAGE_SIZE, dtype=np.uint64)
        frames, _ = self.healthy.target.memory.frames(np.uint64(placed.address) + steps)
        return self.pages[frames.astype(np.int64)].reshape(-1)


@cache
def machine() -> Machine:
    """The machine of this process."""
    return Machine()


def _nonzero(pages: Pages) -> NDArray[np.bool_]:
    """Which pages hold anything."""
    found: NDArray[np.bool_] = pages.max(axis=1) > 0
    return found


def _map_of(written: NDArray[np.bool_]) -> MemoryMap:
    """The runs of pages that are `written`."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], written.astype(np.int8), [0]))))
    regions = [
        MemoryRegion(first << PAGE_SHIFT, (end - first) << PAGE_SHIFT)
        for first, end in edges.reshape(-1, 2).tolist()
    ]
    return MemoryMap.of(regions)
