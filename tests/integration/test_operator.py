"""A person at the command line: machines, incidents and events, with all programs running.

Control and agent are processes, the machine is QEMU.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from site_parts import CONTROL, HOST, MONITOR, VM, Hypervisor, Site, until, watching
from test_control import ENFORCE, Outside

from pyscan import cli, protocol
from pyscan.evidence import verify_directory
from pyscan.keys import SigningKey
from pyscan.lab.broker import ADDRESS, Broker, Role
from pyscan.lab.process import Child, RunDirectory
from pyscan.protocol import TopicKind
from pyscan.records import Action, VerdictState

ANN, BOB = "ann", "bob"
IDENTITIES = {
    MONITOR: Role.MONITOR,
    CONTROL: Role.CONTROL,
    HOST: Role.AGENT,
    ANN: Role.OPERATOR,
    BOB: Role.OPERATOR,
}
TIMEOUT_S = 60


class Installation(Site):
    """A site with two operators."""

    def __init__(self, run: RunDirectory, broker: Broker) -> None:
        super().__init__(run, broker)
        for name in (ANN, BOB):
            self.keys[name] = SigningKey.generate()
            self.keys[name].save(self.path / f"{name}.key")
            self.keys[name].public.save(self.path / f"{name}.pub")
            self.operator_config(name)

    def operator_config(self, name: str, more: str = "") -> Path:
        path = self.path / f"{name}.toml"
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
directory = "control"
[trust]
monitors.{MONITOR} = "{MONITOR}.pub"
controls.{CONTROL} = "{CONTROL}.pub"
agents.{HOST} = "{HOST}.pub"
{more}"""
        )
        return path

    def agent_config(self, vms: str, limits: str = "") -> Path:
        trust = f'[trust]\ncontrols.{CONTROL} = "{CONTROL}.pub"\n'
        trust += "".join(f'operators.{name} = "{name}.pub"\n' for name in (ANN, BOB))
        return self.write("agent", HOST, f"{trust}\n{limits}\n{vms}")

    def command(self, *arguments: object, name: str = ANN) -> list[str]:
        words = [sys.executable, "-m", "pyscan", *map(str, arguments)]
        return [*words, "--config", str(self.path / f"{name}.toml")]

    async def pyscan(self, *arguments: object, name: str = ANN) -> Done:
        """Run a command to its end, in a thread: a process each would take far longer."""
        words = self.command(*arguments, name=name)[3:]
        done = await asyncio.to_thread(_run, words)
        print(arguments, done.status, done.out, done.err)
        assert "Traceback" not in done.err
        assert "internal error" not in done.err
        return done


