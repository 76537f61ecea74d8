"""The control as a process, against a real broker; the test stands for monitor and agent."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from site_parts import CONTROL, HOST, MONITOR, VM, Site, publish, until

from pyscan import protocol
from pyscan.errors import Rejected
from pyscan.evidence import verify_directory
from pyscan.ids import new_id
from pyscan.lab.broker import ADDRESS, Broker
from pyscan.lab.process import RunDirectory
from pyscan.protocol import RejectReason, TopicKind
from pyscan.records import (
    Action,
    Command,
    Finding,
    FindingKind,
    PageStatus,
    Report,
    ReportState,
    Verdict,
    VerdictState,
)

ENFORCE = "enforce = true"


@pytest.fixture
def site(run_directory: RunDirectory, broker: Broker) -> Iterator[Site]:
    site = Site(run_directory, broker)
    yield site
    print(site.log("control").read_text())  # shown on failure


class Outside:
    """Monitor and agent, as far as control sees them."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.monitor = site.link(MONITOR)
        self.agent = site.link(HOST, protocol.subscription(TopicKind.COMMAND, HOST))
        self.commands: list[Command] = []
        self.envelopes: list[bytes] = []
        self.repeated: list[bytes] = []

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Outside]:
        tasks = [
            asyncio.create_task(self.monitor.run()),
            asyncio.create_task(self.agent.run()),
            asyncio.create_task(self._collect()),
        ]
        try:
            await self.agent.wait_online()
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _collect(self) -> None:
        async for message in self.agent.messages:
            try:
                command = protocol.decode_command(
                    message.payload,
                    self._site.ring(CONTROL),
                    topic=message.topic,
                    audience=HOST,
                    now_s=int(time.time()),
                    replay=self,
                )
            except Rejected as rejected:
                if rejected.reason != RejectReason.DUPLICATE:
                    raise
                self.repeated.append(message.payload)
            else:
                self.commands.append(command)
                self.envelopes.append(message.payload)
            message.acknowledge()

    def seen(self, command_id: str) -> bool:
        return any(command.id == command_id for command in self.commands)

    def highest_sequence(self, issuer: str, vm: str) -> int:
        return max((c.sequence for c in self.commands if c.vm == vm), default=-1)

    def verdict(self, state: VerdictState = VerdictState.UNAPPROVED, **changes: object) -> Verdict:
        sweep = new_id()
        bad = Finding(new_id(), sweep, FindingKind.DIGEST, PageStatus.OK, 0xFFFFFFFF81000000, 1)
        findings = () if state is VerdictState.APPROVED else (bad,)
        verdict = Verdict(
            id=new_id(),
            sweep=sweep,
            monitor=MONITOR,
            target="web-1",
            host=HOST,
            vm=VM,
            state=state,
            reason="1 page is not as approved",
            decided_ns=time.time_ns(),
            watched=10,
            ok=10 - len(findings),
            unreadable=0,
            findings=findings,
            findings_total=len(findings),
        )
        return replace(verdict, **changes)  # type: ignore[arg-type]

    def sealed(self, verdict: Verdict, signer: str = MONITOR) -> bytes:
        return protocol.encode_verdict(verdict, self._site.keys[signer])

    async def tell(self, verdict: Verdict, envelope: bytes | None = None, topic: str = "") -> None:
        await publish(
            self.monitor,
            topic or protocol.verdict_topic(verdict.monitor, verdict.target),
            envelope if envelope is not None else self.sealed(verdict),
        )

    async def report(self, command: Command, state: ReportState, reason: str = "") -> None:
        report = Report(
            id=new_id(),
            command=command.id,
            host=HOST,
            vm=command.vm,
            action=command.action,
            state=state,
            at_ns=time.time_ns(),
            reason=reason,
            vm_state="paused",
        )
        envelope = protocol.encode_report(report, self._site.keys[HOST])
        await publish(self.agent, protocol.report_topic(HOST, command.id), envelope)

    async def commanded(self, count: int = 1) -> Command:
        await until(lambda: len(self.commands) >= count, f"command {count}")
        return self.commands[-1]


@asynccontextmanager
async def control(site: Site, config: Path) -> AsyncIterator[Outside]:
    with site.start("control", config) as child:
        await site.wait_log("control", "state=online")
        async with Outside(site).connected() as outside:
            yield outside
        assert child.stop() == 0, child.failure("did not stop cleanly")


