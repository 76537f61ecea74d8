"""From a command to its reports: a running agent, a guest, a broker on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyscan import protocol
from pyscan.bench.measure import Progress
from pyscan.errors import LabError
from pyscan.ids import new_id
from pyscan.keys import KeyRing, SigningKey
from pyscan.lab.broker import ADDRESS, Broker, Role
from pyscan.lab.guest import Guest, GuestOptions
from pyscan.lab.process import Child, RunDirectory
from pyscan.protocol import TopicKind
from pyscan.records import Action, Command, ReportState
from pyscan.transport import Link, LinkSettings, Publication

HOST, CONTROL, VM = "host-1", "control-1", "web-1"
IDENTITIES: Final = {HOST: Role.AGENT, CONTROL: Role.CONTROL}
WARM_UP: Final = 5
TIMEOUT_S: Final = 30.0
FINAL: Final = {ReportState.SUCCEEDED, ReportState.FAILED, ReportState.REJECTED}


@dataclass(frozen=True, slots=True)
class Orders:
    """Milliseconds from before a `query` is signed until a report is verified, one a command."""

    tls: bool
    accepted_ms: list[float]
    final_ms: list[float]


def measure_orders(guest_dir: Path, commands: int, progress: Progress) -> list[Orders]:
    """With certificates on both sides, and without TLS; on one guest. Raises LabError."""
    progress("boot a guest")
    with RunDirectory() as run, Guest(GuestOptions(guest_dir), run) as guest:
        guest.wait_ready()
        measured = []
        for tls in (True, False):
            progress(f"command -> report, {'mutual TLS' if tls else 'no TLS'}")
            with RunDirectory() as own, Broker(own, IDENTITIES, tls=tls) as broker:
                measured.append(asyncio.run(_measure(own.path, guest, broker, commands, tls)))
        return measured


async def _measure(
    directory: Path, guest: Guest, broker: Broker, commands: int, tls: bool
) -> Orders:
    keys = {name: SigningKey.generate() for name in IDENTITIES}
    config = _agent_config(directory, guest, broker, keys)
    log = directory / "agent.log"
    start = [sys.executable, "-m", "pyscan", "agent", "--config", config]
    accepted, final = [], []
    with Child("agent", start, log, environment=dict(os.environ)) as agent:
        agent.wait_until(lambda: "link state=online" in log.read_text(), TIMEOUT_S, "the broker")
        async with _Control(directory, broker, keys, tls).running() as control:
            for number in range(commands + WARM_UP):
                times = await control.query()
                if number >= WARM_UP:
                    accepted.append(times[0])
                    final.append(times[1])
    return Orders(tls, sorted(accepted), sorted(final))


def _agent_config(
    directory: Path, guest: Guest, broker: Broker, keys: dict[str, SigningKey]
) -> Path:
    keys[HOST].save(directory / "host.key")
    keys[CONTROL].public.save(directory / "control.pub")
    path = directory / "agent.toml"
    path.write_text(
        f'[identity]\nname = "{HOST}"\nkey = "host.key"\n'
        f"{broker.mqtt_table(HOST)}"
        f'[state]\ndirectory = "agent"\n[trust]\ncontrols.{CONTROL} = "control.pub"\n'
        f'[[vm]]\nid = "{VM}"\nqmp = "{guest.agent_qmp}"\npidfile = "{guest.pid_file}"\n'
    )
    return path


class _Control:
    """Gives one command after the other, and verifies what comes back."""

    def __init__(
        self, directory: Path, broker: Broker, keys: dict[str, SigningKey], tls: bool
    ) -> None:
        self._key = keys[CONTROL]
        self._ring = KeyRing.of({HOST: keys[HOST].public}, "agent")
        self._sequence = time.time_ns() // 10**6
        self._arrivals: asyncio.Queue[tuple[str, ReportState, float]] = asyncio.Queue()
        name = f"bench-{CONTROL}"
        settings = LinkSettings(
            ADDRESS,
            broker.port,
            name,
            ca=broker.authority.path("ca.pem"),
            crl=broker.authority.path("crl.pem"),
            certificate=broker.certificate(CONTROL),
            key=broker.certificate_key(CONTROL),
        ) if tls else LinkSettings(
            ADDRESS, broker.port, name, CONTROL, broker.password_file(CONTROL).read_text().strip()
        )  # fmt: skip
        self._link = Link(settings, [protocol.subscription(TopicKind.REPORT)])

    @asynccontextmanager
    async def running(self) -> AsyncIterator[_Control]:
        """Connected for as long as the context lasts."""
        tasks = [asyncio.create_task(each) for each in (self._link.run(), self._listen())]
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._link.wait_online()
            yield self
        finally:
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _listen(self) -> None:
        async for message in self._link.messages:
            report = protocol.decode_report(message.payload, self._ring, topic=message.topic)
            self._arrivals.put_nowait((report.command, report.state, time.perf_counter()))
            message.acknowledge()

    async def query(self) -> tuple[float, float]:
        """Milliseconds until `accepted`, and until the final report."""
        self._sequence += 1
        began, now_s = time.perf_counter(), int(time.time())
        command = Command(
            id=new_id(),
            issuer=CONTROL,
            audience=HOST,
            sequence=self._sequence,
            issued_s=now_s,
            expires_s=now_s + 30,
            action=Action.QUERY,
            vm=VM,
        )
        topic = protocol.command_topic(HOST, VM)
        sending = self._link.publish(
            Publication(topic, protocol.encode_command(command, self._key))
        )
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
            group.create_task(sending)
            accepted = final = 0.0
            while not final:
                command_id, state, at = await self._arrivals.get()
                if command_id != command.id:
                    continue
                if state is ReportState.ACCEPTED:
                    accepted = 1e3 * (at - began)
                elif state in FINAL:
                    final = 1e3 * (at - began)
                    if state is not ReportState.SUCCEEDED:
                        raise LabError(f"the agent answered {state} to a query")
        return accepted, final
