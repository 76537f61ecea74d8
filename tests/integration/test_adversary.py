"""Against a broker that is an enemy: whatever it delivers, no wrong effect and none twice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from adversary.arena import Arena, arena, busy_s, memory_kib
from adversary.attacks import ATTACKS
from site_parts import CONTROL, HOST, VM

from pyscan import protocol
from pyscan.evidence import verify_directory
from pyscan.ids import new_id
from pyscan.lab.process import Child, RunDirectory
from pyscan.records import Action, Approval, Command, ReportState

SEED = 1729
APPROVAL = new_id()
#: Bounds of a flood: growth of memory, and of what is written to disk for each message.
GROWTH_KIB_MAX = 48 << 10
WRITTEN_BYTES_MAX = 4 << 20


@asynccontextmanager
async def agent(here: Arena, config: Path) -> AsyncIterator[Child]:
    command = [sys.executable, "-m", "pyscan", "agent", "--config", config]
    environment = {**os.environ, "PYSCAN_TRACEBACK": "1"}
    connections = here.broker.connections
    with Child("agent", command, here.log, environment=environment) as child:
        try:
            await here.until(
                lambda: here.broker.connections > connections or child.exit_status is not None,
                "the agent",
            )
            assert child.exit_status is None, child.failure("did not start")
            await here.agent()
            yield child
            if child.exit_status != -signal.SIGKILL:  # by the test
                assert child.exit_status is None, child.failure("ended by itself")
                # The broker must go on meanwhile: the agent says goodbye.
                status = await asyncio.to_thread(child.stop)
                assert status == 0, child.failure("did not stop cleanly")
        finally:
            log = here.log.read_text()
            print(log[-3000:])  # shown on failure
    assert "Traceback" not in log


def written(here: Arena) -> int:
    """Bytes of log, evidence and database."""
    state = [path for path in (here.path / "agent").rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in (here.log, *state))


async def test_nothing_that_a_broker_delivers_has_a_wrong_effect(
    run_directory: RunDirectory,
) -> None:
    chance = random.Random(SEED)
    rows, wrong = [], []
    async with arena(run_directory.path) as here, agent(here, here.config()) as child:
        refused = await here.counted()
        for attack in ATTACKS:
            effects = here.machine.effects["stop"]
            tries, expected = await attack.run(here, chance)
            await here.settle()
            effects = here.machine.effects["stop"] - effects
            before, refused = refused, await here.counted()
            reasons = refused - before
            rows.append((attack.name, tries, effects, expected, dict(reasons)))
            if effects != expected or not reasons.keys() <= attack.reasons:
                wrong.append(rows[-1])
            if attack.reasons and not reasons:
                wrong.append(rows[-1])
        assert here.foreign() == []
        assert {name for name in here.machine.effects if name != "stop"} <= {"set_link"}
        await _flooded(here, child, rows)
        await _over_a_crash(here, child, rows)
    print(f"{'attack':24}{'tries':>7}{'effects':>9}{'right':>7}  refused")
    for name, tries, effects, expected, reasons in rows:
        print(f"{name:24}{tries:7}{effects:9}{expected:7}  {reasons}")
    assert wrong == []


async def _flooded(here: Arena, child: Child, rows: list[object]) -> None:
    """Thousands of garbage and of genuine old messages: bounded, and then all is as before."""
    old = here.fresh()
    await here.deliver(old)
    await here.settle()
    effects = here.machine.effects["stop"]
    memory, size, busy = memory_kib(child.pid), written(here), busy_s(child.pid)
    tries = 6000
    for n in range(tries):
        await here.deliver(old if n % 2 else os.urandom(400))
    await here.settle()
    memory, size = memory_kib(child.pid) - memory, written(here) - size
    busy = busy_s(child.pid) - busy
    done = here.machine.effects["stop"] - effects
    rows.append(("flood", tries, done, 0, {}))
    print(f"flood of {tries}: {memory} KiB of memory, {size} bytes written, {busy:.1f} s busy")
    assert done == 0
    assert memory < GROWTH_KIB_MAX
    assert size < WRITTEN_BYTES_MAX
    fresh = here.command()
    await here.deliver(here.sign(fresh))
    await here.until(lambda: bool(here.finals(fresh.id)), "the answer after the flood")
    assert here.machine.effects["stop"] == effects + 1


async def _over_a_crash(here: Arena, child: Child, rows: list[object]) -> None:
    """What was carried out before a crash is not carried out after it."""
    envelopes = [here.fresh() for _ in range(20)]
    for envelope in envelopes:
        await here.deliver(envelope)
    await here.settle()
    effects = here.machine.effects["stop"]
    assert child.kill() == -signal.SIGKILL
    async with agent(here, here.path / "agent.toml"):
        for envelope in envelopes * 10:
            await here.deliver(envelope, dup=True)
        await here.settle()
    rows.append(("replayed after a crash", 200, here.machine.effects["stop"] - effects, 0, {}))
    assert here.machine.effects["stop"] == effects


def _approval(given: Command, envelope: bytes, **changes: object) -> Approval:
    fields: dict[str, object] = {
        "id": new_id(),
        "command": given.id,
        "digest": protocol.command_digest(envelope),
        "issuer": "operator-1",
        "audience": HOST,
        "vm": VM,
        "action": given.action,
        "issued_s": given.issued_s,
        "expires_s": given.expires_s,
        **changes,
    }
    return Approval(**fields)  # type: ignore[arg-type]


async def test_a_kill_waits_for_a_second_person(run_directory: RunDirectory) -> None:
    topic = protocol.approval_topic(HOST, VM)
    async with arena(run_directory.path) as here:
        config = here.config('two_person = ["kill"]\nkills_per_minute = 1000')

        def sealed(approval: Approval, signer: str = "operator-1") -> bytes:
            return protocol.encode_approval(approval, here.keys[signer])

        async with agent(here, config):
            commands = [here.command(Action.KILL) for _ in range(20)]
            envelopes = [here.sign(command) for command in commands]
            for envelope in envelopes:
                await here.deliver(envelope)
            await here.settle()
            (waiting,) = here.reports(commands[0].id)
            assert (waiting.state, waiting.reason) == (ReportState.ACCEPTED, "waiting_approval")
            assert waiting.detail == f"digest {protocol.command_digest(envelopes[0])}"
            first, other = commands[0], commands[1]
            bad = {
                "unknown_key": sealed(_approval(first, envelopes[0]), "stranger"),
                "wrong_issuer": sealed(_approval(first, envelopes[0]), CONTROL),
                "same_signer": sealed(_approval(first, envelopes[0], issuer=CONTROL), CONTROL),
                "other_command": sealed(_approval(first, envelopes[1])),
                "expired": sealed(_approval(first, envelopes[0], issued_s=1000, expires_s=1100)),
                "not_waiting": sealed(
                    _approval(first, b"", command=new_id(), action=Action.FREEZE)
                ),
                "wrong_content_type": envelopes[0],
            }
            for approval in bad.values():
                for _ in range(20):
                    await here.deliver(approval, topic)
            for envelope in envelopes * 5:
                await here.deliver(envelope)  # again and again is not a second signature
            await here.settle()
            assert await here.counted() == dict.fromkeys(bad, 20)
            assert here.machine.effects["quit"] == 0

        # Over a restart they wait on; the right approval, often, is good for one of them.
        async with agent(here, config):
            await here.settle()
            assert here.machine.effects["quit"] == 0
            for _ in range(10):
                await here.deliver(sealed(_approval(other, envelopes[1])), topic)
            await here.until(lambda: bool(here.finals(other.id)), "the kill")
            await here.settle()
            assert here.machine.effects["quit"] == 1
            assert here.finals(first.id) == []

            # An approval may come first; a dry run needs none.
            late = here.command(Action.KILL)
            before = await here.counted()
            for _ in range(20):
                await here.deliver(sealed(_approval(late, here.sign(late), id=APPROVAL)), topic)
            assert await here.counted() - before == {"duplicate": 19}
            await here.deliver(here.sign(late))
            dry = here.command(Action.KILL, arguments={"dry_run": True})
            await here.deliver(here.sign(dry))
            await here.until(lambda: bool(here.finals(late.id)), "the kill")
            await here.until(lambda: bool(here.finals(dry.id)), "the dry run")
            assert here.machine.effects["quit"] == 2


async def test_a_command_that_nobody_approves_ends(run_directory: RunDirectory) -> None:
    async with arena(run_directory.path) as here:
        async with agent(here, here.config('two_person = ["kill"]')):
            # In time by the tolerance for clocks, and over two seconds later.
            now_s = int(time.time())
            command = here.command(Action.KILL, issued_s=now_s - 60, expires_s=now_s - 28)
            await here.deliver(here.sign(command))
            await here.until(lambda: bool(here.finals(command.id)), "its end")
            (report,) = here.finals(command.id)
            assert (report.state, report.reason) == (ReportState.REJECTED, "expired")
            assert here.machine.effects["quit"] == 0
        verify_directory(here.path / "agent" / "evidence")


async def test_reports_outlast_a_broker_that_takes_none(run_directory: RunDirectory) -> None:
    """Unconfirmed reports stay; the effects are one each; in the end every report arrives."""
    async with arena(run_directory.path) as here, agent(here, here.config()):
        here.broker.confirm = lambda said: "/report/" not in said.topic
        commands = [here.command() for _ in range(10)]
        for command in commands:
            await here.deliver(here.sign(command))
        await here.until(lambda: here.machine.effects["stop"] == 10, "the effects")
        for command in commands:
            assert here.reports(command.id) == []
            await here.deliver(here.sign(command), dup=True)
        here.broker.confirm = lambda _: True
        for command in commands:
            await here.until(lambda c=command: bool(here.finals(c.id)), "the report")
        await here.settle()
        assert here.machine.effects["stop"] == 10
