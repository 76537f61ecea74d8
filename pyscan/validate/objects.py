"""The kernel's objects that decide what code there may be, read from its memory.

Nothing read here is believed: every walk is bounded, every fault becomes a `Problem`, and
what is returned is what the kernel says of itself, for others to compare. Structures are
those of 6.1; their layout comes from the approved configuration (`PATHS`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from pyscan.records import PAGE_SIZE
from pyscan.validate.context import Target
from pyscan.validate.lists import Fault, Walked, chain_entries, hlist_entries, list_entries
from pyscan.validate.memory import AccessFailed, Unreadable
from pyscan.validate.problem import ProblemKind, Problems

_T = TypeVar("_T")

#: Type layouts that validation reads, by path; a plain name asks for a type's size.
PATHS: Final[tuple[str, ...]] = (
    "bpf_ksym.end",
    "bpf_ksym.lnode",
    "bpf_ksym.name",
    "bpf_ksym.prog",
    "bpf_ksym.start",
    "bpf_prog_pack.bitmap",
    "bpf_prog_pack.list",
    "bpf_prog_pack.ptr",
    "cpuinfo_x86.x86_capability",
    "ftrace_ops.flags",
    "ftrace_ops.func",
    "ftrace_ops.next",
    "ftrace_ops.trampoline",
    "ftrace_ops.trampoline_size",
    "idt_data",
    "idt_data.addr",
    "idt_data.bits",
    "idt_data.segment",
    "idt_data.vector",
    "kprobe.addr",
    "kprobe.ainsn.insn",
    "kprobe.ainsn.size",
    "kprobe.flags",
    "kprobe.hlist",
    "kprobe.list",
    "kprobe.opcode",
    "kprobe.post_handler",
    "kprobe.pre_handler",
    "kprobe_insn_cache.insn_size",
    "kprobe_insn_cache.pages",
    "kprobe_insn_page.insns",
    "kprobe_insn_page.list",
    "list_head",
    "mm_struct.pgd",
    "module",
    "module.core_layout.base",
    "module.core_layout.ro_size",
    "module.core_layout.size",
    "module.core_layout.text_size",
    "module.init",
    "module.init_layout.base",
    "module.init_layout.size",
    "module.init_layout.text_size",
    "module.list",
    "module.name",
    "module.percpu",
    "module.state",
    "optimized_kprobe.kp",
    "optimized_kprobe.optinsn.copied_insn",
    "optimized_kprobe.optinsn.insn",
    "optimized_kprobe.optinsn.size",
    "real_mode_header.ro_end",
    "real_mode_header.text_start",
    "security_hook_heads",
    "security_hook_list",
    "security_hook_list.head",
    "security_hook_list.hook",
    "security_hook_list.list",
    "task_struct.comm",
    "task_struct.mm",
    "task_struct.pid",
    "task_struct.tasks",
    "tlb_state.loaded_mm",
)

MODULES_MAX: Final = 4096
FTRACE_OPS_MAX: Final = 4096
KPROBES_MAX: Final = 1 << 16
SLOT_PAGES_MAX: Final = 4096
BPF_SYMBOLS_MAX: Final = 1 << 16
BPF_PACKS_MAX: Final = 1024
TASKS_MAX: Final = 1 << 17
CPUS_MAX: Final = 8192  # CONFIG_NR_CPUS with MAXSMP, arch/x86/Kconfig
NODES_MAX: Final = 1024  # 1 << CONFIG_NODES_SHIFT, arch/x86/Kconfig

#: Longest name of a module (MODULE_NAME_LEN, include/linux/module.h), of a BPF symbol
#: (KSYM_NAME_LEN), of a task (TASK_COMM_LEN), with the NUL.
MODULE_NAME_MAX: Final = 64 - 8
BPF_NAME_MAX: Final = 512
TASK_NAME_MAX: Final = 16

#: enum module_state, include/linux/module.h.
MODULE_LIVE: Final = 0

#: kernel/kprobes.c: KPROBE_TABLE_SIZE.
_KPROBE_TABLE: Final = 1 << 6

#: Of a pack of BPF programs, by the number of NUMA nodes (kernel/bpf/core.c,
#: BPF_PROG_PACK_SIZE); a chunk of it is 64 bytes, one bit in its map.
_PACK_NODE_BYTES: Final = 2 << 20
PACK_CHUNK: Final = 64

_LISTS: Final = {
    Fault.UNREADABLE: ProblemKind.UNREADABLE,
    Fault.WILD: ProblemKind.WILD_POINTER,
    Fault.CYCLE: ProblemKind.BROKEN_LIST,
    Fault.ENDLESS: ProblemKind.BROKEN_LIST,
    Fault.DISAGREE: ProblemKind.BROKEN_LIST,
}


@dataclass(frozen=True, slots=True)
class LoadedModule:
    """A module by its own account; sizes in bytes from `base` on (struct module_layout)."""

    name: str
    address: int  # of its struct module
    state: int
    base: int
    size: int
    text_size: int
    ro_size: int
    percpu: int
    init: int  # its init function
    init_base: int  # 0 once it is initialised
    init_text_size: int


@dataclass(frozen=True, slots=True)
class FtraceOps:
    """A registered user of function tracing."""

    address: int
    func: int
    trampoline: int
    trampoline_size: int
    flags: int


@dataclass(frozen=True, slots=True)
class Kprobe:
    """A probe in the kernel's table. `slot_*` is 0 where it has none."""

    structure: int  # address of struct kprobe
    address: int  # of the probed instruction
    opcode: int  # its saved first byte
    flags: int
    slot: int  # where a copy of the instruction is executed
    slot_size: int  # bytes of the copied instruction
    pre_handler: int
    post_handler: int
    members: tuple[int, ...]  # handlers of the probes that share this place
    optimized_slot: int  # detour of a jump-optimised probe
    optimized_size: int  # bytes of instructions that are copied into it
    saved: bytes  # the 4 bytes behind the first that its jump replaces


