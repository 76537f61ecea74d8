"""Edits of a stopped kernel that look legal where they are, and are inconsistent.

    PYTHONPATH=tests .venv/bin/python -m matrix.edits URI ...

Every edit is made in an overlay, and validated from scratch. It names the classes of what must
come of it; it is found when something of one of them is new, and, for an edit of bytes that
are compared, is reported at the edited place. With `together`, edits of single places of code
and data share a validation, which then must report each of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table as Grid

from matrix.examine import approved_kernel
from matrix.mutate import clean_validation
from matrix.overlay import OverlaySource
from pyscan.approved.linux import LinuxApproved
from pyscan.approved.unit import SegmentKind, TableKind
from pyscan.errors import PyscanError
from pyscan.records import PAGE_SHIFT, PAGE_SIZE
from pyscan.sources import Source, open_source
from pyscan.translate import X86_64
from pyscan.validate.attach import attach
from pyscan.validate.code import site_at
from pyscan.validate.lists import hlist_entries
from pyscan.validate.patch import CALL, JMP8, JMP32, NOP5, NOPS, RETURN, branch
from pyscan.validate.placed import Placed
from pyscan.validate.predict import Predictor
from pyscan.validate.problem import ProblemKind
from pyscan.validate.validation import Validation, validate

TEXT: Final = "text"  # a difference of code
DATA: Final = "data"  # a difference of read-only data
_LARGE: Final = 2 << 20

#: A reported place may begin behind the edited byte, where the edit wrote what was legal.
_NEAR: Final = 8

#: Edits that share a validation lie at least so many bytes apart.
_APART: Final = 64

#: Where hooks lead: a function of the kernel (kernel/cred.c).
_INTO: Final = "commit_creds"


class NotHere(Exception):
    """The image has no place for an edit."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit. `make` writes it and returns the virtual address of the first byte."""

    name: str
    expected: frozenset[str]  # TEXT, DATA and kinds of problems; one of them must come
    make: Callable[[Editor], int]
    wide: bool = False  # it contradicts many places at once

    @property
    def narrow(self) -> bool:
        """Whether it is found by that place alone."""
        return not (self.wide or self.expected - {TEXT, DATA})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an edit. `new`: classes of what was not there before."""

    name: str
    address: int
    place: str
    new: frozenset[str]
    found: bool
    note: str


class Editor:
    """Writes to an overlay by virtual address, with the help of a validation of the image."""

    def __init__(self, validation: Validation, overlay: OverlaySource) -> None:
        self.validation = validation
        self.overlay = overlay
        self.target = validation.target
        self.kernel = validation.units.vmlinux
        self.predictor = Predictor(validation.state, validation.keys.keys())

    def write(self, address: int, data: bytes) -> int:
        """Write bytes; returns the address of the first that changes."""
        old = self.read(address, len(data))
        changed = [at for at in range(len(data)) if old[at] != data[at]]
        if not changed:
            raise NotHere(f"{address:#x} holds {data.hex()} already")
        for at in changed:
            self.overlay.write(self.physical(address + at), data[at : at + 1])
        return address + changed[0]

    def read(self, address: int, length: int) -> bytes:
        """Bytes as the image has them."""
        return self.target.memory.read(address, length)

    def physical(self, address: int) -> int:
        """Where an address leads. Raises NotHere."""
        gpas, mapped = self.target.memory.translate(np.array([address], dtype=np.uint64))
        if not mapped[0]:
            raise NotHere(f"{address:#x} is not mapped")
        return int(gpas[0])

    def flip(self, address: int) -> int:
        """Change one byte."""
        return self.write(address, bytes([self.read(address, 1)[0] ^ 0x01]))

    def branch(self, opcode: int, address: int, symbol: str = _INTO) -> int:
        """Write a branch of 5 bytes to a function."""
        return self.write(address, branch(opcode, address, self.target.address(symbol)))

    def site(self, name: str, fits: Callable[[int, np.void, bytes], bool]) -> tuple[int, np.void]:
        """Address and row of the first site of the kernel that fits (address, row, bytes)."""
        column = getattr(self.kernel.unit.sites, name)
        for row in column:
            offset = int(row if column.dtype.names is None else row["offset"])
            address = self.kernel.address + offset
            if offset + 16 < self.kernel.unit.segments[0].length and fits(
                address, row, self.read(address, 16)
            ):
                return address, row
        raise NotHere(f"no such place among {name}")

    def module(self) -> Placed:
        """The largest module."""
        modules = self.validation.units.modules
        if not modules:
            raise NotHere("no module of the package is loaded")
        return max((each.placed for each in modules), key=lambda placed: placed.unit.length)

    def entries(self, address: int, root: int | None = None) -> list[tuple[int, int]]:
        """(physical address, value) of each entry of the page tables that leads to an address."""
        kernel = self.target.memory.kernel
        form = X86_64[kernel.paging_levels]
        table, found = kernel.root_gpa if root is None else root, []
        for level in form.levels:
            gpa = table + 8 * (address >> level.shift & 511)
            value = int.from_bytes(self.physical_read(gpa, 8), "little")
            found.append((gpa, value))
            if not value & form.present or (level.leaf == "large" and value & form.large):
                break
            table = value & form.address
        return found

    def physical_read(self, gpa: int, length: int) -> bytes:
        """Physical memory of the edited image, within one page."""
        page = np.empty((1, PAGE_SIZE), dtype=np.uint8)
        self.overlay.read(np.array([gpa >> PAGE_SHIFT], dtype=np.uint64), page)
        start = gpa % PAGE_SIZE
        return page[0, start : start + length].tobytes()

    def change_leaf(self, address: int, put: int = 0, take: int = 0) -> int:
        """Set and clear bits of the entry that maps an address."""
        gpa, value = self.entries(address)[-1]
        new = (value | put) & ~take
        if new == value:
            raise NotHere("the entry has these bits already")
        self.overlay.write(gpa, new.to_bytes(8, "little"))
        return address

    def free_large(self) -> int:
        """Physical address of 2 MiB of zeros, for copies."""
        frames = np.arange(512, dtype=np.uint64)
        pages = np.empty((512, PAGE_SIZE), dtype=np.uint8)
        for region in self.overlay.regions():
            first = -(-region.gpa // _LARGE) * _LARGE
            for gpa in range(max(first, 16 * _LARGE), region.end - _LARGE + 1, _LARGE):
                self.overlay.read(frames + np.uint64(gpa >> PAGE_SHIFT), pages)
                if not pages.any():
                    return gpa
        raise NotHere("no 2 MiB of zeros")


@dataclass(slots=True)
class _Edits:
    rows: list[Edit] = field(default_factory=list)

    def __call__(
        self, name: str, *expected: str, wide: bool = False
    ) -> Callable[[Callable[[Editor], int]], Callable[[Editor], int]]:
        def add(make: Callable[[Editor], int]) -> Callable[[Editor], int]:
            self.rows.append(Edit(name, frozenset(str(each) for each in expected), make, wide))
            return make

        return add


edit = _Edits()


# Patch sites


@edit("return flipped", TEXT)
def _(it: Editor) -> int:
    address, _row = it.site("returns", lambda _a, _r, code: code[0] in (0xC3, JMP32))
    if it.read(address, 1)[0] == 0xC3:
        return it.branch(JMP32, address, "__x86_return_thunk")
    return it.write(address, RETURN)


@edit("lock prefix toggled", TEXT)
def _(it: Editor) -> int:
    address, _row = it.site("locks", lambda _a, _r, code: code[0] in (0xF0, 0x3E))
    return it.write(address, bytes([0xF0 ^ 0x3E ^ it.read(address, 1)[0]]))


@edit("long jump label flipped", TEXT)
def _(it: Editor) -> int:
    address, row = it.site("jump_labels", lambda _a, row, _c: int(row["length"]) == 5)
    if it.read(address, 5) != NOP5:
        return it.write(address, NOP5)
    return it.write(address, branch(JMP32, address, it.kernel.address + int(row["target"])))


@edit("short jump label flipped", TEXT)
def _(it: Editor) -> int:
    address, row = it.site("jump_labels", lambda _a, row, _c: int(row["length"]) == 2)
    if it.read(address, 2) != NOPS[1]:
        return it.write(address, NOPS[1])
    distance = int(row["target"]) - int(row["offset"]) - 2
    return it.write(address, bytes([JMP8, distance & 0xFF]))


@edit("retpoline replaced by an indirect call", TEXT)
def _(it: Editor) -> int:
    address, row = it.site(
        "retpolines", lambda _a, row, code: row["form"] == 0 and row["register"] < 8
        and code[0] == CALL,
    )  # fmt: skip
    return it.write(address, bytes([0xFF, 0xD0 + int(row["register"])]) + NOPS[2])


@edit("indirect call replaced by a retpoline", TEXT)
def _(it: Editor) -> int:
    address, row = it.site(
        "retpolines", lambda _a, row, code: row["form"] == 0 and row["register"] == 0
        and code[0] == 0xFF,
    )  # fmt: skip
    del row
    return it.branch(CALL, address, "__x86_indirect_thunk_rax")


@edit("alternative reverted", TEXT)
def _(it: Editor) -> int:
    def replaced(address: int, row: np.void, code: bytes) -> bool:
        length = int(row["length"])
        return 0 < length <= 16 and _built(it, address, length) != code[:length]

    address, row = it.site("alternatives", replaced)
    return it.write(address, _built(it, address, int(row["length"])))


def _built(it: Editor, address: int, length: int) -> bytes:
    offset = address - it.kernel.address
    return it.predictor.linked(it.kernel, offset, offset + length).tobytes()


@edit("paravirt call led elsewhere", TEXT)
def _(it: Editor) -> int:
    address, _row = it.site("paravirt", lambda _a, _r, code: code[0] == CALL)
    return it.branch(CALL, address)


@edit("ftrace call without ops", TEXT)
def _(it: Editor) -> int:
    if it.validation.structures.ftrace:
        raise NotHere("functions are traced")
    address, _row = it.site("mcount", lambda _a, _r, code: code[:5] == NOP5)
    return it.branch(CALL, address, "ftrace_caller")


@edit("ftrace call led elsewhere", TEXT)
def _(it: Editor) -> int:
    address, _row = it.site("mcount", lambda _a, _r, _c: True)
    return it.branch(CALL, address)


@edit("static call site led elsewhere", TEXT)
def _(it: Editor) -> int:
    address, _row = it.site("static_calls", lambda _a, _r, code: code[0] == CALL)
    return it.branch(CALL, address)


@edit("static call site cut", TEXT)
def _(it: Editor) -> int:
    address, _row = it.site("static_calls", lambda _a, _r, code: code[0] == CALL)
    return it.write(address, NOP5)


@edit("static call made to return zero", TEXT)
def _(it: Editor) -> int:
    address, _row = it.site("static_calls", lambda _a, _r, code: code[0] == CALL)
    return it.write(address, b"\x2e\x2e\x2e\x31\xc0")


@edit("static tail call cut", TEXT)
def _(it: Editor) -> int:
    def called(address: int, row: np.void, code: bytes) -> bool:
        tail = bool(row["tail"]) and int(row["length"]) == 5 and code[0] == JMP32
        key = int(it.kernel.resolve(row["key_slot"].reshape(1), row["key_addend"].reshape(1))[0])
        return tail and it.validation.keys.functions[it.validation.keys.key_of(key)] != 0

    address, _row = it.site("static_calls", called)
    return it.write(address, RETURN)


@edit("static tail call of nothing led elsewhere", TEXT)
def _(it: Editor) -> int:
    address, _row = it.site("static_calls", lambda _a, row, code: row["tail"]
                            and code[:5] == RETURN)  # fmt: skip
    return it.branch(JMP32, address)


@edit("trampoline led elsewhere", TEXT)
def _(it: Editor) -> int:
    address, _row = it.site("trampolines", lambda _a, _r, _c: True)
    return it.branch(JMP32, address)


@edit("trampoline cut", TEXT)
def _(it: Editor) -> int:
    address, _row = it.site("trampolines", lambda _a, _r, code: code[0] == JMP32)
    return it.write(address, RETURN)


@edit("trampoline as it was built", TEXT)
def _(it: Editor) -> int:
    """Its key was updated; the trampoline alone is put back."""
    address, _row = it.site(
        "trampolines", lambda address, _r, code: _built(it, address, 5) != code[:5]
        and code[0] == JMP32,
    )  # fmt: skip
    return it.write(address, _built(it, address, 5))


@edit("breakpoint without a probe", TEXT)
def _(it: Editor) -> int:
    return it.write(it.target.address("vfs_unlink") + 5, b"\xcc")


@edit("probe's place with another breakpoint", TEXT)
def _(it: Editor) -> int:
    for probe in it.validation.structures.kprobes:
        if it.kernel.address <= probe.address < it.kernel.end:
            return it.write(probe.address + 1, b"\xcc")
    raise NotHere("no probe in the kernel's text")


@edit("code in the padding behind the kernel's text", TEXT)
def _(it: Editor) -> int:
    end = it.kernel.unit.segments[0].length
    return it.write(it.kernel.address + end - 16, b"\x0f\x05")


@edit("code in the padding behind a module's text", TEXT)
def _(it: Editor) -> int:
    module = it.module()
    return it.write(module.address + module.unit.segments[0].length - 16, b"\x0f\x05")


@edit("byte of a function without any site", TEXT)
def _(it: Editor) -> int:
    start = it.target.symbol("commit_creds")
    offset = next(at for at in range(start + 5, start + 64) if not site_at(it.kernel.unit, at))
    return it.flip(it.kernel.address + offset)


# State that text must agree with: data, so that the text is what is reported


@edit("static key flipped without its sites", TEXT, wide=True)
def _(it: Editor) -> int:
    keys = it.validation.keys.enabled
    address, row = it.site("jump_labels", lambda _a, _r, _c: True)
    key = int(it.kernel.resolve(row["key_slot"].reshape(1), row["key_addend"].reshape(1))[0])
    offset = it.target.offset("static_key.enabled")
    it.write(key + offset, (0 if keys[key] else 1).to_bytes(4, "little"))
    return address


@edit("static call's key led elsewhere", TEXT, wide=True)
def _(it: Editor) -> int:
    address, row = it.site("static_calls", lambda _a, _r, code: code[0] == CALL)
    key = int(it.kernel.resolve(row["key_slot"].reshape(1), row["key_addend"].reshape(1))[0])
    offset = it.target.offset("static_call_key.func")
    it.write(key + offset, it.target.address(_INTO).to_bytes(8, "little"))
    return address + 1


@edit("pv_ops led elsewhere", TEXT, wide=True)
def _(it: Editor) -> int:
    address, row = it.site("paravirt", lambda _a, _r, code: code[0] == CALL)
    place = it.target.address("pv_ops") + 8 * int(row["index"])
    it.write(place, it.target.address(_INTO).to_bytes(8, "little"))
    return address + 1


@edit("return thunk of another name", TEXT, wide=True)
def _(it: Editor) -> int:
    names = ("srso_return_thunk", "__x86_return_thunk")
    thunks = [it.target.address(name) for name in names]
    other = thunks[thunks[0] == it.validation.state.return_thunk]
    it.write(it.target.address("x86_return_thunk"), other.to_bytes(8, "little"))
    address, _row = it.site("returns", lambda _a, _r, code: code[0] == JMP32)
    return address + 1


@edit("ftrace_ops with a foreign trampoline", TEXT, ProblemKind.HANDLER, ProblemKind.GENERATED_CODE)
def _(it: Editor) -> int:
    """It says that it made no trampoline, and names a function of the kernel as one."""
    for ops in it.validation.structures.ftrace:
        into = it.target.address(_INTO)
        offset = it.target.offset
        it.write(ops.address + offset("ftrace_ops.trampoline"), into.to_bytes(8, "little"))
        flags = ops.flags & ~(1 << 11)
        it.overlay.write(
            it.physical(ops.address + offset("ftrace_ops.flags")), flags.to_bytes(8, "little")
        )
        address, _row = it.site("mcount", lambda _a, _r, code: code[:5] == NOP5)
        return it.branch(CALL, address)
    raise NotHere("no ftrace_ops")


# Read-only data


@edit("system call table", DATA)
def _(it: Editor) -> int:
    place = it.target.address("sys_call_table") + 8 * 163
    return it.write(place, it.target.address(_INTO).to_bytes(8, "little"))


@edit("byte of a module's read-only data", DATA)
def _(it: Editor) -> int:
    module = it.module()
    section = next(s for s in module.unit.sections if s.name == ".rodata")
    return it.flip(module.address + section.offset + section.length // 2)


@edit("zeros behind a module's read-only data", DATA)
def _(it: Editor) -> int:
    module = it.module()
    segment = next(s for s in module.unit.segments if s.kind is SegmentKind.RODATA)
    return it.flip(module.address + segment.offset + segment.length - 1)


def _table(it: Editor, placed: Placed, kind: TableKind) -> tuple[int, int, int]:
    for table in placed.unit.tables:
        if table.kind is kind:
            return placed.address + table.offset, table.entry, table.length // table.entry
    raise NotHere(f"{placed.unit.name} has no table {kind}")


@edit("row of the jump table doubled", DATA)
def _(it: Editor) -> int:
    start, entry, rows = _table(it, it.kernel, TableKind.JUMP_TABLE)
    for row in range(1, rows):
        before, place = start + entry * (row - 1), start + entry * row
        code, to = (int.from_bytes(it.read(before + at, 4), "little") - entry for at in (0, 4))
        key = int.from_bytes(it.read(before + 8, 8), "little") - entry
        data = b"".join((value & ((1 << 8 * n) - 1)).to_bytes(n, "little") for value, n in
                        ((code, 4), (to, 4), (key, 8)))  # fmt: skip
        if data != it.read(place, entry):
            return it.write(place, data)
    raise NotHere("all rows are equal")


@edit("row of the exception table led elsewhere", DATA)
def _(it: Editor) -> int:
    section = next(s for s in it.kernel.unit.sections if s.name == "__ex_table")
    return it.flip(it.kernel.address + section.offset + 4)


@edit("unwinding of one instruction changed", DATA)
def _(it: Editor) -> int:
    start, entry, rows = _table(it, it.module(), TableKind.ORC_ENTRY)
    return it.flip(start + entry * (rows // 2))


@edit("function pointer in data after init", DATA)
def _(it: Editor) -> int:
    """The first relocated pointer to a function in ro_after_init data of the kernel."""
    unit = it.kernel.unit
    spans = [s for s in unit.segments if s.kind is SegmentKind.RO_AFTER_INIT]
    for offset in unit.relocations64["offset"].tolist():
        if any(s.offset <= offset < s.offset + s.length for s in spans):
            address = it.kernel.address + offset
            value = int.from_bytes(it.read(address, 8), "little")
            if it.target.is_function(value):
                return it.write(address, it.target.address(_INTO).to_bytes(8, "little"))
    raise NotHere("no such pointer")


# Page tables


@edit("text moved, one byte changed", TEXT, wide=True)
def _(it: Editor) -> int:
    address = _move_text(it)
    form = X86_64[it.target.memory.kernel.paging_levels]
    copy = it.entries(address)[-1][1] & form.address & -_LARGE
    old = it.physical_read(copy + 0x1234, 1)[0]
    it.overlay.write(copy + 0x1234, bytes([old ^ 1]))
    return address + 0x1234


@edit("text moved, nothing changed", ProblemKind.PAGE_TABLE, ProblemKind.WRITABLE_ALIAS)
def _(it: Editor) -> int:
    return _move_text(it)


def _move_text(it: Editor) -> int:
    """Copy 2 MiB of text and lead the kernel's page table to the copy."""
    form = X86_64[it.target.memory.kernel.paging_levels]
    address = it.kernel.address + _LARGE
    gpa, value = it.entries(address)[-1]
    if not value & form.large:
        raise NotHere("text is not mapped by large pages")
    old, copy = value & form.address & -_LARGE, it.free_large()
    for page in range(0, _LARGE, PAGE_SIZE):
        it.overlay.write(copy + page, it.physical_read(old + page, PAGE_SIZE))
    it.overlay.write(gpa, (value & ~(form.address & -_LARGE) | copy).to_bytes(8, "little"))
    return address


