"""BTF: a real kernel's against facts from elsewhere, and hand-made and damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from package_files import BtfMaker, edited, one_line

from pyscan.errors import PackageError
from pyscan.kernel.types import Types
from pyscan.package.bzimage import kernel_payload
from pyscan.package.elf import Elf

EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=6)


@pytest.fixture(scope="module")
def vmlinux(guest_dir: Path) -> Elf:
    return Elf(kernel_payload((guest_dir / "vmlinuz").read_bytes()), "vmlinux")


@pytest.fixture(scope="module")
def real(vmlinux: Elf) -> Types:
    section = vmlinux.section(".BTF")
    assert section is not None
    return Types(vmlinux.content(section))


def test_struct_module_as_a_module_has_it(real: Types, guest_dir: Path) -> None:
    """A module file holds its own struct module: size, name, and two pointers by relocation."""
    elf = Elf((guest_dir / "tamper.ko").read_bytes(), "tamper.ko")
    section = elf.section(".gnu.linkonce.this_module")
    relocations = elf.section(".rela.gnu.linkonce.this_module")
    assert section is not None
    assert relocations is not None
    assert real.size("module") == section.size
    name = real.offset("module.name")
    assert bytes(elf.content(section)[name : name + 7]) == b"tamper\0"
    names = elf.symbol_names()
    places = {
        names[info >> 32]: offset for offset, info, _ in elf.relocations(relocations).tolist()
    }
    assert places["init_module"] == real.offset("module.init")
    assert places["cleanup_module"] == real.offset("module.exit")


def test_layouts_of_the_architecture(real: Types) -> None:
    """Sizes that the processor or the source files fix."""
    assert real.size("list_head") == 16
    assert real.offset("list_head.prev") == 8
    assert real.size("pt_regs") == 21 * 8
    assert real.offset("pt_regs.ip") == 16 * 8
    assert real.size("gate_struct") == 16
    assert real.size("jump_entry") == 16
    assert real.size("static_call_site") == 8
    assert real.size("exception_table_entry") == 12
    assert real.size("kernel_symbol") == 12
    assert real.size("pgd_t") == 8  # a typedef
    assert real.size("list_head.next") == 8  # a pointer
    assert real.size("task_struct.comm") == 16  # TASK_COMM_LEN
    assert real.offset("task_struct.thread_info") == 0
    assert real.offset("static_key.enabled") == 0


def test_paths_of_the_real_kernel(real: Types) -> None:
    """What the validation of a kernel asks for."""
    base = real.offset("module.core_layout")
    assert real.offset("module.core_layout.base") == base
    assert real.offset("module.core_layout.size") == base + 8
    assert real.offset("module.core_layout.text_size") == base + 12
    assert real.offset("module.core_layout.ro_size") == base + 16
    assert not real.has("module.mem")
    for path in (
        "task_struct.mm",
        "task_struct.tasks",
        "mm_struct.pgd",  # inside an anonymous struct
        "ftrace_ops.func",
        "ftrace_ops.trampoline",
        "ftrace_ops.next",
        "kprobe.opcode",
        "optimized_kprobe.optinsn.insn",
        "kprobe_insn_cache.pages",
        "bpf_ksym.start",
        "security_hook_list.hook",
        "cpuinfo_x86.x86_capability",
        "idt_data.addr",
        "static_key.entries",
        "static_call_key.func",
    ):
        assert real.has(path), path
        assert 0 <= real.offset(path) < real.size(path.split(".")[0])
    # arch/x86/include/asm/cpufeatures.h: NCAPINTS + NBUGINTS words of 32 bits.
    assert real.size("cpuinfo_x86.x86_capability") % 4 == 0
    assert real.enum("module_state") == {
        "MODULE_STATE_LIVE": 0,
        "MODULE_STATE_COMING": 1,
        "MODULE_STATE_GOING": 2,
        "MODULE_STATE_UNFORMED": 3,
    }


def made() -> BtfMaker:
    """Types with every way to nest one in another."""
    make = BtfMaker()
    number = make.add(1, "int", 4, body=struct.pack("<I", 0x0100_0020))  # 1
    pointer = make.add(2, size=8)  # 2: to 8, which stands below
    inner = make.struct("", 8, ("first", number, 0), ("second", number, 32))  # 3
    union = make.struct("", 8, ("whole", pointer, 0), ("", inner, 0), kind=5)  # 4
    array = make.array(7, 3)  # 5
    const = make.add(10, size=array)  # 6
    leaf = make.struct("leaf", 12, ("a", number, 0), ("b", number, 64))  # 7
    typedef = make.add(8, "leaf_t", leaf)  # 8
    make.struct(
        "outer",
        80,
        ("head", number, 0),
        ("", union, 64),
        ("leaves", const, 128),
        ("named", typedef, 512),
    )  # 9
    make.struct("bits", 8, ("low", number, 4 << 24), ("word", number, 32), flag=True)  # 10
    body = struct.pack("<IiIi", make.name("RED"), -1, make.name("B"), 7)
    make.add(6, "color", 4, 2, flag=True, body=body)
    body = struct.pack("<III", make.name("HUGE"), 1, 0x8000_0000)
    make.add(19, "wide", 8, 1, body=body)
    make.struct("twice", 4, ("x", number, 0))
    make.struct("twice", 8, ("x", number, 0), ("y", number, 32))
    make.struct("differs", 4, ("x", number, 0))
    make.struct("differs", 8, ("x", number, 32))
    make.add(7, "unknown")
    make.add(8, "unknown_t", make.count)
    return make


def test_made_layouts() -> None:
    types = Types(made().blob())
    assert types.offset("outer") == 0
    assert types.offset("outer.head") == 0
    assert types.offset("outer.whole") == 8
    assert types.offset("outer.second") == 12
    assert types.offset("outer.leaves") == 16
    assert types.offset("outer.leaves.b") == 24
    assert types.offset("outer.leaves[2].b") == 16 + 2 * 12 + 8
    assert types.offset("outer.named.b") == 72
    assert types.offset("leaf_t.b") == 8
    assert types.offset("bits.word") == 4
    assert types.size("outer") == 80
    assert types.size("outer.leaves") == 36
    assert types.size("outer.leaves[1]") == 12
    assert types.size("outer.whole") == 8
    assert types.size("leaf_t") == 12
    assert types.size("color") == 4
    assert types.size("int") == 4
    assert types.enum("color") == {"RED": -1, "B": 7}
    assert types.enum("wide") == {"HUGE": 1 << 63 | 1}


def test_types_of_one_name() -> None:
    types = Types(made().blob())
    assert types.offset("twice.x") == 0
    assert types.offset("twice.y") == 4
    for ask in (lambda: types.size("twice"), lambda: types.offset("differs.x")):
        with pytest.raises(PackageError, match="means several things"):
            ask()
    assert not types.has("differs.x")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("absent", "no type absent"),
        ("outer.absent", "no member absent"),
        ("outer.whole.a", "a ptr has no members"),
        ("outer.head.a", "a int has no members"),
        ("outer.leaves[3]", "3 elements"),
        ("outer.head[1]", "only arrays"),
        ("leaf[1].a", "no type leaf"),
        ("bits.low", "bit field"),
        ("unknown_t.a", "a fwd has no members"),
        ("", "no path"),
        ("outer.", "no path"),
        ("outer..head", "no path"),
        ("outer.\u0661", "no path"),
        ("outer.leaves[-1]", "no path"),
        ("a." * 100 + "a", "no path"),
    ],
)
def test_wrong_paths(path: str, reason: str) -> None:
    types = Types(made().blob())
    with pytest.raises(PackageError, match=reason):
        types.offset(path)
    assert not types.has(path)


def test_no_size_and_no_enum() -> None:
    types = Types(made().blob())
    with pytest.raises(PackageError, match="a fwd has no size"):
        types.size("unknown_t")
    for name in ("leaf", "absent", ""):
        with pytest.raises(PackageError, match="no enum"):
            types.enum(name)


def test_cycles_end() -> None:
    make = BtfMaker()
    make.add(8, "a", 2)
    make.add(8, "b", 1)
    make.struct("s", 8, ("", 4, 0), ("", 5, 0))
    make.struct("", 8, ("", 5, 0), ("", 4, 0), ("", 3, 0))
    make.struct("", 8, ("", 4, 0), ("", 5, 0), ("", 4, 0))
    make.array(6, 2)  # of itself
    make.add(8, "t", 6)
    types = Types(make.blob())
    for path in ("a", "t", "s.x", "t.x", "a.x"):
        with pytest.raises(PackageError):
            types.size(path)


def test_anonymous_members_that_multiply() -> None:
    """40 levels of two members each: 2^40 ways to the same types."""
    make = BtfMaker()
    for level in range(40):
        make.struct("top" if level == 0 else "", 8, ("", level + 2, 0), ("", level + 2, 0))
    make.struct("", 8, ("x", 42, 0))
    make.add(1, "int", 4, body=bytes(4))
    types = Types(make.blob())
    assert types.offset("top.x") == 0
    assert not types.has("top.y")


def test_arrays_that_multiply() -> None:
    make = BtfMaker()
    for level in range(30):
        make.array(level + 2, (1 << 32) - 1)
    make.add(1, "int", 4, body=bytes(4))
    make.add(8, "t", 1)
    assert Types(make.blob()).size("t") < 1 << 64


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, b"\xeb\x9f"),
        (2, b"\2"),
        (4, b"\x17"),
        (4, b"\xff\xff\xff\xff"),
        (8, b"\xff\xff\xff\xff"),
        (12, b"\xff\xff\xff\x7f"),
        (12, b"\x05"),
        (16, b"\x01"),
        (20, b"\x01"),
        (20, b"\0\0\0\0"),
        (24, b"\xff\xff\xff\x7f"),
        (31, b"\x1f"),
        (31, b"\x00"),
    ],
)
def test_damaged_headers(place: int, value: bytes) -> None:
    blob = bytearray(made().blob())
    blob[place : place + len(value)] = value
    with pytest.raises(PackageError, match=r"\.BTF"):
        Types(bytes(blob))


@pytest.mark.parametrize("size", [0, 1, 23, 24, 100])
def test_truncated(size: int) -> None:
    with pytest.raises(PackageError, match="damaged"):
        Types(made().blob()[:size])


PATHS = ["outer.leaves[1].b", "outer.second", "outer.named.a", "leaf_t", "bits.word", "twice.y"]


@settings(max_examples=400, deadline=None)
@given(edits=EDITS, cut=st.floats(0.9, 1), path=st.sampled_from(PATHS))
def test_any_damage(edits: list[tuple[float, bytes]], cut: float, path: str) -> None:
    try:
        types = Types(edited(made().blob(), edits, cut))
        types.has(path)
        types.enum("color")
        types.size(path)
    except PackageError as error:
        one_line(error)
