"""Invariants: a healthy kernel keeps all, and each attack breaks the one it should."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_kernel import MIB
from fake_target import MODULES, OFFSETS, SYMBOLS, FakeTarget, pack
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import NX, PRESENT, TABLE, USER, WRITE, Memory
from test_validate_objects import link_tasks, module, probe, process

from pyscan.records import PAGE_SIZE
from pyscan.validate.invariants import Invariants, check_invariants, check_walk
from pyscan.validate.memory import walk_kernel
from pyscan.validate.objects import BpfPack, read_structures
from pyscan.validate.ownership import OwnerKind
from pyscan.validate.patch import branch
from pyscan.validate.problem import ProblemKind, Problems
from pyscan.validate.thunks import Thunks, thunks_in

CODE = MODULES + 0x10_0000  # where module() puts its first module
PACK = MODULES + 0x80_0000
FREE = 40 * MIB  # physical memory that nothing else uses
TABLE_GPA = 30 * MIB


@pytest.fixture
def fake(tmp_path: Path) -> FakeTarget:
    return FakeTarget(Memory(tmp_path / "ram", 64 * MIB))


def check(fake: FakeTarget) -> Invariants:
    with fake.memory.source() as source:
        target = fake.target(source)
        structures = read_structures(target)
        assert not structures.problems.kept
        # Of the 2 MiB of a pack the tests map four pages.
        packs = [BpfPack(each.start, 0x4000, each.chunks[:0x100]) for each in structures.packs]
        structures = replace(structures, packs=tuple(packs))
        walked = walk_kernel(source, fake.kernel.image)
        return check_invariants(target.with_modules(structures.modules), structures, walked)


def kinds(found: Invariants) -> list[ProblemKind]:
    assert found.problems_total == len(found.problems)
    for problem in found.problems:
        assert "\n" not in str(problem)
    return [problem.kind for problem in found.problems]


def protect(fake: FakeTarget, gpa: int, pages: int) -> None:
    """Make frames read-only in the direct map, as the kernel does with code."""
    first = gpa >> 21 << 21
    table = fake.memory.table()
    for page in range(512):
        here = first + page * PAGE_SIZE
        right = 0 if gpa <= here < gpa + pages * PAGE_SIZE else WRITE
        fake.memory.set_entry(table, page, here | PRESENT | NX | right)
    fake.memory.map(
        fake.kernel.form,
        fake.kernel.root,
        fake.kernel.direct(first),
        table,
        TABLE,
        shift=21,
        large=False,
    )


def code(fake: FakeTarget, address: int, data: bytes, gpa: int = FREE) -> None:
    """Executable pages with content."""
    pages = -(-len(data) // PAGE_SIZE)
    for page in range(pages):
        fake.map(address + page * PAGE_SIZE, gpa + page * PAGE_SIZE, PRESENT)
    fake.memory.write(gpa, data)
    protect(fake, gpa, pages)


def test_a_healthy_kernel(fake: FakeTarget) -> None:
    found = check(fake)
    assert kinds(found) == []
    assert found.ownership.bytes_by_kind[OwnerKind.VMLINUX] == 2 * MIB
    assert found.ownership.bytes_by_kind[OwnerKind.REALMODE] == PAGE_SIZE
    assert not found.unverified


# Permissions and owners


def test_writable_code(fake: FakeTarget) -> None:
    fake.split(fake.kernel.text)
    page = fake.kernel.virtual + 0x7000
    fake.map(page, fake.gpa(page), PRESENT | WRITE)
    found = check(fake)
    assert kinds(found) == [ProblemKind.WRITABLE_EXECUTABLE, ProblemKind.WRITABLE_ALIAS]
    assert found.problems[0].address == page


@pytest.mark.parametrize("offset", [0x7000, 0x20_3000])
def test_a_second_mapping_that_is_writable(fake: FakeTarget, offset: int) -> None:
    """Of text, and of read-only data."""
    alias = 0xFFFF_C900_0000_0000
    fake.map(alias, fake.kernel.physical + offset, PRESENT | WRITE | NX)
    found = check(fake)
    assert kinds(found) == [ProblemKind.WRITABLE_ALIAS]
    assert found.problems[0].address == alias


def test_modules_own_their_text(fake: FakeTarget) -> None:
    fake.list("modules", [module(fake, 1)])
    code(fake, CODE, bytes(0x2000))
    found = check(fake)
    assert kinds(found) == []
    assert found.ownership.bytes_by_kind[OwnerKind.MODULE] == 0x2000


def test_a_hidden_module(fake: FakeTarget) -> None:
    code(fake, CODE, bytes(0x2000))
    found = check(fake)
    assert kinds(found) == [ProblemKind.ORPHAN_CODE]
    assert found.problems[0].address == CODE
    assert "2 executable pages" in found.problems[0].text


def test_code_behind_a_module(fake: FakeTarget) -> None:
    fake.list("modules", [module(fake, 1)])
    code(fake, CODE, bytes(0x3000))
    found = check(fake)
    assert kinds(found) == [ProblemKind.ORPHAN_CODE]
    assert found.problems[0].address == CODE + 0x2000


def test_an_absurd_module_owns_nothing(fake: FakeTarget) -> None:
    node = module(fake, 1)
    layout = struct.pack("<QIII", 0xFFFF_8000_0000_0000, *[0xFFFF_F000] * 3)
    fake.write(fake.scratch(1) + OFFSETS["module.core_layout.base"], layout)
    fake.list("modules", [node])
    code(fake, CODE, bytes(0x1000))
    assert ProblemKind.ORPHAN_CODE in kinds(check(fake))


def thunk_page() -> bytes:
    page = bytearray(b"\xcc" * PAGE_SIZE)
    for offset, thunk in ((32, b"\xff\xe0\xcc"), (35, b"\x41\xff\xe3\xcc"), (39, b"\xff\xe7\xcc")):
        page[offset : offset + len(thunk)] = thunk
    return bytes(page)


def test_thunk_pages_are_told_by_content(fake: FakeTarget) -> None:
    code(fake, CODE, thunk_page())
    found = check(fake)
    assert kinds(found) == []
    assert found.ownership.bytes_by_kind[OwnerKind.ITS] == PAGE_SIZE


def full_thunk_page() -> bytes:
    """As many thunks as a page holds, of alternating length."""
    page, offset, long = bytearray(b"\xcc" * PAGE_SIZE), 32, False
    while offset + (4 if long else 3) <= PAGE_SIZE:
        thunk = b"\x41\xff\xe0\xcc" if long else b"\xff\xe1\xcc"
        if (offset + len(thunk) - 1) % 64 < 32:
            offset = ((offset - 1) | 0x3F) + 33
        page[offset : offset + len(thunk)] = thunk
        offset, long = offset + len(thunk), not long
    return bytes(page)


def test_thunks_are_read_as_the_kernel_puts_them() -> None:
    """its_allocate_thunk(): a long one that does not fit goes on, a short one may stay."""
    page = bytearray(b"\xcc" * PAGE_SIZE)
    wanted = {}
    # Ten of 3 bytes end at 62, where neither fits; then 9 of 3 and one long end at 127.
    for offset in range(32, 62, 3):
        wanted[offset] = 5
    for offset in range(96, 123, 3):
        wanted[offset] = 1
    wanted[123] = 8
    # Nine of 3 and ... a short one at 189, in the last 3 bytes of its line; then a long one.
    wanted[160] = wanted[164] = 15
    for offset in range(168, 192, 3):
        wanted[offset] = 0
    wanted[224] = 10
    for offset, register in wanted.items():
        code = bytes([*([0x41] if register >= 8 else []), 0xFF, 0xE0 + register % 8, 0xCC])
        page[offset : offset + len(code)] = code
    assert thunks_in(bytes(page)) == wanted
    page[61] = 0xFF
    assert thunks_in(bytes(page)) == {}


def test_thunks_at_the_end_of_a_page() -> None:
    page = bytearray(full_thunk_page())
    last = max(thunks_in(bytes(page)))
    assert PAGE_SIZE - last <= 6
    page[last] = 0x90
    assert thunks_in(bytes(page)) == {}


def test_thunks_by_address(fake: FakeTarget) -> None:
    code(fake, CODE, thunk_page())
    with fake.memory.source() as source:
        thunks = Thunks(fake.target(source))
        assert [thunks.get(CODE + at) for at in (32, 35, 39, 33, 42)] == [0, 11, 7, None, None]
        assert thunks.get(CODE + PAGE_SIZE) is None  # not mapped
        assert thunks.get(0) is None


def test_thunk_pages_to_the_byte() -> None:
    assert thunks_in(thunk_page())
    assert thunks_in(full_thunk_page())
    assert not thunks_in(b"\xcc" * PAGE_SIZE)
    assert not thunks_in(bytes(PAGE_SIZE))
    for offset in range(0, 160):
        page = bytearray(thunk_page())
        page[offset] ^= 0x10
        assert not thunks_in(bytes(page))


# Interrupts


@pytest.mark.parametrize(
    ("vector", "name", "offset", "bits"),
    [
        (14, "kernel_function", 0, 0x8E00),
        (14, "asm_exc_page_fault", 1, 0x8E00),
        (14, "asm_exc_page_fault", 0, 0xEE00),  # user mode may call it
        (15, "asm_exc_page_fault", 0, 0x8E00),
        (0x31, "irq_entries_start", 0x10 * 8, 0x8E00),  # another vector's stub
        (0x80, "kernel_function", 0, 0xEE00),
    ],
)
def test_a_gate_that_no_kernel_sets(
    fake: FakeTarget, vector: int, name: str, offset: int, bits: int
) -> None:
    fake.gate(vector, fake.address(name) + offset, bits)
    found = check(fake)
    assert kinds(found) == [ProblemKind.INTERRUPT_TABLE]
    assert f"vector {vector:#x}" in found.problems[0].text


@pytest.mark.parametrize("vector", [0, 15, 0x20, 0xEB, 0xEC, 0xFF])
def test_stubs_of_all_ranges(fake: FakeTarget, vector: int) -> None:
    start, first, size = {
        True: ("early_idt_handler_array", 0, 9),
        False: ("irq_entries_start", 0x20, 8),
    }[vector < 0x20]
    fake.gate(vector, fake.address(start) + (vector - first) * size)
    assert kinds(check(fake)) == []


def test_a_table_that_can_be_written(fake: FakeTarget) -> None:
    table = fake.address("idt_table")
    fake.map(table, fake.gpa(table), PRESENT | WRITE | NX)
    assert kinds(check(fake)) == [ProblemKind.INTERRUPT_TABLE]


def test_another_table_at_the_alias(fake: FakeTarget) -> None:
    fake.map(0xFFFF_FE00_0000_0000, FREE, PRESENT | NX)
    assert kinds(check(fake)) == [ProblemKind.INTERRUPT_TABLE]


# Security hooks

HOOKS = SYMBOLS["small_hooks"]


def replace_hook(fake: FakeTarget) -> None:
    fake.write(fake.kernel.virtual + HOOKS + 24, pack(fake.address("other_function")))


def hook_into_code(fake: FakeTarget) -> None:
    fake.write(fake.kernel.virtual + HOOKS + 24, pack(fake.address("kernel_function") + 5))


def empty_list(fake: FakeTarget) -> None:
    fake.put("security_hook_heads", pack(0))


def foreign_hook(fake: FakeTarget) -> None:
    node, old = fake.scratch(1), fake.kernel.virtual + HOOKS
    head = fake.address("security_hook_heads")
    fake.write(node, pack(old, head, 0, fake.address("kernel_function")))
    fake.write(old, pack(0, node))
    fake.write(head, pack(node))


def cyclic_hooks(fake: FakeTarget) -> None:
    fake.write(fake.kernel.virtual + HOOKS, pack(fake.kernel.virtual + HOOKS))


@pytest.mark.parametrize(
    "attack", [replace_hook, hook_into_code, empty_list, foreign_hook, cyclic_hooks]
)
def test_tampered_hooks(fake: FakeTarget, attack: Callable[[FakeTarget], None]) -> None:
    attack(fake)
    assert kinds(check(fake)) == [ProblemKind.SECURITY_HOOK]


def test_a_module_that_is_not_in_use(fake: FakeTarget) -> None:
    """None of its hooks registered: another boot option, no attack."""
    fake.put("security_hook_heads", pack(0, 0))
    assert kinds(check(fake)) == []


# Page tables


def with_process(fake: FakeTarget) -> None:
    fake.kernel.process(TABLE_GPA)
    link_tasks(fake, [process(fake, 1, fake.kernel.direct(TABLE_GPA))])


def test_processes_share_the_kernel_half(fake: FakeTarget) -> None:
    with_process(fake)
    fake.memory.set_entry(TABLE_GPA, 300, 0)
    entry = fake.memory.read_entry(TABLE_GPA, 511)
    fake.memory.set_entry(TABLE_GPA, 511, entry | 1 << 5 | 1 << 6)  # accessed, dirty
    assert kinds(check(fake)) == []


@pytest.mark.parametrize("index", [256, 300, 511])
def test_a_process_with_another_kernel(fake: FakeTarget, index: int) -> None:
    with_process(fake)
    fake.memory.set_entry(TABLE_GPA, index, FREE | TABLE)
    found = check(fake)
    assert kinds(found) == [ProblemKind.PAGE_TABLE]
    assert "process 1 init" in found.problems[0].place
    assert f"entry {index} " in found.problems[0].text


def test_a_process_whose_tables_are_nowhere(fake: FakeTarget) -> None:
    link_tasks(fake, [process(fake, 1, 0x1234_5000), process(fake, 2, 0x1234_5678)])
    assert kinds(check(fake)) == [ProblemKind.WILD_POINTER] * 2


LDT = 0xFFFF_8800_0000_0000


@pytest.mark.parametrize(("bits", "good"), [(PRESENT | NX | USER, True), (PRESENT, False)])
def test_a_process_with_its_own_segments(fake: FakeTarget, bits: int, good: bool) -> None:
    with_process(fake)
    fake.memory.map(fake.kernel.form, TABLE_GPA, LDT, FREE, bits)
    assert kinds(check(fake)) == ([] if good else [ProblemKind.PAGE_TABLE])


def test_the_kernels_own_user_half(fake: FakeTarget) -> None:
    fake.memory.map(fake.kernel.form, fake.kernel.root, 0x1000, FREE, PRESENT | NX)
    assert kinds(check(fake)) == [ProblemKind.PAGE_TABLE]


def isolate(fake: FakeTarget) -> int:
    """Turn page-table isolation on; the user mode's top table is returned."""
    words = OFFSETS["cpuinfo_x86.x86_capability"] + 4 * 7
    fake.put("boot_cpu_data", struct.pack("<I", 1 << 11), words)
    return fake.kernel.root + PAGE_SIZE


