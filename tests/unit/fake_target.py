"""A synthetic kernel with symbols and structures, for tests of validation."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np
from fake_kernel import FakeKernel
from tables import NX, PRESENT, WRITE, Memory

from pyscan.approved.linux import LinuxApproved
from pyscan.approved.unit import (
    ALTERNATIVE,
    ALTERNATIVE_RUN,
    JUMP_LABEL,
    PARAVIRT,
    RELOCATION,
    RETPOLINE,
    STATIC_CALL,
    TRAMPOLINE,
    VMLINUX,
    Sites,
    Slot,
    SlotKind,
    SymbolKind,
    Symbols,
    Unit,
)
from pyscan.sources.base import Source
from pyscan.translate import walk
from pyscan.validate.context import Target
from pyscan.validate.memory import VirtualMemory, kernel_half

LINK = 0xFFFF_FFFF_8100_0000
MODULES = 0xFFFF_FFFF_C000_0000
IMAGE_BYTES = 6 << 20
DATA = 4 << 20  # offset of the data part, which is writable

#: Type layouts of a kernel that never was; all members are apart from each other.
OFFSETS = {
    "bpf_ksym.start": 0,
    "bpf_ksym.end": 8,
    "bpf_ksym.name": 16,
    "bpf_ksym.lnode": 528,
    "bpf_ksym.prog": 544,
    "bpf_prog_pack.list": 0,
    "bpf_prog_pack.ptr": 16,
    "bpf_prog_pack.bitmap": 24,
    "cpuinfo_x86.x86_capability": 16,
    "ftrace_ops.func": 0,
    "ftrace_ops.next": 8,
    "ftrace_ops.flags": 16,
    "ftrace_ops.trampoline": 24,
    "ftrace_ops.trampoline_size": 32,
    "idt_data": 24,
    "idt_data.vector": 0,
    "idt_data.segment": 4,
    "idt_data.bits": 8,
    "idt_data.addr": 16,
    "kprobe.hlist": 0,
    "kprobe.list": 16,
    "kprobe.addr": 32,
    "kprobe.pre_handler": 40,
    "kprobe.post_handler": 48,
    "kprobe.opcode": 56,
    "kprobe.ainsn.insn": 64,
    "kprobe.ainsn.size": 73,
    "kprobe.flags": 80,
    "kprobe_insn_cache.pages": 8,
    "kprobe_insn_cache.insn_size": 24,
    "kprobe_insn_page.list": 0,
    "kprobe_insn_page.insns": 16,
    "list_head": 16,
    "mm_struct.pgd": 8,
    "module": 512,
    "module.state": 0,
    "module.list": 8,
    "module.name": 24,
    "module.init": 96,
    "module.percpu": 104,
    "module.core_layout.base": 128,
    "module.core_layout.size": 136,
    "module.core_layout.text_size": 140,
    "module.core_layout.ro_size": 144,
    "module.init_layout.base": 160,
    "module.init_layout.size": 168,
    "module.init_layout.text_size": 172,
    "optimized_kprobe.kp": 0,
    "optimized_kprobe.optinsn.copied_insn": 128,
    "optimized_kprobe.optinsn.insn": 136,
    "optimized_kprobe.optinsn.size": 144,
    "real_mode_header.text_start": 0,
    "real_mode_header.ro_end": 4,
    "security_hook_heads": 32,
    "security_hook_list": 40,
    "security_hook_list.list": 0,
    "security_hook_list.head": 16,
    "security_hook_list.hook": 24,
    "task_struct.tasks": 8,
    "task_struct.mm": 24,
    "task_struct.pid": 32,
    "task_struct.comm": 40,
    "tlb_state.loaded_mm": 0,
}

#: Offsets in the image. Variables lie in the data part, code and tables in text.
SYMBOLS = {
    "_text": 0,
    "early_idt_handler_array": 0x1000,
    "irq_entries_start": 0x2000,
    "spurious_entries_start": 0x2000 + (0xEC - 0x20) * 8,
    "asm_exc_page_fault": 0x3000,
    "kernel_function": 0x4000,
    "other_function": 0x4100,
    "aggr_pre_handler": 0x4200,
    "ftrace_caller": 0x5000,
    "ftrace_caller_op_ptr": 0x5010,
    "ftrace_call": 0x5020,
    "ftrace_caller_end": 0x5040,
    "ftrace_regs_caller": 0x6000,
    "ftrace_regs_caller_op_ptr": 0x6010,
    "ftrace_regs_call": 0x6020,
    "ftrace_regs_caller_jmp": 0x6030,
    "ftrace_regs_caller_end": 0x6040,
    "ftrace_ops_assist_func": 0x7000,
    "optimized_callback": 0x7100,
    "_etext": 0x20_0000,
    "__start_rodata": 0x20_0000,
    "optprobe_template_entry": 0x20_0100,
    "optprobe_template_clac": 0x20_0104,
    "optprobe_template_val": 0x20_0110,
    "optprobe_template_call": 0x20_011A,
    "optprobe_template_end": 0x20_0130,
    "def_idts": 0x20_1000,
    "behind_def_idts": 0x20_1000 + 24,
    "__start_ro_after_init": 0x30_0000,
    "small_hooks": 0x30_0000,
    "security_hook_heads": 0x30_0100,
    "__end_ro_after_init": 0x31_0000,
    "real_mode_blob": 0x32_0000,
    "real_mode_blob_end": 0x32_2000,
    "real_mode_relocs": 0x32_2000,
    "__end_rodata": 0x40_0000,
    "init_top_pgt": DATA + 0x1_0000,
    "idt_table": DATA + 0x2_0000,
    "modules": DATA + 0x2_1000,
    "ftrace_ops_list": DATA + 0x2_1020,
    "ftrace_list_end": DATA + 0x2_1040,
    "kprobe_insn_slots": DATA + 0x2_1100,
    "kprobe_optinsn_slots": DATA + 0x2_1140,
    "bpf_kallsyms": DATA + 0x2_1180,
    "pack_list": DATA + 0x2_11A0,
    "boot_cpu_data": DATA + 0x2_1200,
    "init_task": DATA + 0x2_1400,
    "real_mode_header": DATA + 0x2_1600,
    "kprobe_table": DATA + 0x2_2000,
    "scratch": DATA + 0x3_0000,
}
FUNCTIONS = {
    "early_idt_handler_array",
    "irq_entries_start",
    "spurious_entries_start",
    "asm_exc_page_fault",
    "kernel_function",
    "other_function",
    "aggr_pre_handler",
    "ftrace_caller",
    "ftrace_regs_caller",
    "ftrace_ops_assist_func",
    "optimized_callback",
}
LISTS = ("modules", "bpf_kallsyms", "pack_list")


def symbols() -> Symbols:
    ordered = sorted(SYMBOLS.items(), key=lambda item: item[1])
    names = [name.encode() + b"\0" for name, _ in ordered]
    lengths = np.cumsum([0] + [len(name) for name in names[:-1]])
    kinds = [SymbolKind.FUNCTION if n in FUNCTIONS else SymbolKind.DATA for n, _ in ordered]
    return Symbols(
        offsets=np.array([offset for _, offset in ordered], dtype=np.int64),
        kinds=np.array(kinds, dtype=np.uint8),
        starts=lengths.astype(np.uint32),
        names=np.frombuffer(b"".join(names), dtype=np.uint8),
    )


def empty_sites() -> Sites:
    none = np.zeros(0, dtype=np.uint32)
    column = {
        "retpolines": RETPOLINE,
        "paravirt": PARAVIRT,
        "alternatives": ALTERNATIVE,
        "alternative_runs": ALTERNATIVE_RUN,
        "jump_labels": JUMP_LABEL,
        "static_calls": STATIC_CALL,
        "trampolines": TRAMPOLINE,
    }
    columns = {name: np.zeros(0, dtype=kind) for name, kind in column.items()}
    return Sites(mcount=none, returns=none, locks=none, **columns)


def pack(*words: int) -> bytes:
    return b"".join(struct.pack("<Q", word & ((1 << 64) - 1)) for word in words)


@dataclass
class FakeTarget:
    """A healthy kernel: empty lists, one IDT gate, one security module."""

    memory: Memory
    image: bytearray = field(default_factory=lambda: bytearray(DATA))
    pointers: list[int] = field(default_factory=list)  # offsets of 64-bit relocations

    def __post_init__(self) -> None:
        self.kernel = FakeKernel(self.memory)
        for name in LISTS:
            self.list(name, [])
        for name in ("kprobe_insn_slots", "kprobe_optinsn_slots"):
            self.list(name, [], OFFSETS["kprobe_insn_cache.pages"])
        self.put("ftrace_ops_list", pack(self.address("ftrace_list_end")))
        tasks = self.address("init_task") + OFFSETS["task_struct.tasks"]
        self.write(tasks, pack(tasks, tasks))
        self.interrupts()
        self.hooks()
        self.realmode()

    # Addresses

    def address(self, name: str) -> int:
        return self.kernel.virtual + SYMBOLS[name]

    def scratch(self, number: int) -> int:
        """The address of one of many places of 4 KiB in the kernel's data."""
        return self.address("scratch") + number * 0x1000

    def gpa(self, address: int) -> int:
        return address - self.kernel.virtual + self.kernel.physical

    def write(self, address: int, data: bytes) -> None:
        self.memory.write(self.gpa(address), data)

    def put(self, name: str, data: bytes, offset: int = 0) -> None:
        self.write(self.address(name) + offset, data)

    def list(self, name: str, nodes: list[int], offset: int = 0) -> None:
        """Link nodes to a circular list with the head `name`."""
        ring = [self.address(name) + offset, *nodes]
        for index, node in enumerate(ring):
            self.write(node, pack(ring[(index + 1) % len(ring)], ring[index - 1]))

    def map(self, address: int, gpa: int, bits: int) -> None:
        self.memory.map(self.kernel.form, self.kernel.root, address, gpa, bits)

    # What a healthy kernel has

    def package_pointer(self, offset: int, name: str) -> None:
        """A pointer in the package, which is relocated, and in memory."""
        struct.pack_into("<Q", self.image, offset, LINK + SYMBOLS[name])
        self.pointers.append(offset)
        self.write(self.kernel.virtual + offset, pack(self.address(name)))

    def interrupts(self) -> None:
        struct.pack_into("<IIH", self.image, SYMBOLS["def_idts"], 14, 0, 0x8E00)
        self.package_pointer(SYMBOLS["def_idts"] + 16, "asm_exc_page_fault")
        self.gate(14, self.address("asm_exc_page_fault"))
        self.gate(0x30, self.address("irq_entries_start") + 0x10 * 8)
        table = self.address("idt_table")
        self.map(0xFFFF_FE00_0000_0000, self.gpa(table), PRESENT | NX)
        self.split(self.kernel.data)
        self.map(table, self.gpa(table), PRESENT | NX)

    def gate(self, vector: int, handler: int, bits: int = 0x8E00) -> None:
        low, middle, high = handler & 0xFFFF, handler >> 16 & 0xFFFF, handler >> 32
        row = struct.pack("<HHHHII", low, 0x10, bits, middle, high, 0)
        self.put("idt_table", row, 16 * vector)

    def split(self, gpa: int) -> None:
        """Map 2 MiB of the image by small pages, so that one of them can differ."""
        address = self.kernel.address(gpa)
        bits = PRESENT if gpa == self.kernel.text else PRESENT | WRITE | NX
        table = self.memory.table()
        entries = [gpa + page * 0x1000 | bits for page in range(512)]
        self.memory.write(table, struct.pack("<512Q", *entries))
        self.memory.set_entry(self.kernel.level2, (address >> 21) & 511, table | PRESENT | WRITE)

    def hooks(self) -> None:
        """One security module with a hook in each of two lists."""
        array, heads = SYMBOLS["small_hooks"], SYMBOLS["security_hook_heads"]
        for number, name in enumerate(("kernel_function", "other_function")):
            node = array + number * 40
            struct.pack_into("<Q", self.image, node + 16, LINK + heads + 8 * number)
            self.pointers.append(node + 16)
            head = self.kernel.virtual + heads + 8 * number
            self.write(self.kernel.virtual + node, pack(0, head, head))
            self.package_pointer(node + 24, name)
            self.write(head, pack(self.kernel.virtual + node))

    def realmode(self) -> None:
        base = 0x9_A000
        start = SYMBOLS["real_mode_blob"]
        struct.pack_into("<II", self.image, start, 0x1000, 0x2000)
        struct.pack_into("<IIIII", self.image, SYMBOLS["real_mode_relocs"], 0, 2, 0, 4, 0)
        self.memory.write(base, struct.pack("<II", base + 0x1000, base + 0x2000))
        table = self.memory.table()  # of the first 2 MiB of the direct map
        bits = [PRESENT | (0 if page == 0x9B else WRITE | NX) for page in range(512)]
        entries = [page * 0x1000 | right for page, right in enumerate(bits)]
        self.memory.write(table, struct.pack("<512Q", *entries))
        self.memory.map(
            self.kernel.form,
            self.kernel.root,
            self.kernel.direct(0),
            table,
            PRESENT | WRITE,
            shift=21,
            large=False,
        )
        self.put("real_mode_header", pack(self.kernel.direct(base)))

    # Results

    def approved(self) -> LinuxApproved:
        none = np.zeros(0, dtype=RELOCATION)
        rows = [(offset, 0) for offset in sorted(set(self.pointers))]
        unit = Unit(
            name=VMLINUX,
            link_address=LINK,
            image=np.frombuffer(bytes(self.image), dtype=np.uint8),
            length=IMAGE_BYTES,
            segments=(),
            sections=(),
            tables=(),
            slots=(Slot(SlotKind.BASE),),
            relocations32=none,
            relocations64=np.array(rows, dtype=RELOCATION),
            symbols=symbols(),
            exports=(),
            sites=empty_sites(),
            sizes=(),
            init_function=None,
        )
        return LinuxApproved(
            release="6.1.0-0-test",
            banner="Linux version 6.1.0-0-test",
            series="6.1",
            provenance=(),
            anchors=(),
            offsets=OFFSETS,
            vmlinux=unit,
            modules={},
        )

    def target(self, source: Source) -> Target:
        kernel = self.kernel.image
        found = walk(source, kernel.root_gpa, self.kernel.form, [kernel_half(4)])
        return Target.of(VirtualMemory(source, kernel, found.leaves), self.approved(), kernel)
