"""The laboratory's guest: a real kernel, a card on its bus, and an attacker that really writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyscan.errors import DriverError, LabError
from pyscan.lab.guest import Guest, GuestOptions, TamperKind
from pyscan.lab.process import RunDirectory
from pyscan.lab.ram import GuestRam, Machine
from pyscan.qmp import query

pytestmark = pytest.mark.guest

BootGuest = Callable[..., Guest]

LENGTHS = {TamperKind.TEXT: 1, TamperKind.SYSCALL: 8}


class KernelImage:
    """Text and rodata of a guest's kernel, read through the RAM file."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        begin, text_end, rodata, rodata_end = map(
            guest.symbol, ("_text", "_etext", "__start_rodata", "__end_rodata")
        )
        code = int(guest.shell("grep 'Kernel code' /proc/iomem").split("-")[0], 16)
        self._parts = [
            (begin, code, text_end - begin),
            (rodata, code + rodata - begin, rodata_end - rodata),
        ]

    def snapshot(self) -> list[bytes]:
        return [self._guest.ram.read(physical, length) for _, physical, length in self._parts]

    def changed(self, before: list[bytes], after: list[bytes]) -> dict[int, tuple[int, int]]:
        """Virtual address -> (old byte, new byte)."""
        found = {}
        for (address, _, _), old, new in zip(self._parts, before, after, strict=True):
            if old != new:
                pairs = enumerate(zip(old, new, strict=True))
                found.update({address + i: pair for i, pair in pairs if pair[0] != pair[1]})
        return found


def test_shared_guest_is_the_distributions_kernel_with_a_card(shared_guest: Guest) -> None:
    assert shared_guest.shell("uname -r").strip().endswith("-cloud-amd64")
    assert shared_guest.shell("cat /sys/class/net/eth0/operstate").strip() == "up"
    assert shared_guest.shell("test -b /dev/vda && echo disk").strip() == "disk"
    assert shared_guest.card_seen_inside()
    assert shared_guest.card_seen_outside()
    assert shared_guest.status() == "running"


def test_each_user_has_a_qmp_socket_of_its_own(shared_guest: Guest) -> None:
    for socket in (shared_guest.monitor_qmp, shared_guest.agent_qmp, shared_guest.lab_qmp):
        (answer,) = query(socket, [("query-uuid", None)])
        assert answer == {"UUID": shared_guest.uuid}
    assert int(shared_guest.pid_file.read_text()) == shared_guest.pid


def test_guest_command_that_fails_says_so(shared_guest: Guest) -> None:
    with pytest.raises(LabError, match="failed with status 3: told so"):
        shared_guest.shell("echo told so; exit 3")
    with pytest.raises(LabError, match="syntax error"):
        shared_guest.shell("if")
    assert shared_guest.shell("printf 'no newline'") == "no newline"


def test_shot_that_failed_is_told_by_the_next_command(shared_guest: Guest) -> None:
    shared_guest.fire()  # no module is loaded
    with pytest.raises(LabError, match=r"parameters/fire.*failed with status"):
        shared_guest.shell("echo unheard")
    assert shared_guest.shell("echo heard") == "heard\n"


def test_tampering_changes_exactly_its_target_and_restores_it(boot_guest: BootGuest) -> None:
    guest = boot_guest(load=True)
    kernel = KernelImage(guest)
    untouched = kernel.snapshot()
    for kind in TamperKind:
        target = guest.load_tamper(kind)
        assert kernel.snapshot() == untouched, "loading the module changed the kernel"
        assert guest.ram.read(target.physical, len(target.old)) == target.old

        with guest.ram.watch(target.physical) as watch:
            guest.fire()
            change = watch.wait(timeout_s=10)
        assert (change.before, change.after) == (target.old[0], target.new[0])
        assert change.last_seen_before_ns < change.first_seen_after_ns
        changed = kernel.changed(untouched, kernel.snapshot())
        assert changed == {
            target.address + i: (old, new)
            for i, (old, new) in enumerate(zip(target.old, target.new, strict=True))
            if old != new
        }
        assert len(target.old) == LENGTHS[kind]

        guest.restore()
        assert kernel.snapshot() == untouched
    assert guest.status() == "running"


