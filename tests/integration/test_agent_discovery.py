"""An agent finds machines that appear, move and vanish, and says so within seconds."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from site_parts import HOST, OBSERVER, VM, Hypervisor, Peer, Site, until

from pyscan import protocol
from pyscan.lab.broker import Broker
from pyscan.lab.libvirt import LibvirtDaemon, LibvirtGuest, LibvirtOptions
from pyscan.lab.process import RunDirectory
from pyscan.protocol import TopicKind
from pyscan.records import Action, ReportState


@pytest.fixture
def site(run_directory: RunDirectory, broker: Broker) -> Iterator[Site]:
    site = Site(run_directory, broker)
    yield site
    print(site.log("agent").read_text() if site.log("agent").exists() else "")  # shown on failure


@asynccontextmanager
async def states(site: Site) -> AsyncIterator[dict[str, str]]:
    """The retained state of each machine, as it is now."""
    link = site.link(OBSERVER, protocol.subscription(TopicKind.STATE, HOST))
    now: dict[str, str] = {}

    async def collect() -> None:
        async for message in link.messages:
            content = json.loads(message.payload or b"{}")
            now[message.topic.rsplit("/", 1)[1]] = content.get("state", "")
            message.acknowledge()

    tasks = [asyncio.create_task(link.run()), asyncio.create_task(collect())]
    await link.wait_online()
    yield now
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def config(site: Site, discovery: str, more: str = "") -> Path:
    return site.agent_config(f"[discovery]\ninterval_s = 0.2\n{discovery}\n{more}")


async def test_machines_behind_sockets(site: Site, run_directory: RunDirectory) -> None:
    path = run_directory.path
    stale = path / "vm-stale.qmp"  # a socket that nobody listens on
    stale.touch()
    pattern = f'qmp = "{path}/vm-*.qmp"'
    with site.start("agent", config(site, pattern)) as child:
        await site.wait_log("agent", "state=online")
        async with states(site) as now, Peer(site).connected() as peer:
            refused = await peer.order(Action.QUERY, vm="vm-one")
            assert (refused.state, refused.reason) == (ReportState.REJECTED, "unknown_vm")
            with Hypervisor(run_directory, "vm-one") as machine:
                # QEMU has a second socket there, which serves the same machine.
                machine.other_qmp.rename(path / "other.qmp")
                await until(lambda: now.get("vm-one") == "running", "it is found")
                frozen = await peer.order(Action.FREEZE, vm="vm-one")
                assert (frozen.state, frozen.vm_state) == (ReportState.SUCCEEDED, "paused")
                await until(lambda: now["vm-one"] == "paused", "its new state")
                machine.qmp.rename(path / "vm-one-moved.qmp")
                os.link(path / "vm-one-moved.qmp", machine.qmp)
                assert (await peer.order(Action.RELEASE, vm="vm-one")).vm_state == "running"
                machine.child.kill()
                await until(lambda: now["vm-one"] == "gone", "its end")
            query = await peer.order(Action.QUERY, vm="vm-one")
            assert query.vm_state == "gone"
        assert "vm-stale" in site.log("agent").read_text()
        assert child.stop() == 0
    # It ended while there was no agent, or before: its retained state goes.
    for socket in path.glob("vm-one*.qmp"):
        socket.unlink()
    async with states(site) as now:
        await until(lambda: now.get("vm-one") == "gone", "its retained state")
        with site.start("agent", config(site, pattern)) as child:
            await until(lambda: now["vm-one"] == "", "its end")
            assert child.stop() == 0


async def test_configured_machines_are_looked_at_all_the_time(
    site: Site, run_directory: RunDirectory
) -> None:
    with (
        Hypervisor(run_directory) as machine,
        site.start("agent", config(site, "", machine.table())) as child,
    ):
        async with states(site) as now:
            await until(lambda: now.get(VM) == "running", "its state")
            machine.child.kill()
            await until(lambda: now[VM] == "gone", "its end")
        assert child.stop() == 0


async def test_domains_of_libvirt(site: Site, run_directory: RunDirectory, guest_dir: Path) -> None:
    with LibvirtDaemon(run_directory) as daemon:
        table = f'[libvirt]\nuri = "{daemon.uri}"\npid_directory = "{daemon.pid_directory}"\n'
        with site.start("agent", config(site, "", table)) as child:
            await site.wait_log("agent", "state=online")
            async with states(site) as now:
                options = LibvirtOptions(guest_dir)
                with LibvirtGuest(options, daemon, run_directory) as guest:
                    await until(lambda: now.get(guest.uuid) == "running", "it is found")
                await until(lambda: now[guest.uuid] == "gone", "its end")
            assert child.stop() == 0


async def test_a_daemon_that_is_not_there_is_told_once(site: Site) -> None:
    uri = f"qemu+unix:///system?socket={site.path}/none"
    with site.start("agent", config(site, "", f'[libvirt]\nuri = "{uri}"\n')) as child:
        await site.wait_log("agent", "state=online")
        await asyncio.sleep(1)
        log = site.log("agent").read_text()
        assert log.count("discovery problem=libvirt") == 1
        assert "check [libvirt] uri" in log
        assert child.stop() == 0
