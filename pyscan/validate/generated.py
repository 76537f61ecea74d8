"""Code that the kernel makes at run time, compared with the recipe it is made by.

Of what is made of the package's own bytes every byte is derived: trampolines of ftrace,
the real-mode trampoline, the slots of kprobes. BPF programs are compiled from what a user
loads, so of their packs only the unused bytes are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np

from pyscan.kernel.layout import MODULES
from pyscan.records import PAGE_SHIFT, PAGE_SIZE, PageStatus
from pyscan.validate.context import Target
from pyscan.validate.memory import AccessFailed, Unreadable
from pyscan.validate.objects import PACK_CHUNK, FtraceOps, Kprobe, Structures, read_ops
from pyscan.validate.ownership import FTRACE_ALLOC_TRAMP, Owner, OwnerKind
from pyscan.validate.patch import CALL, INT3, JMP32, NOPS, branch, branch_target
from pyscan.validate.problem import ProblemKind, Problems
from pyscan.validate.thunks import thunks_in

#: include/linux/ftrace.h: the ops want all registers; are called by way of a helper.
_FTRACE_SAVE_REGS: Final = 1 << 2
_FTRACE_ASSISTED: Final = 1 << 4 | 1 << 14  # FTRACE_OPS_FL_RECURSION, FTRACE_OPS_FL_RCU

#: What trampolines are made of, and where it calls.
_CALLS: Final = {"ftrace_caller": "ftrace_call", "ftrace_regs_caller": "ftrace_regs_call"}

#: Bytes of the return at a trampoline's end: `jmp __x86_return_thunk` or `ret` (RET_SIZE,
#: arch/x86/kernel/ftrace.c), by configuration.
_RETURN_SIZES: Final = (5, 2, 1)
_TRAMPOLINE_MAX: Final = PAGE_SIZE

#: include/linux/kprobes.h: KPROBE_FLAG_GONE, KPROBE_FLAG_OPTIMIZED, KPROBE_FLAG_FTRACE.
_KPROBE_GONE: Final = 1
_KPROBE_OPTIMIZED: Final = 4
_KPROBE_FTRACE: Final = 8

#: Longest instruction of x86, and of instructions that a detour replaces (a jump is 5).
_INSN_MAX: Final = 15
_DETOUR_MAX: Final = 4 + _INSN_MAX

#: Largest real-mode blob in bytes; it is copied below 1 MiB (arch/x86/realmode/init.c).
_BLOB_MAX: Final = 1 << 20
_RELOCATIONS_MAX: Final = 1 << 12

_CLAC: Final = b"\x0f\x01\xca"

#: X86_FEATURE_SMAP, arch/x86/include/asm/cpufeatures.h: word 9, bit 20.
_SMAP: Final = 9 * 32 + 20


def check_generated(
    target: Target, structures: Structures, owners: Iterable[Owner], problems: Problems
) -> dict[OwnerKind, int]:
    """All but the real-mode trampoline; bytes of them that are known to be good, by owner.

    Good is what equals its recipe, and between that what does nothing: int3, and the zeros
    of fresh memory.
    """
    owners = tuple(owners)
    listed = {ops.trampoline for ops in structures.ftrace}
    spans = [  # what `recognise` found has been compared
        (owner.start, owner.end)
        for owner in owners
        if owner.kind is OwnerKind.FTRACE and owner.start not in listed
    ]
    for ops in structures.ftrace:
        spans += check_trampoline(target, ops, problems)
    for probe in structures.kprobes:
        spans += check_kprobe(target, probe, problems)
    good = dict.fromkeys(OwnerKind, 0)
    good[OwnerKind.BPF] = check_packs(target, structures, problems)
    for kind in (OwnerKind.FTRACE, OwnerKind.KPROBE):
        pages = {
            page
            for owner in owners
            if owner.kind is kind
            for page in range(owner.start >> PAGE_SHIFT, ((owner.end - 1) >> PAGE_SHIFT) + 1)
        }
        good[kind] = _known_bytes(target, sorted(pages), spans)
    return good


def _known_bytes(target: Target, pages: list[int], spans: Iterable[tuple[int, int]]) -> int:
    """Bytes of executable pages that lie in `spans` [start, end) or do nothing."""
    content, statuses = target.memory.read_pages(
        np.array(pages, dtype=np.uint64) << np.uint64(PAGE_SHIFT)
    )
    known = (content == INT3) | (content == 0)
    rows = {page: row for row, page in enumerate(pages)}
    for start, end in spans:
        for page in range(start >> PAGE_SHIFT, ((end - 1) >> PAGE_SHIFT) + 1):
            row = rows.get(page)
            if row is not None:
                first = max(start - (page << PAGE_SHIFT), 0)
                known[row, first : end - (page << PAGE_SHIFT)] = True
    return int(known[statuses == PageStatus.OK].sum())


def recognise(target: Target, address: int, page: bytes) -> Owner | None:
    """Code on no list of the kernel's, told by its content: see the functions used."""
    if thunks_in(page):
        return Owner(OwnerKind.ITS, address, address + PAGE_SIZE, "thunks")
    return _left_trampoline(target, address, page)


