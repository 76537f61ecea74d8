"""One contract for every driver: the agent as a process, a real hypervisor, a real guest.

A guest serves all tests of its hypervisor, in the order of this file; the last one ends it.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
from hypervisors import HOSTS, Host
from site_parts import CONTROL, HOST, OBSERVER, Peer, Site, until

from pyscan import protocol
from pyscan.agent.drivers.base import CpuQuota
from pyscan.agent.process import identify
from pyscan.cose import verify1
from pyscan.evidence import verify_directory
from pyscan.evidence.manifest import CONTENT_TYPE, EXTERNAL_AAD, MANIFEST_NAME, Manifest
from pyscan.lab.broker import Broker, Role
from pyscan.lab.process import Child, RunDirectory
from pyscan.records import Action, Report, ReportState

SUCCEEDED, FAILED = ReportState.SUCCEEDED, ReportState.FAILED
IDENTITIES = {CONTROL: Role.CONTROL, HOST: Role.AGENT, OBSERVER: Role.OBSERVER}
HOLD = "hold"


class Bench:
    """A host, its agent's configuration, and the place of the agent's files."""

    def __init__(self, host: Host, site: Site) -> None:
        self.host = host
        self.site = site
        self.child: Child | None = None
        self.hook_calls = site.path / "revoked"
        hook = site.path / "revoke.sh"
        hook.write_text(
            f'echo "$1" >>"{self.hook_calls}"\n'
            f'while [ -e "{site.path / HOLD}" ]; do sleep 0.05; done\n'
        )
        self.config = site.agent_config(
            f"{host.table}[discovery]\ninterval_s = 0.3\n"
            f'[sandbox]\nrevoke = ["/bin/sh", "{hook}"]\n'
        )

    @property
    def state(self) -> Path:
        return self.site.path / "agent"

    def start_agent(self) -> Child:
        """An agent that runs; the one before, if a test has not ended it."""
        if self.child is None or self.child.exit_status is not None:
            self.site.log("agent").write_bytes(b"")
            self.child = self.site.start("agent", self.config)
        return self.child

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[Control]:
        """A running agent, and the test in the place of control."""
        async with Peer(self.site).connected() as peer:
            child = self.start_agent()
            await self.site.wait_log("agent", "link state=online")
            await self.site.wait_log("agent", f"machine found vm={self.host.vm}")
            yield Control(self, peer, child)
            assert child.exit_status is None, child.failure("ended")

    def stop_agent(self) -> None:
        if self.child is not None:
            assert self.child.stop() == 0, self.child.failure("did not stop cleanly")


class Control:
    """Gives orders about the one machine."""

    def __init__(self, bench: Bench, peer: Peer, child: Child) -> None:
        self.peer = peer
        self.child = child
        self._vm = bench.host.vm

    async def order(self, action: Action, **arguments: str | int | bool) -> Report:
        return await self.peer.order(action, vm=self._vm, arguments=arguments)

    def steps(self, report: Report) -> list[str]:
        return [
            r.detail
            for r in self.peer.reports
            if r.command == report.command and r.state is ReportState.PROGRESS
        ]


@pytest.fixture(scope="module", params=HOSTS)
def bench(request: pytest.FixtureRequest, guest_dir: Path) -> Iterator[Bench]:
    with (
        RunDirectory() as run,
        Broker(run, IDENTITIES) as broker,
        HOSTS[request.param]() as host,
    ):
        host.start(guest_dir, run)
        bench = Bench(host, Site(run, broker))
        with ExitStack() as stack:
            stack.callback(bench.stop_agent)
            yield bench


@pytest.fixture(autouse=True)
def _log(bench: Bench) -> Iterator[None]:
    yield
    print(bench.site.log("agent").read_text() if bench.site.log("agent").exists() else "")


async def test_dry_runs_change_nothing(bench: Bench) -> None:
    host = bench.host
    async with bench.agent() as control:
        query = await control.order(Action.QUERY)
        assert (query.state, query.vm_state) == (SUCCEEDED, "running")
        assert host.link in query.detail
        for action in Action:
            report = await control.order(action, dry_run=True)
            assert (report.state, report.vm_state) == (SUCCEEDED, "running")
        assert (await control.order(Action.RELEASE)).vm_state == "running"
        bad = await control.order(Action.SANDBOX, cpu_percent=0)
        assert (bad.state, bad.reason) == (ReportState.REJECTED, "unsupported_action")
    assert host.status() == "running"
    assert host.sends(host.production)
    assert not bench.hook_calls.exists()
    assert not (bench.state / "captures").exists()


async def test_a_frozen_machine_stands_still(bench: Bench) -> None:
    host = bench.host
    host.shell("{ while :; do :; done & } ; echo $! >/tmp/busy")
    async with bench.agent() as control:
        uptime_s, began_s = host.uptime_s(), time.monotonic()
        before = host.processor_ticks()
        await asyncio.sleep(1)
        assert host.processor_ticks() - before > 20  # it works hard while it runs
        frozen = await control.order(Action.FREEZE)
        assert (frozen.state, frozen.vm_state) == (SUCCEEDED, "paused")
        again = await control.order(Action.FREEZE)
        assert (again.state, again.vm_state) == (SUCCEEDED, "paused")
        assert host.status() == "paused"
        frozen_s, before = time.monotonic(), host.processor_ticks()
        assert host.is_silent(host.production)
        assert host.processor_ticks() - before <= 10
        released = await control.order(Action.RELEASE)
        frozen_s = time.monotonic() - frozen_s
        assert (released.state, released.vm_state) == (SUCCEEDED, "running")
        advanced_s = host.uptime_s() - uptime_s
        assert advanced_s < time.monotonic() - began_s - 0.8 * frozen_s
    host.shell("kill $(cat /tmp/busy)")
    assert host.sends(host.production)


async def test_a_sandboxed_machine_runs_without_network(bench: Bench) -> None:
    host = bench.host
    async with bench.agent() as control:
        report = await control.order(Action.SANDBOX)
        assert (report.state, report.vm_state) == (SUCCEEDED, "running")
        assert f"link {host.link}: down" in control.steps(report)
        assert "credentials: revoked" in control.steps(report)
        assert bench.hook_calls.read_text() == f"{host.vm}\n"
        uptime_s = host.uptime_s()
        again = await control.order(Action.SANDBOX, network="nowhere")
        assert (again.state, again.vm_state) == (SUCCEEDED, "running")
        assert f"link {host.link}: down (" in again.detail  # there is no such network
        assert host.is_silent(host.production)
        assert host.uptime_s() > uptime_s
        released = await control.order(Action.RELEASE)
        assert (released.state, released.vm_state) == (SUCCEEDED, "running")
        assert host.sends(host.production)


async def test_quarantine_network_and_back(bench: Bench) -> None:
    host = bench.host
    async with bench.agent() as control:
        report = await control.order(Action.SANDBOX, network="quarantine")
        assert report.state is SUCCEEDED, report.detail
        assert f"link {host.link}: on quarantine" in report.detail
        assert host.sends(host.quarantine)
        assert host.is_silent(host.production)
        again = await control.order(Action.SANDBOX, network="quarantine")
        assert again.state is SUCCEEDED, again.detail
        assert host.sends(host.quarantine)
        # Frozen in the sandbox, and released from both at once.
        assert (await control.order(Action.FREEZE)).state is SUCCEEDED
        released = await control.order(Action.RELEASE)
        assert (released.state, released.vm_state) == (SUCCEEDED, "running"), released.detail
        assert host.sends(host.production)
        assert host.is_silent(host.quarantine)


async def test_disk_overlay_is_committed(bench: Bench) -> None:
    host = bench.host
    async with bench.agent() as control:
        host.write_disk("before", 8)
        async with host.driver().attach() as machine:
            disks = await machine.disks()
        report = await control.order(Action.SANDBOX, disk=True, cpu_percent=30)
        assert report.state is SUCCEEDED
        assert f"disk {host.disk}: writes to an overlay" in control.steps(report)
        # A process that shares its control group with others is left alone.
        limited = "cpu: limited" in control.steps(report)
        assert limited is host.limits_processor
        host.write_disk("inside", 8)
        assert host.on_disk("before", 8)
        assert len(list((bench.state / "overlays").glob("*/*.qcow2"))) == len(disks)
        async with host.driver().attach() as machine:
            (slow,) = await machine.disks()
            assert slow.throttle.iops == 100
            if limited:
                assert await machine.cpu_quota() == CpuQuota(30_000, 100_000)
        assert (await control.order(Action.FREEZE, ttl_s=1)).state is SUCCEEDED
        refused = "time is over, not released: disks"
        await until(lambda: any(refused in r.detail for r in control.peer.reports), "its time")
        undecided = await control.order(Action.RELEASE)
        assert (undecided.state, undecided.reason) == (FAILED, "disk_choice")
        assert host.is_silent(host.production)
        released = await control.order(Action.RELEASE, disk="commit")
        assert (released.state, released.vm_state) == (SUCCEEDED, "running"), released.detail
        assert host.on_disk("inside", 8)
        async with host.driver().attach() as machine:
            assert [(d.name, d.file, d.throttle) for d in await machine.disks()] == [
                (d.name, d.file, d.throttle) for d in disks
            ]
            if limited:
                assert (await machine.cpu_quota()).runtime_us < 0
        assert list((bench.state / "overlays").iterdir()) == []
        host.write_disk("after", 8)
        assert host.on_disk("after", 8)
        assert host.sends(host.production)


async def test_agent_killed_in_the_middle_of_a_sandbox(bench: Bench) -> None:
    """kill -9 while the hook runs: after a restart, one report, and release restores all."""
    host, hold = bench.host, bench.site.path / HOLD
    bench.hook_calls.unlink(missing_ok=True)
    hold.touch()
    async with Peer(bench.site).connected() as peer:
        command = peer.command(Action.SANDBOX, vm=host.vm, arguments={"network": "quarantine"})
        child = bench.start_agent()
        await peer.send(command)
        await until(bench.hook_calls.exists, "the hook")
        assert child.kill() == -signal.SIGKILL
        assert peer.finals(command) == []
        hold.unlink()
        bench.start_agent()
        report = await peer.final(command)
        assert (report.state, report.vm_state) == (SUCCEEDED, "running")
    assert host.sends(host.quarantine)
    async with bench.agent() as control:
        assert (await control.order(Action.RELEASE)).state is SUCCEEDED
    assert host.sends(host.production)
    assert host.is_silent(host.quarantine)


async def test_agent_killed_in_the_middle_of_a_release(bench: Bench) -> None:
    """kill -9 between the steps of a release: what is left of it is done after a restart."""
    host = bench.host
    async with bench.agent() as control:
        assert (await control.order(Action.SANDBOX, disk=True)).state is SUCCEEDED
        host.write_disk("twice", 24)
    async with Peer(bench.site).connected() as peer:
        child = bench.start_agent()
        command = peer.command(Action.RELEASE, vm=host.vm, arguments={"disk": "commit"})
        await peer.send(command)
        await until(lambda: ReportState.PROGRESS in peer.states(command), "the first step")
        assert child.kill() == -signal.SIGKILL
        bench.start_agent()
        report = await peer.final(command)
        assert (report.state, report.vm_state) == (SUCCEEDED, "running"), report.detail
    assert host.on_disk("twice", 24)
    assert list((bench.state / "overlays").iterdir()) == []
    assert host.sends(host.production)


async def test_released_when_its_time_is_over(bench: Bench) -> None:
    host = bench.host
    async with Peer(bench.site).connected() as peer:
        child = bench.start_agent()
        for action in (Action.SANDBOX, Action.FREEZE):  # the newest counts
            command = peer.command(action, vm=host.vm, arguments={"ttl_s": 2})
            await peer.send(command)
            assert (await peer.final(command)).state is SUCCEEDED
        assert child.kill() == -signal.SIGKILL  # it is the journal that remembers
        bench.start_agent()
        over = "time is over, released: as before"
        await until(lambda: any(over in r.detail for r in peer.reports), "the release")
        assert {r.command for r in peer.reports if over in r.detail} == {command.id}
    assert host.status() == "running"
    assert host.sends(host.production)


async def test_capture(bench: Bench) -> None:
    host = bench.host
    marker = f"marker-{time.time_ns()}"
    host.shell(f"echo {marker} >/tmp/marker")
    async with bench.agent() as control:
        assert (await control.order(Action.FREEZE)).state is SUCCEEDED
        report = await control.order(Action.CAPTURE)
        assert (report.state, report.vm_state) == (SUCCEEDED, "paused"), report.detail
        assert ("screen: " in report.detail) is not host.has_screen
        assert (await control.order(Action.RELEASE)).vm_state == "running"
    directory = bench.state / "captures" / report.command
    manifest = verify1(
        (directory / MANIFEST_NAME).read_bytes(),
        bench.site.ring(HOST),
        CONTENT_TYPE,
        EXTERNAL_AAD,
        1 << 20,
    )
    content = Manifest.decode(manifest.payload)
    assert content.facts["vm"] == host.vm
    there = {str(f.relative_to(directory)) for f in directory.rglob("*") if f.is_file()}
    assert {*content.files, MANIFEST_NAME} == there
    assert [file.name for file in directory.parent.iterdir()] == [directory.name]
    bench.stop_agent()
    summary = verify_directory(bench.state, bench.site.ring(HOST, CONTROL))
    assert len(summary.captures) == 1
    memory = (directory / "memory.elf").read_bytes()
    assert memory[:4] == b"\x7fELF"
    assert len(memory) > 256 << 20
    assert marker.encode() in memory
    assert host.sends(host.production)


async def test_disk_overlay_is_discarded(bench: Bench) -> None:
    host = bench.host
    async with bench.agent() as control:
        host.write_disk("keep", 16)
        assert (await control.order(Action.SANDBOX, disk=True)).state is SUCCEEDED
        host.write_disk("drop", 16)
        released = await control.order(Action.RELEASE, disk="discard")
        assert (released.state, released.vm_state) == (SUCCEEDED, "running"), released.detail
        host.wait_ready_again()
        assert host.shell("dd if=/dev/vda bs=512 skip=16 count=1 2>/dev/null").strip() == "keep"
        assert host.on_disk("keep", 16)
        assert list((bench.state / "overlays").iterdir()) == []
        assert host.sends(host.production)


async def test_a_hypervisor_that_does_not_answer(bench: Bench) -> None:
    host = bench.host
    async with bench.agent() as control:
        host.server.signal(signal.SIGSTOP)
        try:
            report = await control.order(Action.FREEZE)
            assert report.state is FAILED
            assert report.reason in {"timeout", "unreachable"}
            assert report.vm_state == "unknown"
        finally:
            host.server.signal(signal.SIGCONT)
        assert (await control.order(Action.FREEZE)).vm_state == "paused"
        assert (await control.order(Action.RELEASE)).vm_state == "running"


async def test_killed_is_gone(bench: Bench) -> None:
    host, pid = bench.host, bench.host.pid
    link = bench.site.link(OBSERVER, protocol.state_topic(HOST, host.vm))
    states: list[bytes] = []

    async def collect() -> None:
        async for message in link.messages:
            states.append(message.payload)
            message.acknowledge()

    tasks = [asyncio.create_task(link.run()), asyncio.create_task(collect())]
    async with bench.agent() as control:
        killed = await control.order(Action.KILL)
        assert (killed.state, killed.vm_state) == (SUCCEEDED, "gone")
        assert host.status() == "gone"
        assert identify(pid) is None
        again = await control.order(Action.KILL)
        assert (again.state, again.vm_state) == (SUCCEEDED, "gone")
        for action in (Action.FREEZE, Action.SANDBOX, Action.CAPTURE, Action.RELEASE):
            report = await control.order(action)
            assert (report.state, report.reason, report.vm_state) == (FAILED, "gone", "gone")
        assert (await control.order(Action.QUERY)).vm_state == "gone"
        await until(lambda: bool(states) and b'"gone"' in states[-1], "the retained state")
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