def test_isolation_maps_a_part_of_the_kernel(fake: FakeTarget) -> None:
    user = isolate(fake)
    page = fake.kernel.virtual + 0x3000
    fake.memory.map(fake.kernel.form, user, page, fake.gpa(page), PRESENT)
    assert kinds(check(fake)) == []


@pytest.mark.parametrize(("offset", "bits"), [(0x1000, PRESENT), (0, PRESENT | WRITE)])
def test_isolation_that_maps_something_else(fake: FakeTarget, offset: int, bits: int) -> None:
    user = isolate(fake)
    page = fake.kernel.virtual + 0x3000
    fake.memory.map(fake.kernel.form, user, page, fake.gpa(page) + offset, bits)
    assert kinds(check(fake)) == [ProblemKind.PAGE_TABLE]


def test_anomalies_of_the_walk(fake: FakeTarget) -> None:
    fake.memory.set_entry(fake.kernel.root, 400, 0xFE_0000_0000 | TABLE)
    problems = Problems()
    with fake.memory.source() as source:
        check_walk(walk_kernel(source, fake.kernel.image), problems)
    assert [problem.kind for problem in problems.kept] == [ProblemKind.PAGE_TABLE]


# Generated code

CALLER, SIZE = SYMBOLS["ftrace_caller"], 0x40