# ftrace


def _left_trampoline(target: Target, address: int, page: bytes) -> Owner | None:
    """A trampoline whose ops are not registered now.

    The kernel's own ops (kprobe_ftrace_ops, graph_ops) keep theirs for the next time
    (ftrace_shutdown frees those of FTRACE_OPS_FL_DYNAMIC only). It names its ops, which must
    name it; what it calls may have changed since (ftrace_reset_array_ops), but is a function.
    """
    for name in ("ftrace_caller", "ftrace_regs_caller"):
        size = target.symbol(f"{name}_end") - target.symbol(name)
        for ending in _RETURN_SIZES:
            end = size + ending
            pointer = int.from_bytes(page[end : end + 8], "little")
            if not target.virtual_base <= pointer < target.image_end:
                continue
            try:
                ops = replace(read_ops(target, pointer), func=_called(target, name, address, page))
                if (
                    ops.trampoline == address
                    and target.is_function(ops.func)
                    and _trampoline_fault(target, ops) is None
                ):
                    end = address + ops.trampoline_size
                    return Owner(OwnerKind.FTRACE, address, end, target.place(pointer))
            except AccessFailed:
                continue
    return None


def _called(target: Target, name: str, address: int, page: bytes) -> int:
    """What a trampoline made of the function `name` calls."""
    place = target.symbol(_CALLS[name]) - target.symbol(name)
    return branch_target(page[place : place + 5], address + place)


def check_trampoline(target: Target, ops: FtraceOps, problems: Problems) -> list[tuple[int, int]]:
    """The trampoline of one ftrace_ops (arch/x86/kernel/ftrace.c, create_trampoline).

    Returns the span of addresses that is as it should be, if it is.

    It is the live text of ftrace_caller or ftrace_regs_caller, which is compared
    elsewhere, with its call, its reference to the ops and its end replaced.
    """
    if not target.is_function(ops.func):
        text = f"its function {target.place(ops.func)} is no function of the kernel"
        problems.add(ProblemKind.HANDLER, ops.address, "ftrace_ops", text)
    if not ops.flags & FTRACE_ALLOC_TRAMP or not ops.trampoline:
        return []
    place = f"ftrace trampoline {ops.trampoline:#x} of {target.place(ops.func)}"
    try:
        wrong = _trampoline_fault(target, ops)
    except AccessFailed as error:
        failed(ops.trampoline, place, error, problems)
        return []
    if wrong is not None:
        problems.add(ProblemKind.GENERATED_CODE, ops.trampoline, place, wrong)
        return []
    return [(ops.trampoline, ops.trampoline + ops.trampoline_size)]