@edit("module's page writable and executable", ProblemKind.WRITABLE_EXECUTABLE)
def _(it: Editor) -> int:
    return it.change_leaf(it.module().address, put=X86_64[4].writable)


@edit("module's data executable", ProblemKind.WRITABLE_EXECUTABLE)
def _(it: Editor) -> int:
    module = it.module()
    return it.change_leaf(module.address + module.unit.sizes[2], take=X86_64[4].no_execute)


@edit("read-only data executable", ProblemKind.ORPHAN_CODE)
def _(it: Editor) -> int:
    return it.change_leaf(it.target.address("__start_rodata"), take=X86_64[4].no_execute)


@edit("read-only data writable", ProblemKind.WRITABLE_ALIAS)
def _(it: Editor) -> int:
    return it.change_leaf(it.target.address("__start_rodata"), put=X86_64[4].writable)


@edit("text writable", ProblemKind.WRITABLE_EXECUTABLE)
def _(it: Editor) -> int:
    return it.change_leaf(it.kernel.address + _LARGE, put=X86_64[4].writable)


@edit("direct map of text writable", ProblemKind.WRITABLE_ALIAS)
def _(it: Editor) -> int:
    physical = it.physical(it.kernel.address + _LARGE)
    leaves = it.target.memory.leaves
    rows = (leaves.gpa <= physical) & (physical - leaves.gpa < leaves.size)
    rows &= leaves.address < np.uint64(0xFFFF_FFFF_8000_0000)
    for row in np.flatnonzero(rows).tolist():
        return it.change_leaf(int(leaves.address[row]), put=X86_64[4].writable)
    raise NotHere("the direct map does not hold the text")


