"""The kernel of the fuzzed machine, written to a file: see machine.py."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from fake_target import DATA, LINK, MODULES, OFFSETS, SYMBOLS, empty_sites, pack
from fake_validation import FakeValidation
from fuzz.made_module import make_patched_module
from tables import NX, PRESENT, WRITE, Memory
from units import offsets, rows

from pyscan.approved.linux import Anchor, LinuxApproved
from pyscan.approved.unit import (
    ALTERNATIVE,
    ALTERNATIVE_NOT,
    ALTERNATIVE_RUN,
    JUMP_LABEL,
    PARAVIRT,
    RETPOLINE,
    STATIC_CALL,
    TRAMPOLINE,
    Section,
    Segment,
    SegmentKind,
    Table,
    TableKind,
)
from pyscan.compile.module import compile_module
from pyscan.kernel.series import SERIES
from pyscan.records import PAGE_SHIFT, PAGE_SIZE

MIB: Final = 1 << 20
RAM: Final = 26 * MIB
#: Offsets in vmlinux: its predicted text and data, and code that is copied when patching.
TEXT_BYTES: Final = 0x1_0000
RODATA: Final = 0x20_0000
RODATA_BYTES: Final = 0x8000
AFTER_INIT: Final = 0x30_0000
REPLACEMENTS: Final = 0x33_0000
TABLES: Final = 0x20_4000
NAMES: Final = {
    "__x86_return_thunk": 0x9000,
    "_paravirt_nop": 0x9040,
    "its_return_thunk": 0x9080,
    "__static_call_return0": 0x90C0,
    "ftrace_stub": 0x9100,
    "__x86_indirect_thunk_rax": 0x9140,
    "__x86_indirect_thunk_r11": 0x9180,
    "_printk": 0x91C0,
    "__SCT__theirs": 0x9200,
    "__fentry__": 0x9220,
    "none_trampoline": 0x9240,
    "capability_hooks": AFTER_INIT,
    "__init_begin": 0x38_0000,
    "__init_end": 0x38_1000,
    "x86_return_thunk": DATA + 0x2_3000,
    "uniproc_patched": DATA + 0x2_3010,
    "pv_ops": DATA + 0x2_3100,
    "their_key": DATA + 0x2_3200,
    "off_key": DATA + 0x2_3220,
    "__SCK__theirs": DATA + 0x2_3240,
    "__SCK__none": DATA + 0x2_3260,
    "__SCK__zero": DATA + 0x2_3280,
    "nr_cpu_ids": DATA + 0x2_32A0,
    "node_states": DATA + 0x2_3300,
    "nr_node_ids": DATA + 0x2_3380,
    "poking_mm": DATA + 0x2_3388,
    "system_state": DATA + 0x2_3390,
    "__per_cpu_offset": DATA + 0x2_3400,
    # In the area of each CPU: link addresses count from zero.
    "cpu_tlbstate": (1 << 64) - LINK + 0x100,
}
LAYOUT: Final = {
    "cpuinfo_x86.x86_vendor_id": 16 + 24 * 4,
    "static_key.enabled": 0,
    "static_call_key.func": 0,
    "paravirt_patch_template": 16 * 8,
}
MODULE: Final = MODULES + 0x10_0000
INIT: Final = MODULES + 0x40_0000  # where the module's init sections were
SLOTS: Final = MODULES + 0x20_0000
TRACER: Final = MODULES + 0x30_0000
PACK: Final = MODULES + 0x80_0000
#: Physical: code that is made at run time and the module, both read-only, and a pack of BPF.
CODE_GPA: Final = 8 * MIB
PACK_GPA: Final = 12 * MIB
PROCESS_GPA: Final = 24 * MIB
#: Features that are set: RETPOLINE, RETHUNK, and two that choose alternatives.
FEATURES: Final = (3, 20, 11 * 32 + 12, 11 * 32 + 14)


class MachineMaker:
    """Writes the memory of a machine to a file, and what is approved for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.memory = Memory(path, RAM)
        self.fake = FakeValidation(self.memory, symbols=NAMES)
        self.kernel = self.fake.fake.kernel
        self._protect()
        self._sites()
        self._tables()
        self._set_state()
        self._structures()
        self._generated()
        self.approved = self._approve()
        self._load_module()

    def _protect(self) -> None:
        """Make frames of code read-only in the direct map, as the kernel does."""
        for gpa in (CODE_GPA, PACK_GPA):
            self.memory.map(
                self.kernel.form,
                self.kernel.root,
                self.kernel.direct(gpa),
                gpa,
                PRESENT | NX,
                shift=21,
            )

    def _map(self, address: int, gpa: int, pages: int, bits: int) -> None:
        for page in range(pages):
            self.fake.fake.map(address + page * PAGE_SIZE, gpa + page * PAGE_SIZE, bits)

    def _sites(self) -> None:
        """One or two of every class, and code around them that none of them touches."""
        gate = SYMBOLS["def_idts"]
        self.fake.package(gate, bytes(self.fake.fake.image[gate : gate + 16]))
        noise = np.random.default_rng(7).integers(0, 256, 0x1000, dtype=np.uint8).tobytes()
        self.fake.package(0xC000, noise)
        self.fake.package(RODATA + 0x5000, noise)
        code = {
            0xA000: b"\xe9\1\2\3\4",
            0xA040: b"\xf0\xff",
            0xA080: b"\xe8\1\2\3\4",
            0xA0C0: b"\x2e\xe9\1\2\3\4",
            0xA100: b"\xff\x14\x25\1\2\3\4",
            0xA140: b"\xff\x14\x25\1\2\3\4",
            0xA180: b"\x0f\x1f\x44\0\0",
            0xA1C0: b"\xeb\x10",
            0xA200: b"\x90" * 12,
            0xA240: b"\x66\x90\x90\x90\x90",
            0xA280: b"\xe8\1\2\3\4",
            0xA2C0: b"\xe9\1\2\3\4",
            0xA300: b"\x0f\x85\1\2\3\4",
            0xA340: b"\xe8\1\2\3\4",
            0x4000: b"\xe8\1\2\3\4",
            0x4100: b"\xe8\1\2\3\4\x48\x8b\x05\x78\x56\x34\x12",
            REPLACEMENTS: b"\xe8\1\2\3\4",
            REPLACEMENTS + 0x10: b"\xe9\1\2\3\4",
            0x9200: b"\xe9\1\2\3\4\x0f\xb9\xcc",
            0x9240: b"\xe9\1\2\3\4\x0f\xb9\xcc",
        }
        for offset, data in code.items():
            self.fake.package(offset, data)
        for start in (SYMBOLS["ftrace_caller"], SYMBOLS["ftrace_regs_caller"]):
            self.fake.package(start, bytes(range(0x40)))
        key = {name: LINK + NAMES[name] - (1 << 64) for name in NAMES}
        self.fake.sites = replace(
            empty_sites(),
            mcount=offsets(0x4000, 0x4100),
            returns=offsets(0xA000),
            locks=offsets(0xA040),
            retpolines=rows(RETPOLINE, (0xA080, 0, 0, 5, 0), (0xA0C0, 11, 1, 6, 1)),
            paravirt=rows(PARAVIRT, (0xA100, 1, 7), (0xA140, 2, 7)),
            alternatives=rows(
                ALTERNATIVE,
                (0xA200, REPLACEMENTS, 20, 12, 5, 0, 2),
                (0xA200, REPLACEMENTS + 0x10, ALTERNATIVE_NOT | 16, 12, 0, 2, 0),
                (0xA240, REPLACEMENTS + 0x10, 99, 5, 5, 2, 1),
            ),
            alternative_runs=rows(ALTERNATIVE_RUN, (0, 12, 0), (5, 7, 1), (2, 3, 0)),
            jump_labels=rows(
                JUMP_LABEL,
                (0xA180, 0xA280, 0, key["their_key"], 0, 5),
                (0xA1C0, 0xA1D2, 0, key["off_key"], 1, 2),
            ),
            static_calls=rows(
                STATIC_CALL,
                (0xA280, 0, key["__SCK__theirs"], 0, 5, 0),
                (0xA2C0, 0, key["__SCK__none"], 1, 5, 0),
                (0xA300, 0, key["__SCK__theirs"], 1, 6, 0),
                (0xA340, 0, key["__SCK__zero"], 0, 5, 0),
            ),
            trampolines=rows(
                TRAMPOLINE,
                (NAMES["__SCT__theirs"], 0, key["__SCK__theirs"]),
                (NAMES["none_trampoline"], 0, key["__SCK__none"]),
            ),
        )

    def _tables(self) -> None:
        """Tables in read-only data, that the kernel may sort."""
        put = self.fake.package

        def near(at: int, target: int) -> bytes:
            return struct.pack("<i", target - at)

        jump, calls, faults, places, entries, mcount = (TABLES + 0x100 * n for n in range(6))
        for row, (code, to, key) in enumerate(
            ((0xA180, 0xA280, NAMES["their_key"]), (0xA1C0, 0xA1D2, NAMES["off_key"] | 1))
        ):
            at = jump + 16 * row
            put(at, near(at, code) + near(at + 4, to) + struct.pack("<q", key - at - 8))
        for row, (site, key) in enumerate(((0xA280, 0x2_3240), (0xA2C0, 0x2_3260 | 1))):
            at = calls + 8 * row
            put(at, near(at, site) + near(at + 4, DATA + key))
        for row, site in enumerate((0xA000, 0xA100, 0xB000)):
            at = faults + 12 * row
            put(at, near(at, site) + near(at + 4, 0xA040) + struct.pack("<i", row))
            put(places + 4 * row, near(places + 4 * row, site))
            put(entries + 6 * row, bytes([row, 1, 2, 3, 4, 5]))
        self.fake.pointer(mcount, "kernel_function")
        self.fake.pointer(mcount + 8, "other_function")
        self.fake.tables = (
            Table(TableKind.JUMP_TABLE, jump, 32, 16),
            Table(TableKind.STATIC_CALLS, calls, 16, 8),
            Table(TableKind.EXCEPTIONS, faults, 36, 12),
            Table(TableKind.ORC_IP, places, 12, 4),
            Table(TableKind.ORC_ENTRY, entries, 18, 6),
            Table(TableKind.MCOUNT, mcount, 16, 8),
        )
        self.fake.sections = (
            Section(".text", 0, TEXT_BYTES),
            Section(".rodata", RODATA, RODATA_BYTES),
            Section(".altinstr_replacement", REPLACEMENTS, 0x100),
        )

    def _set_state(self) -> None:
        """What decides how code is patched."""
        address = self.fake.address
        features = np.zeros(24 * 32, dtype=np.uint8)
        features[list(FEATURES)] = 1
        place = SYMBOLS["boot_cpu_data"] + OFFSETS["cpuinfo_x86.x86_capability"]
        self.fake.write(place, np.packbits(features, bitorder="little").tobytes())
        for name, value in {
            "x86_return_thunk": address("__x86_return_thunk"),
            "their_key": 1,
            "off_key": 0,
            "__SCK__theirs": address("_printk"),
            "__SCK__zero": address("__static_call_return0"),
            "system_state": 3,  # SYSTEM_RUNNING
            "nr_cpu_ids": 2,
            "__per_cpu_offset": self.fake.fake.scratch(8),
            "nr_node_ids": 1,
            "node_states": 1,
        }.items():
            self.fake.word(NAMES[name], value)
        for index, name in enumerate(("kernel_function", "_paravirt_nop", "other_function")):
            self.fake.word(NAMES["pv_ops"] + 8 * index, address(name))

    def _structures(self) -> None:
        """A process, a tracer, a probe, a BPF program and a module, by their lists."""
        fake, scratch = self.fake.fake, self.fake.fake.scratch
        self.kernel.process(PROCESS_GPA)
        task, space = scratch(0), scratch(0) + 0x800
        node = task + OFFSETS["task_struct.tasks"]
        head = fake.address("init_task") + OFFSETS["task_struct.tasks"]
        fake.write(task + OFFSETS["task_struct.mm"], pack(space))
        fake.write(task + OFFSETS["task_struct.comm"], b"init\0")
        fake.write(space + OFFSETS["mm_struct.pgd"], pack(self.kernel.direct(PROCESS_GPA)))
        fake.write(head, pack(node, node))
        fake.write(node, pack(head, head))
        fake.write(scratch(8) + 0x100, pack(space))  # loaded by a CPU, the other has none
        self.fake.word(NAMES["__per_cpu_offset"] + 8, scratch(9))
        self.fake.word(NAMES["poking_mm"], space)
        ops = scratch(1)
        fake.put("ftrace_ops_list", pack(ops))
        words = (fake.address("kernel_function"), fake.address("ftrace_list_end"), 0x800, TRACER)
        fake.write(ops, pack(*words, 0x40 + 5 + 8))
        probe, table = scratch(2), fake.address("kprobe_table")
        fake.write(table, pack(probe))
        fake.write(probe, pack(0, table))
        for path, value in {
            "kprobe.addr": pack(self._probed),
            "kprobe.pre_handler": pack(fake.address("kernel_function")),
            "kprobe.opcode": b"\x48",
            "kprobe.ainsn.insn": pack(SLOTS) + b"\1\7",
        }.items():
            fake.write(probe + OFFSETS[path], value)
        fake.list("kprobe_insn_slots", [scratch(3)], OFFSETS["kprobe_insn_cache.pages"])
        fake.write(scratch(3) + OFFSETS["kprobe_insn_page.insns"], pack(SLOTS))
        area, symbol = scratch(4), scratch(6)  # the map of a pack takes a page
        fake.list("pack_list", [area])
        fake.write(area + OFFSETS["bpf_prog_pack.ptr"], pack(PACK))
        fake.write(area + OFFSETS["bpf_prog_pack.bitmap"], pack(0b111 << 4))
        fake.write(symbol, pack(PACK + 0x108, PACK + 0x178) + b"bpf_prog_1\0")
        fake.write(symbol + OFFSETS["bpf_ksym.prog"], b"\1")
        fake.list("bpf_kallsyms", [symbol + OFFSETS["bpf_ksym.lnode"]])

    @property
    def _probed(self) -> int:
        return self.fake.address("other_function") + 5

    def _generated(self) -> None:
        """Code that the kernel makes at run time: see test_validate_invariants.py."""
        fake = self.fake.fake
        caller = bytearray(range(0x40))
        caller[0x10:0x17] = b"\x48\x8b\x15" + struct.pack("<i", 0x40 + 5 - 0x17)
        call = fake.address("kernel_function") - (TRACER + 0x25)
        caller[0x20:0x25] = b"\xe8" + struct.pack("<i", call)
        end = b"\xe9" + struct.pack("<i", self.fake.address("__x86_return_thunk") - TRACER - 0x45)
        self._map(TRACER, CODE_GPA, 1, PRESENT)
        self.memory.write(CODE_GPA, bytes(caller) + end + pack(fake.scratch(1)))
        moved = (0x1234_5678 + self._probed - SLOTS) & 0xFFFF_FFFF
        slot = b"\x48\x8b\x05" + struct.pack("<I", moved)
        slot += b"\xe9" + struct.pack("<i", self._probed + 7 - (SLOTS + 12))
        self._map(SLOTS, CODE_GPA + PAGE_SIZE, 1, PRESENT)
        self.memory.write(CODE_GPA + PAGE_SIZE, slot)
        self.memory.map(self.kernel.form, self.kernel.root, PACK, PACK_GPA, PRESENT, shift=21)
        pack_bytes = bytearray(b"\xcc" * (2 * MIB))
        pack_bytes[0x100:0x1C0] = bytes(range(0xC0))
        self.memory.write(PACK_GPA, bytes(pack_bytes))

    def _approve(self) -> LinuxApproved:
        approved = self.fake.fake.approved()
        noise = bytes(self.fake.fake.image[0xC000:0xC040])
        exports = ("their_key", "pv_ops", "_printk", "__x86_return_thunk", "__SCT__theirs")
        thunks = ("__x86_indirect_thunk_rax", "__x86_indirect_thunk_r11")
        names = tuple(sorted((*exports, *thunks, "__fentry__")))
        vmlinux = replace(
            self.fake.unit(approved.vmlinux),
            segments=(
                Segment(SegmentKind.TEXT, 0, TEXT_BYTES),
                Segment(SegmentKind.RODATA, RODATA, RODATA_BYTES),
                Segment(SegmentKind.RO_AFTER_INIT, AFTER_INIT, PAGE_SIZE),
            ),
            exports=tuple((name, 0, LINK + NAMES[name] - (1 << 64)) for name in names),
        )
        return replace(
            approved,
            anchors=(Anchor("start", 0xC000, noise), Anchor("other", 0xC040, noise)),
            offsets={**OFFSETS, **LAYOUT},
            vmlinux=vmlinux,
            modules={"made": compile_module("made", make_patched_module(), SERIES["6.1"])},
        )

    def _load_module(self) -> None:
        fake, unit = self.fake.fake, self.approved.modules["made"]
        text, ro, after, size = unit.sizes
        gpa = CODE_GPA + 0x1_0000
        self._map(MODULE, gpa, text >> PAGE_SHIFT, PRESENT)
        self._map(MODULE + text, gpa + text, (after - text) >> PAGE_SHIFT, PRESENT | NX)
        rest = 10 * MIB  # of the direct map that can be written
        self._map(MODULE + after, rest, (size - after) >> PAGE_SHIFT, PRESENT | WRITE | NX)
        self.memory.write(rest, pack(1, 0, MODULE + 0x60))
        module = fake.scratch(7)
        for path, value in {
            "module.name": b"made\0",
            "module.core_layout.base": struct.pack("<QIIII", MODULE, size, text, ro, after),
            "module.init": pack(INIT + (unit.init_function or 0)),
            "module.percpu": pack(0x1_0000),
        }.items():
            fake.write(module + OFFSETS[path], value)
        fake.list("modules", [module + OFFSETS["module.list"]])

    def patches(self) -> Iterator[tuple[int, bytes]]:
        """What tracing and probing have written to text: physical address and bytes."""
        function = self.fake.address("kernel_function")
        yield self.fake.fake.gpa(function), b"\xe8" + struct.pack("<i", TRACER - function - 5)
        yield self.fake.fake.gpa(self._probed), b"\xcc"
        # A module's call of another unit's key is led from the trampoline to the key.
        unit = self.approved.modules["made"]
        (table,) = (t for t in unit.tables if t.kind is TableKind.STATIC_CALLS)
        place = table.offset + 8 + 4
        key = (self.fake.address("__SCK__theirs") | 1) - (MODULE + place)
        yield CODE_GPA + 0x1_0000 + place, struct.pack("<i", key)