def with_ftrace(fake: FakeTarget, flags: int = 0x800) -> bytearray:
    """A registered ftrace_ops with its trampoline, which is returned."""
    text = bytearray(range(SIZE))
    fake.write(fake.kernel.virtual + CALLER, bytes(text))
    ops, func = fake.scratch(1), fake.address("kernel_function")
    fake.put("ftrace_ops_list", pack(ops))
    size = SIZE + 5 + 8
    fake.write(ops, pack(func, fake.address("ftrace_list_end"), flags, CODE, size))
    text[0x10:0x17] = b"\x48\x8b\x15" + struct.pack("<i", SIZE + 5 - 0x17)
    text[0x20:0x25] = branch(0xE8, CODE + 0x20, func)
    return text + b"\xc3\xcc\xcc\xcc\xcc" + pack(ops)


def test_a_trampoline(fake: FakeTarget) -> None:
    code(fake, CODE, bytes(with_ftrace(fake)))
    found = check(fake)
    assert kinds(found) == []
    assert not found.unverified


@pytest.mark.parametrize("offset", [0, 0x12, 0x21, SIZE - 1, SIZE, SIZE + 2, SIZE + 5, SIZE + 12])
def test_a_tampered_trampoline(fake: FakeTarget, offset: int) -> None:
    text = with_ftrace(fake)
    text[offset] ^= 0x40
    code(fake, CODE, bytes(text))
    assert kinds(check(fake)) == [ProblemKind.GENERATED_CODE]