class Done:
    """What a command wrote and returned."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err

    def json(self) -> Any:
        return json.loads(self.out)


def _run(words: list[str]) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = cli.main(words)
    return Done(status, out.getvalue(), err.getvalue())


@pytest.fixture
def broker(run_directory: RunDirectory) -> Iterator[Broker]:
    with Broker(run_directory, IDENTITIES) as running:
        yield running


@pytest.fixture
def site(run_directory: RunDirectory, broker: Broker) -> Iterator[Installation]:
    site = Installation(run_directory, broker)
    yield site
    for program in ("control", "agent"):
        if site.log(program).exists():
            print(site.log(program).read_text())  # shown on failure


@pytest.fixture
def hypervisor(run_directory: RunDirectory) -> Iterator[Hypervisor]:
    with Hypervisor(run_directory) as running:
        yield running


@asynccontextmanager
async def programs(site: Installation, hypervisor: Hypervisor, policy: str = ENFORCE) -> (
    AsyncIterator[Outside]
):  # fmt: skip
    """Control and agent, and the test in the place of the monitor."""
    with ExitStack() as stack:
        stack.enter_context(site.start("control", site.control_config(policy)))
        stack.enter_context(site.start("agent", site.agent_config(hypervisor.table())))
        for program in ("control", "agent"):
            await site.wait_log(program, "state=online")
        outside = Outside(site)
        link = asyncio.create_task(outside.monitor.run())
        try:
            yield outside
        finally:
            link.cancel()
            await asyncio.wait({link})


async def test_a_person_acts_on_a_machine(site: Installation, hypervisor: Hypervisor) -> None:
    async with programs(site, hypervisor), watching(hypervisor) as watcher:
        query = await site.pyscan("vm", "query", f"{HOST}/{VM}")
        assert query.status == 0
        assert "succeeded" in query.out
        assert "machine running" in query.out

        dry = await site.pyscan("vm", "freeze", f"{HOST}/{VM}", "--wait", "--dry-run")
        assert dry.status == 0
        assert await watcher.status() == "running"

        frozen = await site.pyscan("vm", "freeze", f"{HOST}/{VM}", "--wait", "--json")
        assert frozen.status == 0
        assert await watcher.status() == "paused"
        document = frozen.json()
        assert document["host"] == HOST
        states = [report["state"] for report in document["reports"]]
        assert states[0] == "accepted"
        assert states[-1] == "succeeded"

        listed = await site.pyscan("vm", "list", "--json")
        [row] = listed.json()
        assert (row["host"], row["vm"], row["state"], row["agent"]) == (
            HOST,
            VM,
            "paused",
            "online",
        )
        assert f"{HOST}/{VM}" in (await site.pyscan("vm", "list")).out

        assert (await site.pyscan("vm", "release", f"{HOST}/{VM}", "--wait")).status == 0
        assert await watcher.status() == "running"

        nobody = await site.pyscan("vm", "freeze", f"{HOST}/web-9", "--wait")
        assert nobody.status == 4
        assert "unknown_vm" in nobody.out


async def test_a_kill_is_confirmed(site: Installation, hypervisor: Hypervisor) -> None:
    async with programs(site, hypervisor):
        unasked = await site.pyscan("vm", "kill", f"{HOST}/{VM}", "--wait")
        assert unasked.status == 2
        assert "--yes" in unasked.err

        assert await on_terminal(site, "no\n") == 2
        assert hypervisor.child.exit_status is None

        assert await on_terminal(site, f"{VM}\n") == 0
        await until(lambda: hypervisor.child.exit_status is not None, "the machine's end")

        again = await site.pyscan("vm", "kill", f"{HOST}/{VM}", "--wait", "--yes")
        assert "machine gone" in again.out


async def on_terminal(site: Installation, typed: str) -> int:
    """Run the kill on a terminal, and type something."""
    master, slave = pty.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            *site.command("vm", "kill", f"{HOST}/{VM}", "--wait"),
            stdin=slave,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        os.write(master, typed.encode())
        async with asyncio.timeout(TIMEOUT_S):
            return await process.wait()
    finally:
        os.close(master)
        os.close(slave)


async def incident_of(site: Installation, state: str, count: int = 1) -> dict[str, Any]:
    """The latest incident, once so many were in a state."""
    await site.wait_log("control", f"incident state={state}", count)
    listed = (await site.pyscan("incidents", "--json", "--all")).json()
    latest = dict(listed["incidents"][0])
    assert latest["state"] == state
    return latest


async def test_an_incident_from_verdict_to_release(
    site: Installation, hypervisor: Hypervisor
) -> None:
    async with programs(site, hypervisor) as outside, watching(hypervisor) as watcher:
        assert (await site.pyscan("incidents")).out == "no incidents\n"
        told = outside.verdict()
        await outside.tell(told)
        incident = await incident_of(site, "answered")
        assert (incident["action"], incident["reason"]) == ("freeze", told.reason)
        assert await watcher.status() == "paused"

        shown = await site.pyscan("incidents", "show", incident["id"], "--json")
        [command] = shown.json()["commands"]
        assert (command["action"], command["issuer"], command["state"]) == (
            "freeze",
            CONTROL,
            "succeeded",
        )
        assert [report["state"] for report in command["reports"]][-1] == "succeeded"
        plain = await site.pyscan("incidents", "show", incident["id"])
        assert command["id"] in plain.out

        released = await site.pyscan("incidents", "release", incident["id"], "--wait")
        assert released.status == 0
        assert await watcher.status() == "running"
        await incident_of(site, "released")
        assert (await site.pyscan("incidents")).out == "no incidents\n"
        twice = await site.pyscan("incidents", "release", incident["id"])
        assert (twice.status, twice.out) == (2, "")

        # What is not as approved after the release is answered again.
        await outside.tell(outside.verdict())
        second = await incident_of(site, "answered", 2)
        assert second["id"] != incident["id"]
        by_hand = ("incidents", "release", second["id"], "--by-hand", "was a drill")
        assert (await site.pyscan(*by_hand)).status == 0
        await site.wait_log("control", "note=was a drill")
        assert (await site.pyscan("incidents", "show", MONITOR)).status == 2
    verify_directory(site.path / "control" / "evidence", site.ring(CONTROL, MONITOR, HOST))


async def test_a_breaker_waits_for_a_person(site: Installation, hypervisor: Hypervisor) -> None:
    policy = f"{ENFORCE}\n[policy.limits]\nfleet_min = 2\nunapproved_percent_max = 50"
    async with programs(site, hypervisor, policy) as outside:
        await outside.tell(outside.verdict(VerdictState.APPROVED, target="web-2", vm="web-2"))
        await outside.tell(outside.verdict())
        await incident_of(site, "answered")
        await outside.tell(outside.verdict(target="web-2", vm="web-2"))
        await site.wait_log("control", "circuit breaker opened")
        assert "the circuit breaker is open: 2 of 2" in (await site.pyscan("incidents")).out
        resumed = await site.pyscan("incidents", "resume", "--because", "a drill", "--json")
        assert resumed.json()["was_open"].startswith("2 of 2")
        await site.wait_log("control", "note=circuit breaker closed: a drill")
        assert (await site.pyscan("incidents", "--json")).json()["circuit_breaker"] is None
        assert "action=freeze host=host-1 vm=web-2" not in site.log("control").read_text()


async def test_events_are_followed_and_verified(
    site: Installation, hypervisor: Hypervisor, tmp_path: Path
) -> None:
    async with programs(site, hypervisor) as outside:
        out = tmp_path / "events.jsonl"
        words = site.command("events", "--follow", "--json")
        with Child("events", words, tmp_path / "events.log", output=out) as events:
            await until(lambda: '"host_status"' in out.read_text(), "retained states")
            genuine, forged = outside.verdict(), outside.verdict()
            await outside.tell(genuine)
            await outside.tell(forged, outside.sealed(forged, "foreign"))
            await until(lambda: '"succeeded"' in out.read_text(), "the agent's report")
            await until(lambda: "unknown_key" in out.read_text(), "the forged verdict")
            assert events.stop() in {0, 130, -15}
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        verdicts = [line for line in lines if line["event"] == "verdict"]
        assert [line["verified"] for line in verdicts] == [True, False]
        assert verdicts[0]["message"]["id"] == genuine.id
        assert "message" not in verdicts[1]
        assert {line["message"]["action"] for line in lines if line["event"] == "report"} == {
            "freeze"
        }
        shown = await site.pyscan("events")
        assert "(unsigned)" in shown.out

        policy = tmp_path / "draft.toml"
        policy.write_text('[policy]\nunapproved = "kill"\nenforce = true\n')
        for recorded in (out, site.path / "control" / "evidence"):
            words = [sys.executable, "-m", "pyscan", "policy", "simulate", str(policy)]
            words += [str(recorded), "--json", "--trust", str(site.path / f"{MONITOR}.pub")]
            done = await asyncio.to_thread(
                subprocess.run, words, capture_output=True, text=True, check=True
            )
            document = json.loads(done.stdout)
            assert document["verdicts"] == 1
            assert document["actions"] == {Action.KILL: 1}
            assert document["steps"][0]["verdict"] == genuine.id


async def test_a_broker_that_refuses(site: Installation) -> None:
    path = site.path / f"{ANN}.toml"
    path.write_text(path.read_text().replace(f'username = "{ANN}"', 'username = "nobody"'))
    done = await site.pyscan("vm", "list")
    assert done.status == 4
    assert "username" in done.err


async def test_a_second_person(site: Installation, hypervisor: Hypervisor) -> None:
    """The approval leaves as its operator signed it; what it does is the agent's matter."""
    with site.start("agent", site.agent_config(hypervisor.table())):
        await site.wait_log("agent", "state=online")
        killing = await site.pyscan("vm", "kill", f"{HOST}/{VM}", "--yes", "--json", "--dry-run")
        command = killing.json()
        link = site.link(HOST, protocol.subscription(TopicKind.APPROVAL, HOST))
        running = asyncio.create_task(link.run())
        await link.wait_online()
        where = ("vm", "approve", f"{HOST}/{VM}", "kill", command["command"])
        assert (await site.pyscan(*where, command["digest"], name=BOB)).status == 0
        message = await anext(link.messages)
        approval = protocol.decode_approval(
            message.payload,
            site.ring(BOB),
            topic=message.topic,
            audience=HOST,
            now_s=int(time.time()),
        )
        assert (approval.command, approval.digest) == (command["command"], command["digest"])
        assert (await site.pyscan(*where, "nonsense", name=BOB)).status == 2
        running.cancel()
        await asyncio.wait({running})