def _trampoline_fault(target: Target, ops: FtraceOps) -> str | None:
    """What is wrong with a trampoline. Raises AccessFailed."""
    name = "ftrace_regs_caller" if ops.flags & _FTRACE_SAVE_REGS else "ftrace_caller"
    start = target.address(name)
    size = target.address(f"{name}_end") - start
    ending = ops.trampoline_size - size - 8
    if ending not in _RETURN_SIZES or not 0 < size <= _TRAMPOLINE_MAX:
        return f"{ops.trampoline_size} bytes long"
    code = bytearray(target.memory.read(start, size))
    if ops.flags & _FTRACE_SAVE_REGS and target.has(f"{name}_jmp"):
        jump = target.address(f"{name}_jmp") - start
        code[jump : jump + 2] = NOPS[1]
    reference = target.address(f"{name}_op_ptr") - start
    distance = size + ending - reference - 7
    code[reference : reference + 7] = b"\x48\x8b\x15" + distance.to_bytes(4, "little")
    place = target.symbol(_CALLS[name]) - target.symbol(name)
    handler = ops.func
    if ops.flags & _FTRACE_ASSISTED and target.has("ftrace_ops_assist_func"):
        handler = target.address("ftrace_ops_assist_func")
    code[place : place + 5] = branch(CALL, ops.trampoline + place, handler)
    actual = target.memory.read(ops.trampoline, ops.trampoline_size)
    if actual[:size] != code:
        return _difference(bytes(code), actual[:size])
    if actual[size + ending :] != ops.address.to_bytes(8, "little"):
        return "it names other ftrace_ops"
    return _return_fault(target, actual[size : size + ending], ops.trampoline + size)


def _return_fault(target: Target, code: bytes, source: int) -> str | None:
    """What is wrong with the return that ends a trampoline."""
    if code[0] == 0xC3:
        return None if set(code[1:]) <= {INT3, 0} else "bytes behind its return"
    if len(code) == 5 and code[0] == JMP32:
        name = target.names.near(branch_target(code, source) - target.virtual_base)
        if name is not None and name[1] == 0 and name[0].endswith("_return_thunk"):
            return None
    return f"it ends with {code.hex()}, no return"


def _difference(expected: bytes, actual: bytes) -> str:
    """Where two codes of one length differ first."""
    at = next(i for i in range(len(expected)) if expected[i] != actual[i])
    return f"at +{at:#x} it holds {actual[at : at + 8].hex()}, not {expected[at : at + 8].hex()}"


# kprobes


def check_kprobe(target: Target, probe: Kprobe, problems: Problems) -> list[tuple[int, int]]:
    """Handlers are functions, and slots hold the instructions that the probe replaced.

    Returns the spans of its slots that are as they should be.
    """
    place = f"kprobe at {target.place(probe.address)}"
    handlers = {probe.pre_handler, probe.post_handler, *probe.members} - {0}
    for handler in sorted(handlers):
        if not target.is_function(handler):
            text = f"its handler {target.place(handler)} is no function of the kernel"
            problems.add(ProblemKind.HANDLER, probe.structure, place, text)
    if probe.flags & (_KPROBE_GONE | _KPROBE_FTRACE):
        return []  # its code was freed, or ftrace calls it without a slot
    try:
        wrong = _slot_fault(target, probe) if probe.slot else None
        if wrong is None and probe.optimized_slot:
            wrong = _detour_fault(target, probe)
    except AccessFailed as error:
        failed(probe.structure, place, error, problems)
        return []
    if wrong is not None:
        problems.add(ProblemKind.GENERATED_CODE, probe.structure, place, wrong)
        return []
    spans = []
    if probe.slot:
        spans.append((probe.slot, probe.slot + probe.slot_size + 5))
    if probe.optimized_slot:
        length = _detour_length(target) + probe.optimized_size + 5
        spans.append((probe.optimized_slot, probe.optimized_slot + length))
    return spans


def _detour_length(target: Target) -> int:
    """Bytes of the template that every detour begins with."""
    return target.symbol("optprobe_template_end") - target.symbol("optprobe_template_entry")


def _probed_code(target: Target, probe: Kprobe, size: int) -> bytes:
    """The instructions that a probe replaced: live text with its saved bytes put back.

    Text outside of probes, and the saved bytes, are compared elsewhere. Raises AccessFailed.
    """
    code = bytearray(target.memory.read(probe.address, size))
    if code[0] == JMP32 and probe.flags & _KPROBE_OPTIMIZED:
        code[1:5] = probe.saved
    code[0] = probe.opcode
    return bytes(code[:size])


