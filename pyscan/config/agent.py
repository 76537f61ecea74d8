"""`pyscan agent`: the machines of its host, and what it refuses to do to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from pyscan.config.base import Name, Program, Table, load_config, refuse_duplicates
from pyscan.records import Action
from pyscan.trust import Role


class Vm(Table, frozen=True, kw_only=True):
    """One virtual machine of an agent's host, a `[[vm]]`."""

    id: Name
    qmp: Path  # socket of its own: QEMU serves one client per socket
    pidfile: Path | None = None  # else the process behind the socket is the machine
    hub: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)] | None = None  # QEMU's, of its cards
    ports: tuple[Name, ...] = ()  # the links that are plugged into it
    uplinks: tuple[Name, ...] = ()  # the hub's ports to the network that it came with

    def __post_init__(self) -> None:
        if len({self.hub is None, not self.ports, not self.uplinks}) > 1:
            raise ValueError("hub, ports and uplinks come together")


class Discovery(Table, frozen=True, kw_only=True):
    """Where machines are looked for that no [[vm]] names, and how often all are looked at."""

    interval_s: Annotated[float, msgspec.Meta(ge=0.1, le=60)] = 2.0
    qmp: str | None = None  # pattern of sockets, "/run/vms/*.qmp"; a pidfile ends in .pid

    def __post_init__(self) -> None:
        if self.qmp is not None and not self.qmp.startswith("/"):
            raise ValueError("qmp is a pattern of absolute paths, such as /run/vms/*.qmp")


class Libvirt(Table, frozen=True, kw_only=True):
    """A libvirt daemon, whose domains are all this agent's; named by their UUID."""

    uri: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)] = "qemu:///system"
    pid_directory: Path = Path("/run/libvirt/qemu")  # NAME.pid of each domain


class Sandbox(Table, frozen=True, kw_only=True):
    """What a sandboxed machine may still use, and what else is done when one is sandboxed."""

    disk_iops: Annotated[int, msgspec.Meta(ge=1, le=10**9)] = 100
    disk_bytes_per_s: Annotated[int, msgspec.Meta(ge=4096, le=10**12)] = 10 << 20
    overlays: Path | None = None  # directory; else in that of [state]
    revoke: tuple[str, ...] = ()  # program, arguments; the VM's id comes behind
    revoke_timeout_s: Annotated[int, msgspec.Meta(ge=1, le=300)] = 10

    def __post_init__(self) -> None:
        if self.revoke and not self.revoke[0].startswith("/"):
            raise ValueError("revoke begins with the absolute path of a program")


class Capture(Table, frozen=True, kw_only=True):
    """Where captured memory goes. Like the overlays, it is written by the hypervisor's user."""

    directory: Path | None = None  # else in that of [state]


class Limits(Table, frozen=True, kw_only=True):
    """What an agent refuses even when the order is genuine."""

    kills_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 10
    protected: tuple[Name, ...] = ()  # VMs on which only query is allowed
    two_person: tuple[Action, ...] = ()  # actions that a second person has to approve


class AgentConfig(Program, frozen=True, kw_only=True):
    """`pyscan agent`: the common tables and these; at least one way to a machine."""

    vm: Annotated[tuple[Vm, ...], msgspec.Meta(max_length=1024)] = ()
    limits: Limits = Limits()
    discovery: Discovery = Discovery()
    libvirt: Libvirt | None = None
    sandbox: Sandbox = Sandbox()
    capture: Capture = Capture()
    # QMP: arguments of `netdev_add` for each network that a sandbox may name
    network: dict[Name, dict[str, str | int | bool]] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.vm and not self.discovers:
            raise ValueError("no [[vm]], no [libvirt] and no [discovery] qmp: nothing to act on")
        refuse_duplicates("vm id", [vm.id for vm in self.vm])
        refuse_duplicates("vm qmp", [str(vm.qmp) for vm in self.vm])
        if not self.trust.hears(Role.CONTROL, Role.OPERATOR):
            raise ValueError("[trust] controls is empty: no command can be trusted")
        unknown = set(self.limits.protected) - {vm.id for vm in self.vm}
        if unknown and not self.discovers:
            raise ValueError(f"[limits] protected names no [[vm]]: {', '.join(sorted(unknown))}")

    @property
    def discovers(self) -> bool:
        """Whether there are machines that no [[vm]] names."""
        return self.libvirt is not None or self.discovery.qmp is not None


def load_agent(path: Path) -> AgentConfig:
    """Read an agent's configuration. Raises ConfigError."""
    return load_config(path, AgentConfig)