@edit("process's table redirected", ProblemKind.PAGE_TABLE)
def _(it: Editor) -> int:
    """A process gets page tables of its own for the kernel's image."""
    kernel = it.target.memory.kernel
    form = X86_64[kernel.paging_levels]
    for root in it.validation.structures.roots:
        gpa = it.physical(root.address)
        if gpa == kernel.root_gpa:
            continue
        place, value = it.entries(it.kernel.address, gpa)[0]
        if not value & form.present:
            continue
        copy = it.free_large()
        it.overlay.write(copy, it.physical_read(value & form.address, PAGE_SIZE))
        it.overlay.write(place, (value & ~form.address | copy).to_bytes(8, "little"))
        return root.address
    raise NotHere("no process has a table of its own")


# Structures


@edit("module unlinked", ProblemKind.ORPHAN_CODE)
def _(it: Editor) -> int:
    module = it.validation.units.modules[0].module
    node = module.address + it.target.offset("module.list")
    following, before = (int.from_bytes(it.read(node + at, 8), "little") for at in (0, 8))
    it.write(before, following.to_bytes(8, "little"))
    it.write(following + 8, before.to_bytes(8, "little"))
    return module.base


def _hook(it: Editor) -> tuple[int, int]:
    """Head of a list of security hooks, and its first hook."""
    heads = it.target.address("security_hook_heads")
    link = it.target.offset("security_hook_list.list")
    for number in range(it.target.offset("security_hook_heads") // 8):
        walked = hlist_entries(it.target.memory, heads + 8 * number, link, 8)
        if walked.entries:
            return heads + 8 * number, walked.entries[0]
    raise NotHere("no security hooks")


@edit("security hook led to another function", ProblemKind.SECURITY_HOOK)
def _(it: Editor) -> int:
    place = _hook(it)[1] + it.target.offset("security_hook_list.hook")
    return it.write(place, it.target.address(_INTO).to_bytes(8, "little"))


@edit("security hook led into a function", ProblemKind.SECURITY_HOOK)
def _(it: Editor) -> int:
    place = _hook(it)[1] + it.target.offset("security_hook_list.hook")
    hook = int.from_bytes(it.read(place, 8), "little")
    return it.write(place, (hook + 9).to_bytes(8, "little"))


@edit("list of security hooks emptied", ProblemKind.SECURITY_HOOK)
def _(it: Editor) -> int:
    return it.write(_hook(it)[0], bytes(8))


@edit("interrupt gate led elsewhere", ProblemKind.INTERRUPT_TABLE)
def _(it: Editor) -> int:
    gate = it.target.address("idt_table") + 16 * 4
    into = it.target.address(_INTO)
    return it.write(gate, (into & 0xFFFF).to_bytes(2, "little"))


EDITS: Final = tuple(edit.rows)


def try_edits(
    source: Source,
    approved: LinuxApproved,
    edits: Sequence[Edit] = EDITS,
    *,
    together: bool = False,
) -> list[Outcome]:
    """Make the edits and validate. An edit that has no place here has the note why."""
    before = clean_validation(source, approved)
    outcomes = {}
    waiting = [edit for edit in edits if together and edit.narrow]
    for edit in edits:
        if edit not in waiting:
            outcomes.update(_try(before, [edit]))
    while waiting:
        done = _try(before, waiting)
        outcomes.update(done)
        waiting = [edit for edit in waiting if edit.name not in done]
    return [outcomes[edit.name] for edit in edits]


def _try(before: Validation, edits: Sequence[Edit]) -> dict[str, Outcome]:
    """What came of the first of `edits`, and of those that lie apart from all before them."""
    overlay = OverlaySource(before.attached.source)
    outcomes: dict[str, Outcome] = {}
    made: list[tuple[Edit, int]] = []
    for edit in edits:
        editor = Editor(before, OverlaySource(overlay))
        try:
            address = edit.make(editor)
        except (NotHere, StopIteration) as error:
            note = f"not here: {error}"
            outcomes[edit.name] = Outcome(edit.name, 0, "", frozenset(), True, note)
            continue
        if any(abs(address - other) < _APART for _, other in made):
            continue
        edit.make(Editor(before, overlay))
        made.append((edit, address))
    try:
        after = validate(attach(overlay, [before.attached.approved])) if made else before
    except PyscanError as error:
        failed = frozenset({"error"})
        return outcomes | {
            edit.name: Outcome(edit.name, address, "", failed, False, str(error))
            for edit, address in made
        }
    for edit, address in made:
        outcomes[edit.name] = _outcome(edit, address, before, after)
    return outcomes


def _outcome(edit: Edit, address: int, before: Validation, after: Validation) -> Outcome:
    """Whether a validation tells of an edit."""
    new = {text.split(" ")[0] for text in _problems(after) - _problems(before)}
    differences = {TEXT: after.text, DATA: after.rodata.code}
    new |= {name for name, result in differences.items() if result.total}
    at_place = any(
        each.address - _NEAR <= address < each.address + len(each.actual) + _NEAR
        for result in differences.values()
        for each in result.differences
    )
    wanted = new & edit.expected
    others = wanted - {TEXT, DATA}
    found = bool(others) or (bool(wanted) and at_place)
    note = "found elsewhere" if wanted and not found else ""
    place = before.target.place(address)
    return Outcome(edit.name, address, place, frozenset(new), found, note)


def _problems(validation: Validation) -> set[str]:
    return {f"{each.kind} {each.address:#x} {each.text}" for each in validation.problems.kept}


def print_outcomes(outcomes: Sequence[Outcome], console: Console, title: str) -> None:
    """A row for every edit."""
    grid = Grid("edit", "place", "by", "found", title=title)
    for each in outcomes:
        by = ", ".join(sorted(each.new)) or each.note
        grid.add_row(each.name, each.place, by, "yes" if each.found else f"NO {each.note}")
    console.print(grid)


def main(arguments: Sequence[str]) -> int:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="matrix.edits")
    parser.add_argument("uris", nargs="+")
    options = parser.parse_args(arguments)
    console = Console(width=160)
    missed = 0
    for uri in options.uris:
        with open_source(uri) as source:
            outcomes = try_edits(source, approved_kernel())
        print_outcomes(outcomes, console, uri)
        missed += sum(not each.found for each in outcomes)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