def _slot_fault(target: Target, probe: Kprobe) -> str | None:
    """What is wrong with the copy of one instruction (arch_copy_kprobe). Raises AccessFailed."""
    size = probe.slot_size
    if not 0 < size <= _INSN_MAX:
        return f"its copied instruction is {size} bytes long"
    original = _probed_code(target, probe, size)
    code = target.memory.read(probe.slot, size + 5)
    if not _are_copies(code[:size], original, probe.slot - probe.address):
        return f"its slot holds {code[:size].hex()}, not {original.hex()}"
    if code[size] != INT3 and code[size:] != branch(JMP32, probe.slot + size, probe.address + size):
        return f"its copied instruction is followed by {code[size:].hex()}"
    return None


def _detour_fault(target: Target, probe: Kprobe) -> str | None:
    """What is wrong with the detour of an optimised probe (arch_prepare_optimized_kprobe).

    Raises AccessFailed.
    """
    size = probe.optimized_size
    if not 5 <= size <= _DETOUR_MAX:
        return f"its detour replaces {size} bytes"
    start = target.symbol("optprobe_template_entry")
    length = target.symbol("optprobe_template_end") - start
    template = target.packaged(start, length) if 0 < length <= PAGE_SIZE else None
    if template is None:
        return None
    code = bytearray(template)
    slot = probe.optimized_slot
    if target.has("optprobe_template_clac") and _has_feature(target, _SMAP):
        at = target.symbol("optprobe_template_clac") - start
        code[at : at + 3] = _CLAC
    at = target.symbol("optprobe_template_val") - start
    code[at : at + 10] = b"\x48\xbf" + probe.structure.to_bytes(8, "little")
    at = target.symbol("optprobe_template_call") - start
    code[at : at + 5] = branch(CALL, slot + at, target.address("optimized_callback"))
    actual = target.memory.read(slot, length + size + 5)
    if actual[:length] != code:
        return f"its detour differs: {_difference(bytes(code), actual[:length])}"
    back = branch(JMP32, slot + length + size, probe.address + size)
    if actual[length + size :] != back:
        return f"its detour ends with {actual[length + size :].hex()}, not {back.hex()}"
    original = _probed_code(target, probe, size)
    moved = actual[length : length + size]
    if not _are_copies(moved, original, slot + length - probe.address):
        return f"its detour holds {moved.hex()}, not {original.hex()}"
    return None


def _are_copies(code: bytes, original: bytes, distance: int) -> bool:
    """Whether instructions were moved by `distance`: equal but for PC-relative operands."""
    at = 0
    while at < len(original):
        if code[at] == original[at]:
            at += 1
            continue
        for start in range(max(0, at - 3), at + 1):
            here = int.from_bytes(code[start : start + 4], "little")
            there = int.from_bytes(original[start : start + 4], "little")
            if start + 4 <= len(original) and (here + distance - there) & 0xFFFF_FFFF == 0:
                at = start + 4
                break
        else:
            return False
    return True


