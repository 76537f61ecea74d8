"""QEMU's monitor protocol (QMP) over a Unix socket: bounded in time and memory.

A thin layer over the library `qemu.qmp`: everything has a timeout, event queues are
bounded, and every failure is a `DriverError` with one of three reasons:

``unreachable``
    no socket, nobody listens, or the connection broke (a command's fate is then unknown);
``timeout``
    no answer in time (stopped process, or another client holds the socket: QEMU serves
    one client per socket);
``refused``
    QEMU answered with an error; its text is in the message.

Protocol: QEMU docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from qemu.qmp import ConnectError, EventListener, ExecuteError, Message, QMPClient, QMPError
from qemu.qmp.protocol import Runstate

from pyscan.errors import DriverError

#: Events kept per listener; the oldest is dropped when a consumer does not keep up. An
#: event says "look again", so losing an old one loses no state.
EVENTS_MAX = 256

#: Longest message accepted from a monitor.
MESSAGE_BYTES_MAX = 1 << 20

# struct ucred, socket(7): pid, uid, gid.
_UCRED = struct.Struct("=iII")

# Failures reach the caller as DriverError; the library would log each a second time.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class _BoundedListener(EventListener):
    """The library's listener with a bounded queue and without its growing history."""

    async def put(self, event: Message) -> None:
        if not self.accept(event):
            return
        while self._queue.qsize() >= EVENTS_MAX:
            self._queue.get_nowait()
        self._queue.put_nowait(event)


class QmpSession:
    """One connection to a running QEMU.

        async with QmpSession(Path("/run/vm/qmp.sock")) as session:
            status = await session.execute("query-status")

    `timeout_s` bounds connecting, leaving, and every command that names no other limit.
    Entering raises DriverError ("unreachable" or "timeout").
    """

    def __init__(self, path: Path, timeout_s: float = 5.0) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._client = QMPClient(readbuflen=MESSAGE_BYTES_MAX)
        self._client.events.event_filter = lambda _event: False  # its queue has no bound
        self._peer_pid = 0

    @property
    def peer_pid(self) -> int:
        """Process that listens on the socket, by SO_PEERCRED (socket(7), unix(7)).

        It is the process that called listen(2): QEMU itself, unless a manager opened the
        socket and handed it over.
        """
        return self._peer_pid

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.setblocking(False)
        try:
            async with asyncio.timeout(self._timeout_s):
                await loop.sock_connect(link, str(self._path))
                credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
                self._peer_pid = _UCRED.unpack(credentials)[0]
                await self._client.connect(link)
        except TimeoutError as error:
            link.close()
            raise DriverError(
                "timeout",
                f"{self._path}: QEMU did not greet within {self._timeout_s:g} s; check that it "
                "is not stopped and that no other client holds this socket",
            ) from error
        except (OSError, ConnectError) as error:
            link.close()
            cause = error.exc if isinstance(error, ConnectError) else error
            raise DriverError(
                "unreachable",
                f"{self._path}: cannot reach QEMU ({cause}); check that the virtual machine "
                "runs and that this is its -qmp socket",
            ) from error
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The reader's own end (EOF after quit, a broken pipe) is re-raised here by the
        # library; a caller that needed an answer has had it as DriverError already.
        with suppress(OSError, EOFError, QMPError, TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                await self._client.disconnect()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        timeout_s: float | None = None,
    ) -> object:
        """Run one command and return QEMU's answer (plain JSON values).

        Raises DriverError; after "timeout" the command may still take effect.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._client.execute(command, arguments)
        except TimeoutError as error:
            raise DriverError(
                "timeout",
                f"{self._path}: no answer to {command} within {limit_s:g} s; "
                "its effect is unknown, query the state",
            ) from error
        except ExecuteError as error:
            raise DriverError("refused", f"{self._path}: {command} refused: {error}") from error
        except QMPError as error:
            raise DriverError(
                "unreachable",
                f"{self._path}: connection lost during {command} ({error}); "
                "its effect is unknown, connect again and query the state",
            ) from error

    def events(self, *names: str) -> AsyncIterator[dict[str, object]]:
        """Events with one of `names` (all without names), from this call on.

        Each is a dict as in qmp-spec.rst ("event", "data", "timestamp"). At most
        EVENTS_MAX wait unread, the newest are kept. Raises DriverError("unreachable")
        from the iterator when the connection ends.
        """
        listener = _BoundedListener(names)
        self._client.register_listener(listener)
        return self._stream(listener)

    async def _stream(self, listener: EventListener) -> AsyncGenerator[dict[str, object], None]:
        closed = asyncio.create_task(self._closed(), name="qmp-closed")
        try:
            while True:
                arrival = asyncio.create_task(listener.get(), name="qmp-event")
                try:
                    await asyncio.wait({arrival, closed}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not arrival.done():
                        arrival.cancel()
                if not arrival.done():
                    raise DriverError(
                        "unreachable", f"{self._path}: connection lost; connect again"
                    )
                yield dict(arrival.result())
        finally:
            closed.cancel()
            self._client.remove_listener(listener)

    async def _closed(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()


def query(
    path: Path,
    commands: Sequence[tuple[str, Mapping[str, object] | None]],
    timeout_s: float = 5.0,
) -> list[object]:
    """Run commands one after the other on a short connection; return their answers.

    For callers without an event loop: it runs its own, so it may be called from any
    thread that has none running. `timeout_s` bounds every step. Raises DriverError at the
    first command that fails.
    """

    async def run() -> list[object]:
        async with QmpSession(path, timeout_s) as session:
            return [await session.execute(command, arguments) for command, arguments in commands]

    return asyncio.run(run())
