"""Reading the kernel's objects: healthy ones, and those that an attacker wrote."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_kernel import MIB
from fake_target import LINK, MODULES, OFFSETS, SYMBOLS, FakeTarget, pack
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import Memory

from pyscan.errors import ApprovedFileError
from pyscan.records import PageStatus
from pyscan.sources.layers import FaultSource
from pyscan.validate.context import Target
from pyscan.validate.objects import PATHS, Structures, read_structures
from pyscan.validate.problem import PROBLEMS_MAX, ProblemKind, Problems

WILD = 0x1122_3344_5566_7788


@pytest.fixture
def fake(tmp_path: Path) -> FakeTarget:
    return FakeTarget(Memory(tmp_path / "ram", 64 * MIB))


@pytest.fixture
def read(fake: FakeTarget) -> Iterator[Callable[[], Structures]]:
    with fake.memory.source() as source:
        yield lambda: read_structures(fake.target(source))


def module(fake: FakeTarget, number: int, name: bytes = b"ext4\0") -> int:
    """A struct module; its list node is returned."""
    base = fake.scratch(number)
    fake.write(base + OFFSETS["module.name"], name)
    layout = struct.pack("<QIII", MODULES + number * 0x10_0000, 0x5000, 0x2000, 0x3000)
    fake.write(base + OFFSETS["module.core_layout.base"], layout)
    fake.write(base + OFFSETS["module.init"], pack(0xFFFF_FFFF_C0F0_0000))
    return base + OFFSETS["module.list"]


def process(fake: FakeTarget, number: int, pgd: int, name: bytes = b"init\0") -> int:
    """A task with an address space; its list node is returned."""
    task, space = fake.scratch(number), fake.scratch(number) + 0x800
    fake.write(task + OFFSETS["task_struct.mm"], pack(space))
    fake.write(task + OFFSETS["task_struct.pid"], struct.pack("<I", number))
    fake.write(task + OFFSETS["task_struct.comm"], name)
    fake.write(space + OFFSETS["mm_struct.pgd"], pack(pgd))
    return task + OFFSETS["task_struct.tasks"]


def link_tasks(fake: FakeTarget, nodes: list[int]) -> None:
    ring = [fake.address("init_task") + OFFSETS["task_struct.tasks"], *nodes]
    for index, node in enumerate(ring):
        fake.write(node, pack(ring[(index + 1) % len(ring)], ring[index - 1]))


def probe(fake: FakeTarget, number: int, handler: int, bucket: int = 0) -> int:
    """A struct kprobe, the only one of its bucket."""
    address, head = fake.scratch(number), fake.address("kprobe_table") + 8 * bucket
    fake.write(head, pack(address))
    fake.write(address, pack(0, head))
    fake.write(address + OFFSETS["kprobe.addr"], pack(fake.address("other_function")))
    fake.write(address + OFFSETS["kprobe.pre_handler"], pack(handler))
    return address


def test_the_healthy_kernel_has_nothing(read: Callable[[], Structures]) -> None:
    found = read()
    assert not found.problems.kept
    assert (found.modules, found.ftrace, found.kprobes, found.bpf, found.packs) == ((),) * 5
    assert found.tasks == 0


def test_all_paths_are_known() -> None:
    assert set(PATHS) <= set(OFFSETS)


def test_modules(fake: FakeTarget, read: Callable[[], Structures]) -> None:
    fake.list("modules", [module(fake, 1), module(fake, 2, b"virtio_net\0")])
    found = read()
    assert not found.problems.kept
    assert [each.name for each in found.modules] == ["ext4", "virtio_net"]
    first = found.modules[0]
    assert (first.base, first.size, first.text_size, first.ro_size) == (
        MODULES + 0x10_0000,
        0x5000,
        0x2000,
        0x3000,
    )
    assert (first.address, first.init) == (fake.scratch(1), 0xFFFF_FFFF_C0F0_0000)


def test_a_name_without_end(fake: FakeTarget, read: Callable[[], Structures]) -> None:
    fake.list("modules", [module(fake, 1, b"a" * 56), module(fake, 2)])
    found = read()
    assert [each.name for each in found.modules] == ["ext4"]
    assert [each.kind for each in found.problems.kept] == [ProblemKind.WILD_POINTER]


@pytest.mark.parametrize(
    "layout", [(MODULES + 1, 1, 1, 1), (MODULES, 0, 0x1000, 0), (MODULES, 0x1000, 0x2000, 0x1000)]
)
def test_a_layout_that_cannot_be(
    fake: FakeTarget, read: Callable[[], Structures], layout: tuple[int, ...]
) -> None:
    node = module(fake, 1)
    place = fake.scratch(1) + OFFSETS["module.core_layout.base"]
    fake.write(place, struct.pack("<QIII", *layout))
    fake.list("modules", [node])
    assert [each.kind for each in read().problems.kept] == [ProblemKind.IMPLAUSIBLE]


def test_ftrace(fake: FakeTarget, read: Callable[[], Structures]) -> None:
    ops = fake.scratch(1)
    fake.put("ftrace_ops_list", pack(ops))
    words = pack(fake.address("kernel_function"), fake.address("ftrace_list_end"), 0x200, 7, 9)
    fake.write(ops, words)
    found = read()
    assert not found.problems.kept
    assert [(each.address, each.flags, each.trampoline) for each in found.ftrace] == [
        (ops, 0x200, 7)
    ]


def test_kprobes(fake: FakeTarget, read: Callable[[], Structures]) -> None:
    plain = probe(fake, 1, fake.address("kernel_function"))
    shared = probe(fake, 2, fake.address("aggr_pre_handler"), bucket=63)
    member = fake.scratch(3)
    link = OFFSETS["kprobe.list"]
    for node, other in ((shared + link, member + link), (member + link, shared + link)):
        fake.write(node, pack(other, other))
    fake.write(member + OFFSETS["kprobe.pre_handler"], pack(fake.address("kernel_function")))
    fake.write(shared + OFFSETS["optimized_kprobe.optinsn.copied_insn"], b"\1\2\3\4")
    fake.write(shared + OFFSETS["optimized_kprobe.optinsn.insn"], pack(MODULES, 5))
    found = read()
    assert not found.problems.kept
    first, second = found.kprobes
    assert (first.structure, first.members, first.optimized_slot) == (plain, (), 0)
    assert second.members == (fake.address("kernel_function"),)
    assert (second.optimized_slot, second.optimized_size) == (MODULES, 5)
    assert second.saved == b"\1\2\3\4"


def test_slots_and_bpf(fake: FakeTarget, read: Callable[[], Structures]) -> None:
    page, symbol, area = fake.scratch(1), fake.scratch(2), fake.scratch(3)
    fake.list("kprobe_insn_slots", [page], OFFSETS["kprobe_insn_cache.pages"])
    fake.write(page + OFFSETS["kprobe_insn_page.insns"], pack(MODULES))
    fake.write(symbol, pack(MODULES + 0x1048, MODULES + 0x1100) + b"bpf_prog_1\0")
    fake.write(symbol + OFFSETS["bpf_ksym.prog"], b"\1")
    fake.list("bpf_kallsyms", [symbol + OFFSETS["bpf_ksym.lnode"]])
    fake.list("pack_list", [area])
    fake.write(area + OFFSETS["bpf_prog_pack.ptr"], pack(MODULES + 0x1000))
    found = read()
    assert not found.problems.kept
    assert [(each.address, each.cache) for each in found.slot_pages] == [
        (MODULES, "kprobe_insn_slots")
    ]
    assert [(each.name, each.program) for each in found.bpf] == [("bpf_prog_1", True)]
    assert [(each.start, each.size) for each in found.packs] == [(MODULES + 0x1000, 2 << 20)]


def test_roots_are_named_once(fake: FakeTarget, read: Callable[[], Structures]) -> None:
    nodes = [process(fake, 1, 0xFFFF_8880_0000_1000), process(fake, 2, 0xFFFF_8880_0000_1000)]
    thread = fake.scratch(3) + OFFSETS["task_struct.tasks"]  # of the kernel: no mm
    link_tasks(fake, [*nodes, thread])
    found = read()
    assert not found.problems.kept
    assert found.tasks == 3
    assert {root.address for root in found.roots} == {0xFFFF_8880_0000_1000}


def test_wild_address_spaces(fake: FakeTarget, read: Callable[[], Structures]) -> None:
    link_tasks(fake, [process(fake, 1, 1), process(fake, 2, 2)])
    fake.write(fake.scratch(2) + OFFSETS["task_struct.mm"], pack(WILD))
    found = read()
    assert [each.kind for each in found.problems.kept] == [ProblemKind.WILD_POINTER]
    assert [root.address for root in found.roots] == [1]


def test_unreadable_leads_to_undecided(fake: FakeTarget) -> None:
    fake.list("modules", [module(fake, 1)])
    frame = fake.gpa(fake.scratch(1)) >> 12
    with FaultSource(fake.memory.source(), {frame: PageStatus.LINK_DOWN}) as source:
        found = read_structures(fake.target(source))
    assert [each.kind for each in found.problems.kept] == [ProblemKind.UNREADABLE]
    assert found.problems.kept[0].undecided


def test_problems_are_bounded() -> None:
    problems = Problems()
    for number in range(PROBLEMS_MAX + 5):
        problems.add(ProblemKind.IMPLAUSIBLE, number, "here", "why")
    assert (len(problems.kept), problems.total) == (PROBLEMS_MAX, PROBLEMS_MAX + 5)
    other = Problems()
    other.merge(problems)
    assert other.total == PROBLEMS_MAX + 5


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["pointers", "words"]))
def test_noise_is_never_an_exception(
    tmp_path_factory: pytest.TempPathFactory, seed: int, kind: str
) -> None:
    """All variables and all that they point to are noise."""
    fake = FakeTarget(Memory(tmp_path_factory.mktemp("noise") / "ram", 64 * MIB))
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << 64, 512 * 64, dtype=np.uint64)
    if kind == "pointers":
        words = np.uint64(fake.scratch(0)) + words % np.uint64(32 << 12)
    start = fake.address("modules")
    fake.write(start, words[: (fake.scratch(0) - start) // 8].tobytes())
    fake.write(fake.scratch(0), words.tobytes())
    with fake.memory.source() as source:
        found = read_structures(fake.target(source))
    assert found.problems.total


# The context


@pytest.fixture
def target(fake: FakeTarget) -> Iterator[Target]:
    with fake.memory.source() as source:
        yield fake.target(source)


def test_addresses(fake: FakeTarget, target: Target) -> None:
    assert target.slide == fake.kernel.virtual - LINK
    assert target.address("idt_table") == fake.address("idt_table")
    assert target.link_address("idt_table") == LINK + SYMBOLS["idt_table"]
    assert target.has("idt_table")
    assert not target.has("nothing")
    with pytest.raises(ApprovedFileError, match="no symbol nothing"):
        target.address("nothing")
    with pytest.raises(ApprovedFileError, match=r"no offset of task_struct\.nothing"):
        target.offset("task_struct.nothing")


def test_places(fake: FakeTarget, target: Target) -> None:
    assert target.place(fake.address("kernel_function") + 5) == "vmlinux kernel_function+0x5"
    assert target.place(0x1234) == "0x1234"
    assert target.place(WILD) == f"{WILD:#x}"


def test_functions(fake: FakeTarget, target: Target) -> None:
    assert target.is_function(fake.address("kernel_function"))
    assert not target.is_function(fake.address("kernel_function") + 1)
    assert not target.is_function(fake.address("idt_table"))
    assert not target.is_function(-1)
    more = target.with_functions(MODULES, np.array([0x10], dtype=np.uint64))
    assert more.is_function(MODULES + 0x10)
    assert more.is_function(fake.address("kernel_function"))
    assert not target.is_function(MODULES + 0x10)


def test_packaged_bytes_are_relocated(fake: FakeTarget, target: Target) -> None:
    row = target.packaged(target.symbol("def_idts"), 24)
    assert row is not None
    assert row[16:] == pack(fake.address("asm_exc_page_fault"))
    assert target.packaged(SYMBOLS["scratch"], 8) is None
    assert target.packaged(-8, 8) is None
