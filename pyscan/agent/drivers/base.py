"""The interface to a hypervisor: single steps on one virtual machine.

What an action is made of, and in which order, stands in `pyscan.agent.actions`. Every step
names a state, so it may be repeated; a step that finds its state already there succeeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from pyscan.agent.process import Pidfile, ProcessIdentity
from pyscan.errors import DriverError

#: Bound of connecting and of every single step.
STEP_TIMEOUT_S: Final = 5.0
#: Bound of a memory dump, and of writing an overlay back into its disk.
LONG_STEP_TIMEOUT_S: Final = 900.0
#: Devices looked at when searching for network cards or disks.
DEVICES_MAX: Final = 256


@dataclass(frozen=True, slots=True)
class NetworkLink:
    """A virtual network card and where it is plugged into."""

    name: str
    up: bool | None = None  # None: the hypervisor does not tell
    network: str = ""  # name of the network; empty: the one that the machine was started with


@dataclass(frozen=True, slots=True)
class Throttle:
    """Limits of a disk per second, as QEMU counts them; 0: no limit."""

    iops: int = 0
    bps: int = 0  # bytes
    iops_rd: int = 0
    iops_wr: int = 0
    bps_rd: int = 0
    bps_wr: int = 0


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk that the machine can write to."""

    name: str
    file: str  # the image that is written to now
    node: str = ""  # QEMU's name of that image; empty where the hypervisor has none
    throttle: Throttle = Throttle()


@dataclass(frozen=True, slots=True)
class CpuQuota:
    """Processor time: `runtime_us` of every `period_us`; negative: no limit."""

    runtime_us: int
    period_us: int


@dataclass(frozen=True, slots=True)
class Setup:
    """What a machine is connected to and may use."""

    links: tuple[NetworkLink, ...] = ()
    disks: tuple[Disk, ...] = ()
    cpu: CpuQuota | None = None  # None: cannot be told, so cannot be changed
    problems: dict[str, str] = field(default_factory=dict)  # by part that could not be looked at


class Machine(Protocol):
    """A virtual machine that answers. Every method raises DriverError."""

    @property
    def process(self) -> ProcessIdentity | None:
        """The hypervisor process of this machine; None when it cannot be told for sure."""

    async def running(self) -> bool:
        """Whether its processors run."""

    async def links(self) -> tuple[NetworkLink, ...]:
        """All network links, up or down."""

    async def disks(self) -> tuple[Disk, ...]:
        """All disks that the machine can write to."""

    async def cpu_quota(self) -> CpuQuota:
        """The limit of its processor time."""

    async def pause(self) -> None:
        """Stop its processors."""

    async def resume(self) -> None:
        """Let its processors run."""

    async def set_link(self, name: str, *, up: bool) -> None:
        """Plug or unplug a network link."""

    async def move_link(self, name: str, network: str) -> None:
        """Connect a link to another network; empty: to the one that it was started with."""

    async def set_cpu_quota(self, quota: CpuQuota) -> None:
        """Limit its processor time."""

    async def set_throttle(self, disk: str, throttle: Throttle) -> None:
        """Limit a disk."""

    async def add_overlay(self, disk: str, overlay: Path) -> None:
        """Let a disk's writes go to a new file from now on."""

    async def commit_overlay(self, disk: str, overlay: Path, base: Disk) -> None:
        """Write what is in the overlay into its base, and write there again."""

    async def discard_overlay(self, disk: str, overlay: Path, base: Disk) -> None:
        """Go back to the base and forget the overlay.

        What the machine has in memory no longer fits the disk: it is started afresh, and
        is paused or running as it was.
        """

    async def dump_memory(self, file: Path) -> None:
        """Write its memory as an ELF core, processor registers included."""

    async def screenshot(self, file: Path) -> None:
        """Write what its first screen shows, as an image."""

    async def describe(self, directory: Path) -> Mapping[str, bytes]:
        """Its configuration and device state: contents by file name.

        Large parts may be written into `directory` by the hypervisor.
        """

    async def quit(self) -> None:
        """End the machine at once."""


def remove_overlay(overlay: Path) -> None:
    """Delete an overlay that nothing writes to any more; it may be gone. Raises DriverError."""
    try:
        overlay.unlink(missing_ok=True)
    except OSError as error:
        raise DriverError("refused", f"{overlay}: cannot be removed: {error.strerror}") from error


class Driver(Protocol):
    """The way to one virtual machine."""

    def attach(self) -> AbstractAsyncContextManager[Machine]:
        """Reach the machine.

        Entering raises DriverError: "unreachable", "timeout", or "gone" when the hypervisor
        itself says that there is no such machine.
        """

    def recorded_process(self) -> Pidfile:
        """What the host's records say about the machine's process, reachable or not."""