def left_behind(fake: FakeTarget) -> bytearray:
    """A trampoline of the kernel's own ops, which are not registered any more."""
    text = with_ftrace(fake)
    fake.put("ftrace_ops_list", pack(fake.address("ftrace_list_end")))
    return text


def test_a_trampoline_that_stays(fake: FakeTarget) -> None:
    code(fake, CODE, bytes(left_behind(fake)))
    found = check(fake)
    assert kinds(found) == []
    assert found.ownership.bytes_by_kind[OwnerKind.FTRACE] == PAGE_SIZE
    assert not found.unverified


def test_a_trampoline_that_calls_what_it_did_before(fake: FakeTarget) -> None:
    text = left_behind(fake)
    text[0x20:0x25] = branch(0xE8, CODE + 0x20, fake.address("other_function"))
    code(fake, CODE, bytes(text))
    assert kinds(check(fake)) == []


@pytest.mark.parametrize("offset", [0, 0x21, SIZE, SIZE + 5])
def test_a_trampoline_that_is_none(fake: FakeTarget, offset: int) -> None:
    text = left_behind(fake)
    text[offset] ^= 0x40
    code(fake, CODE, bytes(text))
    assert kinds(check(fake)) == [ProblemKind.ORPHAN_CODE]


def test_a_trampoline_that_its_ops_do_not_name(fake: FakeTarget) -> None:
    text = left_behind(fake)
    fake.write(fake.scratch(1) + OFFSETS["ftrace_ops.trampoline"], pack(CODE + PAGE_SIZE))
    code(fake, CODE, bytes(text))
    assert kinds(check(fake)) == [ProblemKind.ORPHAN_CODE]


