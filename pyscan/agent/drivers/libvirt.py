"""The libvirt driver: one domain of a libvirt daemon, found by its UUID.

libvirt-python blocks, so every call runs in a thread of its own with a limit of time: a
daemon that hangs costs that thread, never the agent. Device descriptions are derived from the
live XML, so nothing that the daemon added to them is lost (docs: libvirt.org/formatdomain.html).

`suspend` and `destroy` of what is suspended or gone are errors to libvirt and states to us:
after an error, the state decides.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Final, TypeVar
from xml.etree import ElementTree

import libvirt

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
from pyscan.agent.process import Pidfile, ProcessIdentity, is_hypervisor, read_pidfile
from pyscan.errors import DriverError

ResultT = TypeVar("ResultT")

#: Calls that may hang at the same time before no more are begun.
_CALLS_MAX: Final = 32
#: Interval at which a block job is looked at.
_JOB_POLL_S: Final = 0.05
#: libvirt waits up to 15 s for a process that does not end (qemu_process.c, virProcessKill).
_DESTROY_TIMEOUT_S: Final = 20.0
#: libvirt's names of the limits of a disk (libvirt-domain.h, VIR_DOMAIN_BLOCK_IOTUNE_*).
_TUNE_NAMES: Final = {
    "iops": "total_iops_sec",
    "bps": "total_bytes_sec",
    "iops_rd": "read_iops_sec",
    "iops_wr": "write_iops_sec",
    "bps_rd": "read_bytes_sec",
    "bps_wr": "write_bytes_sec",
}
_RUNNING: Final = {libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED}
_LIVE: Final = libvirt.VIR_DOMAIN_AFFECT_LIVE

# Failures reach the caller as DriverError; the library would print each on stderr as well.
libvirt.registerErrorHandler(lambda _context, _error: None, None)
_calls = threading.BoundedSemaphore(_CALLS_MAX)


async def call(what: str, function: Callable[[], ResultT], timeout_s: float) -> ResultT:
    """Run a blocking libvirt call. Raises DriverError.

    A call that does not come back in time is left behind in its (daemon) thread.
    """
    if not _calls.acquire(blocking=False):
        raise DriverError("timeout", f"{what}: {_CALLS_MAX} calls hang; restart libvirtd")
    loop = asyncio.get_running_loop()
    future: asyncio.Future[ResultT] = loop.create_future()

    def settle(result: ResultT | None, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        try:
            result, error = function(), None
        except Exception as problem:
            result, error = None, problem
        finally:
            _calls.release()
        with suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name=f"libvirt-{what}", daemon=True).start()
    try:
        async with asyncio.timeout(timeout_s):
            return await future
    except TimeoutError as error:
        raise DriverError(
            "timeout", f"libvirt: no answer to {what} within {timeout_s:g} s; its effect is unknown"
        ) from error
    except libvirt.libvirtError as error:
        raise driver_error(what, error) from error


def driver_error(what: str, error: libvirt.libvirtError) -> DriverError:
    """libvirt's error by our reason codes."""
    code = error.get_error_code()
    text = " ".join(str(error).split())
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return DriverError("gone", f"libvirt knows no such machine: {text}")
    if code == libvirt.VIR_ERR_OPERATION_TIMEOUT:
        return DriverError("timeout", f"libvirt: {what}: {text}")
    lost = {
        libvirt.VIR_ERR_NO_CONNECT,
        libvirt.VIR_ERR_INVALID_CONN,
        libvirt.VIR_ERR_RPC,
        libvirt.VIR_ERR_SYSTEM_ERROR,
        libvirt.VIR_ERR_AUTH_FAILED,
        libvirt.VIR_ERR_AUTH_UNAVAILABLE,
    }
    if code in lost or error.get_error_domain() == libvirt.VIR_FROM_RPC:
        return DriverError(
            "unreachable", f"libvirt: {what}: {text}; check [libvirt] uri and that it runs"
        )
    return DriverError("refused", f"libvirt refused {what}: {text}")


@asynccontextmanager
async def connection(uri: str) -> AsyncIterator[libvirt.virConnect]:
    """An open connection. Raises DriverError."""
    link = await call("connect", lambda: libvirt.open(uri), STEP_TIMEOUT_S)
    try:
        yield link
    finally:
        # A connection that hangs is left to its thread.
        with suppress(DriverError):
            await call("disconnect", link.close, STEP_TIMEOUT_S)