@dataclass(frozen=True, slots=True)
class SlotPage:
    """A page of slots for copied instructions."""

    address: int
    cache: str  # symbol of its struct kprobe_insn_cache


@dataclass(frozen=True, slots=True)
class BpfSymbol:
    """A piece of generated BPF code, [start, end)."""

    start: int
    end: int
    name: str
    program: bool


@dataclass(frozen=True, slots=True, eq=False)
class BpfPack:
    """An area that BPF programs share.

    `chunks` (n,) bool: which pieces of PACK_CHUNK bytes the kernel has given to a program.
    Not all of those are on the list of BPF symbols: classic filters, as of seccomp, are not.
    """

    start: int
    size: int
    chunks: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TableRoot:
    """A top-level page table in use."""

    address: int  # of the table, virtual
    owner: str  # "process 1 systemd", "cpu 3"


@dataclass(frozen=True, slots=True)
class Structures:
    """All that was read."""

    modules: tuple[LoadedModule, ...]
    ftrace: tuple[FtraceOps, ...]
    kprobes: tuple[Kprobe, ...]
    slot_pages: tuple[SlotPage, ...]
    bpf: tuple[BpfSymbol, ...]
    packs: tuple[BpfPack, ...]
    roots: tuple[TableRoot, ...]
    tasks: int
    problems: Problems


def read_structures(target: Target) -> Structures:
    """Read everything. Raises ApprovedFileError when the approved configuration lacks a path."""
    problems = Problems()
    tasks, roots = read_roots(target, problems)
    return Structures(
        modules=read_modules(target, problems),
        ftrace=read_ftrace(target, problems),
        kprobes=read_kprobes(target, problems),
        slot_pages=read_slot_pages(target, problems),
        bpf=read_bpf(target, problems),
        packs=read_packs(target, problems),
        roots=roots,
        tasks=tasks,
        problems=problems,
    )


def read_modules(target: Target, problems: Problems) -> tuple[LoadedModule, ...]:
    """The list `modules`: all modules that are loaded, or are being loaded."""
    memory, offset = target.memory, target.offset

    def read(address: int) -> LoadedModule:
        layout = address + offset("module.core_layout.base")
        return LoadedModule(
            name=memory.string(address + offset("module.name"), MODULE_NAME_MAX),
            address=address,
            state=memory.u32(address + offset("module.state")),
            base=memory.u64(layout),
            size=memory.u32(address + offset("module.core_layout.size")),
            text_size=memory.u32(address + offset("module.core_layout.text_size")),
            ro_size=memory.u32(address + offset("module.core_layout.ro_size")),
            percpu=memory.u64(address + offset("module.percpu")),
            init=memory.u64(address + offset("module.init")),
            init_base=memory.u64(address + offset("module.init_layout.base")),
            init_text_size=memory.u32(address + offset("module.init_layout.text_size")),
        )

    head = target.address("modules")
    walked = list_entries(memory, head, offset("module.list"), MODULES_MAX)
    found = _read_each(target, "list of modules", walked, read, problems)
    for module in found:
        if (module.base | module.text_size | module.ro_size) % PAGE_SIZE or not (
            module.text_size <= module.ro_size <= module.size
        ):
            text = f"sizes {module.text_size:#x}, {module.ro_size:#x}, {module.size:#x}"
            problems.add(
                ProblemKind.IMPLAUSIBLE,
                module.address,
                f"module {module.name}",
                f"its layout at {module.base:#x} cannot be: {text}",
            )
    return found


