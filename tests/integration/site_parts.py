"""Parts for tests of the programs: keys, configuration files, processes, a bare QEMU.

Nothing here is a stand-in: the broker is mosquitto, the hypervisor is QEMU (with its
firmware as the only guest: enough to stop, unplug and end), the programs are processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pyscan import protocol
from pyscan.errors import TransportError
from pyscan.ids import new_id
from pyscan.keys import KeyRing, SigningKey
from pyscan.lab.broker import ADDRESS, Broker
from pyscan.lab.process import Child, RunDirectory
from pyscan.qmp import QmpSession
from pyscan.records import Action, Command, Report, ReportState
from pyscan.transport import Link, LinkSettings, Publication

MONITOR, CONTROL, HOST, OBSERVER = "card-1", "control-1", "host-1", "observer-1"
VM = "web-1"
DEADLINE_S = 30.0
TERMINAL = {ReportState.SUCCEEDED, ReportState.FAILED, ReportState.REJECTED}


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition that no event tells."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + DEADLINE_S
    while not condition():
        assert loop.time() < deadline_s, f"{what} did not happen"
        await asyncio.sleep(0.01)


async def publish(link: Link, topic: str, payload: bytes) -> None:
    """Publish until it is confirmed, over lost connections."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            await link.wait_online()
            with suppress(TransportError):
                await link.publish(Publication(topic, payload))
                return


class Site:
    """One installation in a run directory: a key pair for each name, a file per program."""

    def __init__(self, run: RunDirectory, broker: Broker) -> None:
        self.path = run.path
        self.broker = broker
        self.keys = {name: SigningKey.generate() for name in (MONITOR, CONTROL, HOST, "foreign")}
        for name, key in self.keys.items():
            key.save(self.path / f"{name}.key")
            key.public.save(self.path / f"{name}.pub")

    def ring(self, *names: str) -> KeyRing:
        return KeyRing.of({name: self.keys[name].public for name in names})

    def link(self, name: str, *subscriptions: str) -> Link:
        """A connection of the test itself, in the name of a program that does not run."""
        password = self.broker.password_file(name).read_text()
        settings = LinkSettings(ADDRESS, self.broker.port, f"test-{name}", name, password)
        return Link(settings, subscriptions)

    def write(self, program: str, name: str, more: str) -> Path:
        path = self.path / f"{program}.toml"
        path.write_text(
            f"""
[identity]
name = "{name}"
key = "{name}.key"
[mqtt]
host = "{ADDRESS}"
port = {self.broker.port}
username = "{name}"
password_file = "{self.broker.password_file(name)}"
[state]
directory = "{program}"
{more}"""
        )
        return path

    def agent_config(self, vms: str, limits: str = "") -> Path:
        return self.write(
            "agent", HOST, f'[trust]\ncontrols.{CONTROL} = "{CONTROL}.pub"\n{limits}\n{vms}'
        )

    def control_config(self, policy: str, more: str = "") -> Path:
        trust = f'monitors.{MONITOR} = "{MONITOR}.pub"\nagents.{HOST} = "{HOST}.pub"'
        path = self.write("control", CONTROL, f"[trust]\n{trust}\n[policy]\n{policy}\n")
        path.write_text(f"{more}\n{path.read_text()}")
        return path

    def start(self, program: str, config: Path) -> Child:
        return Child(
            program,
            [sys.executable, "-m", "pyscan", program, "--config", config],
            self.log(program),
            environment={**os.environ, "PYSCAN_TRACEBACK": "1"},
        )

    def log(self, program: str) -> Path:
        return self.path / f"{program}.log"

    async def wait_log(self, program: str, text: str, count: int = 1) -> None:
        await until(lambda: self.log(program).read_text().count(text) >= count, f"log {text!r}")


class Hypervisor:
    """QEMU with one network card and no disk; leaving the context ends it."""

    def __init__(
        self, run: RunDirectory, name: str = VM, *, pidfile: bool = True, extra: Sequence[str] = ()
    ) -> None:
        self.qmp = run.path / f"{name}.qmp"
        self.other_qmp = run.path / f"{name}-test.qmp"
        self.pidfile = run.path / f"{name}.pid" if pidfile else None
        command: list[str | Path] = ["qemu-system-x86_64", "-accel", "tcg", "-m", "64"]
        command += ["-nodefaults", "-display", "none"]
        command += ["-netdev", "user,id=n0,restrict=on"]
        command += ["-device", "virtio-net-pci,netdev=n0,id=nic0"]
        command += ["-netdev", "user,id=n1,restrict=on", "-device", "e1000,netdev=n1"]
        for path in (self.qmp, self.other_qmp):
            command += ["-qmp", f"unix:{path},server=on,wait=off"]
        if self.pidfile:
            command += ["-pidfile", self.pidfile]
        command += extra
        self.child = Child(name, command, run.path / f"{name}.log")
        self.child.wait_until(self._ready, DEADLINE_S, "its sockets")

    def _ready(self) -> bool:
        # A socket's file is there before QEMU listens on it.
        for path in (self.qmp, self.other_qmp):
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)):
                    return False
        return self.pidfile is None or self.pidfile.exists()

    def table(self, qmp: Path | None = None, *, name: str = VM) -> str:
        """The agent's [[vm]]."""
        pidfile = f'pidfile = "{self.pidfile}"' if self.pidfile else ""
        return f'[[vm]]\nid = "{name}"\nqmp = "{qmp or self.qmp}"\n{pidfile}\n'

    def __enter__(self) -> Hypervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.close()


