"""One agent, alone with a broker that is against it, and what became of its machine."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from site_parts import CONTROL, HOST, TERMINAL, VM

from adversary.broker import DEADLINE_S, Client, HostileBroker
from adversary.machine import Machine
from adversary.packets import Published
from pyscan import protocol
from pyscan.ids import new_id
from pyscan.keys import KeyRing, SigningKey
from pyscan.records import Action, Command, Report

NAMES = (CONTROL, HOST, "operator-1", "card-1", "stranger")


class Arena:
    """Keys, a broker, a machine; the agent comes and goes."""

    def __init__(self, directory: Path, broker: HostileBroker, machine: Machine) -> None:
        self.path = directory
        self.broker = broker
        self.machine = machine
        self.keys = {name: SigningKey.generate() for name in NAMES}
        for name, key in self.keys.items():
            key.save(directory / f"{name}.key")
            key.public.save(directory / f"{name}.pub")
        self.sequence = time.time_ns() // 10**6
        self.log = directory / "agent.log"
        self._ring = KeyRing.of({HOST: self.keys[HOST].public}, "agent")

    def config(self, limits: str = "") -> Path:
        path = self.path / "agent.toml"
        path.write_text(
            f"""
[identity]
name = "{HOST}"
key = "{HOST}.key"
[mqtt]
port = {self.broker.port}
[state]
directory = "agent"
[trust]
controls.{CONTROL} = "{CONTROL}.pub"
operators.operator-1 = "operator-1.pub"
[limits]
{limits}
[[vm]]
id = "{VM}"
qmp = "{self.machine.path}"
[[vm]]
id = "web-2"
qmp = "{self.path}/nobody.qmp"
"""
        )
        return path

    def command(self, action: Action = Action.FREEZE, **changes: object) -> Command:
        self.sequence += 1
        now_s = int(time.time())
        fields: dict[str, object] = {
            "id": new_id(),
            "issuer": CONTROL,
            "audience": HOST,
            "sequence": self.sequence,
            "issued_s": now_s,
            "expires_s": now_s + 120,
            "action": action,
            "vm": VM,
            **changes,
        }
        return Command(**fields)  # type: ignore[arg-type]

    def sign(self, command: Command, signer: str = CONTROL) -> bytes:
        return protocol.encode_command(command, self.keys[signer])

    def fresh(self, action: Action = Action.FREEZE, **changes: object) -> bytes:
        return self.sign(self.command(action, **changes))

    async def agent(self) -> Client:
        return await self.broker.client(f"agent-{HOST}")

    async def deliver(self, payload: bytes, topic: str = "", **options: object) -> None:
        client = await self.agent()
        topic = topic or protocol.command_topic(HOST, VM)
        await client.deliver(topic, payload, **options)  # type: ignore[arg-type]

    async def settle(self) -> None:
        """Wait until everything that was delivered has been dealt with: it goes in order."""
        query = self.command(Action.QUERY)
        await self.deliver(self.sign(query))
        await self.until(lambda: bool(self.finals(query.id)), "the answer to a query")

    async def until(self, condition: object, what: str) -> None:
        assert callable(condition)
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come"
            await asyncio.sleep(0.005)

    def reports(self, command: str) -> list[Report]:
        topic = protocol.report_topic(HOST, command)
        said = self.broker.by_topic[topic]
        return [protocol.decode_report(each.payload, self._ring, topic=topic) for each in said]

    def finals(self, command: str) -> list[Report]:
        return [report for report in self.reports(command) if report.state in TERMINAL]

    def rejected(self) -> Counter[str]:
        """The agent's own counters, as it published them last."""
        topic = protocol.host_status_topic(HOST)
        said = self.broker.by_topic[topic]
        return Counter(json.loads(said[-1].payload)["rejected"]) if said else Counter()

    async def counted(self) -> Counter[str]:
        """The counters once they stand still: they are published four times a second."""
        before = None
        while (now := self.rejected()) != before:
            before = now
            await asyncio.sleep(0.4)
        return now

    def foreign(self) -> list[Published]:
        """What the agent published on topics that are not its own."""
        own = f"pyscan/v1/hosts/{HOST}/"
        topics = [topic for topic in self.broker.by_topic if not topic.startswith(own)]
        return [said for topic in topics for said in self.broker.by_topic[topic]]


def memory_kib(pid: int) -> int:
    """Resident memory of a process, proc(5)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def busy_s(pid: int) -> float:
    """Processor time of a process, proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def arena(directory: Path) -> AsyncIterator[Arena]:
    broker, machine = HostileBroker(), Machine(directory / "machine.qmp")
    async with broker.serve(), machine.serve():
        yield Arena(directory, broker, machine)