async def active_domains(uri: str) -> list[str]:
    """UUIDs of the running and paused domains. Raises DriverError."""

    def names(link: libvirt.virConnect) -> list[str]:
        domains = link.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        return [domain.UUIDString() for domain in domains]

    async with connection(uri) as link:
        return await call("list", lambda: names(link), STEP_TIMEOUT_S)


class LibvirtDriver:
    """One domain of the daemon at `uri`, whose pid files lie in `pid_directory`."""

    def __init__(self, uri: str, uuid: str, pid_directory: Path) -> None:
        self._uri = uri
        self._uuid = uuid
        self._pid_directory = pid_directory
        self._name = ""  # of the domain, once it was reached

    @asynccontextmanager
    async def attach(self) -> AsyncIterator[Machine]:
        """Open a connection for as long as the context lasts."""
        async with connection(self._uri) as link:
            domain = await call(
                "look up", lambda: link.lookupByUUIDString(self._uuid), STEP_TIMEOUT_S
            )
            self._name = domain.name()
            if not await call("look", domain.isActive, STEP_TIMEOUT_S):
                raise DriverError("gone", f"libvirt: {self._name} does not run")
            yield _Domain(domain, self.recorded_process().process)

    def recorded_process(self) -> Pidfile:
        """What libvirt's pid file of this domain says (qemu_process.c, NAME.pid)."""
        if not self._name or "/" in self._name:
            return Pidfile()
        recorded = read_pidfile(self._pid_directory / f"{self._name}.pid")
        if recorded.process is not None and not is_hypervisor(recorded.process.pid):
            return Pidfile()
        return recorded