def test_a_function_that_is_none(fake: FakeTarget) -> None:
    with_ftrace(fake, flags=0)
    fake.write(fake.scratch(1), pack(fake.address("kernel_function") + 4))
    assert kinds(check(fake)) == [ProblemKind.HANDLER]


def with_kprobe(fake: FakeTarget) -> bytearray:
    """A probe on `mov 0x12345678(%rip), %rax`; the page of its slot is returned."""
    at = fake.address("other_function")
    original = b"\x48\x8b\x05" + struct.pack("<i", 0x1234_5678)
    fake.write(at, b"\xcc" + original[1:])
    structure = probe(fake, 1, fake.address("kernel_function"))
    fake.write(structure + OFFSETS["kprobe.opcode"], b"\x48")
    fake.write(structure + OFFSETS["kprobe.ainsn.insn"], pack(CODE) + b"\1\7")
    page = fake.scratch(2)
    fake.list("kprobe_insn_slots", [page], OFFSETS["kprobe_insn_cache.pages"])
    fake.write(page + OFFSETS["kprobe_insn_page.insns"], pack(CODE))
    moved = (0x1234_5678 + at - CODE) & 0xFFFF_FFFF
    back = branch(0xE9, CODE + 7, at + 7)
    return bytearray(b"\x48\x8b\x05" + struct.pack("<I", moved) + back)


def test_a_probe(fake: FakeTarget) -> None:
    code(fake, CODE, bytes(with_kprobe(fake)))
    found = check(fake)
    assert kinds(found) == []
    assert not found.unverified


def test_what_lies_beside_slots_is_counted(fake: FakeTarget) -> None:
    """Slots that were given back keep what they held."""
    code(fake, CODE, bytes(with_kprobe(fake)) + bytes(100) + b"\x90" * 7)
    found = check(fake)
    assert kinds(found) == []
    assert found.unverified == {OwnerKind.KPROBE: 7}


