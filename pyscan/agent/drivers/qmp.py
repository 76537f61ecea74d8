"""The QMP driver: a QEMU process with a monitor socket of its own.

Commands are those of QEMU's qapi/*.json (run-state, net, qom, block-core, dump, ui, migration);
docs/interop/qemu-qmp-ref. What QMP does not tell is not guessed: whether a link is up, and the
processor time of a process that shares its control group.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Final

from pyscan.agent import cgroup
from pyscan.agent.drivers.base import (
    DEVICES_MAX,
    LONG_STEP_TIMEOUT_S,
    STEP_TIMEOUT_S,
    CpuQuota,
    Disk,
    Machine,
    NetworkLink,
    Throttle,
    remove_overlay,
)
from pyscan.agent.process import Pidfile, ProcessIdentity, identify, is_hypervisor, read_pidfile
from pyscan.errors import DriverError
from pyscan.qmp import QmpSession

#: Interval at which a block job is looked at.
_JOB_POLL_S: Final = 0.05
#: What a machine's description asks; all of them only read.
_QUERIES: Final = (
    *("query-version", "query-name", "query-uuid", "query-status", "query-cpus-fast"),
    *("query-block", "query-named-block-nodes", "query-pci", "query-chardev", "query-iothreads"),
    "query-memory-size-summary",
)


@dataclass(frozen=True, slots=True)
class HubNetworks:
    """How a machine whose cards are plugged into a hub of QEMU gets to another network.

    QEMU cannot plug a running machine's card into another backend, but a hub (`-netdev
    hubport`) can get another port and lose the ones that it had.
    """

    hub: int | None = None
    ports: tuple[str, ...] = ()  # the links that are plugged into it
    uplinks: tuple[str, ...] = ()  # the hub's ports to the network that the machine came with
    backends: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # by network


class QmpDriver:
    """One machine behind a QMP socket, and perhaps a pidfile."""

    def __init__(
        self, socket: Path, pidfile: Path | None = None, networks: HubNetworks = HubNetworks()
    ) -> None:
        self._socket = socket
        self._pidfile = pidfile
        self._networks = networks

    @asynccontextmanager
    async def attach(self) -> AsyncIterator[Machine]:
        """Open a QMP session for as long as the context lasts."""
        async with QmpSession(self._socket, STEP_TIMEOUT_S) as session:
            process = self.recorded_process().process
            if process is None and is_hypervisor(session.peer_pid):
                process = identify(session.peer_pid)
            yield _QmpMachine(session, process, self._networks)

    def recorded_process(self) -> Pidfile:
        """What the pidfile says; nothing without one."""
        return read_pidfile(self._pidfile) if self._pidfile else Pidfile()


class _QmpMachine:
    """A `Machine` over an open session."""

    def __init__(
        self, session: QmpSession, process: ProcessIdentity | None, networks: HubNetworks
    ) -> None:
        self._session = session
        self._process = process
        self._networks = networks

    @property
    def process(self) -> ProcessIdentity | None:
        return self._process

    async def running(self) -> bool:
        status = await self._session.execute("query-status")
        if not isinstance(status, Mapping) or not isinstance(status.get("running"), bool):
            raise DriverError("refused", "query-status gave no run state; is this QEMU?")
        return bool(status["running"])

    async def links(self) -> tuple[NetworkLink, ...]:
        # QEMU has no query for network links: every device with a `netdev` property names
        # the link that it is plugged into.
        names: list[str] = []
        for parent in ("/machine/peripheral", "/machine/peripheral-anon"):
            devices = await self._children(parent)
            if len(devices) > DEVICES_MAX:
                raise DriverError("refused", f"more than {DEVICES_MAX} devices in {parent}")
            for device in devices:
                names += await self._link_of(f"{parent}/{device}")
        return tuple(NetworkLink(name) for name in dict.fromkeys(names))

    async def _children(self, path: str) -> list[str]:
        entries = _maps(await self._session.execute("qom-list", {"path": path}))
        return [
            str(entry.get("name"))
            for entry in entries
            if str(entry.get("type")).startswith("child<")
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

    async def move_link(self, name: str, network: str) -> None:
        hub, uplinks = self._networks.hub, self._networks.uplinks
        backend = self._networks.backends.get(network)
        movable = hub is not None and name in self._networks.ports
        if not movable and not network:
            return  # it never left
        if not movable or (network and backend is None):
            raise DriverError(
                "unsupported",
                f"{name} cannot be moved to {network}: set [[vm]] hub, ports and uplinks, "
                f"and [network.{network}]",
            )
        # All cards of the hub move together; the next one finds it done.
        for uplink in uplinks:
            await self.set_link(uplink, up=not network)
        for other in self._networks.backends:
            if other != network:
                await self._accept("not found", "netdev_del", {"id": _port_name(other)})
                await self._accept("not found", "netdev_del", {"id": _backend_name(other)})
        if backend is not None:
            own = _backend_name(network)
            await self._accept("duplicate", "netdev_add", {**backend, "id": own})
            port = {"type": "hubport", "id": _port_name(network), "hubid": hub, "netdev": own}
            await self._accept("duplicate", "netdev_add", port)

    async def _accept(
        self, done_already: str, command: str, arguments: Mapping[str, object]
    ) -> None:
        """Run a command; a refusal with these words means that its state is there already."""
        try:
            await self._session.execute(command, arguments)
        except DriverError as error:
            if error.reason != "refused" or done_already not in str(error).lower():
                raise

    async def disks(self) -> tuple[Disk, ...]:
        return tuple(disk for disk, _ in await self._blocks())

    async def _blocks(self) -> list[tuple[Disk, str]]:
        """Writable disks, each with the QOM path of its device."""
        found = []
        for entry in await self._entries():
            inserted, qdev = entry.get("inserted"), entry.get("qdev")
            if not isinstance(inserted, Mapping) or inserted.get("ro") or not qdev:
                continue
            found.append((_disk(str(qdev), inserted), str(qdev)))
        return found

    async def _entries(self) -> list[Mapping[str, object]]:
        entries = _maps(await self._session.execute("query-block"))
        if len(entries) > DEVICES_MAX:
            raise DriverError("refused", f"more than {DEVICES_MAX} disks")
        return entries

    async def _block(self, name: str) -> tuple[Disk, str]:
        for disk, qdev in await self._blocks():
            if disk.name == name:
                return disk, qdev
        raise DriverError("refused", f"it has no writable disk {name} any more")

    async def cpu_quota(self) -> CpuQuota:
        return cgroup.read_quota(self._known_process().pid)

    async def set_cpu_quota(self, quota: CpuQuota) -> None:
        cgroup.write_quota(self._known_process().pid, quota)

    def _known_process(self) -> ProcessIdentity:
        if self._process is None or not self._process.alive():
            raise DriverError("unsupported", "its process is not known; set [[vm]] pidfile")
        return self._process

    async def set_throttle(self, disk: str, throttle: Throttle) -> None:
        _, qdev = await self._block(disk)
        await self._session.execute("block_set_io_throttle", {"id": qdev, **asdict(throttle)})

    async def add_overlay(self, disk: str, overlay: Path) -> None:
        block, _ = await self._block(disk)
        if block.node == _node_name(overlay):
            return
        await self._session.execute(
            "blockdev-snapshot-sync",
            {
                "node-name": block.node,
                "snapshot-file": str(overlay),
                "format": "qcow2",
                "snapshot-node-name": _node_name(overlay),
            },
        )

    async def commit_overlay(self, disk: str, overlay: Path, base: Disk) -> None:
        job = _node_name(overlay)
        block, _ = await self._block(disk)
        jobs = await self._jobs()
        if block.node == _node_name(overlay) and job not in jobs:
            # Without a base, QEMU would write into the lowest image of the chain.
            await self._session.execute(
                "block-commit", {"job-id": job, "device": block.node, "base-node": base.node}
            )
        try:
            async with asyncio.timeout(LONG_STEP_TIMEOUT_S):
                while job in (jobs := await self._jobs()):
                    if jobs[job]:
                        with suppress(DriverError):  # told once already, or just over
                            await self._session.execute("block-job-complete", {"device": job})
                    await asyncio.sleep(_JOB_POLL_S)
        except TimeoutError as error:
            raise DriverError(
                "timeout",
                f"disk {disk} is not written back after {LONG_STEP_TIMEOUT_S:g} s; "
                "release it again",
            ) from error
        block, _ = await self._block(disk)
        if block.file != base.file:
            raise DriverError("refused", f"disk {disk} still writes to {block.file}; try again")
        remove_overlay(overlay)

    async def _jobs(self) -> dict[str, bool]:
        """Block jobs, and whether each is ready to be completed."""
        jobs = _maps(await self._session.execute("query-block-jobs"))
        return {str(job.get("device")): bool(job.get("ready")) for job in jobs}

    async def discard_overlay(self, disk: str, overlay: Path, base: Disk) -> None:
        # QEMU opened the base for reading only, and only its commit opens it for writing
        # again with the options that it had: an empty overlay is put in and committed.
        empty = overlay.with_suffix(".empty")
        was_running = await self.running()
        await self.pause()
        block, qdev = await self._block(disk)
        if block.node == _node_name(overlay):
            await self._add_empty_overlay(disk, empty, base)
            node = {"path": qdev, "property": "drive", "value": _node_name(empty)}
            await self._session.execute("qom-set", node)
        await self.commit_overlay(disk, empty, base)
        for node_name in (_node_name(empty), _file_node_name(empty)):
            await self._accept("failed to find", "blockdev-del", {"node-name": node_name})
        await self._reset()
        # Last: while it is there, a crash has come before the reset.
        remove_overlay(overlay)
        if was_running:
            await self.resume()

    async def _add_empty_overlay(self, disk: str, empty: Path, base: Disk) -> None:
        remove_overlay(empty)  # what a crash left
        node, file_node = _node_name(empty), _file_node_name(empty)
        for name in (node, file_node):
            await self._accept("failed to find", "blockdev-del", {"node-name": name})
        await self._create_image({"driver": "file", "filename": str(empty), "size": 0})
        await self._session.execute(
            "blockdev-add", {"driver": "file", "node-name": file_node, "filename": str(empty)}
        )
        size = await self._virtual_size(disk)
        await self._create_image({"driver": "qcow2", "file": file_node, "size": size})
        await self._session.execute(
            "blockdev-add",
            {"driver": "qcow2", "node-name": node, "file": file_node, "backing": base.node},
        )

    async def _virtual_size(self, disk: str) -> object:
        _, qdev = await self._block(disk)
        for entry in await self._entries():
            if entry.get("qdev") == qdev:
                inserted = entry.get("inserted")
                image = inserted.get("image") if isinstance(inserted, Mapping) else None
                if isinstance(image, Mapping):
                    return image.get("virtual-size")
        raise DriverError("refused", f"the size of disk {disk} is not known")

    async def _create_image(self, options: Mapping[str, object]) -> None:
        job = "pyscan-create"
        await self._accept("not found", "job-dismiss", {"id": job})
        await self._session.execute("blockdev-create", {"job-id": job, "options": options})
        problem: object = "it has no end"
        with suppress(TimeoutError):
            async with asyncio.timeout(STEP_TIMEOUT_S):
                problem = await self._end_of_job(job)
        await self._accept("not found", "job-dismiss", {"id": job})
        if problem:
            raise DriverError("refused", f"cannot create an image: {problem}")

    async def _end_of_job(self, name: str) -> object:
        """What went wrong with a job, once it is over."""
        while True:
            jobs = _maps(await self._session.execute("query-jobs"))
            found = next((job for job in jobs if job.get("id") == name), None)
            if found is None or found.get("status") == "concluded":
                return "it is gone" if found is None else found.get("error")
            await asyncio.sleep(_JOB_POLL_S)

    async def _reset(self) -> None:
        events = self._session.events("RESET", "SHUTDOWN")
        await self._session.execute("system_reset")
        try:
            async with asyncio.timeout(STEP_TIMEOUT_S):
                event = await anext(events)
        except TimeoutError as error:
            raise DriverError("timeout", "it was not reset in time; reset it") from error
        if event.get("event") == "SHUTDOWN":
            raise DriverError("gone", "it ended at the reset (-no-reboot); start it again")

    async def dump_memory(self, file: Path) -> None:
        # The listener first: a small machine is dumped before the command's answer is read.
        events = self._session.events("DUMP_COMPLETED")
        await self._session.execute(
            "dump-guest-memory",
            {"paging": False, "protocol": f"file:{file}", "detach": True, "format": "elf"},
        )
        try:
            async with asyncio.timeout(LONG_STEP_TIMEOUT_S):
                event = await anext(events)
        except TimeoutError as error:
            raise DriverError(
                "timeout", f"no whole memory dump after {LONG_STEP_TIMEOUT_S:g} s"
            ) from error
        data = event.get("data")
        result = data.get("result") if isinstance(data, Mapping) else None
        if not isinstance(result, Mapping) or result.get("status") != "completed":
            problem = data.get("error") if isinstance(data, Mapping) else None
            raise DriverError("refused", f"the memory dump failed: {problem or 'no reason given'}")

    async def screenshot(self, file: Path) -> None:
        await self._session.execute("screendump", {"filename": str(file), "format": "png"})

    async def describe(self, directory: Path) -> Mapping[str, bytes]:
        facts: dict[str, object] = {}
        for name in _QUERIES:
            try:
                facts[name] = await self._session.execute(name)
            except DriverError as error:
                if error.reason != "refused":
                    raise
                facts[name] = {"refused": str(error)}
        registers = await self._session.execute(
            "human-monitor-command", {"command-line": "info registers -a"}
        )
        # `live` true would take the disks from a machine that is paused (QEMU
        # migration/savevm.c, qmp_xen_save_devices_state); it needs no Xen.
        await self._session.execute(
            "xen-save-devices-state",
            {"filename": str(directory / "devices.state"), "live": False},
            LONG_STEP_TIMEOUT_S,
        )
        return {
            "machine.json": json.dumps(facts, indent=1, sort_keys=True).encode(),
            "registers.txt": str(registers).encode(),
        }

    async def quit(self) -> None:
        await self._session.execute("quit")


def _maps(answer: object) -> list[Mapping[str, object]]:
    """The maps of a list. A hypervisor that its guest has taken over may answer anything."""
    entries = answer if isinstance(answer, list) else []
    return [entry for entry in entries if isinstance(entry, Mapping)]


def _disk(qdev: str, inserted: Mapping[str, object]) -> Disk:
    # "/machine/peripheral/blk0/virtio-backend" is known to people as blk0.
    device = qdev.removeprefix("/machine/peripheral/")
    name = device.split("/", 1)[0] if device != qdev else qdev
    limits = {limit.name: inserted.get(limit.name) for limit in fields(Throttle)}
    throttle = Throttle(**{k: value for k, value in limits.items() if isinstance(value, int)})
    return Disk(name, str(inserted.get("file")), str(inserted.get("node-name")), throttle)


def _node_name(overlay: Path) -> str:
    """A name for QEMU's block layer, at most 31 characters (block-core.json, node-name)."""
    return f"pyscan-{hashlib.sha256(str(overlay).encode()).hexdigest()[:16]}"


def _file_node_name(overlay: Path) -> str:
    return f"{_node_name(overlay)}-file"


def _backend_name(network: str) -> str:
    return f"pyscan-{network}"


def _port_name(network: str) -> str:
    return f"pyscan-{network}-port"