class _Domain:
    """A `Machine` over an open connection. Links are named by their MAC address."""

    def __init__(self, domain: libvirt.virDomain, process: ProcessIdentity | None) -> None:
        self._domain = domain
        self._process = process

    @property
    def process(self) -> ProcessIdentity | None:
        return self._process

    async def running(self) -> bool:
        state = (await self._call("state", self._domain.state))[0]
        if state in {libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED}:
            raise DriverError("gone", f"libvirt: {self._domain.name()} does not run")
        return state in _RUNNING

    async def links(self) -> tuple[NetworkLink, ...]:
        return tuple(_link(interface) for interface in _interfaces(await self._live()))

    async def disks(self) -> tuple[Disk, ...]:
        tree = await self._live()
        disks = []
        for element in _limited(tree.findall("devices/disk")):
            target, source = element.find("target"), element.find("source")
            if target is None or source is None or element.find("readonly") is not None:
                continue
            name, file = target.get("dev", ""), source.get("file") or source.get("dev") or ""
            if element.get("device", "disk") == "disk" and file:
                disks.append(Disk(name, file, "", await self._throttle(name)))
        return tuple(disks)

    async def _throttle(self, disk: str) -> Throttle:
        limits = await self._call("limits of a disk", lambda: self._domain.blockIoTune(disk, _LIVE))
        ours = {limit.name: limits.get(_TUNE_NAMES[limit.name], 0) for limit in fields(Throttle)}
        return Throttle(**{name: int(value) for name, value in ours.items()})

    async def cpu_quota(self) -> CpuQuota:
        limits = await self._call(
            "processor limits", lambda: self._domain.schedulerParametersFlags(_LIVE)
        )
        if "vcpu_quota" not in limits or not limits.get("vcpu_period"):
            raise DriverError("unsupported", "libvirt has no processor limits for it (cgroups)")
        return CpuQuota(_signed(limits["vcpu_quota"]), int(limits["vcpu_period"]))

    async def pause(self) -> None:
        await self._reach("suspend", self._domain.suspend, running=False)

    async def resume(self) -> None:
        await self._reach("resume", self._domain.resume, running=True)

    async def _reach(self, what: str, function: Callable[[], object], *, running: bool) -> None:
        try:
            await self._call(what, function)
        except DriverError as error:
            if error.reason != "refused" or await self.running() is not running:
                raise

    async def set_link(self, name: str, *, up: bool) -> None:
        interface = await self._interface(name)
        if (_link(interface).up is True) is up:
            return
        for element in interface.findall("link"):
            interface.remove(element)
        ElementTree.SubElement(interface, "link", state="up" if up else "down")
        await self._update("set a link", interface)

    async def move_link(self, name: str, network: str) -> None:
        interface = await self._interface(name)
        source = interface.find("source")
        if interface.get("type") != "network" or source is None:
            if not network:
                return  # it never left
            raise DriverError(
                "unsupported", f"{name} is not on a network of libvirt, so it cannot be moved"
            )
        if source.get("network") == network:
            return
        source.attrib.clear()
        source.set("network", network)
        await self._update("move a link", interface)

    async def _interface(self, name: str) -> ElementTree.Element:
        for interface in _interfaces(await self._live()):
            if _link(interface).name == name:
                return interface
        raise DriverError("refused", f"it has no link {name} any more")

    async def _update(self, what: str, device: ElementTree.Element) -> None:
        text = ElementTree.tostring(device, encoding="unicode")
        await self._call(what, lambda: self._domain.updateDeviceFlags(text, _LIVE))

    async def set_cpu_quota(self, quota: CpuQuota) -> None:
        limits = {"vcpu_period": quota.period_us, "vcpu_quota": quota.runtime_us}
        await self._call(
            "limit the processor",
            lambda: self._domain.setSchedulerParametersFlags(limits, _LIVE),
        )

    async def set_throttle(self, disk: str, throttle: Throttle) -> None:
        limits = {_TUNE_NAMES[name]: value for name, value in asdict(throttle).items()}
        await self._call("limit a disk", lambda: self._domain.setBlockIoTune(disk, limits, _LIVE))

    async def add_overlay(self, disk: str, overlay: Path) -> None:
        if (await self._disk(disk)).file == str(overlay):
            return
        tree = ElementTree.Element("domainsnapshot")
        parts = ElementTree.SubElement(tree, "disks")
        for each in await self.disks():
            external = each.name == disk
            kind = "external" if external else "no"
            part = ElementTree.SubElement(parts, "disk", name=each.name, snapshot=kind)
            if external:
                ElementTree.SubElement(part, "source", file=str(overlay))
        # A file that a crash left behind is overwritten; the snapshot is no restore point of
        # libvirt's, so it keeps no record of it.
        flags = (
            libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        )
        remove_overlay(overlay)
        text = ElementTree.tostring(tree, encoding="unicode")
        await self._call("put an overlay", lambda: self._domain.snapshotCreateXML(text, flags))

    async def _disk(self, name: str) -> Disk:
        for disk in await self.disks():
            if disk.name == name:
                return disk
        raise DriverError("refused", f"it has no writable disk {name} any more")

    async def commit_overlay(self, disk: str, overlay: Path, base: Disk) -> None:
        domain = self._domain
        if (await self._disk(disk)).file == str(overlay):
            if not await self._call("look at a job", lambda: domain.blockJobInfo(disk, 0)):
                flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
                await self._call(
                    "write an overlay back",
                    lambda: domain.blockCommit(disk, base.file, str(overlay), 0, flags),
                )
            await self._pivot(disk)
        if (await self._disk(disk)).file == str(overlay):
            raise DriverError("refused", f"disk {disk} still writes to {overlay}; try again")
        remove_overlay(overlay)

    async def _pivot(self, disk: str) -> None:
        """Switch to the base once the copy is complete."""
        domain = self._domain
        flags = libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT
        try:
            async with asyncio.timeout(LONG_STEP_TIMEOUT_S):
                while job := await self._call(
                    "look at a job", lambda: domain.blockJobInfo(disk, 0)
                ):
                    if job["cur"] == job["end"]:
                        # libvirt may see the end a moment later than QEMU tells it.
                        with suppress(DriverError):
                            await self._call("end a job", lambda: domain.blockJobAbort(disk, flags))
                    await asyncio.sleep(_JOB_POLL_S)
        except TimeoutError as error:
            raise DriverError(
                "timeout", f"disk {disk} is not written back after {LONG_STEP_TIMEOUT_S:g} s"
            ) from error

    async def discard_overlay(self, disk: str, overlay: Path, base: Disk) -> None:
        # libvirt cannot take a running machine's disk back, and its memory would no longer
        # fit the disk anyway: it is ended and started with the base.
        tree = await self._live()
        changed = False
        for element in tree.findall("devices/disk"):
            target, source = element.find("target"), element.find("source")
            if target is None or source is None or target.get("dev") != disk:
                continue
            changed = source.get("file") == str(overlay)
            if changed:
                _take_back(element, base.file)
        if changed:
            await self._restart(ElementTree.tostring(tree, encoding="unicode"))
        remove_overlay(overlay)

    async def _restart(self, text: str) -> None:
        domain = self._domain
        paused = not await self.running()
        link = domain.connect()
        persistent = await self._call("look", domain.isPersistent)
        await self.quit()
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
        if persistent:
            self._domain = await self._call("define", lambda: link.defineXML(text))
            await self._call("start", lambda: self._domain.createWithFlags(flags))
        else:
            self._domain = await self._call("start", lambda: link.createXML(text, flags))

    async def dump_memory(self, file: Path) -> None:
        kind, flags = libvirt.VIR_DOMAIN_CORE_DUMP_FORMAT_RAW, libvirt.VIR_DUMP_MEMORY_ONLY
        await self._call(
            "dump the memory",
            lambda: self._domain.coreDumpWithFormat(str(file), kind, flags),
            LONG_STEP_TIMEOUT_S,
        )

    async def screenshot(self, file: Path) -> None:
        def receive() -> None:
            stream = self._domain.connect().newStream()
            self._domain.screenshot(stream, 0)
            with file.open("xb") as image:
                stream.recvAll(lambda _stream, data, _opaque: image.write(data), None)
            stream.finish()

        await self._call("take a screenshot", receive, LONG_STEP_TIMEOUT_S)

    async def describe(self, directory: Path) -> Mapping[str, bytes]:
        del directory  # libvirt gives nothing large
        domain = self._domain

        def ask() -> dict[str, bytes]:
            state = f"state {domain.state()} info {domain.info()}\n"
            return {"domain.xml": domain.XMLDesc().encode(), "state.txt": state.encode()}

        return await self._call("describe", ask)

    async def quit(self) -> None:
        try:
            await self._call("destroy", self._domain.destroy, _DESTROY_TIMEOUT_S)
        except DriverError as error:
            if error.reason == "gone" or not await self._call("look", self._domain.isActive):
                return
            raise

    async def _live(self) -> ElementTree.Element:
        """The live description, secrets included: what is given back must be whole."""
        flags = libvirt.VIR_DOMAIN_XML_SECURE
        text = await self._call("describe", lambda: self._domain.XMLDesc(flags))
        return ElementTree.fromstring(text)  # noqa: S314 - libvirt wrote it

    async def _call(
        self, what: str, function: Callable[[], ResultT], timeout_s: float = STEP_TIMEOUT_S
    ) -> ResultT:
        return await call(what, function, timeout_s)


