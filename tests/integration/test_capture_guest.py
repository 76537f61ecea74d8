"""A capture of a real guest, opened with tools that know nothing of pyscan."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pyscan.evidence import CaptureWriter, EvidenceLog, verify_directory
from pyscan.keys import KeyRing, SigningKey
from pyscan.lab.guest import Guest
from pyscan.qmp import query
from pyscan.records import PAGE_SHIFT, PAGE_SIZE

pytestmark = pytest.mark.guest

BootGuest = Callable[..., Guest]
KEY = SigningKey.generate()
MIB = 1 << 20


def run(*command: object) -> str:
    """The output of another program."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True, timeout=120
    )
    print(done.args, done.stdout, done.stderr, sep="\n")
    return done.stdout


def test_a_dump_opens_in_gdb_and_readelf(boot_guest: BootGuest, tmp_path: Path) -> None:
    guest = boot_guest(memory_mib=256)
    version = guest.shell("cat /proc/version").strip()
    code = int(guest.shell("grep 'Kernel code' /proc/iomem").split("-")[0], 16)
    banner = code + guest.symbol("linux_banner") - guest.symbol("_text")
    text_frame = guest.text_physical() >> PAGE_SHIFT

    dump = tmp_path / "dump"
    _, _, registers = query(
        guest.lab_qmp,
        [
            ("stop", None),
            ("dump-guest-memory", {"paging": False, "protocol": f"file:{dump}", "format": "elf"}),
            ("human-monitor-command", {"command-line": "info registers"}),
        ],
        timeout_s=60,
    )
    directory = tmp_path / "captures" / "one"
    with EvidenceLog.open(tmp_path / "log", KEY, "host-7") as log:
        writer = CaptureWriter(directory, {"vm": guest.uuid})
        writer.add_file("memory.elf", dump)
        assert writer.add_pages("memory.elf", [text_frame, banner >> PAGE_SHIFT, 1 << 40]) == [
            1 << 40
        ]
        writer.finish(KEY, "host-7", log)
    summary = verify_directory(tmp_path, KeyRing.of({"host-7": KEY.public}))
    assert summary.captures[0].bytes_total > guest.options.memory_mib * MIB
    memory = directory / "memory.elf"

    # GDB finds the kernel's banner at its physical address, and the processor where QEMU has it.
    shown = run(
        *("gdb", "-nx", "-batch", "-ex", "set print elements 0", "-ex", f"core-file {memory}"),
        *("-ex", f"x/s {banner:#x}", "-ex", "print/x $rip"),
    )
    assert f'"{version}\\n"' in shown
    match = re.search(r"RIP=([0-9a-f]+)", str(registers))
    assert match is not None
    assert f"$1 = {int(match[1], 16):#x}" in shown

    # readelf lists all memory, at its physical addresses.
    segments = [
        [int(number, 16) for number in re.findall(r"0x[0-9a-f]+", line)]
        for line in run("readelf", "-lW", memory).splitlines()
        if line.strip().startswith("LOAD")
    ]
    inside = [each for each in segments if each[2] <= banner < each[2] + each[3]]
    assert len(inside) == 1
    assert sum(each[3] for each in segments) >= guest.options.memory_mib * MIB
    assert "NT_PRSTATUS" in run("readelf", "-nW", memory)

    # The pages that were taken out are those that the guest has, as another reader sees them.
    for frame in (text_frame, banner >> PAGE_SHIFT):
        page = (directory / "pages" / f"{frame:#x}").read_bytes()
        assert page == guest.ram.read(frame << PAGE_SHIFT, PAGE_SIZE)
        assert len(set(page)) > 16
        with memory.open("rb") as file:
            offset, _, physical = next(
                each[:3] for each in segments if each[2] <= frame << PAGE_SHIFT < each[2] + each[3]
            )
            file.seek(offset + (frame << PAGE_SHIFT) - physical)
            assert hashlib.sha256(file.read(PAGE_SIZE)).digest() == hashlib.sha256(page).digest()
    memory.unlink()  # large; pytest keeps directories
