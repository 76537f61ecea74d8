"""Tables of the kernel that decide where the CPU goes: interrupts, hooks, page tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.kernel.layout import LAYOUTS, READ_ONLY_IDT
from pyscan.records import PAGE_SHIFT, PAGE_SIZE, PageStatus
from pyscan.translate import EXECUTABLE, WRITABLE, Leaves, Span, WalkLimits, walk
from pyscan.validate.context import Target
from pyscan.validate.generated import failed
from pyscan.validate.lists import hlist_entries
from pyscan.validate.memory import AccessFailed
from pyscan.validate.objects import Structures, TableRoot
from pyscan.validate.problem import ProblemKind, Problems

U64 = NDArray[np.uint64]

#: Gates of the interrupt descriptor table (Intel SDM vol. 3A, 6.14.1), 16 bytes each.
VECTORS: Final = 256
_GATE: Final = 16
_FIRST_EXTERNAL: Final = 0x20  # arch/x86/include/asm/irq_vectors.h
_KERNEL_CODE: Final = 0x10  # __KERNEL_CS
_INTERRUPT_GATE: Final = 0x8E00  # present, DPL 0, type 14, no stack of its own
_PRESENT: Final = 0x8000

#: The package's tables of gates, arch/x86/kernel/idt.c.
_GATE_TABLES: Final = ("def_idts", "apic_idts", "early_idts", "early_pf_idts", "ia32_idt")

#: Handlers that a hypervisor's guest support installs (alloc_intr_gate), by vector:
#: arch/x86/include/asm/irq_vectors.h.
_GUEST_GATES: Final = {
    0xF3: (
        "asm_sysvec_kvm_asyncpf_interrupt",
        "asm_sysvec_xen_hvm_callback",
        "asm_sysvec_hyperv_callback",
        "asm_sysvec_acrn_hv_callback",
    ),
    0xEE: ("asm_sysvec_hyperv_reenlightenment",),
    0xED: ("asm_sysvec_hyperv_stimer0",),
}

#: Bytes of an interrupt stub: IDT_ALIGN, 8 or with ENDBR 16; of an early exception stub:
#: EARLY_IDT_HANDLER_SIZE, 9 or with ENDBR 13 (arch/x86/include/asm/idtentry.h, segment.h).
_STUB_SIZES: Final = (8, 16)
_EARLY_SIZES: Final = (9, 13)

#: Lists of security hooks, and hooks of one list, that are looked at.
_HOOK_LISTS_MAX: Final = 1024
_HOOKS_MAX: Final = 64
_HOOK_ARRAY_MAX: Final = 1024

_ADDRESS_MASK: Final = (1 << 64) - 1
_HALF: Final = 256  # entry of a top-level table that the kernel half begins with
_ENTRY_IGNORED: Final = 1 << 5 | 1 << 6  # accessed, dirty: written by the CPU

#: Entry of a process's table for its LDT (arch/x86/include/asm/pgtable_64_types.h,
#: LDT_PGD_ENTRY), with 4 paging levels and with 5; used with page-table isolation.
_LDT_ENTRY: Final = 512 - 240

#: X86_FEATURE_PTI, arch/x86/include/asm/cpufeatures.h: word 7, bit 11.
_PTI: Final = 7 * 32 + 11

_USER_WALK: Final = WalkLimits(tables_max=4096, leaves_max=1 << 20)

#: An LDT has 64 KiB, and its area room for two (arch/x86/kernel/ldt.c).
_LDT_WALK: Final = WalkLimits(tables_max=16, leaves_max=64)

#: Leaves of user mode's tables that are reported; the others are counted.
_LEAVES_MAX: Final = 256
_ROOTS_BATCH: Final = 256


# Interrupts


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate of the interrupt descriptor table."""

    address: int
    selector: int
    bits: int


def check_interrupts(target: Target, problems: Problems) -> None:
    """Every gate is one that the package sets for its vector, and the table is read-only."""
    table = target.address("idt_table")
    place = "idt_table"
    _check_read_only(target, table, problems)
    try:
        data = target.memory.read(table, VECTORS * _GATE)
    except AccessFailed as error:
        failed(table, place, error, problems)
        return
    allowed = _package_gates(target)
    for vector in range(VECTORS):
        gate = _gate(data[vector * _GATE : (vector + 1) * _GATE])
        if gate.bits & _PRESENT and gate not in allowed[vector]:
            text = (
                f"vector {vector:#x} leads to {target.place(gate.address)} "
                f"(selector {gate.selector:#x}, bits {gate.bits:#x})"
            )
            problems.add(ProblemKind.INTERRUPT_TABLE, table + vector * _GATE, place, text)