async def test_a_command_without_an_answer_is_repeated_as_the_same_bytes(site: Site) -> None:
    outside = Outside(site)
    with site.start("control", site.control_config(ENFORCE)):
        async with outside.connected():
            await site.wait_log("control", "link state=online")
            await outside.tell(outside.verdict())
            command = await outside.commanded()
            await until(lambda: len(outside.repeated) >= 2, "two repetitions")
            await outside.report(command, ReportState.SUCCEEDED)
            await site.wait_log("control", "report state=succeeded")
    assert set(outside.repeated) == set(outside.envelopes)
    assert len(outside.commands) == 1


async def test_verdict_command_report(site: Site) -> None:
    async with control(site, site.control_config(ENFORCE)) as outside:
        verdict = outside.verdict()
        await outside.tell(verdict)
        command = await outside.commanded()
        assert (command.action, command.vm, command.audience) == (Action.FREEZE, VM, HOST)
        assert command.cause.verdict == verdict.id
        assert command.cause.finding == verdict.findings[0].id
        assert command.expires_s - command.issued_s == 30
        for state in (ReportState.ACCEPTED, ReportState.STARTED, ReportState.SUCCEEDED):
            await outside.report(command, state)
        await site.wait_log("control", f"incident state=answered id={command.cause.incident}")
        # Later verdicts about the same target belong to the same incident.
        for state in (VerdictState.APPROVED, VerdictState.UNAPPROVED):
            later = outside.verdict(state)
            await outside.tell(later)
            await site.wait_log("control", f"verdict id={later.id}")
        assert len(outside.commands) == 1
    verify_directory(site.path / "control" / "evidence", site.ring(CONTROL, MONITOR, HOST))


@pytest.mark.parametrize(
    ("policy", "state"),
    [
        ("", VerdictState.UNAPPROVED),
        (f'{ENFORCE}\nprotected = ["{VM}"]', VerdictState.UNAPPROVED),
        (ENFORCE, VerdictState.UNDECIDED),
    ],
    ids=["observe only", "protected", "undecided"],
)
async def test_incident_without_command(site: Site, policy: str, state: VerdictState) -> None:
    async with control(site, site.control_config(policy)) as outside:
        await outside.tell(outside.verdict(state))
        await site.wait_log("control", "incident state=open")
        other = outside.verdict(target="web-2", vm="web-2", state=VerdictState.APPROVED)
        await outside.tell(other)
        await site.wait_log("control", f"verdict id={other.id}")
        assert outside.commands == []
    with sqlite3.connect(site.path / "control" / "state.sqlite") as database:
        assert database.execute("SELECT count(*) FROM outbox").fetchone() == (0,)


async def test_redelivered_verdict_gives_one_command(site: Site) -> None:
    async with control(site, site.control_config(ENFORCE)) as outside:
        verdict = outside.verdict()
        envelope = outside.sealed(verdict)
        for _ in range(3):
            await outside.tell(verdict, envelope)
        other = outside.verdict(target="web-2", vm="web-2")
        await outside.tell(other)
        await outside.commanded(2)
        assert [c.cause.verdict for c in outside.commands] == [verdict.id, other.id]


async def test_stronger_policy_acts_under_the_same_incident(site: Site) -> None:
    async with control(site, site.control_config(ENFORCE)) as outside:
        await outside.tell(outside.verdict())
        frozen = await outside.commanded()
        await outside.report(frozen, ReportState.SUCCEEDED)
        await site.wait_log("control", "incident state=answered")
    config = site.control_config(f'{ENFORCE}\nunapproved = "kill"')
    with site.start("control", config) as child:
        await site.wait_log("control", "state=online", 2)
        async with Outside(site).connected() as outside:
            await outside.tell(outside.verdict())
            killed = await outside.commanded()
            assert killed.action is Action.KILL
            assert killed.cause.incident == frozen.cause.incident
            assert killed.sequence > frozen.sequence
        assert child.stop() == 0


BadVerdict = Callable[[Outside], tuple[Verdict, bytes, str]]