def read_ftrace(target: Target, problems: Problems) -> tuple[FtraceOps, ...]:
    """The list `ftrace_ops_list`, which ends with ftrace_list_end."""
    if not target.has("ftrace_ops_list"):
        return ()
    head, end = target.address("ftrace_ops_list"), target.address("ftrace_list_end")
    link = target.offset("ftrace_ops.next")
    walked = chain_entries(target.memory, head, link, FTRACE_OPS_MAX, end)
    return _read_each(
        target, "list of ftrace_ops", walked, lambda ops: read_ops(target, ops), problems
    )


def read_ops(target: Target, address: int) -> FtraceOps:
    """One struct ftrace_ops. Raises AccessFailed."""
    memory, offset = target.memory, target.offset
    return FtraceOps(
        address=address,
        func=memory.u64(address + offset("ftrace_ops.func")),
        trampoline=memory.u64(address + offset("ftrace_ops.trampoline")),
        trampoline_size=memory.u64(address + offset("ftrace_ops.trampoline_size")),
        flags=memory.u64(address + offset("ftrace_ops.flags")),
    )


def read_kprobes(target: Target, problems: Problems) -> tuple[Kprobe, ...]:
    """The hash table `kprobe_table`."""
    if not target.has("kprobe_table"):
        return ()
    found: list[Kprobe] = []
    read = _kprobe_reader(target, problems)
    for bucket in range(_KPROBE_TABLE):
        head = target.address("kprobe_table") + 8 * bucket
        bound = KPROBES_MAX - len(found)
        walked = hlist_entries(target.memory, head, target.offset("kprobe.hlist"), bound)
        found += _read_each(target, f"kprobe_table[{bucket}]", walked, read, problems)
    return tuple(found)


def _kprobe_reader(target: Target, problems: Problems) -> Callable[[int], Kprobe]:
    memory, offset = target.memory, target.offset
    aggregate = target.address("aggr_pre_handler") if target.has("aggr_pre_handler") else 0
    room = KPROBES_MAX  # of all aggregates' members together

    def read(address: int) -> Kprobe:
        nonlocal room
        pre_handler = memory.u64(address + offset("kprobe.pre_handler"))
        members: tuple[int, ...] = ()
        slot, size, saved = 0, 0, b""
        if aggregate and pre_handler == aggregate:  # it is a struct optimized_kprobe
            members = _member_handlers(target, address, room, problems)
            room -= len(members)
            outer = address - offset("optimized_kprobe.kp")
            slot = memory.u64(outer + offset("optimized_kprobe.optinsn.insn"))
            size = memory.u64(outer + offset("optimized_kprobe.optinsn.size"))
            saved = memory.read(outer + offset("optimized_kprobe.optinsn.copied_insn"), 4)
        return Kprobe(
            structure=address,
            address=memory.u64(address + offset("kprobe.addr")),
            opcode=memory.u8(address + offset("kprobe.opcode")),
            flags=memory.u32(address + offset("kprobe.flags")),
            slot=memory.u64(address + offset("kprobe.ainsn.insn")),
            slot_size=memory.u8(address + offset("kprobe.ainsn.size")),
            pre_handler=pre_handler,
            post_handler=memory.u64(address + offset("kprobe.post_handler")),
            members=members,
            optimized_slot=slot,
            optimized_size=size,
            saved=saved,
        )

    return read


def _member_handlers(
    target: Target, address: int, bound: int, problems: Problems
) -> tuple[int, ...]:
    """Pre-handlers of the probes that an aggregate stands for (kernel/kprobes.c)."""
    link, handler = target.offset("kprobe.list"), target.offset("kprobe.pre_handler")
    walked = list_entries(target.memory, address + link, link, bound)
    place = f"probes of {address:#x}"
    return _read_each(
        target, place, walked, lambda probe: target.memory.u64(probe + handler), problems
    )


