"""Keys that come and go while an agent runs: a new set, an old one put back, TLS all the way."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from adversary.machine import Machine
from site_parts import CONTROL, HOST, TERMINAL, VM, until

from pyscan import protocol
from pyscan.ids import new_id
from pyscan.keys import KeyRing, PublicKey, SigningKey
from pyscan.lab.broker import ADDRESS, Broker, Role
from pyscan.lab.process import Child, RunDirectory
from pyscan.records import Action, Command, Report, ReportState
from pyscan.transport import Link, LinkSettings, Publication

IDENTITIES = {CONTROL: Role.CONTROL, HOST: Role.AGENT}


class Site:
    """A broker with certificates, an agent that follows the key set, the test as control."""

    def __init__(self, run: RunDirectory, broker: Broker, machine: Machine) -> None:
        self.path = run.path
        self.broker = broker
        self.machine = machine
        self.files = broker.certificate(HOST).parent  # keys lie beside certificates
        self.set = run.path / "trust.cose"
        self.log = run.path / "agent.log"
        self.reports: list[Report] = []
        self._sequence = time.time_ns() // 10**6
        self.bring()

    def bring(self) -> None:
        """Take the root's latest set to the agent."""
        new = self.set.with_suffix(".new")
        new.write_bytes(self.broker.authority.path("trust.cose").read_bytes())
        new.replace(self.set)

    def config(self) -> Path:
        path = self.path / "agent.toml"
        path.write_text(
            f"""
[identity]
name = "{HOST}"
key = "{self.files}/{HOST}.key"
{self.broker.mqtt_table(HOST)}
[state]
directory = "agent"
[trust]
root = "{self.broker.authority.path("root.pub")}"
set = "{self.set}"
[[vm]]
id = "{VM}"
qmp = "{self.machine.path}"
"""
        )
        return path

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[Child]:
        command = [sys.executable, "-m", "pyscan", "agent", "--config", self.config()]
        with Child("agent", command, self.log) as child:
            online = self.log.read_text().count("state=online") + 1
            await self.logged("state=online", online)
            yield child
            status = await asyncio.to_thread(child.stop)
            assert status == 0, child.failure("did not stop cleanly")

    async def logged(self, text: str, count: int = 1) -> None:
        await until(lambda: self.log.read_text().count(text) >= count, f"log {text!r}")

    @asynccontextmanager
    async def control(self) -> AsyncIterator[Link]:
        authority = self.broker.authority
        settings = LinkSettings(
            ADDRESS,
            self.broker.port,
            "test-control",
            ca=authority.path("ca.pem"),
            crl=authority.path("crl.pem"),
            certificate=self.broker.certificate(CONTROL),
            key=self.broker.certificate_key(CONTROL),
        )
        link = Link(settings, [protocol.subscription(protocol.TopicKind.REPORT)])
        tasks = [asyncio.create_task(link.run()), asyncio.create_task(self._collect(link))]
        try:
            await link.wait_online()
            yield link
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _collect(self, link: Link) -> None:
        ring = KeyRing.of({HOST: PublicKey.load(self.files / f"{HOST}.pub")})
        async for message in link.messages:
            self.reports.append(protocol.decode_report(message.payload, ring, topic=message.topic))
            message.acknowledge()

    async def obeys(self, link: Link, key: SigningKey) -> bool:
        """Whether a freeze that is signed with `key` is carried out; else it is an unknown key."""
        self._sequence += 1
        now_s = int(time.time())
        command = Command(
            id=new_id(),
            issuer=CONTROL,
            audience=HOST,
            sequence=self._sequence,
            issued_s=now_s,
            expires_s=now_s + 60,
            action=Action.FREEZE,
            vm=VM,
        )
        refused = self.log.read_text().count("unknown_key")
        topic = protocol.command_topic(HOST, VM)
        await link.publish(Publication(topic, protocol.encode_command(command, key)))

        def answer() -> list[ReportState]:
            mine = [report for report in self.reports if report.command == command.id]
            return [report.state for report in mine if report.state in TERMINAL]

        await until(
            lambda: bool(answer()) or self.log.read_text().count("unknown_key") > refused, "answer"
        )
        return answer() == [ReportState.SUCCEEDED]


async def test_rotation_and_revocation(run_directory: RunDirectory, tmp_path: Path) -> None:
    machine = Machine(run_directory.path / "machine.qmp")
    with Broker(run_directory, IDENTITIES, tls=True) as broker:
        site = Site(run_directory, broker, machine)
        authority = broker.authority
        old = SigningKey.load(site.files / f"{CONTROL}.key")
        async with machine.serve(), site.control() as link:
            async with site.agent() as child:
                assert await site.obeys(link, old)

                bundle = authority.rotate(CONTROL, tmp_path)
                new = SigningKey.load(tmp_path / f"{CONTROL}.key")
                assert bundle.private_key == tmp_path / f"{CONTROL}.key"
                assert not await site.obeys(link, new)  # the agent has not heard of it
                site.bring()
                await site.logged("key set taken", 2)
                assert [await site.obeys(link, key) for key in (old, new)] == [True, True]

                before = site.set.read_bytes()
                authority.revoke(CONTROL)
                site.bring()
                child.signal(signal.SIGHUP)
                await site.logged("key set taken", 3)
                assert [await site.obeys(link, key) for key in (old, new)] == [False, False]

                site.set.write_bytes(before)
                child.signal(signal.SIGHUP)
                await site.logged("key set refused")
                assert not await site.obeys(link, new)
            # Nor does a restart bring the old set back.
            async with site.agent():
                assert "which is in use" in site.log.read_text()
                assert not await site.obeys(link, new)
        assert machine.effects["stop"] == 3