def _sealed(signer: str = MONITOR, topic: str = "", **changes: object) -> BadVerdict:
    def make(outside: Outside) -> tuple[Verdict, bytes, str]:
        verdict = outside.verdict(**changes)
        return verdict, outside.sealed(verdict, signer), topic

    return make


def _damaged(change: Callable[[bytes], bytes]) -> BadVerdict:
    def make(outside: Outside) -> tuple[Verdict, bytes, str]:
        verdict = outside.verdict()
        return verdict, change(outside.sealed(verdict)), ""

    return make


BAD: dict[str, BadVerdict] = {
    "stale": _sealed(decided_ns=time.time_ns() - 2 * 3600 * 10**9),
    "not_yet_valid": _sealed(decided_ns=time.time_ns() + 3600 * 10**9),
    "unknown_key": _sealed(signer="foreign"),
    "bad_signature": _sealed(topic=protocol.verdict_topic(MONITOR, "web-2")),
    "malformed": _damaged(lambda envelope: envelope[:-9]),
    "too_large": _damaged(lambda envelope: envelope + bytes(100_000)),
}


async def test_bad_verdicts_open_nothing(site: Site) -> None:
    async with control(site, site.control_config(ENFORCE)) as outside:
        for reason, make in BAD.items():
            await outside.tell(*make(outside))
            await site.wait_log("control", f"problem={reason}:")
        assert "incident" not in site.log("control").read_text()
        assert outside.commands == []


async def test_report_of_another_host_or_about_nothing_changes_nothing(site: Site) -> None:
    async with control(site, site.control_config(ENFORCE)) as outside:
        await outside.tell(outside.verdict())
        command = await outside.commanded()
        await outside.report(replace(command, id=new_id()), ReportState.SUCCEEDED)
        await outside.report(replace(command, vm="web-2"), ReportState.SUCCEEDED)
        await outside.report(command, ReportState.ACCEPTED)
        await site.wait_log("control", "report state=accepted")
        assert "state=succeeded" not in site.log("control").read_text()


async def test_failed_command_is_followed_by_a_new_one(site: Site) -> None:
    config = site.control_config(ENFORCE, "command_lifetime_s = 5")
    async with control(site, config) as outside:
        await outside.tell(outside.verdict())
        first = await outside.commanded()
        await outside.report(first, ReportState.FAILED, "timeout")
        second = await outside.commanded(2)
        assert second.issued_s >= first.expires_s
        assert second.id != first.id
        assert second.sequence > first.sequence
        assert (second.action, second.cause) == (first.action, first.cause)
        await outside.report(second, ReportState.REJECTED, "protected_vm")
        await site.wait_log("control", "incident needs a person")


class MuteTowards:
    """A TCP proxy to the broker that lets everything pass but commands."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.swallowed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[int]:
        async with await asyncio.start_server(self._accept, ADDRESS) as server:
            yield server.sockets[0].getsockname()[1]
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.create_task(self._relay(reader, writer)))

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(ADDRESS, self._port)
        down = asyncio.create_task(self._down(up_reader, writer))
        try:
            while data := await reader.read(65536):
                if protocol.command_topic(HOST, VM).encode() in data:
                    self.swallowed.set()
                if not self.swallowed.is_set():
                    up_writer.write(data)
                    await up_writer.drain()
        finally:
            down.cancel()
            writer.close()
            up_writer.close()

    @staticmethod
    async def _down(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()


async def test_control_killed_after_commit_and_before_publish(site: Site) -> None:
    """kill -9 while the command is on its way: after a restart the same bytes leave."""
    config = site.control_config(ENFORCE)
    direct = config.read_text()
    proxy = MuteTowards(site.broker.port)
    async with Outside(site).connected() as outside, proxy.serve() as port:
        config.write_text(direct.replace(f"port = {site.broker.port}", f"port = {port}"))
        with site.start("control", config) as child:
            await site.wait_log("control", "state=online")
            await outside.tell(outside.verdict())
            async with asyncio.timeout(30):
                await proxy.swallowed.wait()
            child.kill()
        assert outside.commands == []
        with sqlite3.connect(site.path / "control" / "state.sqlite") as database:
            [(stored,)] = database.execute("SELECT envelope FROM commands").fetchall()
        config.write_text(direct)
        with site.start("control", config) as child:
            await outside.commanded()
            assert outside.envelopes == [stored]
            assert child.stop() == 0