@dataclass
class Watcher:
    """The test's own view of a machine, over its other monitor socket."""

    session: QmpSession
    events: list[str] = field(default_factory=list)

    async def status(self) -> str:
        answer = await self.session.execute("query-status")
        assert isinstance(answer, dict)
        return str(answer["status"])


@asynccontextmanager
async def watching(hypervisor: Hypervisor) -> AsyncIterator[Watcher]:
    async with QmpSession(hypervisor.other_qmp) as session:
        watcher = Watcher(session)
        stream = session.events("STOP", "RESUME", "SHUTDOWN")

        async def collect() -> None:
            async for event in stream:
                watcher.events.append(str(event["event"]))

        task = asyncio.create_task(collect())
        try:
            yield watcher
        finally:
            task.cancel()
            await asyncio.wait({task})


class QmpProxy:
    """Stands between the agent and QEMU, notes the commands, and may hold one of them.

    `forward` tells whether a held command still reaches QEMU (its answer never comes back)
    or not.
    """

    def __init__(self, upstream: Path, path: Path) -> None:
        self.path = path
        self.commands: list[tuple[str, object]] = []
        self.held = asyncio.Event()
        self.hold = ""
        self.forward = False
        self._upstream = upstream
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[QmpProxy]:
        server = await asyncio.start_unix_server(self._accept, self.path)
        async with server:
            yield self
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self.path.unlink()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: asyncio.streams would log the cancellation of one of its own.
        self._tasks.add(asyncio.create_task(self._relay(reader, writer)))

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_unix_connection(self._upstream)
        except OSError:
            writer.close()
            return
        answers = asyncio.create_task(self._copy(up_reader, writer))
        try:
            async for request in _requests(reader):
                self._note(request)
                if self.held.is_set():
                    answers.cancel()
                if not self.held.is_set() or self.forward:
                    up_writer.write(request)
                    await up_writer.drain()
        finally:
            answers.cancel()
            for stream in (writer, up_writer):
                stream.close()

    def _note(self, message: bytes) -> None:
        request = json.loads(message)
        name = request.get("execute") or request.get("exec-oob")
        self.commands.append((name, request.get("arguments")))
        if self.hold and name == self.hold:
            self.held.set()

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


async def _requests(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The JSON objects of a stream, which need not stand on lines."""
    text = ""
    while data := await reader.read(65536):
        text += data.decode()
        while text := text.lstrip():
            try:
                _, end = json.JSONDecoder().raw_decode(text)
            except json.JSONDecodeError:
                break
            yield text[:end].encode()
            text = text[end:]


class Peer:
    """The test in the place of control: sends commands, collects verified reports."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.link = site.link(CONTROL, protocol.subscription(protocol.TopicKind.REPORT))
        self.reports: list[Report] = []
        self.envelopes: list[bytes] = []
        self._sequence = time.time_ns() // 10**6

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Peer]:
        tasks = [asyncio.create_task(self.link.run()), asyncio.create_task(self._collect())]
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self.link.wait_online()
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _collect(self) -> None:
        ring = self._site.ring(HOST)
        async for message in self.link.messages:
            self.reports.append(protocol.decode_report(message.payload, ring, topic=message.topic))
            self.envelopes.append(message.payload)
            message.acknowledge()

    def command(self, action: Action, **changes: object) -> Command:
        self._sequence += 1
        now_s = int(time.time())
        fields: dict[str, object] = {
            "id": new_id(),
            "issuer": CONTROL,
            "audience": HOST,
            "sequence": self._sequence,
            "issued_s": now_s,
            "expires_s": now_s + 60,
            "action": action,
            "vm": VM,
            **changes,
        }
        return Command(**fields)  # type: ignore[arg-type]

    def envelope(self, command: Command, signer: str = CONTROL) -> bytes:
        return protocol.encode_command(command, self._site.keys[signer])

    async def send(self, command: Command, envelope: bytes | None = None, topic: str = "") -> None:
        await publish(
            self.link,
            topic or protocol.command_topic(command.audience, command.vm),
            envelope if envelope is not None else self.envelope(command),
        )

    def states(self, command: Command) -> list[ReportState]:
        return [report.state for report in self.reports if report.command == command.id]

    def finals(self, command: Command) -> list[Report]:
        mine = [report for report in self.reports if report.command == command.id]
        return [report for report in mine if report.state in TERMINAL]

    async def final(self, command: Command, count: int = 1) -> Report:
        await until(lambda: len(self.finals(command)) >= count, f"report on {command.action}")
        return self.finals(command)[-1]

    async def order(self, action: Action, **changes: object) -> Report:
        """Send a fresh command and wait for its final report."""
        command = self.command(action, **changes)
        await self.send(command)
        return await self.final(command)