def _check_read_only(target: Target, table: int, problems: Problems) -> None:
    """The table's page is not writable, and its fixed alias leads to the same frame."""
    memory = target.memory
    addresses = np.array([table, READ_ONLY_IDT], dtype=np.uint64)
    frames, mapped = memory.frames(addresses)
    kind = ProblemKind.INTERRUPT_TABLE
    if not mapped.all() or frames[0] != frames[1]:
        text = "its read-only alias does not lead to it"
        problems.add(kind, READ_ONLY_IDT, "idt_table", text)
    for address in addresses[mapped].tolist():
        if leaf_flags(memory.leaves, address) & WRITABLE:
            problems.add(kind, address, "idt_table", "its page is writable")


def leaf_flags(leaves: Leaves, address: int) -> int:
    """Flags of the leaf that maps an address, which must be mapped."""
    row = int(np.searchsorted(leaves.address, np.uint64(address), side="right")) - 1
    return int(leaves.flags[row])


def _gate(data: bytes) -> Gate:
    low, selector, bits, middle = (int.from_bytes(data[i : i + 2], "little") for i in (0, 2, 4, 6))
    high = int.from_bytes(data[8:12], "little")
    return Gate(low | middle << 16 | high << 32, selector, bits)


def _package_gates(target: Target) -> list[set[Gate]]:
    """Gates that the package allows for each vector."""
    allowed: list[set[Gate]] = [set() for _ in range(VECTORS)]
    for vector, gate in _table_gates(target):
        allowed[vector].add(gate)
    for vector, name in _stubs(target):
        allowed[vector].add(Gate(name, _KERNEL_CODE, _INTERRUPT_GATE))
    for vector, names in _GUEST_GATES.items():
        for symbol in names:
            if target.has(symbol):
                gate = Gate(target.address(symbol), _KERNEL_CODE, _INTERRUPT_GATE)
                allowed[vector].add(gate)
    return allowed


def _table_gates(target: Target) -> Iterator[tuple[int, Gate]]:
    """Vector and gate of every row (struct idt_data) of the package's tables."""
    size = target.offset("idt_data")
    for name in _GATE_TABLES:
        if not target.has(name):
            continue
        start = target.symbol(name)
        end = min(target.names.end(start) or start, start + VECTORS * size)
        data = target.packaged(start, end - start - (end - start) % size)
        for at in range(0, len(data or b""), size):
            row = (data or b"")[at : at + size]
            vector = _field(target, row, "vector", 4)
            address = _field(target, row, "addr", 8)
            if address and vector < VECTORS:
                selector = _field(target, row, "segment", 4) or _KERNEL_CODE
                yield vector, Gate(address, selector, _field(target, row, "bits", 2))


def _field(target: Target, row: bytes, name: str, width: int) -> int:
    offset = target.offset(f"idt_data.{name}")
    return int.from_bytes(row[offset : offset + width], "little")


def _stubs(target: Target) -> Iterator[tuple[int, int]]:
    """Vector and address of the stubs of devices' and of spurious interrupts.

    Stubs of devices end at the first system vector, and those of spurious interrupts
    follow, so the distance of the two arrays tells that vector and the size of a stub.
    """
    early = target.address("early_idt_handler_array")
    for vector in range(_FIRST_EXTERNAL):
        for size in _EARLY_SIZES:
            yield vector, early + vector * size
    if not (target.has("irq_entries_start") and target.has("spurious_entries_start")):
        return
    devices, spurious = (target.address(f"{name}_entries_start") for name in ("irq", "spurious"))
    for size in _STUB_SIZES:
        system = _FIRST_EXTERNAL + (spurious - devices) // size
        if not 0xA0 <= system <= VECTORS:
            continue
        for vector in range(_FIRST_EXTERNAL, VECTORS):
            if vector < system:
                yield vector, devices + (vector - _FIRST_EXTERNAL) * size
            else:
                yield vector, spurious + (vector - system) * size


# Security hooks


