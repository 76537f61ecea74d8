"""An independent witness of the demonstration: what the broker carried, what QEMU did.

It listens with an identity of its own, verifies every signature by itself, and takes the
hypervisor's word for what became of the guest: the time stamp of QEMU's STOP event, or the
moment its process ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, Self, TypeVar

import msgspec

from pyscan import protocol
from pyscan.errors import LabError, PyscanError
from pyscan.keys import KeyRing
from pyscan.protocol import Topic, TopicKind
from pyscan.qmp import QmpSession
from pyscan.records import Command, Report, Verdict
from pyscan.transport import Link, LinkSettings, Message

T = TypeVar("T")
Content = TypeVar("Content", Verdict, Command, Report)

WATCHED_KINDS: Final = (
    TopicKind.VERDICT,
    TopicKind.COMMAND,
    TopicKind.REPORT,
    TopicKind.SWEEP,
)


@dataclass(frozen=True, slots=True)
class Rings:
    """Whose signatures the observer accepts."""

    monitors: KeyRing
    controls: KeyRing
    agents: KeyRing


@dataclass(frozen=True, slots=True)
class Arrival(Generic[Content]):
    """One verified message and when it arrived here."""

    content: Content
    at_ns: int


class _NoReplay:
    """The observer acts on nothing, so it may see a command twice."""

    def seen(self, command_id: str) -> bool:
        del command_id
        return False

    def highest_sequence(self, issuer: str, vm: str) -> int:
        del issuer, vm
        return -1


@dataclass(slots=True)
class _Record:
    messages: list[tuple[Verdict | Command | Report, int]] = field(default_factory=list)
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    stops_ns: list[int] = field(default_factory=list)
    ended_ns: int | None = None
    problems: list[str] = field(default_factory=list)
    online: bool = False

    def add_problem(self, text: str) -> None:
        self.problems.append(text)

    def add_stop(self, at_ns: int) -> None:
        self.stops_ns.append(at_ns)


class Observer:
    """Listens in a thread of its own from entering to leaving the context."""

    def __init__(self, settings: LinkSettings, rings: Rings, qmp: Path, pid: int) -> None:
        self._settings = settings
        self._rings = rings
        self._qmp = qmp
        self._pid = pid
        self._record = _Record()
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; the laboratory's QMP socket is free again. Idempotent."""
        self._ready.wait(5)
        if self._loop is not None and self._task is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop ended meanwhile
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)

    def wait(self, look: Callable[[], T | None], timeout_s: float, what: str) -> T:
        """Wait until `look()` gives something. Raises LabError when time is up."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while (found := look()) is None:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())) and (
                    time.monotonic() >= deadline
                ):
                    problems = "; ".join(self._record.problems) or "no problem was seen"
                    raise LabError(f"no {what} within {timeout_s:g} s ({problems})")
        return found

    def wait_online(self, timeout_s: float) -> None:
        """Wait until the broker has granted the subscriptions. Raises LabError."""
        self.wait(lambda: self._record.online or None, timeout_s, "connection to the broker")

    def first(
        self, kind: type[Content], test: Callable[[Content], bool]
    ) -> Arrival[Content] | None:
        """The first verdict, command or report for which `test` holds."""
        for content, at_ns in list(self._record.messages):
            if isinstance(content, kind) and test(content):
                return Arrival(content, at_ns)
        return None

    def sweeps(self) -> list[dict[str, Any]]:
        """The monitor's statistics so far, oldest first."""
        return list(self._record.sweeps)

    @property
    def stops_ns(self) -> tuple[int, ...]:
        """When QEMU stopped the guest's processors, by its own clock."""
        return tuple(self._record.stops_ns)

    @property
    def ended_ns(self) -> int | None:
        """When the QEMU process ended."""
        return self._record.ended_ns

    def _note(self, change: Callable[[_Record], None]) -> None:
        with self._changed:
            change(self._record)
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except asyncio.CancelledError:
            pass
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._ready.set()
        link = Link(self._settings, [protocol.subscription(kind) for kind in WATCHED_KINDS])
        async with asyncio.TaskGroup() as group:
            group.create_task(link.run(), name="link")
            group.create_task(self._listen(link), name="listen")
            group.create_task(self._watch_qmp(), name="qmp")
            group.create_task(self._watch_process(), name="process")

    async def _listen(self, link: Link) -> None:
        await link.wait_online()
        self._note(lambda record: setattr(record, "online", True))
        async for message in link.messages:
            at_ns = time.time_ns()
            try:
                self._take(message, at_ns)
            except PyscanError as error:
                self._note(partial(_Record.add_problem, text=str(error)))
            message.acknowledge()

    def _take(self, message: Message, at_ns: int) -> None:
        topic, rings = Topic.parse(message.topic), self._rings
        content: Verdict | Command | Report
        if topic.kind is TopicKind.SWEEP:
            statistics = msgspec.json.decode(message.payload, type=dict[str, Any])
            self._note(lambda record: record.sweeps.append(statistics))
            return
        if topic.kind is TopicKind.VERDICT:
            content = protocol.decode_verdict(
                message.payload, rings.monitors, topic=message.topic, now_ns=at_ns
            )
        elif topic.kind is TopicKind.COMMAND:
            content = protocol.decode_command(
                message.payload,
                rings.controls,
                topic=message.topic,
                audience=topic.owner,
                now_s=at_ns // 10**9,
                replay=_NoReplay(),
            )
        else:
            content = protocol.decode_report(message.payload, rings.agents, topic=message.topic)
        self._note(lambda record: record.messages.append((content, at_ns)))

    async def _watch_qmp(self) -> None:
        """Note every STOP event until QEMU goes away."""
        with contextlib.suppress(PyscanError):
            async with QmpSession(self._qmp) as session:
                async for event in session.events("STOP"):
                    stamp: Any = event["timestamp"]
                    at_ns = stamp["seconds"] * 10**9 + stamp["microseconds"] * 1000
                    self._note(partial(_Record.add_stop, at_ns=at_ns))

    async def _watch_process(self) -> None:
        """Note when the QEMU process ends (pidfd_open(2): readable at its end)."""
        loop = asyncio.get_running_loop()
        descriptor = os.pidfd_open(self._pid)
        ended = asyncio.Event()
        try:
            loop.add_reader(descriptor, ended.set)
            await ended.wait()
            at_ns = time.time_ns()
            self._note(lambda record: setattr(record, "ended_ns", at_ns))
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