def with_detour(fake: FakeTarget) -> bytearray:
    """An optimised probe on `push %rbp; mov 0x1234(%rip), %rax`; its detour is returned."""
    at, structure = fake.address("other_function"), fake.scratch(1)
    original = b"\x55\x48\x8b\x05" + struct.pack("<i", 0x1234)
    probe(fake, 1, fake.address("aggr_pre_handler"))
    fake.write(at, branch(0xE9, at, CODE) + original[5:])
    link = structure + OFFSETS["kprobe.list"]
    fake.write(link, pack(link, link))
    fake.write(structure + OFFSETS["kprobe.opcode"], original[:1])
    fake.write(structure + OFFSETS["kprobe.flags"], struct.pack("<I", 4))
    fake.write(structure + OFFSETS["optimized_kprobe.optinsn.copied_insn"], original[1:5])
    fake.write(structure + OFFSETS["optimized_kprobe.optinsn.insn"], pack(CODE, len(original)))
    page = fake.scratch(2)
    fake.list("kprobe_optinsn_slots", [page], OFFSETS["kprobe_insn_cache.pages"])
    fake.write(page + OFFSETS["kprobe_insn_page.insns"], pack(CODE))
    template = bytearray(range(0x30))
    start = SYMBOLS["optprobe_template_entry"]
    fake.image[start : start + 0x30] = template
    template[0x10:0x1A] = b"\x48\xbf" + pack(structure)
    template[0x1A:0x1F] = branch(0xE8, CODE + 0x1A, fake.address("optimized_callback"))
    moved = struct.pack("<i", 0x1234 + at - CODE - 0x30)
    end = CODE + 0x30 + len(original)
    return template + original[:4] + moved + branch(0xE9, end, at + len(original))


def test_an_optimised_probe(fake: FakeTarget) -> None:
    code(fake, CODE, bytes(with_detour(fake)))
    found = check(fake)
    assert kinds(found) == []
    assert not found.unverified


def test_an_optimised_probe_with_access_prevention(fake: FakeTarget) -> None:
    detour = with_detour(fake)
    detour[4:7] = b"\x0f\x01\xca"
    code(fake, CODE, bytes(detour))
    assert kinds(check(fake)) == [ProblemKind.GENERATED_CODE]
    words = OFFSETS["cpuinfo_x86.x86_capability"] + 4 * 9
    fake.put("boot_cpu_data", struct.pack("<I", 1 << 20), words)
    assert kinds(check(fake)) == []


@pytest.mark.parametrize("offset", [0, 0x12, 0x1B, 0x2F, 0x30, 0x33, 0x37, 0x38, 0x3C])
def test_a_tampered_detour(fake: FakeTarget, offset: int) -> None:
    detour = with_detour(fake)
    detour[offset] ^= 0x40
    code(fake, CODE, bytes(detour))
    assert kinds(check(fake)) == [ProblemKind.GENERATED_CODE]


@pytest.mark.parametrize("offset", range(12))
def test_a_tampered_slot(fake: FakeTarget, offset: int) -> None:
    slot = with_kprobe(fake)
    slot[offset] ^= 0x40
    code(fake, CODE, bytes(slot))
    assert kinds(check(fake)) == [ProblemKind.GENERATED_CODE]


def test_a_handler_in_no_function(fake: FakeTarget) -> None:
    probe(fake, 1, CODE)
    assert kinds(check(fake)) == [ProblemKind.HANDLER]


def with_bpf(fake: FakeTarget) -> bytearray:
    """A pack with one program in three chunks; its pages are returned."""
    area, symbol = fake.scratch(1), fake.scratch(2)
    fake.write(area + OFFSETS["bpf_prog_pack.bitmap"], pack(0b111 << 4))
    fake.list("pack_list", [area])
    fake.write(area + OFFSETS["bpf_prog_pack.ptr"], pack(PACK))
    fake.write(symbol, pack(PACK + 0x108, PACK + 0x178) + b"bpf_prog_1\0")
    fake.list("bpf_kallsyms", [symbol + OFFSETS["bpf_ksym.lnode"]])
    data = bytearray(b"\xcc" * 0x4000)
    data[0x100:0x1C0] = bytes(range(0xC0))
    return data


def test_a_pack(fake: FakeTarget) -> None:
    code(fake, PACK, bytes(with_bpf(fake)))
    found = check(fake)
    assert kinds(found) == []
    assert found.unverified == {OwnerKind.BPF: 0xC0}


