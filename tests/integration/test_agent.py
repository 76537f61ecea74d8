"""The agent as a process, against a real broker and a real QEMU."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from site_parts import (
    CONTROL,
    HOST,
    OBSERVER,
    VM,
    Hypervisor,
    Peer,
    QmpProxy,
    Site,
    until,
    watching,
)

from pyscan import protocol
from pyscan.errors import ExitStatus
from pyscan.evidence import verify_directory
from pyscan.lab.broker import Broker
from pyscan.lab.process import Child, RunDirectory
from pyscan.records import Action, Command, ReportState

ACCEPTED, STARTED = ReportState.ACCEPTED, ReportState.STARTED
SUCCEEDED, FAILED, REJECTED = ReportState.SUCCEEDED, ReportState.FAILED, ReportState.REJECTED


@pytest.fixture
def site(run_directory: RunDirectory, broker: Broker) -> Iterator[Site]:
    site = Site(run_directory, broker)
    yield site
    print(site.log("agent").read_text() if site.log("agent").exists() else "")  # shown on failure


@pytest.fixture
def machine(run_directory: RunDirectory) -> Iterator[Hypervisor]:
    with Hypervisor(run_directory) as running:
        yield running


@asynccontextmanager
async def agent(site: Site, config: Path) -> AsyncIterator[tuple[Child, Peer]]:
    """A running agent, and the test in the place of control."""
    with site.start("agent", config) as child:
        await site.wait_log("agent", "state=online")
        async with Peer(site).connected() as peer:
            yield child, peer
        assert child.stop() == 0, child.failure("did not stop cleanly")


async def test_freeze_and_release(
    site: Site, machine: Hypervisor, run_directory: RunDirectory
) -> None:
    proxy = QmpProxy(machine.qmp, run_directory.path / "proxy.qmp")
    config = site.agent_config(machine.table(proxy.path))
    async with proxy.serve(), watching(machine) as watcher, agent(site, config) as (_, peer):
        command = peer.command(Action.FREEZE)
        await peer.send(command)
        report = await peer.final(command)
        assert peer.states(command) == [ACCEPTED, STARTED, SUCCEEDED]
        assert (report.vm, report.action, report.vm_state) == (VM, Action.FREEZE, "paused")
        assert await watcher.status() == "paused"
        effects = [c for c in proxy.commands if c[0] in {"stop", "set_link"}]
        assert effects == [
            ("stop", None),
            ("set_link", {"name": "n0", "up": False}),
            ("set_link", {"name": "n1", "up": False}),
        ]

        again = await peer.order(Action.FREEZE)
        assert (again.state, again.vm_state) == (SUCCEEDED, "paused")
        assert watcher.events == ["STOP"]

        proxy.commands.clear()
        released = await peer.order(Action.RELEASE)
        assert (released.state, released.vm_state) == (SUCCEEDED, "running")
        assert await watcher.status() == "running"
        assert [c for c in proxy.commands if c[0] in {"cont", "set_link"}] == [
            ("set_link", {"name": "n0", "up": True}),
            ("set_link", {"name": "n1", "up": True}),
            ("cont", None),
        ]
        nothing = await peer.order(Action.RELEASE)
        assert (nothing.state, nothing.vm_state) == (SUCCEEDED, "running")
        assert watcher.events == ["STOP", "RESUME"]


async def test_release_leaves_paused_what_was_paused_before(
    site: Site, machine: Hypervisor
) -> None:
    config = site.agent_config(machine.table())
    async with watching(machine) as watcher, agent(site, config) as (_, peer):
        await watcher.session.execute("stop")
        assert (await peer.order(Action.FREEZE)).state is SUCCEEDED
        released = await peer.order(Action.RELEASE)
        assert (released.state, released.vm_state) == (SUCCEEDED, "paused")
        assert watcher.events == ["STOP"]


@pytest.mark.parametrize("pidfile", [True, False])
async def test_kill(site: Site, run_directory: RunDirectory, pidfile: bool) -> None:
    with Hypervisor(run_directory, pidfile=pidfile) as machine:
        config = site.agent_config(machine.table())
        async with agent(site, config) as (_, peer):
            report = await peer.order(Action.KILL)
            assert (report.state, report.vm_state) == (SUCCEEDED, "gone")
            assert machine.child.exit_status == 0  # by `quit`: it ended by itself
            again = await peer.order(Action.KILL)
            assert (again.state, again.vm_state) == (SUCCEEDED, "gone")
            frozen = await peer.order(Action.FREEZE)
            assert (frozen.state, frozen.reason, frozen.vm_state) == (FAILED, "gone", "gone")


async def test_kill_of_a_hypervisor_that_does_not_answer(site: Site, machine: Hypervisor) -> None:
    config = site.agent_config(machine.table())
    async with agent(site, config) as (_, peer):
        await site.wait_log("agent", "state=running")
        machine.child.signal(signal.SIGSTOP)
        frozen = await peer.order(Action.FREEZE)
        assert (frozen.state, frozen.reason, frozen.vm_state) == (FAILED, "timeout", "unknown")
        report = await peer.order(Action.KILL)
        assert (report.state, report.vm_state) == (SUCCEEDED, "gone")
        assert machine.child.exit_status == -signal.SIGKILL


async def test_dead_socket_is_no_proof_of_death(site: Site, run_directory: RunDirectory) -> None:
    config = site.agent_config(f'[[vm]]\nid = "{VM}"\nqmp = "{run_directory.path}/none.qmp"\n')
    async with agent(site, config) as (_, peer):
        for action in (Action.KILL, Action.FREEZE, Action.QUERY):
            report = await peer.order(action)
            assert (report.state, report.reason) == (FAILED, "unreachable")
            assert report.vm_state == "unknown"


async def test_reused_process_id_is_not_hit(site: Site, run_directory: RunDirectory) -> None:
    """A pidfile older than the process that it names is not believed."""
    pidfile = run_directory.path / "stale.pid"
    with Child("bystander", ["sleep", "600"], run_directory.path / "sleep.log") as bystander:
        pidfile.write_text(f"{bystander.pid}\n")
        an_hour_ago = time.time() - 3600
        os.utime(pidfile, (an_hour_ago, an_hour_ago))
        config = site.agent_config(
            f'[[vm]]\nid = "{VM}"\nqmp = "{run_directory.path}/none.qmp"\npidfile = "{pidfile}"\n'
        )
        async with agent(site, config) as (_, peer):
            report = await peer.order(Action.KILL)
            assert (report.state, report.reason) == (FAILED, "unreachable")
        assert bystander.exit_status is None


async def test_query_dry_run_and_bad_arguments_have_no_effect(
    site: Site, machine: Hypervisor
) -> None:
    config = site.agent_config(machine.table())
    async with watching(machine) as watcher, agent(site, config) as (_, peer):
        query = await peer.order(Action.QUERY)
        assert (query.state, query.vm_state) == (SUCCEEDED, "running")
        assert "n0, n1" in query.detail
        for action in (Action.FREEZE, Action.KILL, Action.RELEASE):
            report = await peer.order(action, arguments={"dry_run": True})
            assert (report.state, report.vm_state) == (SUCCEEDED, "running")
            assert "dry run" in report.detail
        for action, arguments in BAD_ARGUMENTS:
            report = await peer.order(action, arguments=arguments)
            assert (report.state, report.reason) == (REJECTED, "unsupported_action")
        assert await watcher.status() == "running"
        assert watcher.events == []


async def test_a_hypervisor_with_a_user_of_its_own_writes_what_it_must(
    site: Site, run_directory: RunDirectory
) -> None:
    nobody = pwd.getpwnam("nobody")
    run_directory.path.chmod(0o711)
    disk = run_directory.path / "disk.raw"
    disk.touch(0o600)
    os.truncate(disk, 1 << 20)
    os.chown(disk, nobody.pw_uid, nobody.pw_gid)
    extra = [
        *("-runas", "nobody", "-device", "virtio-blk-pci,drive=disk0,id=blk0", "-blockdev"),
        f"driver=raw,node-name=disk0,file.driver=file,file.filename={disk}",
    ]
    with Hypervisor(run_directory, extra=extra) as machine:
        own = run_directory.path / "own"
        config = site.agent_config(
            machine.table(),
            f'[sandbox]\noverlays = "{own}/overlays"\n[capture]\ndirectory = "{own}/captures"\n',
        )
        async with agent(site, config) as (_, peer):
            sandboxed = await peer.order(Action.SANDBOX, arguments={"disk": True})
            assert sandboxed.state is SUCCEEDED
            assert "disk" not in sandboxed.detail  # it names only what was not done
            (overlay,) = (own / "overlays").glob("*/*.qcow2")
            assert overlay.stat().st_uid == nobody.pw_uid
            captured = await peer.order(Action.CAPTURE)
            assert captured.state is SUCCEEDED, captured.detail
            (memory,) = (own / "captures").glob("*/memory.elf")
            assert memory.stat().st_size > 64 << 20
            released = await peer.order(Action.RELEASE, arguments={"disk": "commit"})
            assert released.state is SUCCEEDED, released.detail
            assert not overlay.exists()


BAD_ARGUMENTS: list[tuple[Action, dict[str, object]]] = [
    (Action.FREEZE, {"dry_run": "yes"}),
    (Action.FREEZE, {"ttl_s": 0}),
    (Action.KILL, {"ttl_s": 5}),
    (Action.SANDBOX, {"network": "../x"}),
    (Action.SANDBOX, {"disk": True, "ttl_s": 60}),
    (Action.RELEASE, {"disk": True}),
]

Make = Callable[[Peer], tuple[Command, bytes, str]]


def _with(signer: str = CONTROL, topic: str = "", **changes: object) -> Make:
    def make(peer: Peer) -> tuple[Command, bytes, str]:
        command = peer.command(Action.KILL, **changes)
        return command, peer.envelope(command, signer), topic

    return make


def _damaged(change: Callable[[bytes], bytes]) -> Make:
    def make(peer: Peer) -> tuple[Command, bytes, str]:
        command = peer.command(Action.KILL)
        return command, change(peer.envelope(command)), ""

    return make


NOW_S = int(time.time())
#: (reason code, whether the sender is known and so hears of it, the message)
BAD: dict[str, tuple[str, bool, Make]] = {
    "expired": ("expired", True, _with(issued_s=NOW_S - 600, expires_s=NOW_S - 540)),
    "from the future": (
        "not_yet_valid",
        True,
        _with(issued_s=NOW_S + 3600, expires_s=NOW_S + 3660),
    ),
    "endless": ("lifetime", True, _with(expires_s=NOW_S + 86400)),
    "replayed": ("replayed", True, _with(sequence=1)),
    "another VM's topic": (
        "bad_signature",
        False,
        _with(vm="web-2", topic=protocol.command_topic(HOST, VM)),
    ),
    "another host's": (
        "bad_signature",
        False,
        _with(audience="host-2", topic=protocol.command_topic(HOST, VM)),
    ),
    "unknown VM": ("unknown_vm", True, _with(vm="web-9")),
    "protected VM": ("protected_vm", True, _with(vm="web-2")),
    "foreign key": ("unknown_key", False, _with(signer="foreign")),
    "agent's own key": ("unknown_key", False, _with(signer=HOST)),
    "broken signature": ("bad_signature", False, _damaged(lambda e: e[:-1] + bytes([e[-1] ^ 1]))),
    "truncated": ("malformed", False, _damaged(lambda e: e[:-10])),
    "garbage": ("malformed", False, _damaged(lambda _: os.urandom(300))),
    "empty": ("malformed", False, _damaged(lambda _: b"")),
    "oversize": ("too_large", False, _damaged(lambda e: e + bytes(100_000))),
}


async def test_bad_commands_have_no_effect(site: Site, machine: Hypervisor) -> None:
    config = site.agent_config(
        machine.table() + '[[vm]]\nid = "web-2"\nqmp = "/nowhere/web-2.qmp"\n',
        '[limits]\nprotected = ["web-2"]',
    )
    async with watching(machine) as watcher, agent(site, config) as (_, peer):
        assert (await peer.order(Action.QUERY)).state is SUCCEEDED
        for name, (reason, reported, make) in BAD.items():
            before = site.log("agent").read_text().count(f"{reason}")
            command, envelope, topic = make(peer)
            await peer.send(command, envelope, topic)
            await site.wait_log("agent", reason, before + 1)
            if reported:
                report = await peer.final(command)
                assert (report.state, report.reason) == (REJECTED, reason), name
        # Everything before it has been dealt with: one worker, in order.
        assert (await peer.order(Action.QUERY)).vm_state == "running"
        answered = {report.command for report in peer.reports}
        assert len(answered) == 2 + sum(reported for _, reported, _ in BAD.values())
        assert watcher.events == []
        assert await watcher.status() == "running"
    assert machine.child.exit_status is None


async def test_kills_are_rate_limited(site: Site, machine: Hypervisor) -> None:
    config = site.agent_config(machine.table(), "[limits]\nkills_per_minute = 1")
    async with agent(site, config) as (_, peer):
        first = await peer.order(Action.KILL, arguments={"dry_run": True})
        assert first.state is SUCCEEDED
        second = await peer.order(Action.KILL)
        assert (second.state, second.reason) == (REJECTED, "rate_limited")
    assert machine.child.exit_status is None


async def test_redelivered_command_gets_the_stored_report(site: Site, machine: Hypervisor) -> None:
    config = site.agent_config(machine.table())
    async with watching(machine) as watcher, agent(site, config) as (_, peer):
        command = peer.command(Action.FREEZE)
        envelope = peer.envelope(command)
        await peer.send(command, envelope)
        await peer.final(command)
        await watcher.session.execute("cont")  # if it were carried out again, it would show
        await peer.send(command, envelope)
        await peer.final(command, count=2)
        assert peer.envelopes[-1] == peer.envelopes[-2]
        assert await watcher.status() == "running"


@pytest.mark.parametrize("forward", [False, True], ids=["not forwarded", "answer withheld"])
@pytest.mark.parametrize("action", [Action.FREEZE, Action.KILL])
async def test_agent_killed_between_started_and_done(
    site: Site, machine: Hypervisor, action: Action, forward: bool
) -> None:
    """kill -9 in the middle of the effect: after a restart, one effect and one report."""
    proxy = QmpProxy(machine.qmp, site.path / "proxy.qmp")
    proxy.hold = "stop" if action is Action.FREEZE else "quit"
    proxy.forward = forward
    config = site.agent_config(machine.table(proxy.path))
    async with Peer(site).connected() as peer, watching(machine) as watcher:
        command = peer.command(action)
        with site.start("agent", config) as child:
            async with proxy.serve():
                await site.wait_log("agent", "state=online")
                await peer.send(command)
                async with asyncio.timeout(30):
                    await proxy.held.wait()
                if forward:
                    effect = "STOP" if action is Action.FREEZE else "SHUTDOWN"
                    await until(lambda: effect in watcher.events, effect)
                assert child.kill() == -signal.SIGKILL
        assert peer.finals(command) == []

        proxy.hold = ""
        proxy.held.clear()
        async with proxy.serve():
            with site.start("agent", config) as child:
                report = await peer.final(command)
                assert (report.state, report.reason) == (SUCCEEDED, "")
                # The broker delivers the command again; that is answered, not carried out.
                await site.wait_log("agent", "command redelivered")
                await peer.final(command, count=2)
                assert len({r.id for r in peer.finals(command)}) == 1
                if action is Action.FREEZE:
                    assert await watcher.status() == "paused"
                    assert watcher.events == ["STOP"]
                else:
                    assert machine.child.wait(10) == 0
                    assert watcher.events == ["SHUTDOWN"]
                assert child.stop() == 0


async def test_command_queued_over_restarts_of_broker_and_agent(
    site: Site, machine: Hypervisor
) -> None:
    config = site.agent_config(machine.table())
    async with watching(machine) as watcher, Peer(site).connected() as peer:
        with site.start("agent", config) as child:
            await site.wait_log("agent", "state=online")
            assert child.stop() == 0
        command = peer.command(Action.FREEZE)
        await peer.send(command)
        site.broker.stop()
        with site.start("agent", config) as child:
            await site.wait_log("agent", "is the broker running")
            site.broker.start()
            assert child.exit_status is None
            assert (await peer.final(command)).state is SUCCEEDED
            site.broker.stop()
            site.broker.start()
            assert (await peer.order(Action.QUERY)).vm_state == "paused"
            assert watcher.events == ["STOP"]
            # The broker may deliver a report twice over its restart, never two reports.
            assert len({report.id for report in peer.finals(command)}) == 1
            assert child.stop() == 0


async def test_wrong_password_is_told_and_does_not_end_the_agent(
    site: Site, machine: Hypervisor
) -> None:
    config = site.agent_config(machine.table())
    wrong = site.path / "wrong.password"
    wrong.touch(0o600)
    wrong.write_text("wrong\n")
    text = config.read_text().replace(str(site.broker.password_file(HOST)), str(wrong))
    config.write_text(text)
    with site.start("agent", config) as child:
        await site.wait_log("agent", "check [mqtt] username and password_file")
        assert child.stop() == 0


async def test_presence_and_state_are_retained(site: Site, machine: Hypervisor) -> None:
    config = site.agent_config(machine.table())
    status_topic = protocol.host_status_topic(HOST)
    state_topic = protocol.state_topic(HOST, VM)
    link = site.link(OBSERVER, status_topic, state_topic)
    seen: dict[str, list[str]] = {status_topic: [], state_topic: []}

    async def collect() -> None:
        async for message in link.messages:
            content = json.loads(message.payload)
            seen[message.topic].append(content.get("status") or content["state"])
            message.acknowledge()

    tasks = [asyncio.create_task(link.run()), asyncio.create_task(collect())]
    await link.wait_online()
    async with agent(site, config) as (_, peer):
        await until(lambda: "running" in seen[state_topic], "the first state")
        await peer.order(Action.FREEZE)
        await until(lambda: seen[state_topic][-1] == "paused", "the new state")
    await until(lambda: seen[status_topic] == ["online", "offline"], "the clean stop")
    with site.start("agent", config) as child:
        await until(lambda: seen[status_topic][-1] == "online", "online")
        child.kill()
        await until(lambda: seen[status_topic][-1] == "offline", "the will")
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_evidence_verifies_after_a_clean_stop(site: Site, machine: Hypervisor) -> None:
    config = site.agent_config(machine.table())
    async with agent(site, config) as (_, peer):
        await peer.order(Action.FREEZE)
        command = peer.command(Action.KILL)
        await peer.send(command, b"garbage")
        await site.wait_log("agent", "command rejected")
    verify_directory(site.path / "agent" / "evidence", site.ring(HOST, CONTROL))
    assert not list(site.path.glob("**/*.sqlite-wal"))


@pytest.mark.parametrize("good", [True, False])
def test_check_config(site: Site, machine: Hypervisor, good: bool) -> None:
    config = site.agent_config(machine.table())
    if not good:
        config.write_text(config.read_text().replace("port =", "prot ="))
    result = subprocess.run(
        [os.sys.executable, "-m", "pyscan", "agent", "--config", config, "--check-config"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == (ExitStatus.APPROVED if good else ExitStatus.USAGE)
    if not good:
        assert "agent.toml:7: mqtt: Object contains unknown field `prot`" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not (site.path / "agent").exists()
