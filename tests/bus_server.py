"""A server without firmware and without a guest: a bus, a card on it, memory in a file.

    with bus_server(run) as server, open_source(server.nvme_uri) as source:
        ...

It is up in a fraction of a second. Its processor halts at once (the clock runs, which QEMU's
devices need), and the test does what firmware would: it places the window of configuration
space and gives the card's functions their addresses.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyscan.lab.bus import (
    EDU_SLOT,
    ENGINE_SLOT,
    MEMORY_SLOT,
    CardBus,
    ServerBus,
    comma_safe,
    qtest_arguments,
)
from pyscan.lab.process import Child, RunDirectory
from pyscan.records import MemoryRegion
from pyscan.sources.layout import Layout, Segment
from pyscan.sources.pci import COMMAND_MEMORY, PciBus, PortSpace, Slot
from pyscan.sources.qtest import QtestClient

MIB = 1 << 20
_ECAM_BASE = 0xB000_0000
_ABOVE = 4 << 30

#: Function, BAR and the address it gets.
_ADDRESSES = (
    (MEMORY_SLOT, 0, 0xE000_0000),
    (MEMORY_SLOT, 2, 0xE100_0000),
    (ENGINE_SLOT, 0, 0xE200_0000),
    (EDU_SLOT, 0, 0xE300_0000),
    ("00:01.0", 0, 0xE400_0000),  # pci-testdev
    ("00:01.0", 2, 0xE410_0000),
)

#: Code at the reset vector (0xfffffff0, the end of the firmware): hlt; jmp to itself.
_HALT = bytes.fromhex("f4ebfd")


class BusServer:
    """One server; `kill` and `restart` take it away and bring it back with the same files."""

    def __init__(self, run: RunDirectory, low_mib: int, high_mib: int) -> None:
        self._run = run
        self._low_mib, self._high_mib = low_mib, high_mib
        self.bus = ServerBus(CardBus(edu=True), run, "server")
        self.ram_path = run.ram_file("server.ram", (low_mib + high_mib) * MIB)
        self.map_path = run.path / "server.toml"
        self._firmware = run.path / "halt.bin"
        code = bytearray(b"\xf4" * 65536)
        code[-16 : len(_HALT) - 16] = _HALT
        self._firmware.write_bytes(code)
        # The firmware lies over 0xe0000; nothing below 1 MiB is offered.
        segments = [Segment(MemoryRegion(MIB, (low_mib - 1) * MIB), MIB)]
        if high_mib:
            segments.append(Segment(MemoryRegion(_ABOVE, high_mib * MIB), low_mib * MIB))
        self.layout = Layout.of(segments)
        self.write_map(self.layout)
        self._child: Child | None = None

    @property
    def nvme_uri(self) -> str:
        return self.bus.nvme_uri(map=str(self.map_path))

    @property
    def edu_uri(self) -> str:
        return self.bus.edu_uri(map=str(self.map_path))

    @property
    def qtest_socket(self) -> Path:
        return self.bus.qtest_socket

    @property
    def child(self) -> Child:
        assert self._child is not None
        return self._child

    def write_map(self, layout: Layout) -> None:
        """Describe the memory otherwise; counts for sources that are opened from now on."""
        self.map_path.write_text(
            "".join(
                f"[[region]]\ngpa = {segment.region.gpa:#x}\nlength = {segment.region.length:#x}\n"
                f'offset = {segment.offset:#x}\nkind = "{segment.region.kind}"\n'
                for segment in layout.segments
            )
        )

    def restart(self) -> None:
        """Start QEMU (again), and do what its firmware would."""
        self.kill()
        self._child = Child("server", self._command(), self._run.path / "server.log")
        self._child.wait_until(self._listens, timeout_s=20, what="its qtest socket")
        with QtestClient(self.qtest_socket, timeout_s=20) as client:
            place_functions(client)

    def kill(self) -> None:
        """End QEMU at once."""
        if self._child is not None:
            self._child.kill()
            self._child.close()
            self._child = None

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.qtest_socket)) == 0

    def _command(self) -> list[str | Path]:
        size = self._low_mib + self._high_mib
        return [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-accel", "tcg", "-cpu", "qemu64", "-m", f"{size}M", "-bios", self._firmware),
            "-object",
            f"memory-backend-file,id=ram,size={size}M,share=on,mem-path={comma_safe(self.ram_path)}",
            *("-machine", f"q35,memory-backend=ram,max-ram-below-4g={self._low_mib}M"),
            *("-device", "pci-testdev,membar=1M,addr=1.0"),
            *self.bus.arguments(),
            *qtest_arguments(self.qtest_socket),
        ]


def place_functions(client: QtestClient) -> None:
    """Give configuration space its window, and the card's functions their addresses."""
    ports = PortSpace(client)
    ports.write(Slot(0, 0, 0), 0x64, 4, 0)
    ports.write(Slot(0, 0, 0), 0x60, 4, _ECAM_BASE | 1)
    bus = PciBus(client)
    for slot, bar, address in _ADDRESSES:
        place = Slot.parse(slot)
        bus.space.write(place, 0x10 + 4 * bar, 4, address)
        bus.set_command(place, COMMAND_MEMORY)


@contextmanager
def bus_server(run: RunDirectory, low_mib: int = 32, high_mib: int = 16) -> Iterator[BusServer]:
    """A running server with `low_mib` of memory below 4 GiB and `high_mib` above."""
    server = BusServer(run, low_mib, high_mib)
    try:
        server.restart()
        yield server
    finally:
        server.kill()
