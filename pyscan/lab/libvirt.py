"""A libvirt daemon of one's own, without systemd, and a real guest in it.

    with RunDirectory() as run, LibvirtDaemon(run) as daemon:
        with LibvirtGuest(LibvirtOptions(Path("build/guest")), daemon, run) as guest:
            guest.wait_ready()

It runs in private mount and network namespaces: it sees its own configuration, state and
bridges, and the machine's own libvirt and network see nothing of it. Its guests have no
namespaces and no security driver (qemu.conf), because there is nothing to protect from them.
"""

from __future__ import annotations

import signal
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from xml.sax.saxutils import escape, quoteattr

import libvirt

from pyscan.errors import LabError
from pyscan.lab.console import SerialConsole
from pyscan.lab.process import Child, RunDirectory

# Failures are raised as LabError; the library would print each as well.
libvirt.registerErrorHandler(lambda _context, _error: None, None)

#: Networks that the daemon starts with, and their bridges in its network namespace.
NETWORKS: Final = {"production": "br-prod", "quarantine": "br-quar"}
#: The guest's network card (52:54:00 is QEMU's and KVM's).
MAC: Final = "52:54:00:70:79:01"

_START_S: Final = 30.0
_DISK_BYTES: Final = 16 << 20

#: Arguments: the daemon's directory. Files that libvirt keeps are bound over the system's.
_SCRIPT: Final = """
set -e
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/libvirt /run/lock
for place in etc/libvirt var/lib/libvirt var/log/libvirt var/cache/libvirt run/libvirt; do
    mkdir -p "$1/$place"
    mount --bind "$1/$place" "/$place"
done
# Where both versions of control groups are mounted, libvirt gets lost in the empty second one.
umount /sys/fs/cgroup/unified 2>/dev/null || true
ip link set lo up
exec libvirtd --config "$1/etc/libvirt/libvirtd.conf"
"""
_DAEMON_CONF: Final = 'auth_unix_rw = "none"\nauth_unix_ro = "none"\n'
_QEMU_CONF: Final = """
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = [ "cpu", "cpuacct" ]
remember_owner = 0
stdio_handler = "file"
"""
#: Directories that the QEMU driver wants to find (qemu_driver.c, qemuStateInitialize).
_STATE: Final = (
    *("snapshot", "save", "dump", "ram", "channel/target", "checkpoint", "nvram", "swtpm"),
)


#: Where libvirt makes the control groups of its guests, in both versions (vircgroup.c).
_GROUPS: Final = tuple(
    Path("/sys/fs/cgroup", name, "machine") for name in ("", "cpu", "cpuacct", "cpu,cpuacct")
)


class LibvirtDaemon:
    """A running libvirtd; leaving the context ends its guests and it."""

    def __init__(self, run: RunDirectory) -> None:
        self.path = run.path / "lv"
        self._groups = [group for group in _GROUPS if not group.exists()]
        etc = self.path / "etc/libvirt"
        etc.mkdir(parents=True)
        (etc / "libvirtd.conf").write_text(_DAEMON_CONF)
        (etc / "qemu.conf").write_text(_QEMU_CONF)
        for name in _STATE:
            (self.path / "var/lib/libvirt/qemu" / name).mkdir(parents=True)
        socket = self.path / "run/libvirt/libvirt-sock"
        self.uri = f"qemu+unix:///system?socket={socket}"
        self.pid_directory = self.path / "run/libvirt/qemu"
        with ExitStack() as stack:
            self.child = stack.enter_context(
                Child(
                    "libvirtd",
                    ["unshare", "--mount", "--net", "sh", "-c", _SCRIPT, "sh", self.path],
                    run.path / "libvirtd.log",
                )
            )
            stack.callback(self._remove_groups)
            stack.callback(self._end_guests)
            self.child.wait_until(self._answers, _START_S, "its socket")
            self._define_networks()
            self._contents = stack.pop_all()

    def connect(self) -> libvirt.virConnect:
        """A connection of the laboratory's own. Raises LabError."""
        try:
            return libvirt.open(self.uri)
        except libvirt.libvirtError as error:
            raise self.child.failure(f"refused a connection: {error}") from error

    def _answers(self) -> bool:
        with suppress(libvirt.libvirtError):
            libvirt.open(self.uri).close()
            return True
        return False

    def _define_networks(self) -> None:
        link = self.connect()
        for name, bridge in NETWORKS.items():
            link.networkCreateXML(
                f"<network><name>{name}</name><bridge name='{bridge}' stp='off' delay='0'/>"
                "<dns enable='no'/></network>"
            )
        link.close()

    def _end_guests(self) -> None:
        """The daemon leaves its guests running when it ends."""
        self.child.signal(signal.SIGCONT)
        with suppress(LabError):
            link = self.connect()
            for domain in link.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                with suppress(libvirt.libvirtError):
                    domain.destroy()
            for network in link.listAllNetworks():
                with suppress(libvirt.libvirtError):
                    network.destroy()
            link.close()

    def _remove_groups(self) -> None:
        for group in self._groups:
            with suppress(OSError):  # never made, or another daemon's by now
                group.rmdir()

    def close(self) -> None:
        """End everything. Idempotent."""
        self._contents.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class LibvirtOptions:
    """What to start."""

    guest_dir: Path
    name: str = "guest"
    memory_mib: int = 256
    load: bool = True


