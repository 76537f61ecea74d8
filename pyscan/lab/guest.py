"""A real guest: Debian's cloud kernel in QEMU, its RAM in a shared file, a card on its bus.

    with RunDirectory() as run, Guest(GuestOptions(guest_dir=Path("build/guest")), run) as guest:
        guest.wait_ready()
        target = guest.load_tamper(TamperKind.TEXT)
        guest.fire()

`make setup` builds the kernel, initramfs and tamper module into `build/guest`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import Self

from pyscan.errors import LabError
from pyscan.lab.bus import CardBus, ServerBus, comma_safe, qtest_arguments
from pyscan.lab.console import SerialConsole
from pyscan.lab.process import Child, RunDirectory
from pyscan.lab.ram import GuestRam, Machine
from pyscan.qmp import query

#: Vendor and device of pci-testdev, the card's host-visible function (docs/adr/pci-testdev.md).
CARD_PCI_ID = (0x1B36, 0x0005)

#: Identity of the laboratory's virtual machine.
GUEST_UUID = "9a3c5b1e-6d0f-4c58-8f57-2f6e0d9b7a41"

#: Size of the guest's disk, which stays empty.
_DISK_BYTES = 16 << 20

#: Name of the network card for `set_link`.
NETWORK_DEVICE_ID = "nic0"


class Accelerator(StrEnum):
    """How the guest's processor is run. KVM only on request: /dev/kvm can exist and hang."""

    TCG = "tcg"
    KVM = "kvm"


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """What to boot. `append` goes to the kernel command line, `extra` to QEMU's.

    `initrd`: a file in `guest_dir`; "initrd-matrix.gz" also holds what tests/matrix needs.
    `card`: a DMA engine beside pci-testdev, which every guest has; it brings a qtest socket.
    """

    guest_dir: Path
    machine: Machine = Machine.Q35
    memory_mib: int = 512
    cpus: int = 1
    cpu_model: str = "max"
    accelerator: Accelerator = Accelerator.TCG
    append: str = ""
    initrd: str = "initrd.gz"
    load: bool = False
    qtest: bool = False
    card: CardBus | None = None
    uuid: str = GUEST_UUID
    name: str = "guest"
    extra: tuple[str, ...] = ()


class TamperKind(StrEnum):
    """What the tamper module changes."""

    TEXT = "text"  # one byte of kernel text
    SYSCALL = "syscall"  # one entry of the system call table


@dataclass(frozen=True, slots=True)
class TamperTarget:
    """The place that the loaded tamper module changes when fired; contents little-endian."""

    kind: TamperKind
    symbol: str
    address: int  # virtual
    physical: int
    old: bytes
    new: bytes


@dataclass(frozen=True, slots=True)
class _TamperPlace:
    """Where a kind of tampering goes: `offset` bytes behind a symbol."""

    symbol: str
    offset: int
    length: int


#: Places that nothing in the guest uses, so that it lives on. machine_real_restart only runs
#: on reboot through the BIOS. acct(2), number 163 (syscall_64.tbl), is not called; and this
#: kernel dispatches by x64_sys_call(), a switch, and keeps the table for tracing only
#: (arch/x86/entry/syscall_64.c), so a changed entry is a mark of intent more than a hook.
_TAMPER_PLACES = {
    TamperKind.TEXT: _TamperPlace("machine_real_restart", 0x10, 1),
    TamperKind.SYSCALL: _TamperPlace("sys_call_table", 163 * 8, 8),
}

#: Where the table's entry is made to point.
_SYSCALL_DETOUR = "__x64_sys_ni_syscall"

_TAMPER_PARAMETERS = "/sys/module/tamper/parameters"