def read_slot_pages(target: Target, problems: Problems) -> tuple[SlotPage, ...]:
    """Pages of the caches of instruction slots of kprobes."""
    found: list[SlotPage] = []
    insns = target.offset("kprobe_insn_page.insns")
    link = target.offset("kprobe_insn_page.list")
    for cache in ("kprobe_insn_slots", "kprobe_optinsn_slots"):
        if not target.has(cache):
            continue

        def read(address: int, cache: str = cache) -> SlotPage:
            return SlotPage(target.memory.u64(address + insns), cache)

        head = target.address(cache) + target.offset("kprobe_insn_cache.pages")
        walked = list_entries(target.memory, head, link, SLOT_PAGES_MAX)
        found += _read_each(target, cache, walked, read, problems)
    return tuple(found)


def read_bpf(target: Target, problems: Problems) -> tuple[BpfSymbol, ...]:
    """The list `bpf_kallsyms`: programs, trampolines and dispatchers."""
    memory, offset = target.memory, target.offset

    def read(address: int) -> BpfSymbol:
        return BpfSymbol(
            start=memory.u64(address + offset("bpf_ksym.start")),
            end=memory.u64(address + offset("bpf_ksym.end")),
            name=memory.string(address + offset("bpf_ksym.name"), BPF_NAME_MAX),
            program=bool(memory.u8(address + offset("bpf_ksym.prog"))),
        )

    if not target.has("bpf_kallsyms"):
        return ()
    head = target.address("bpf_kallsyms")
    walked = list_entries(memory, head, offset("bpf_ksym.lnode"), BPF_SYMBOLS_MAX)
    return _read_each(target, "list of BPF symbols", walked, read, problems)


def read_packs(target: Target, problems: Problems) -> tuple[BpfPack, ...]:
    """The list `pack_list` of areas for BPF programs."""
    if not target.has("pack_list") or not target.knows("bpf_prog_pack.ptr"):
        return ()
    pointer, link = target.offset("bpf_prog_pack.ptr"), target.offset("bpf_prog_pack.list")
    size = _PACK_NODE_BYTES * _node_count(target, problems)

    def read(address: int) -> BpfPack:
        start = target.memory.u64(address + pointer)
        bitmap = target.memory.read(
            address + target.offset("bpf_prog_pack.bitmap"), size // PACK_CHUNK // 8
        )
        chunks = np.unpackbits(np.frombuffer(bitmap, dtype=np.uint8), bitorder="little")
        return BpfPack(start, size, chunks != 0)

    walked = list_entries(target.memory, target.address("pack_list"), link, BPF_PACKS_MAX)
    return _read_each(target, "list of BPF packs", walked, read, problems)


