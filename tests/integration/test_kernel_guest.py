"""Discovery in a real guest, compared with what the guest says of itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pyscan.kernel import EXECUTABLE, KernelImage, check_root, find_kernel, place, watched_pages
from pyscan.lab.guest import Guest
from pyscan.lab.ram import Machine
from pyscan.qmp import query
from pyscan.records import PAGE_SIZE
from pyscan.sources import Source, build_uri, open_source
from pyscan.translate import X86_64, translate

pytestmark = pytest.mark.guest

BootGuest = Callable[..., Guest]


def truth(guest: Guest) -> tuple[int, int, int, int]:
    """Top-level table, paging levels, virtual and physical base, as the guest says."""
    text = guest.symbol("_text")
    code = int(guest.shell("grep 'Kernel code' /proc/iomem").split("-")[0], 16)
    levels = 5 if "la57" in guest.shell("grep -m 1 ^flags /proc/cpuinfo").split() else 4
    return guest.symbol("init_top_pgt") - text + code, levels, text, code


def found(kernel: KernelImage) -> tuple[int, int, int, int]:
    return kernel.root_gpa, kernel.paging_levels, kernel.virtual_base, kernel.physical_base


def assert_watched(guest: Guest, source: Source, kernel: KernelImage) -> None:
    """All text and read-only data is watched, with the right rights and frames."""
    watched = watched_pages(source, kernel)
    assert watched.anomalies == ()
    rights = dict(zip(watched.addresses.tolist(), watched.flags.tolist(), strict=True))
    frames = dict(zip(watched.addresses.tolist(), watched.frames.tolist(), strict=True))
    for first, last, flags in (
        ("_text", "_etext", EXECUTABLE),
        ("__start_rodata", "__end_rodata", 0),
    ):
        for address in range(guest.symbol(first), guest.symbol(last), PAGE_SIZE):
            assert rights[address] == flags
            expected = (address - kernel.virtual_base + kernel.physical_base) // PAGE_SIZE
            assert frames[address] == expected
    assert guest.symbol("init_top_pgt") not in rights
    for line in guest.shell("cat /proc/modules").splitlines():
        address = int(line.split()[5], 16)
        assert rights[address] == EXECUTABLE
        assert place(address, rights[address], kernel).startswith("module text +0x")
        form = X86_64[kernel.paging_levels]
        gpa = translate(source, kernel.root_gpa, form, address + 5).gpa
        assert gpa == frames[address] * PAGE_SIZE + 5


def examine(guest: Guest, uri: str) -> None:
    with open_source(uri) as source:
        kernel = find_kernel(source)
        assert found(kernel) == truth(guest)
        assert guest.symbol("_end") - kernel.virtual_base <= kernel.image_bytes
        assert check_root(source, kernel.root_gpa, kernel.paging_levels) == kernel
        assert_watched(guest, source, kernel)


def test_in_a_running_guest(shared_guest: Guest) -> None:
    examine(shared_guest, build_uri("qemu", shared_guest.monitor_qmp))


@pytest.mark.parametrize(
    "options",
    [
        {"machine": Machine.PC, "cpu_model": "max,la57=off", "memory_mib": 5120},
        {"machine": Machine.Q35, "cpu_model": "max", "memory_mib": 5120, "cpus": 2},
        {"machine": Machine.Q35, "cpu_model": "qemu64", "append": "pti=on nokaslr"},
    ],
    ids=["pc-4-level-5G", "q35-5-level-5G", "isolated-nokaslr"],
)
def test_in_other_machines(boot_guest: BootGuest, options: dict[str, object]) -> None:
    examine_guest = boot_guest(**options)
    examine(examine_guest, build_uri("qemu", examine_guest.monitor_qmp))
    isolated = "pti" in examine_guest.shell("grep -m 1 ^flags /proc/cpuinfo").split()
    assert isolated == ("pti=on" in str(options.get("append")))


def test_in_an_image_of_its_memory(shared_guest: Guest, tmp_path: Path) -> None:
    """A plain file: no QEMU to ask, and no holes."""
    image = tmp_path / "memory image.raw"
    shutil.copyfile(shared_guest.ram_file, image)
    size = shared_guest.options.memory_mib
    examine(shared_guest, build_uri("file", image, machine="q35", size=f"{size}M"))


def test_after_reboots_it_is_the_running_kernel(boot_guest: BootGuest) -> None:
    """Earlier kernels stay in memory, intact; they must not be taken for the running one."""
    guest = boot_guest(cpu_model="max,la57=off", extra=("-action", "reboot=reset"))
    uri = build_uri("qemu", guest.monitor_qmp)
    for _ in range(2):
        with open_source(uri) as source:
            before = find_kernel(source)
        assert found(before) == truth(guest)
        query(guest.lab_qmp, [("system_reset", None)])
        guest.wait_ready()
    with open_source(uri) as source:
        after = find_kernel(source)
    assert found(after) == truth(guest)
    assert after != before  # KASLR has moved it, so the test did something
