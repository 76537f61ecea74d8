"""The same real guest behind each hypervisor interface, for one suite over all drivers.

Each guest writes to its disk when told to, loads its processor when told to, and sends frames
to its network all the time, which a peer on that network counts.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from pyscan.agent.drivers.base import Driver
from pyscan.agent.drivers.libvirt import LibvirtDriver
from pyscan.agent.drivers.qmp import QmpDriver
from pyscan.lab.guest import Guest, GuestOptions
from pyscan.lab.libvirt import MAC, NETWORKS, LibvirtDaemon, LibvirtGuest, LibvirtOptions
from pyscan.lab.network import BridgePeer, DatagramPeer, Peer
from pyscan.lab.process import Child, RunDirectory

MEMORY_MIB = 256


class Host(ABC):
    """A hypervisor with one guest."""

    vm: str  # the agent's name of it
    table: str  # the agent's configuration
    disk: str  # name of the guest's disk
    disk_file: Path
    link: str  # name of the link that is watched
    production: Peer
    quarantine: Peer
    has_screen: bool
    limits_processor: bool

    def __init__(self) -> None:
        self.contents = ExitStack()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.contents.close()

    @abstractmethod
    def start(self, guest_dir: Path, run: RunDirectory) -> None:
        """Start everything and set the attributes; leaving the context ends it."""

    @abstractmethod
    def shell(self, command: str) -> str:
        """Run a command in the guest."""

    @abstractmethod
    def status(self) -> str:
        """The state in the hypervisor's own words: running, paused, gone."""

    @abstractmethod
    def wait_ready_again(self) -> None:
        """Wait until a guest that was started afresh has settled."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """QEMU's process."""

    @property
    @abstractmethod
    def server(self) -> Child:
        """The process that the agent talks to."""

    @abstractmethod
    def driver(self) -> Driver:
        """The test's own way to the machine."""

    def send(self) -> None:
        """Let the guest send a few frames every second, to everybody on its network."""
        self.shell(
            f"eth=$(basename $(dirname $(grep -l {MAC} /sys/class/net/*/address))) && "
            "ip link set $eth up && ip address add 10.0.3.15/24 dev $eth && "
            "{ ping -i 0.2 10.0.3.255 >/dev/null 2>&1 & }"
        )

    def uptime_s(self) -> float:
        return float(self.shell("cat /proc/uptime").split()[0])

    def processor_ticks(self) -> int:
        """Processor time of all of QEMU's threads, in clock ticks; proc(5)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    def sends(self, peer: Peer) -> bool:
        """Whether the guest's frames arrive at a peer."""
        return peer.frames(MAC, 6.0, enough=3) >= 3

    def is_silent(self, peer: Peer) -> bool:
        return peer.frames(MAC, 1.5) == 0

    def write_disk(self, text: str, block: int) -> None:
        self.shell(
            f"printf %-512s {text} | dd of=/dev/vda bs=512 seek={block} oflag=direct conv=notrunc"
        )

    def on_disk(self, text: str, block: int, file: Path | None = None) -> bool:
        with (file or self.disk_file).open("rb") as image:
            return os.pread(image.fileno(), len(text), block * 512) == text.encode()


class QemuHost(Host):
    """QEMU by itself. A second card is on a hub, so that it can be moved."""

    vm = "web-1"
    disk = "blk0"
    link = "card1"
    has_screen = False
    limits_processor = False

    def start(self, guest_dir: Path, run: RunDirectory) -> None:
        self.production = self.contents.enter_context(DatagramPeer())
        quarantine = self.contents.enter_context(DatagramPeer())
        self.quarantine = quarantine
        extra = [
            *("-netdev", "hubport,id=card1,hubid=1"),
            *("-device", f"virtio-net-pci,netdev=card1,id=nic1,mac={MAC},romfile="),
            *("-netdev", self.production.netdev("prod")),
            *("-netdev", "hubport,id=up1,hubid=1,netdev=prod"),
            *("-action", "reboot=reset"),
        ]
        options = GuestOptions(guest_dir, memory_mib=MEMORY_MIB, extra=tuple(extra))
        self._guest = self.contents.enter_context(Guest(options, run))
        self.disk_file = run.path / "guest-disk.raw"
        self.table = (
            f'[[vm]]\nid = "{self.vm}"\nqmp = "{self._guest.agent_qmp}"\n'
            f'pidfile = "{self._guest.pid_file}"\n'
            'hub = 1\nports = ["card1"]\nuplinks = ["up1"]\n[network.quarantine]\n'
            + "".join(f'{key} = "{value}"\n' for key, value in quarantine.backend.items())
        )
        self._guest.wait_ready()
        self.send()

    def wait_ready_again(self) -> None:
        self._guest.wait_ready()
        self.send()

    def shell(self, command: str) -> str:
        return self._guest.shell(command)

    def status(self) -> str:
        if not self._guest.alive:
            return "gone"
        # It runs an event loop of its own, and the test is in one.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self._guest.status).result()

    @property
    def pid(self) -> int:
        return self._guest.pid

    @property
    def server(self) -> Child:
        return self._guest._child

    def driver(self) -> Driver:
        return QmpDriver(self._guest.lab_qmp, self._guest.pid_file)


class LibvirtHost(Host):
    """A domain of a libvirt daemon, found by the agent itself."""

    disk = "vda"
    link = MAC
    has_screen = True
    limits_processor = True

    def start(self, guest_dir: Path, run: RunDirectory) -> None:
        self._daemon = self.contents.enter_context(LibvirtDaemon(run))
        options = LibvirtOptions(guest_dir, memory_mib=MEMORY_MIB)
        self._guest = self.contents.enter_context(LibvirtGuest(options, self._daemon, run))
        self._guest.wait_ready()
        self.send()
        self.vm, self.disk_file = self._guest.uuid, self._guest.disk
        self.production, self.quarantine = (
            self.contents.enter_context(BridgePeer(self._daemon.child.pid, NETWORKS[name]))
            for name in ("production", "quarantine")
        )
        self.table = (
            f'[libvirt]\nuri = "{self._daemon.uri}"\n'
            f'pid_directory = "{self._daemon.pid_directory}"\n'
        )

    def wait_ready_again(self) -> None:
        self._guest.wait_ready_again()
        self.send()

    def shell(self, command: str) -> str:
        return self._guest.shell(command)

    def status(self) -> str:
        return self._guest.status()

    @property
    def pid(self) -> int:
        return self._guest.pid

    @property
    def server(self) -> Child:
        return self._daemon.child

    def driver(self) -> Driver:
        return LibvirtDriver(self._daemon.uri, self.vm, self._daemon.pid_directory)


HOSTS = {"qmp": QemuHost, "libvirt": LibvirtHost}
