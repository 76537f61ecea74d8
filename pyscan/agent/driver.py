"""The interface to a hypervisor, and its QMP implementation.

A driver belongs to one virtual machine. It does single steps; what an action is made of,
and in which order, stands in `pyscan.agent.actions`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol

from pyscan.agent.process import Pidfile, ProcessIdentity, identify, is_hypervisor, read_pidfile
from pyscan.errors import DriverError
from pyscan.qmp import QmpSession

#: Bound of connecting and of every QMP command.
QMP_TIMEOUT_S = 5.0
#: Devices looked at when searching for network cards.
DEVICES_MAX = 256


class Machine(Protocol):
    """A virtual machine that answers. Every method raises DriverError."""

    @property
    def process(self) -> ProcessIdentity | None:
        """The hypervisor process of this machine; None when it cannot be told for sure."""

    async def running(self) -> bool:
        """Whether its processors run."""

    async def links(self) -> tuple[str, ...]:
        """Names of all network links, up or down."""

    async def pause(self) -> None:
        """Stop its processors. Repeatable."""

    async def resume(self) -> None:
        """Let its processors run. Repeatable."""

    async def set_link(self, name: str, *, up: bool) -> None:
        """Plug or unplug a network link. Repeatable."""

    async def quit(self) -> None:
        """Ask the hypervisor to end the machine at once."""


class Driver(Protocol):
    """The way to one virtual machine."""

    def attach(self) -> AbstractAsyncContextManager[Machine]:
        """Reach the machine; entering raises DriverError ("unreachable" or "timeout")."""

    def recorded_process(self) -> Pidfile:
        """What the host's records say about the machine's process, reachable or not."""


class QmpDriver:
    """A QEMU process with a QMP socket of its own, and perhaps a pidfile."""

    def __init__(self, socket: Path, pidfile: Path | None = None) -> None:
        self._socket = socket
        self._pidfile = pidfile

    @asynccontextmanager
    async def attach(self) -> AsyncIterator[Machine]:
        """Open a QMP session for as long as the context lasts."""
        async with QmpSession(self._socket, QMP_TIMEOUT_S) as session:
            process = self.recorded_process().process
            if process is None and is_hypervisor(session.peer_pid):
                process = identify(session.peer_pid)
            yield _QmpMachine(session, process)

    def recorded_process(self) -> Pidfile:
        """What the pidfile says; nothing without one."""
        return read_pidfile(self._pidfile) if self._pidfile else Pidfile()


class _QmpMachine:
    """A `Machine` over an open session. Commands: QEMU qapi/run-state.json, net.json, qom.json."""

    def __init__(self, session: QmpSession, process: ProcessIdentity | None) -> None:
        self._session = session
        self._process = process

    @property
    def process(self) -> ProcessIdentity | None:
        return self._process

    async def running(self) -> bool:
        status = await self._session.execute("query-status")
        if not isinstance(status, Mapping) or not isinstance(status.get("running"), bool):
            raise DriverError("refused", "query-status gave no run state; is this QEMU?")
        return bool(status["running"])

    async def links(self) -> tuple[str, ...]:
        # QEMU has no query for network links: every device with a `netdev` property names
        # the link that it is plugged into.
        names: list[str] = []
        for parent in ("/machine/peripheral", "/machine/peripheral-anon"):
            devices = await self._children(parent)
            if len(devices) > DEVICES_MAX:
                raise DriverError("refused", f"more than {DEVICES_MAX} devices in {parent}")
            for device in devices:
                names += await self._link_of(f"{parent}/{device}")
        return tuple(dict.fromkeys(names))

    async def _children(self, path: str) -> list[str]:
        entries = await self._session.execute("qom-list", {"path": path})
        return [
            str(entry.get("name"))
            for entry in (entries if isinstance(entries, list) else [])
            if isinstance(entry, Mapping) and str(entry.get("type")).startswith("child<")
        ]

    async def _link_of(self, device: str) -> list[str]:
        # Asking right away is far cheaper than listing the properties of every device first.
        try:
            name = await self._session.execute("qom-get", {"path": device, "property": "netdev"})
        except DriverError as error:
            if error.reason != "refused":
                raise
            return []
        return [name] if isinstance(name, str) and name else []

    async def pause(self) -> None:
        await self._session.execute("stop")

    async def resume(self) -> None:
        await self._session.execute("cont")

    async def set_link(self, name: str, *, up: bool) -> None:
        # On the link's own name, not the card's: it works for cards without an id and is
        # seen by both ends (QEMU net/net.c, qmp_set_link).
        await self._session.execute("set_link", {"name": name, "up": up})

    async def quit(self) -> None:
        await self._session.execute("quit")