def _node_count(target: Target, problems: Problems) -> int:
    """NUMA nodes that may come: bits of node_states[N_POSSIBLE], the first (nodemask.h)."""
    if not (target.has("nr_node_ids") and target.has("node_states")):
        return 1
    address = target.address("node_states")
    try:
        count = target.memory.u32(target.address("nr_node_ids"))
        if not 1 <= count <= NODES_MAX:
            place = target.place(target.address("nr_node_ids"))
            problems.add(ProblemKind.IMPLAUSIBLE, address, place, f"{count} NUMA nodes")
            return 1
        mask = int.from_bytes(target.memory.read(address, NODES_MAX // 8), "little")
    except AccessFailed as error:
        _failed(target, address, "node_states", error, problems)
        return 1
    return max(1, (mask & ((1 << count) - 1)).bit_count())


def read_roots(target: Target, problems: Problems) -> tuple[int, tuple[TableRoot, ...]]:
    """Number of processes, and the top-level tables in use, each once.

    Processes: the list of init_task.tasks; kernel threads have no table of their own.
    CPUs: cpu_tlbstate.loaded_mm, so a process that is on no list is seen while it runs.
    Address spaces of EFI are not among them: they map the firmware where others do not.
    """
    offset = target.offset
    tasks = offset("task_struct.tasks")
    head = target.address("init_task") + tasks
    walked = list_entries(target.memory, head, tasks, TASKS_MAX)
    _note(target, "list of processes", walked, problems)
    owners: dict[int, str] = {}
    entries = np.array(walked.entries, dtype=np.uint64)
    pointers = entries + np.uint64(offset("task_struct.mm"))
    spaces, good = target.memory.read_array(pointers, 8)
    _note_array(target, pointers, good, "process", problems)
    for row in np.flatnonzero(good & (spaces != 0)).tolist():
        owners.setdefault(int(spaces[row]), _task_name(target, int(entries[row])))
    for cpu, space in _loaded_spaces(target, problems):
        owners.setdefault(space, f"cpu {cpu}")
    for space in _patching_space(target, problems):
        owners.setdefault(space, "text patching")
    addresses = np.array(sorted(owners), dtype=np.uint64)
    pointers = addresses + np.uint64(offset("mm_struct.pgd"))
    tables, good = target.memory.read_array(pointers, 8)
    _note_array(target, pointers, good, "address space", problems)
    roots = {
        int(table): owners[int(space)]
        for table, space in zip(tables[good], addresses[good], strict=True)
    }
    return len(entries), tuple(TableRoot(table, owner) for table, owner in roots.items())


def _task_name(target: Target, task: int) -> str:
    try:
        pid = target.memory.u32(task + target.offset("task_struct.pid"))
        name = target.memory.string(task + target.offset("task_struct.comm"), TASK_NAME_MAX)
    except AccessFailed:
        return f"process at {task:#x}"
    return f"process {pid} {name}"


def _loaded_spaces(target: Target, problems: Problems) -> Iterator[tuple[int, int]]:
    """CPU and address of the mm_struct whose table it has loaded (arch/x86/mm/tlb.c)."""
    needed = ("cpu_tlbstate", "__per_cpu_offset", "nr_cpu_ids")
    if not all(target.has(name) for name in needed):
        return
    try:
        count = target.memory.u32(target.address("nr_cpu_ids"))
    except AccessFailed as error:
        _failed(target, target.address("nr_cpu_ids"), "nr_cpu_ids", error, problems)
        return
    if not 1 <= count <= CPUS_MAX:
        address = target.address("nr_cpu_ids")
        problems.add(ProblemKind.IMPLAUSIBLE, address, target.place(address), f"{count} CPUs")
        return
    steps = np.arange(count, dtype=np.uint64) * np.uint64(8)
    areas, good = target.memory.read_array(np.uint64(target.address("__per_cpu_offset")) + steps, 8)
    state = target.link_address("cpu_tlbstate") + target.offset("tlb_state.loaded_mm")
    spaces, read = target.memory.read_array(areas + np.uint64(state), 8)
    for cpu in np.flatnonzero(good & read).tolist():
        space = int(spaces[cpu])
        if space > 1:  # 0: never came up; 1: LOADED_MM_SWITCHING, arch/x86/include/asm/tlbflush.h
            yield cpu, space


def _patching_space(target: Target, problems: Problems) -> Iterator[int]:
    """The address space through which the kernel writes its own text (poking_mm)."""
    if not target.has("poking_mm"):
        return
    address = target.address("poking_mm")
    try:
        space = target.memory.u64(address)
    except AccessFailed as error:
        _failed(target, address, "poking_mm", error, problems)
        return
    if space:
        yield space


def _read_each(
    target: Target,
    place: str,
    walked: Walked,
    read: Callable[[int], _T],
    problems: Problems,
) -> tuple[_T, ...]:
    """Read every entry of a list; entries that cannot be read are problems."""
    _note(target, place, walked, problems)
    found = []
    for address in walked.entries:
        try:
            found.append(read(address))
        except AccessFailed as error:
            _failed(target, address, place, error, problems)
    return tuple(found)


def _note(target: Target, place: str, walked: Walked, problems: Problems) -> None:
    """Turn a list's fault into a problem."""
    if walked.broken is not None:
        broken = walked.broken
        where = f"{place}, {target.place(broken.node)}"
        problems.add(_LISTS[broken.fault], broken.node, where, broken.text)


def _note_array(
    target: Target,
    addresses: NDArray[np.uint64],
    good: NDArray[np.bool_],
    place: str,
    problems: Problems,
) -> None:
    """Turn pointers that could not be read into problems."""
    for address in addresses[~good].tolist():
        try:
            target.memory.u64(address)
        except AccessFailed as error:
            _failed(target, address, place, error, problems)


def _failed(
    target: Target, address: int, place: str, error: AccessFailed, problems: Problems
) -> None:
    kind = ProblemKind.UNREADABLE if isinstance(error, Unreadable) else ProblemKind.WILD_POINTER
    problems.add(kind, address, f"{place}, {target.place(address)}", str(error))