def _interfaces(tree: ElementTree.Element) -> Iterator[ElementTree.Element]:
    return iter(_limited(tree.findall("devices/interface")))


def _limited(elements: list[ElementTree.Element]) -> list[ElementTree.Element]:
    if len(elements) > DEVICES_MAX:
        raise DriverError("refused", f"more than {DEVICES_MAX} devices of a kind")
    return elements


def _link(interface: ElementTree.Element) -> NetworkLink:
    mac, state, source = (interface.find(name) for name in ("mac", "link", "source"))
    return NetworkLink(
        name=mac.get("address", "") if mac is not None else "",
        up=state is None or state.get("state", "up") == "up",
        network=source.get("network", "") if source is not None else "",
    )


def _take_back(disk: ElementTree.Element, file: str) -> None:
    """Make the base the disk's image again, in the format that it had below the overlay."""
    source, store, driver = (disk.find(name) for name in ("source", "backingStore", "driver"))
    if source is None:
        return
    source.attrib.clear()
    source.set("file", file)
    kind = store.find("format") if store is not None else None
    if driver is not None and kind is not None:
        driver.set("type", kind.get("type", "raw"))
    if store is not None:
        disk.remove(store)


def _signed(value: int) -> int:
    """A number that libvirt may give as unsigned."""
    return value - (1 << 64) if value >= 1 << 63 else value