@pytest.mark.parametrize(
    ("machine", "low_bytes"), [(Machine.Q35, 0x8000_0000), (Machine.PC, 0xC000_0000)]
)
def test_ram_file_is_laid_out_as_qemu_does(
    boot_guest: BootGuest, machine: Machine, low_bytes: int
) -> None:
    length = 4 << 30
    guest = boot_guest(machine=machine, memory_mib=length >> 20)
    dump = guest.serial_log.with_name("page")
    page = {"size": 4096, "filename": str(dump)}
    query(guest.lab_qmp, [("stop", None)])
    high = 1 << 32
    for gpa in (0x10_0000, low_bytes - 0x1000, high, high + length - low_bytes - 0x1000):
        guest.ram.flip(gpa, 0x5A)  # so that no page compares equal only because both are empty
        query(guest.lab_qmp, [("pmemsave", {"val": gpa, **page})])
        assert guest.ram.read(gpa, 4096) == dump.read_bytes()
        assert any(dump.read_bytes())
    with pytest.raises(LabError, match="is not RAM"):
        guest.ram.offset(low_bytes)


def test_physical_address_of_text_agrees_with_the_module(boot_guest: BootGuest) -> None:
    guest = boot_guest(machine=Machine.PC)
    assert guest.text_physical() == guest.load_tamper(TamperKind.TEXT).physical


def test_external_flip_is_seen_by_the_guest(boot_guest: BootGuest) -> None:
    guest = boot_guest()
    target = guest.load_tamper(TamperKind.TEXT)
    assert guest.shell("cat /sys/module/tamper/parameters/fire").strip() == "0"
    guest.ram.flip(target.physical, 0x01)
    assert guest.shell("cat /sys/module/tamper/parameters/fire").strip() == "1"


def test_guest_that_dies_is_one_clear_error(boot_guest: BootGuest) -> None:
    guest = boot_guest()
    with pytest.raises(LabError, match="ended during 'poweroff -f; sleep 60'"):
        guest.shell("poweroff -f; sleep 60")
    guest.wait_gone()
    with pytest.raises(LabError, match="is gone"):
        guest.shell("true")


def test_nothing_is_left_behind(guest_dir: Path) -> None:
    with RunDirectory() as run, Guest(GuestOptions(guest_dir), run) as guest:
        assert guest.ram_file.stat().st_mode & 0o077 == 0
        assert run.path.stat().st_mode & 0o077 == 0
    assert not guest.alive
    assert not guest.ram_file.exists()
    assert not run.path.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(guest.pid, 0)
    with pytest.raises(DriverError):
        guest.status()


def test_option_that_qemu_refuses_is_one_clear_error(
    guest_dir: Path, run_directory: RunDirectory
) -> None:
    options = GuestOptions(guest_dir, extra=("-device", "no-such-device"))
    with pytest.raises(LabError, match="no-such-device"), Guest(options, run_directory) as guest:
        guest.wait_ready()


def test_missing_guest_says_what_to_do(tmp_path: Path, run_directory: RunDirectory) -> None:
    with pytest.raises(LabError, match="run `make setup`"):
        Guest(GuestOptions(tmp_path), run_directory)


@pytest.mark.parametrize(
    ("machine", "length", "gpa", "offset"),
    [
        (Machine.Q35, 0xB000_0000 - 0x1000, 0xAFFF_E000, 0xAFFF_E000),
        (Machine.Q35, 0xB000_0000, 0x1_0000_0000, 0x8000_0000),
        (Machine.PC, 0xE000_0000 - 0x1000, 0xDFFF_E000, 0xDFFF_E000),
        (Machine.PC, 0xE000_0000, 0x1_0000_0000, 0xC000_0000),
    ],
)
def test_split_begins_at_the_machines_limit(
    run_directory: RunDirectory, machine: Machine, length: int, gpa: int, offset: int
) -> None:
    ram = GuestRam(run_directory.ram_file("sparse", length), machine, length)
    try:
        assert ram.offset(gpa) == offset
    finally:
        ram.close()
