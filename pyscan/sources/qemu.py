"""``qemu:`` - a running QEMU, asked over its QMP socket for its RAM file and memory map.

The connection serves discovery only and is closed at once: QEMU serves one client per
socket, and the agent needs it. What stays is the RAM file, opened read-only, and a pidfd
(pidfd_open(2)) of the process, because the file outlives the virtual machine: the memory
of a machine that is gone must not be taken for that of a running one.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from pyscan.errors import DriverError, SourceUnavailable, UsageError
from pyscan.qmp import QmpSession
from pyscan.sources.file import FileSource
from pyscan.sources.layout import Layout
from pyscan.sources.machines import MACHINES, machine_layout
from pyscan.sources.uri import SourceUri

_WANTED = (
    "start QEMU with -object memory-backend-file,id=ram,size=SIZE,mem-path=/absolute/file,"
    "share=on -machine q35,memory-backend=ram"
)


@dataclass(frozen=True, slots=True)
class QemuMemory:
    """What a running QEMU says of its memory."""

    path: Path  # the RAM file
    layout: Layout
    pid: int  # 0 when the process is in another PID namespace


def open_qemu(uri: SourceUri) -> FileSource:
    """Open ``qemu:PATH`` of a QMP socket.

    Raises SourceUnavailable when QEMU does not answer, UsageError when its memory is not
    in a shared file. It runs an event loop of its own: call it from a thread without one.
    """
    uri.allow()
    memory = asyncio.run(discover(Path(uri.path)))
    pidfd = None
    if memory.pid:
        try:
            pidfd = os.pidfd_open(memory.pid)
        except OSError as error:
            raise SourceUnavailable(
                f"{uri.text}: QEMU process {memory.pid} is gone; start it again"
            ) from error
    return FileSource(uri.text, memory.path, memory.layout, pidfd=pidfd)


async def discover(socket: Path) -> QemuMemory:
    """Ask QEMU for its machine type and RAM file.

    Raises SourceUnavailable when it does not answer, UsageError when it is a machine or a
    kind of memory that cannot be read from outside.
    """
    try:
        async with QmpSession(socket) as session:
            return await _ask(socket, session)
    except DriverError as error:
        raise SourceUnavailable(str(error)) from error


async def _ask(socket: Path, session: QmpSession) -> QemuMemory:
    machine_type = str(await _get(session, "/machine", "type"))
    machine = next((m for m in MACHINES.values() if machine_type.startswith(m.type_prefix)), None)
    if machine is None:
        raise UsageError(
            f"{socket}: machine type {machine_type} is not known; known are {', '.join(MACHINES)}"
        )
    backend = str(await _get(session, "/machine", "memory-backend") or "")
    if not backend:
        raise UsageError(f"{socket}: the machine has no single memory backend; {_WANTED}")
    backend = backend if backend.startswith("/") else f"/objects/{backend}"
    if await _get(session, backend, "type") != "memory-backend-file":
        raise UsageError(f"{socket}: the RAM is anonymous memory; {_WANTED}")
    if await _get(session, backend, "share") is not True:
        raise UsageError(f"{socket}: the RAM file is not shared (share=off); {_WANTED}")
    path = Path(str(await _get(session, backend, "mem-path")))
    if not path.is_absolute():
        raise UsageError(f"{socket}: mem-path {path} is not an absolute file name; {_WANTED}")
    size = _integer(socket, await _get(session, backend, "size"))
    below_4g_max = _integer(socket, await _get(session, "/machine", "max-ram-below-4g"))
    layout = machine_layout(machine, size, below_4g_max)
    return QemuMemory(path, layout, session.peer_pid)


async def _get(session: QmpSession, path: str, name: str) -> object:
    return await session.execute("qom-get", {"path": path, "property": name})


def _integer(socket: Path, value: object) -> int:
    if not isinstance(value, int):
        raise SourceUnavailable(f"{socket}: not QEMU: {value!r} is not a number of bytes")
    return value