class Guest:
    """A running guest; leaving the context ends it. Files and sockets lie in `run`.

    Three QMP sockets, because QEMU serves one client per socket: for the monitor, for the
    agent, and for the laboratory's own questions.
    """

    def __init__(self, options: GuestOptions, run: RunDirectory) -> None:
        """Start QEMU. Raises LabError; what QEMU refuses later shows in `wait_ready`."""
        self.options = options
        names = {key: run.path / f"{options.name}-{key}" for key in ("monitor", "agent", "lab")}
        self.monitor_qmp, self.agent_qmp, self.lab_qmp = names.values()
        self.qtest_socket = run.path / f"{options.name}-qtest"
        self.serial_log = run.path / f"{options.name}-serial.log"
        self.pid_file = run.path / f"{options.name}.pid"
        self.uuid = options.uuid
        self.bus: ServerBus | None = None
        if not (options.guest_dir / "guest.json").is_file():
            raise LabError(f"there is no guest in {options.guest_dir}: run `make setup`")
        length = options.memory_mib << 20
        self.ram_file = run.ram_file(f"{options.name}.ram", length)
        if options.card is not None:
            self.bus = ServerBus(options.card, run, options.name)
        self._serial = run.path / f"{options.name}-serial"
        self._disk = run.path / f"{options.name}-disk.raw"
        with self._disk.open("xb") as disk:
            disk.truncate(_DISK_BYTES)
        with ExitStack() as stack:
            self.ram = GuestRam(self.ram_file, options.machine, length)
            stack.callback(self.ram.close)
            self._console = SerialConsole(self._serial)
            stack.callback(self._console.close)
            log = run.path / f"{options.name}-qemu.log"
            self._started_s = monotonic()
            self._child = stack.enter_context(Child(f"guest {options.name}", self._command(), log))
            self._console.accept(self._child, timeout_s=10)
            self._contents = stack.pop_all()

    @property
    def pid(self) -> int:
        """QEMU's process number."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether the QEMU process runs (it also does when the guest is paused)."""
        return self._child.exit_status is None

    def wait_ready(self, timeout_s: float = 60.0) -> float:
        """Wait until the guest has settled; returns seconds since QEMU's start."""
        self._console.wait_ready(self._child, timeout_s)
        return monotonic() - self._started_s

    def wait_gone(self, timeout_s: float = 10.0) -> None:
        """Wait until the QEMU process has ended. Raises LabError when it lives on."""
        self._child.wait(timeout_s)

    def shell(self, command: str, timeout_s: float = 30.0) -> str:
        """Run a shell command as root in the guest; returns its output. Raises LabError."""
        return self._console.shell(self._child, command, timeout_s)

    def symbol(self, name: str) -> int:
        """Virtual address of a kernel symbol, as /proc/kallsyms says. Raises LabError."""
        pattern = name.replace(".", r"\.")
        line = self.shell(f"grep -m 1 -E '^[0-9a-f]+ . {pattern}$' /proc/kallsyms")
        return int(line.split()[0], 16)

    def status(self, timeout_s: float = 5.0) -> str:
        """QEMU's run state: "running", "paused", ... Raises DriverError."""
        (answer,) = query(self.lab_qmp, [("query-status", None)], timeout_s)
        if not isinstance(answer, dict):
            raise LabError(f"QEMU answered {answer!r} to query-status; check the QEMU version")
        return str(answer["status"])

    def card_seen_inside(self) -> bool:
        """Whether the guest's own bus enumeration found pci-testdev."""
        listing = self.shell(
            "cd /sys/bus/pci/devices && for d in *; do cat $d/vendor $d/device | xargs; done"
        )
        return f"{CARD_PCI_ID[0]:#06x} {CARD_PCI_ID[1]:#06x}" in listing.splitlines()

    def card_seen_outside(self, timeout_s: float = 5.0) -> bool:
        """Whether QEMU lists pci-testdev on the guest's root bus. Raises DriverError."""
        (buses,) = query(self.lab_qmp, [("query-pci", None)], timeout_s)
        if not isinstance(buses, list):
            raise LabError(f"QEMU answered {buses!r} to query-pci; check the QEMU version")
        found = {
            (device["id"]["vendor"], device["id"]["device"])
            for bus in buses
            for device in bus["devices"]
        }
        return CARD_PCI_ID in found

    def text_physical(self) -> int:
        """Guest-physical address of a byte of kernel text that nothing executes.

        From the guest's own account (/proc/iomem, /proc/kallsyms), without the module.
        """
        place = _TAMPER_PLACES[TamperKind.TEXT]
        code = int(self.shell("grep 'Kernel code' /proc/iomem").split("-")[0], 16)
        return code + self.symbol(place.symbol) + place.offset - self.symbol("_text")

    def load_tamper(self, kind: TamperKind) -> TamperTarget:
        """Load the tamper module for one target, changing nothing yet. Raises LabError.

        A tamper module that is already loaded is taken out first, without restoring.
        """
        place = _TAMPER_PLACES[kind]
        address = self.symbol(place.symbol) + place.offset
        self.shell(
            "if test -d /sys/module/tamper; then rmmod tamper; fi && "
            f"insmod /lib/tamper.ko address={address:#x} size={place.length}"
        )
        physical, old = map(int, self.shell(f"cd {_TAMPER_PARAMETERS} && cat physical old").split())
        new = old ^ 0xFF if kind is TamperKind.TEXT else self.symbol(_SYSCALL_DETOUR)
        self.shell(f"echo {new:#x} >{_TAMPER_PARAMETERS}/value")
        return TamperTarget(
            kind=kind,
            symbol=place.symbol,
            address=address,
            physical=physical,
            old=old.to_bytes(place.length, "little"),
            new=new.to_bytes(place.length, "little"),
        )

    def fire(self) -> None:
        """Let the loaded tamper module change its target.

        Does not wait: who watches the guest may freeze it before it could answer. `ram.watch`
        sees when the change is made.
        """
        self._console.start(f"echo 1 >{_TAMPER_PARAMETERS}/fire")

    def restore(self) -> None:
        """Let the loaded tamper module put the old content back. Raises LabError."""
        self.shell(f"echo 0 >{_TAMPER_PARAMETERS}/fire")

    def close(self) -> None:
        """End the guest. Idempotent. Files and sockets go with the run directory."""
        self._contents.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _command(self) -> list[str | Path]:
        """QEMU's command line. A comma in a path is doubled where QEMU splits at commas."""
        options = self.options
        model = "host" if options.accelerator is Accelerator.KVM else options.cpu_model
        kernel_line = "console=ttyS0 panic=-1 quiet"
        if options.load:
            kernel_line += " pyscan.load=1"
        if self.bus is not None:
            kernel_line += f" {self.bus.kernel_append}"
        command: list[str | Path] = [
            "qemu-system-x86_64",
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-name", options.name, "-uuid", options.uuid, "-pidfile", self.pid_file),
            *("-accel", options.accelerator, "-cpu", model, "-smp", str(options.cpus)),
            *("-m", f"{options.memory_mib}M"),
            "-object",
            f"memory-backend-file,id=ram,size={options.memory_mib}M,share=on,"
            f"mem-path={comma_safe(self.ram_file)}",
            *("-machine", f"{options.machine},memory-backend=ram"),
            *("-kernel", options.guest_dir / "vmlinuz"),
            *("-initrd", options.guest_dir / options.initrd),
            *("-append", f"{kernel_line} {options.append}".strip()),
            *("-device", "pci-testdev,membar=1M,id=card0"),
            *("-netdev", "user,id=net0,restrict=on"),
            *("-device", f"virtio-net-pci,netdev=net0,id={NETWORK_DEVICE_ID},romfile="),
            "-blockdev",
            f"driver=raw,node-name=disk0,file.driver=file,file.filename={comma_safe(self._disk)}",
            *("-device", "virtio-blk-pci,drive=disk0,id=blk0"),
        ]
        for socket in (self.monitor_qmp, self.agent_qmp, self.lab_qmp):
            command += ["-qmp", f"unix:{comma_safe(socket)},server=on,wait=off"]
        if self.bus is not None:
            command += self.bus.arguments()
        if options.qtest or self.bus is not None:
            command += qtest_arguments(self.qtest_socket)
        # Last: once QEMU has connected to the serial line, its other sockets are open.
        command += [
            "-chardev",
            f"socket,id=serial0,path={comma_safe(self._serial)},"
            f"logfile={comma_safe(self.serial_log)}",
            *("-serial", "chardev:serial0"),
        ]
        return [*command, *options.extra]