def check_hooks(target: Target, problems: Problems) -> None:
    """Lists of security hooks hold what the package's security modules put there.

    A security module adds its whole array of hooks or none of it (security_add_hooks), and
    the array says of every hook which list it is on and which function it is.
    """
    if not target.knows("security_hook_list.hook") or not target.has("security_hook_heads"):
        return
    arrays = list(_hook_arrays(target))
    expected = {address: hook for array in arrays for address, hook in array.hooks.items()}
    seen: set[int] = set()
    heads = target.address("security_hook_heads")
    for number in range(min(target.offset("security_hook_heads") // 8, _HOOK_LISTS_MAX)):
        head = heads + 8 * number
        link = target.offset("security_hook_list.list")
        walked = hlist_entries(target.memory, head, link, _HOOKS_MAX)
        if walked.broken is not None:
            kind = ProblemKind.SECURITY_HOOK
            if walked.broken.fault == "unreadable":
                kind = ProblemKind.UNREADABLE
            problems.add(kind, head, target.place(head), walked.broken.text)
        for entry in walked.entries:
            seen.add(entry)
            _check_hook(target, head, entry, expected, problems)
    for array in arrays:
        present = len(seen & array.hooks.keys())
        if present not in (0, len(array.hooks)):
            text = f"{present} of its {len(array.hooks)} hooks are registered"
            problems.add(ProblemKind.SECURITY_HOOK, array.address, array.name, text)


@dataclass(frozen=True, slots=True)
class _HookArray:
    """A security module's array: address of each hook -> its list's head and function."""

    name: str
    address: int
    hooks: dict[int, tuple[int, int]]


def _hook_arrays(target: Target) -> Iterator[_HookArray]:
    """Arrays of struct security_hook_list, from the package (LSM_HOOK_INIT)."""
    size = target.offset("security_hook_list")
    head_at = target.offset("security_hook_list.head")
    hook_at = target.offset("security_hook_list.hook")
    heads = target.address("security_hook_heads")
    last = heads + target.offset("security_hook_heads")
    if not (target.has("__start_ro_after_init") and target.has("__end_ro_after_init")):
        return
    first = target.symbol("__start_ro_after_init")
    for name, start in target.names.ending("_hooks", first, target.symbol("__end_ro_after_init")):
        end = min(target.names.end(start) or start, start + _HOOK_ARRAY_MAX * size)
        data = target.packaged(start, end - start) or b""
        hooks = {}
        for at in range(0, len(data) - size + 1, size):
            head = int.from_bytes(data[at + head_at : at + head_at + 8], "little")
            hook = int.from_bytes(data[at + hook_at : at + hook_at + 8], "little")
            if heads <= head < last and hook:
                hooks[target.virtual_base + start + at] = (head, hook)
        if hooks:
            yield _HookArray(name, target.virtual_base + start, hooks)


def _check_hook(
    target: Target,
    head: int,
    entry: int,
    expected: dict[int, tuple[int, int]],
    problems: Problems,
) -> None:
    place = f"{target.place(head)}, {target.place(entry)}"
    kind = ProblemKind.SECURITY_HOOK
    if entry not in expected:
        problems.add(kind, entry, place, "it is in no security module's array")
        return
    try:
        hook = target.memory.u64(entry + target.offset("security_hook_list.hook"))
    except AccessFailed as error:
        failed(entry, place, error, problems)
        return
    if expected[entry][0] != head:
        problems.add(kind, entry, place, f"it belongs to {target.place(expected[entry][0])}")
    if expected[entry][1] != hook:
        text = f"it calls {target.place(hook)}, not {target.place(expected[entry][1])}"
        problems.add(kind, entry, place, text)


# Page tables of processes


def check_roots(target: Target, structures: Structures, problems: Problems) -> None:
    """Top-level tables of processes agree with the kernel's own in the kernel half.

    Lower tables are shared, so equal entries mean equal memory. An entry may be missing:
    then the process faults. With page-table isolation the second page of a table is the
    one that user mode runs on, and must agree as well (arch/x86/mm/pgtable.c, pgd_ctor).
    """
    _check_kernel_space(target, problems)
    try:
        isolated = _isolated(target)
    except AccessFailed as error:
        failed(target.address("boot_cpu_data"), "boot_cpu_data", error, problems)
        isolated = False
    kernel = target.memory.kernel
    for half in range(2 if isolated else 1):
        frame = np.array([(kernel.root_gpa >> PAGE_SHIFT) + half], dtype=np.uint64)
        page = np.empty((1, PAGE_SIZE), dtype=np.uint8)
        place = "init_top_pgt"
        if target.memory.source.read(frame, page)[0] != PageStatus.OK:
            address = target.address("init_top_pgt") + half * PAGE_SIZE
            problems.add(ProblemKind.UNREADABLE, address, place, "it could not be read")
            continue
        reference = page.view("<u8")[0]
        if half == 0 and reference[:_HALF].any():
            text = "the user half of the kernel's own table maps something"
            problems.add(ProblemKind.PAGE_TABLE, target.address(place), place, text)
        for start in range(0, len(structures.roots), _ROOTS_BATCH):
            batch = structures.roots[start : start + _ROOTS_BATCH]
            _check_batch(target, batch, reference, half, problems)
    if isolated:
        _check_user_tables(target, problems)


def _check_kernel_space(target: Target, problems: Problems) -> None:
    """The kernel changes the table that it runs on: init_mm.pgd is init_top_pgt."""
    if not target.has("init_mm"):
        return
    address = target.address("init_mm") + target.offset("mm_struct.pgd")
    try:
        table = target.memory.u64(address)
    except AccessFailed as error:
        failed(address, "init_mm", error, problems)
        return
    if table != target.address("init_top_pgt"):
        text = f"its table is {target.place(table)}, not init_top_pgt"
        problems.add(ProblemKind.PAGE_TABLE, address, "init_mm", text)


def _isolated(target: Target) -> bool:
    """Whether page-table isolation is on. Raises AccessFailed."""
    words = target.address("boot_cpu_data") + target.offset("cpuinfo_x86.x86_capability")
    return bool(target.memory.u32(words + 4 * (_PTI // 32)) >> _PTI % 32 & 1)


def _check_batch(
    target: Target,
    roots: tuple[TableRoot, ...],
    reference: U64,
    half: int,
    problems: Problems,
) -> None:
    addresses = np.array(
        [(root.address + half * PAGE_SIZE) & _ADDRESS_MASK for root in roots], dtype=np.uint64
    )
    pages, statuses = target.memory.read_pages(addresses)
    entries = pages.view("<u8")
    differs = (entries ^ reference) & np.uint64(~_ENTRY_IGNORED & _ADDRESS_MASK) != 0
    differs &= entries != 0
    differs[:, :_HALF] = False
    differs[:, _LDT_ENTRY] = False
    for row, root in enumerate(roots):
        place = f"page table of {root.owner}"
        if statuses[row] != PageStatus.OK or root.address % PAGE_SIZE:
            hole = statuses[row] == PageStatus.HOLE or root.address % PAGE_SIZE
            kind = ProblemKind.WILD_POINTER if hole else ProblemKind.UNREADABLE
            problems.add(kind, root.address, place, "it cannot be read")
            continue
        wrong = np.flatnonzero(differs[row])
        if len(wrong):
            index = int(wrong[0])
            text = (
                f"entry {index} is {int(entries[row, index]):#x}, "
                f"the kernel's is {int(reference[index]):#x} ({len(wrong)} differ)"
            )
            problems.add(ProblemKind.PAGE_TABLE, root.address, place, text)
        _check_ldt(target, root, int(entries[row, _LDT_ENTRY]), problems)


def _check_ldt(target: Target, root: TableRoot, entry: int, problems: Problems) -> None:
    """A process's own entry in the kernel half maps its LDT, which is data and read-only."""
    form = LAYOUTS[target.memory.kernel.paging_levels].form
    gpa = target.memory.frame(root.address)
    if not entry & form.present or gpa is None:
        return
    shift = form.levels[0].shift
    first = (_ADDRESS_MASK - (1 << form.address_bits) + 1) + (_LDT_ENTRY << shift)
    span = Span(first, first + (1 << shift) - 1)
    found = walk(target.memory.source, gpa << PAGE_SHIFT, form, [span], _LDT_WALK)
    bad = found.leaves.flags & np.uint8(EXECUTABLE | WRITABLE) != 0
    if bad.any() or not found.complete:
        text = "its area for the LDT maps code or writable memory, or cannot be walked"
        problems.add(ProblemKind.PAGE_TABLE, root.address, f"page table of {root.owner}", text)


def _check_user_tables(target: Target, problems: Problems) -> None:
    """What user mode's tables map of the kernel half is what the kernel's own map there.

    (arch/x86/mm/pti.c clones entry text and the per-CPU entry areas, with fewer rights.)
    """
    kernel = target.memory.kernel
    form = LAYOUTS[kernel.paging_levels].form
    half = Span(_ADDRESS_MASK - (1 << (form.address_bits - 1)) + 1, _ADDRESS_MASK)
    found = walk(target.memory.source, kernel.root_gpa + PAGE_SIZE, form, [half], _USER_WALK)
    place = "init_top_pgt, table of user mode"
    if not found.complete:
        address = target.address("init_top_pgt") + PAGE_SIZE
        problems.add(ProblemKind.PAGE_TABLE, address, place, "it cannot be walked to the end")
    leaves = found.leaves
    gpas, mapped = target.memory.translate(leaves.address)
    main = target.memory.leaves
    same = np.maximum(np.searchsorted(main.address, leaves.address, side="right") - 1, 0)
    more = leaves.flags & ~main.flags[same] & np.uint8(EXECUTABLE | WRITABLE) != 0
    wrong = ~mapped | (gpas != leaves.gpa) | more
    rows = np.flatnonzero(wrong)
    problems.total += max(0, len(rows) - _LEAVES_MAX)
    for row in rows[:_LEAVES_MAX].tolist():
        text = f"it leads to physical {int(leaves.gpa[row]):#x}, as the kernel's own does not"
        problems.add(ProblemKind.PAGE_TABLE, int(leaves.address[row]), place, text)