class LibvirtGuest:
    """The test guest as a transient domain; leaving the context ends it."""

    def __init__(self, options: LibvirtOptions, daemon: LibvirtDaemon, run: RunDirectory) -> None:
        self.options = options
        self.uuid = str(uuid.uuid4())
        self.disk = run.path / f"{options.name}-disk.raw"
        with self.disk.open("xb") as disk:
            disk.truncate(_DISK_BYTES)
        self._daemon = daemon
        self._serial = run.path / f"{options.name}-serial"
        with ExitStack() as stack:
            self._console = SerialConsole(self._serial)
            stack.callback(self._console.close)
            link = daemon.connect()
            stack.callback(link.close)
            stack.callback(self._destroy)
            self._link = link
            try:
                link.createXML(self._xml(), 0)
            except libvirt.libvirtError as error:
                raise LabError(f"libvirt did not start {options.name}: {error}") from error
            self._console.accept(daemon.child, timeout_s=10)
            self._contents = stack.pop_all()

    @property
    def pid(self) -> int:
        """QEMU's process number."""
        return int((self._daemon.pid_directory / f"{self.options.name}.pid").read_text())

    @property
    def alive(self) -> bool:
        """Whether the domain runs or is paused."""
        return self._domain() is not None

    def status(self) -> str:
        """ "running", "paused" or "gone"."""
        domain = self._domain()
        if domain is None:
            return "gone"
        running = domain.state()[0] in {libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED}
        return "running" if running else "paused"

    def xml(self) -> str:
        """The live description."""
        domain = self._domain()
        if domain is None:
            raise LabError(f"{self.options.name} is gone")
        return str(domain.XMLDesc())

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until the guest has settled. Raises LabError."""
        self._console.wait_ready(self._daemon.child, timeout_s)

    def wait_ready_again(self, timeout_s: float = 60.0) -> None:
        """The same, of a guest that was ended and started afresh."""
        self._console.accept(self._daemon.child, timeout_s)
        self.wait_ready(timeout_s)

    def shell(self, command: str, timeout_s: float = 30.0) -> str:
        """Run a shell command as root in the guest; returns its output. Raises LabError."""
        return self._console.shell(self._daemon.child, command, timeout_s)

    def close(self) -> None:
        """End the guest. Idempotent."""
        self._contents.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _domain(self) -> libvirt.virDomain | None:
        try:
            return self._link.lookupByUUIDString(self.uuid)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise LabError(f"libvirt does not answer: {error}") from error

    def _destroy(self) -> None:
        with suppress(libvirt.libvirtError, LabError):
            domain = self._domain()
            if domain is not None:
                domain.destroy()

    def _xml(self) -> str:
        options = self.options
        load = " pyscan.load=1" if options.load else ""
        return f"""
<domain type='qemu'>
  <name>{options.name}</name><uuid>{self.uuid}</uuid>
  <memory unit='MiB'>{options.memory_mib}</memory><vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{escape(str((options.guest_dir / "vmlinuz").absolute()))}</kernel>
    <initrd>{escape(str((options.guest_dir / "initrd.gz").absolute()))}</initrd>
    <cmdline>console=ttyS0 panic=-1 quiet{load}</cmdline>
  </os>
  <features><acpi/></features><cpu mode='maximum'/>
  <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>preserve</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file={quoteattr(str(self.disk))}/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='network'>
      <mac address='{MAC}'/><source network='production'/><model type='virtio'/>
    </interface>
    <serial type='unix'><source mode='connect' path={quoteattr(str(self._serial))}/></serial>
    <video><model type='vga'/></video>
    <memballoon model='none'/><controller type='usb' model='none'/>
  </devices>
</domain>"""