@pytest.mark.parametrize("offset", [0, 0xFF, 0x1C0, 0x3FFF])
def test_code_between_programs(fake: FakeTarget, offset: int) -> None:
    data = with_bpf(fake)
    data[offset] = 0x90
    code(fake, PACK, bytes(data))
    assert kinds(check(fake)) == [ProblemKind.GENERATED_CODE]


def test_a_program_of_absurd_size_owns_nothing(fake: FakeTarget) -> None:
    symbol = fake.scratch(2)
    fake.write(symbol, pack(CODE, (1 << 64) - 1) + b"all\0")
    fake.list("bpf_kallsyms", [symbol + OFFSETS["bpf_ksym.lnode"]])
    code(fake, CODE, bytes(PAGE_SIZE))
    assert sorted(kinds(check(fake))) == [ProblemKind.IMPLAUSIBLE, ProblemKind.ORPHAN_CODE]


def with_blob(fake: FakeTarget) -> bytearray:
    """A real-mode trampoline in the package; its bytes in memory are returned."""
    base, size = 0x9_A000, 0x2000
    blob = bytearray(np.random.default_rng(1).bytes(size))
    blob[:8] = struct.pack("<II", 0x1000, 0x2000)
    blob[0x1010:0x1014] = struct.pack("<I", 0x1100)
    start, table = SYMBOLS["real_mode_blob"], SYMBOLS["real_mode_relocs"]
    fake.image[start : start + size] = blob
    relocations = struct.pack("<II", 1, 0x1020) + struct.pack("<IIII", 3, 0, 4, 0x1010)
    fake.image[table : table + len(relocations)] = relocations
    blob[:8] = struct.pack("<II", base + 0x1000, base + 0x2000)
    blob[0x1010:0x1014] = struct.pack("<I", base + 0x1100)
    blob[0x1020:0x1022] = struct.pack("<H", base >> 4)
    return blob


def test_the_real_mode_trampoline(fake: FakeTarget) -> None:
    fake.memory.write(0x9_A000, bytes(with_blob(fake)))
    assert kinds(check(fake)) == []


@pytest.mark.parametrize("offset", [0x1000, 0x1010, 0x1021, 0x1FFF])
def test_a_tampered_real_mode_trampoline(fake: FakeTarget, offset: int) -> None:
    blob = with_blob(fake)
    blob[offset] ^= 1
    fake.memory.write(0x9_A000, bytes(blob))
    assert kinds(check(fake)) == [ProblemKind.GENERATED_CODE]


def test_a_package_with_absurd_relocations(fake: FakeTarget) -> None:
    """Nothing can be compared, but the owner is known."""
    blob = with_blob(fake)
    table = SYMBOLS["real_mode_relocs"]
    fake.image[table : table + 4] = b"\xff" * 4
    fake.memory.write(0x9_A000, bytes(blob))
    assert kinds(check(fake)) == []


@pytest.mark.parametrize("span", [(0x1000, 0), (0, 0xFFFF_FFFF), (0xFFFF_FFFF, 0x1000)])
def test_a_real_mode_header_of_noise(fake: FakeTarget, span: tuple[int, int]) -> None:
    fake.memory.write(0x9_A000, struct.pack("<II", *span))
    found = sorted(kinds(check(fake)))
    assert found == [ProblemKind.IMPLAUSIBLE, ProblemKind.ORPHAN_CODE]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["pointers", "words"]))
def test_noise_is_never_an_exception(
    tmp_path_factory: pytest.TempPathFactory, seed: int, kind: str
) -> None:
    fake = FakeTarget(Memory(tmp_path_factory.mktemp("noise") / "ram", 64 * MIB))
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << 64, 512 * 64, dtype=np.uint64)
    if kind == "pointers":
        words = np.uint64(fake.scratch(0)) + words % np.uint64(32 << 12)
    start = fake.address("idt_table")
    fake.write(start, words[: (fake.scratch(0) - start) // 8].tobytes())
    fake.write(fake.scratch(0), words.tobytes())
    with fake.memory.source() as source:
        target = fake.target(source)
        structures = read_structures(target)
        walked = walk_kernel(source, fake.kernel.image)
        found = check_invariants(target.with_modules(structures.modules), structures, walked)
    assert found.problems_total