def _has_feature(target: Target, feature: int) -> bool:
    """Whether the boot CPU has a feature, by number. Raises AccessFailed."""
    words = target.address("boot_cpu_data") + target.offset("cpuinfo_x86.x86_capability")
    return bool(target.memory.u32(words + 4 * (feature // 32)) >> feature % 32 & 1)


# BPF


def check_packs(target: Target, structures: Structures, problems: Problems) -> int:
    """Bytes of BPF packs that no program was given are int3, or zeros; their number.

    (kernel/bpf/core.c: an area is filled by jit_fill_hole, or by zeros when the dispatcher
    is the first to need it; bpf_arch_text_invalidate fills what is given back with int3.)
    """
    verified = 0
    room = MODULES.last - MODULES.first + 1  # packs lie there, and apart from each other
    for pack in structures.packs:
        place = f"BPF pack {pack.start:#x}"
        room -= pack.size
        if pack.start not in MODULES or room < 0:
            problems.add(ProblemKind.IMPLAUSIBLE, pack.start, place, "no pack can lie there")
            continue
        try:
            data, statuses = target.memory.read_range(pack.start, pack.size)
        except AccessFailed as error:
            failed(pack.start, place, error, problems)
            continue
        if (statuses != PageStatus.OK).any():
            hole = bool((statuses == PageStatus.HOLE).any())
            kind = ProblemKind.WILD_POINTER if hole else ProblemKind.UNREADABLE
            problems.add(kind, pack.start, place, "not all of it can be read")
            continue
        unused = ~np.repeat(pack.chunks, PACK_CHUNK)
        stray = np.flatnonzero(unused & (data != INT3) & (data != 0))
        verified += int(unused.sum()) - len(stray)
        if len(stray):
            address = pack.start + int(stray[0])
            text = f"{len(stray)} bytes of unused code space hold something"
            problems.add(ProblemKind.GENERATED_CODE, address, place, text)
    return verified


# The real-mode trampoline


def realmode_owner(target: Target, problems: Problems) -> Iterator[Owner]:
    """The trampoline's executable pages, after comparing them (arch/x86/realmode/init.c)."""
    if not target.has("real_mode_header"):
        return
    symbol = target.address("real_mode_header")
    place = "real-mode trampoline"
    try:
        base = target.memory.u64(symbol)
        frame = target.memory.frame(base)
        text = target.memory.u32(base + target.offset("real_mode_header.text_start"))
        end = target.memory.u32(base + target.offset("real_mode_header.ro_end"))
        physical = (frame or 0) * PAGE_SIZE + base % PAGE_SIZE
        if base % PAGE_SIZE or not physical <= text < end <= physical + _BLOB_MAX:
            text_span = f"{text:#x} to {end:#x} of {physical:#x}"
            problems.add(ProblemKind.IMPLAUSIBLE, base, place, f"its text spans {text_span}")
            return
        end += -end % PAGE_SIZE
        expected = _blob(target, physical)
        if expected is not None:
            wrong = _blob_fault(target, expected, base, text - physical, end - physical)
            if wrong is not None:
                problems.add(ProblemKind.GENERATED_CODE, base, place, wrong)
    except AccessFailed as error:
        failed(symbol, place, error, problems)
        return
    start = base + text - physical
    yield Owner(OwnerKind.REALMODE, start, base + end - physical, place)


def _blob(target: Target, physical: int) -> bytes | None:
    """The trampoline's bytes for its place in memory (setup_real_mode); None: not kept."""
    names = ("real_mode_blob", "real_mode_blob_end", "real_mode_relocs")
    if not all(target.has(name) for name in names):
        return None
    start, end, table = (target.symbol(name) for name in names)
    data = target.packaged(start, end - start) if 0 < end - start <= _BLOB_MAX else None
    if data is None:
        return None
    blob = bytearray(data)
    for width, value in ((2, physical >> 4), (4, physical)):
        count = int.from_bytes(target.packaged(table, 4) or b"", "little")
        places = target.packaged(table + 4, 4 * min(count, _RELOCATIONS_MAX))
        if count > _RELOCATIONS_MAX or places is None:
            return None
        for at in np.frombuffer(places, dtype="<u4").tolist():
            old = int.from_bytes(blob[at : at + width], "little") if width == 4 else 0
            blob[at : at + width] = ((old + value) & ((1 << 8 * width) - 1)).to_bytes(
                width, "little"
            )
        table += 4 + 4 * count
    return bytes(blob)


def _blob_fault(target: Target, expected: bytes, base: int, first: int, end: int) -> str | None:
    """What is wrong with the executable pages of the trampoline. Raises AccessFailed."""
    wanted = expected[first:end]
    actual = target.memory.read(base + first, len(wanted))
    return None if actual == wanted else _difference(wanted, actual)


def failed(address: int, place: str, error: AccessFailed, problems: Problems) -> None:
    """Turn a failed read into a problem."""
    kind = ProblemKind.UNREADABLE if isinstance(error, Unreadable) else ProblemKind.WILD_POINTER
    problems.add(kind, address, place, str(error))
