"""Finding the host's machines: configured ones, libvirt's domains, QMP sockets by a pattern.

It looks again at every interval instead of trusting events: one that is lost would be lost for
good, and a machine that appears or vanishes is noticed within an interval either way.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

from pyscan.agent.drivers.base import Driver
from pyscan.agent.drivers.qmp import HubNetworks, QmpDriver
from pyscan.config import AgentConfig
from pyscan.errors import DriverError
from pyscan.qmp import QmpSession

log = logging.getLogger(__name__)

#: Machines of one host that are found; more are left out, and that is logged.
MACHINES_MAX: Final = 4096
#: A machine that is asked who it is must not hold up the others for long.
_ASK_TIMEOUT_S: Final = 2.0
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: What QEMU answers without -uuid (qapi/misc.json, query-uuid).
_NO_UUID: Final = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a machine was found; another place, another way to it."""

    kind: str  # "qmp" or "libvirt"
    where: str  # socket or URI
    mark: int = 0  # inode of the socket: a new one is another machine's


@dataclass(frozen=True, slots=True)
class Found:
    """What one look gave."""

    machines: Mapping[str, Place]
    complete: bool  # whether libvirt, if it is configured, could be asked


@dataclass
class Discovery:
    """Looks for machines."""

    config: AgentConfig
    _names: dict[Place, str] = field(default_factory=dict)  # of sockets that were asked
    _problem: str = ""

    async def look(self) -> Found:
        """All machines by name; a configured [[vm]] is always there."""
        machines: dict[str, Place] = {}
        problems: list[str] = []
        for vm in self.config.vm:
            machines[vm.id] = Place("qmp", str(vm.qmp))
        await self._look_for_sockets(machines, problems)
        complete = await self._look_for_domains(machines, problems)
        if len(machines) > MACHINES_MAX:
            problems.append(f"more than {MACHINES_MAX} machines: the others are left out")
            machines = dict(islice(machines.items(), MACHINES_MAX))
        problem = "; ".join(problems)
        if problem and problem != self._problem:
            log.warning("discovery problem=%s", problem)
        self._problem = problem
        return Found(machines, complete)

    def driver(self, vm: str, place: Place) -> Driver:
        """The way to a machine. Raises ImportError when libvirt is not installed."""
        for each in self.config.vm:
            if each.id == vm:
                networks = HubNetworks(each.hub, each.ports, each.uplinks, self.config.network)
                return QmpDriver(each.qmp, each.pidfile, networks)
        if place.kind == "qmp":
            socket = Path(place.where)
            pidfile = socket.with_suffix(".pid")
            return QmpDriver(socket, pidfile if pidfile.exists() else None)
        from pyscan.agent.drivers.libvirt import LibvirtDriver  # noqa: PLC0415 - an extra

        assert self.config.libvirt is not None  # noqa: S101 - who else found it
        return LibvirtDriver(place.where, vm, self.config.libvirt.pid_directory)

    async def _look_for_sockets(self, machines: dict[str, Place], problems: list[str]) -> None:
        pattern = self.config.discovery.qmp
        if pattern is None:
            return
        known: dict[Place, str] = {}
        configured = {str(vm.qmp) for vm in self.config.vm}
        for path in islice(glob.iglob(pattern), MACHINES_MAX):
            if path in configured:
                continue
            try:
                place = Place("qmp", path, os.stat(path).st_ino)
                name = self._names.get(place) or await _ask_name(Path(path))
            except (OSError, DriverError) as error:
                problems.append(f"{path}: {error}")
                continue
            known[place] = name
            if name in machines and machines[name] != place:
                problems.append(f"{path}: {name} is at {machines[name].where} already")
                continue
            machines[name] = place
        self._names = known

    async def _look_for_domains(self, machines: dict[str, Place], problems: list[str]) -> bool:
        if self.config.libvirt is None:
            return True
        from pyscan.agent.drivers.libvirt import active_domains  # noqa: PLC0415 - an extra

        uri = self.config.libvirt.uri
        try:
            domains = await active_domains(uri)
        except DriverError as error:
            problems.append(str(error))
            return False
        for uuid in domains:
            machines.setdefault(uuid, Place("libvirt", uri))
        return True


async def _ask_name(socket: Path) -> str:
    """The machine's UUID; without one, the name of its socket. Raises DriverError."""
    async with QmpSession(socket, _ASK_TIMEOUT_S) as session:
        answer = await session.execute("query-uuid")
    uuid = answer.get("UUID") if isinstance(answer, Mapping) else None
    name = str(uuid) if uuid and uuid != _NO_UUID else socket.stem
    if not _NAME.fullmatch(name):
        raise DriverError("refused", f"{name!r} cannot name a machine; rename the socket")
    return name
