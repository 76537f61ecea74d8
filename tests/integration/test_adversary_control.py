"""A broker that is an enemy, in front of control; and one between control and a real machine."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from adversary.arena import NAMES
from adversary.broker import DEADLINE_S, HostileBroker
from adversary.packets import Published
from site_parts import CONTROL, HOST, MONITOR, VM, Hypervisor, until, watching

from pyscan import protocol
from pyscan.ids import new_id
from pyscan.keys import KeyRing, SigningKey
from pyscan.lab.process import Child, RunDirectory
from pyscan.records import Action, Report, ReportState, Verdict, VerdictState

COMMANDS = protocol.command_topic(HOST, VM)
VERDICTS = protocol.verdict_topic(MONITOR, "web")


class Site:
    """Keys and configuration files of the programs that are attacked."""

    def __init__(self, directory: Path, broker: HostileBroker) -> None:
        self.path = directory
        self.broker = broker
        self.keys = {name: SigningKey.generate() for name in NAMES}
        for name, key in self.keys.items():
            key.save(directory / f"{name}.key")
            key.public.save(directory / f"{name}.pub")

    def config(self, program: str, name: str, more: str) -> Path:
        path = self.path / f"{program}.toml"
        path.write_text(
            f"""
[identity]
name = "{name}"
key = "{name}.key"
[mqtt]
port = {self.broker.port}
[state]
directory = "{program}"
{more}"""
        )
        return path

    @asynccontextmanager
    async def running(self, program: str, name: str, more: str) -> AsyncIterator[Child]:
        log = self.path / f"{program}.log"
        command = [sys.executable, "-m", "pyscan", program]
        command += ["--config", str(self.config(program, name, more))]
        with Child(program, command, log, environment=dict(os.environ)) as child:
            try:
                await self.broker.client(f"{program}-{name}")
                yield child
                child.signal(signal.SIGTERM)
                await until(lambda: child.exit_status is not None, f"end of {program}")
                assert child.exit_status == 0, child.failure("did not stop cleanly")
            finally:
                print(log.read_text()[-3000:])
        assert "Traceback" not in log.read_text()

    def control(self, more: str = "") -> tuple[str, str, str]:
        trust = f'[trust]\nmonitors.{MONITOR} = "{MONITOR}.pub"\nagents.{HOST} = "{HOST}.pub"\n'
        return "control", CONTROL, f'{trust}[policy]\nenforce = true\nunapproved = "freeze"\n{more}'

    def verdict(self, **changes: object) -> Verdict:
        verdict = Verdict(
            id=new_id(),
            sweep=new_id(),
            monitor=MONITOR,
            target="web",
            host=HOST,
            vm=VM,
            state=VerdictState.UNAPPROVED,
            reason="1 of 9 pages is not as approved",
            decided_ns=time.time_ns(),
            watched=9,
            ok=8,
            unreadable=0,
        )
        return replace(verdict, **changes)  # type: ignore[arg-type]

    def sealed(self, verdict: Verdict, signer: str = MONITOR) -> bytes:
        return protocol.encode_verdict(verdict, self.keys[signer])

    def commands(self) -> set[bytes]:
        """Each command that control gave, however often it repeated it."""
        return {
            said.payload
            for topic, heard in self.broker.by_topic.items()
            if "/cmd/" in topic
            for said in heard
        }


@asynccontextmanager
async def site(run: RunDirectory) -> AsyncIterator[Site]:
    broker = HostileBroker()
    async with broker.serve():
        yield Site(run.path, broker)


def _edited(data: bytes, chance: random.Random) -> bytes:
    out = bytearray(data)
    out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out)


async def test_forged_verdicts_and_reports(run_directory: RunDirectory) -> None:
    chance = random.Random(1729)
    rows: list[tuple[str, int, int]] = []
    async with site(run_directory) as here, here.running(*here.control()):
        client = await here.broker.client(f"control-{CONTROL}")

        async def attack(name: str, tries: int, make: Callable[[], tuple[str, bytes]]) -> None:
            before = client.acknowledged + tries
            for _ in range(tries):
                await client.deliver(*make())
            await until(lambda: client.acknowledged >= before, f"the end of {name}")
            rows.append((name, tries, len(here.commands())))

        old_ns = time.time_ns() - 2 * protocol.VERDICT_AGE_S_MAX * 10**9
        other = protocol.verdict_topic("card-2", "web")
        await attack(
            "edited verdicts",
            600,
            lambda: (VERDICTS, _edited(here.sealed(here.verdict()), chance)),
        )
        await attack("garbage", 600, lambda: (VERDICTS, chance.randbytes(chance.randrange(900))))
        await attack(
            "verdicts by others",
            200,
            lambda: (
                VERDICTS,
                here.sealed(here.verdict(), chance.choice(["stranger", HOST, CONTROL])),
            ),
        )
        await attack("verdicts moved", 100, lambda: (other, here.sealed(here.verdict())))
        await attack(
            "another monitor's", 100, lambda: (other, here.sealed(here.verdict(monitor="card-2")))
        )
        await attack(
            "stale verdicts", 100, lambda: (VERDICTS, here.sealed(here.verdict(decided_ns=old_ns)))
        )
        assert here.commands() == set()

        genuine = here.sealed(here.verdict())
        await attack("one genuine, replayed", 200, lambda: (VERDICTS, genuine))
        await until(lambda: len(here.commands()) == 1, "the command")
        (command,) = here.commands()
        order = protocol.decode_command(
            command,
            _ring(here, CONTROL),
            topic=COMMANDS,
            audience=HOST,
            now_s=int(time.time()),
            replay=_Nothing(),
        )
        assert (order.action, order.vm) == (Action.FREEZE, VM)
        await _forged_reports(here, order.id, attack, chance)
        assert here.commands() == {command}
    print(f"{'attack on control':26}{'tries':>7}{'commands so far':>17}")
    for row in rows:
        print("{:26}{:7}{:17}".format(*row))


async def _forged_reports(
    here: Site, command: str, attack: Callable[..., Awaitable[None]], chance: random.Random
) -> None:
    """Only the agent's own word ends an incident."""
    topic = protocol.report_topic(HOST, command)
    log = here.path / "control.log"
    report = Report(
        id=new_id(),
        command=command,
        host=HOST,
        vm=VM,
        action=Action.FREEZE,
        state=ReportState.SUCCEEDED,
        at_ns=time.time_ns(),
        vm_state="paused",
    )

    def by(signer: str, **changes: object) -> bytes:
        return protocol.encode_report(replace(report, **changes), here.keys[signer])  # type: ignore[arg-type]

    await attack("reports by others", 200, lambda: (topic, by(chance.choice(NAMES[2:]))))
    await attack("edited reports", 300, lambda: (topic, _edited(by(HOST), chance)))
    moved = by(HOST, command=new_id())
    await attack("reports moved", 100, lambda: (topic, moved))
    for state in (ReportState.ACCEPTED, ReportState.STARTED, ReportState.PROGRESS):
        early = by(HOST, id=new_id(), state=state)
        await attack(f"one {state}, replayed", 100, lambda early=early: (topic, early))
        # Each is told of once, and so recorded once: a repetition costs nothing.
        assert log.read_text().count(f"report state={state}") <= 1
    assert "state=answered" not in log.read_text()
    await attack("the agent's own, replayed", 100, lambda: (topic, by(HOST)))
    await until(lambda: "state=answered" in log.read_text(), "the end of the incident")
    assert log.read_text().count("incident state=answered") == 1


def _ring(here: Site, name: str) -> KeyRing:
    return KeyRing.of({name: here.keys[name].public}, "control")


class _Nothing:
    """A replay guard that has seen nothing."""

    def seen(self, _command_id: str) -> bool:
        return False

    def highest_sequence(self, _issuer: str, _vm: str) -> int:
        return -1


class Confusion:
    """Forwards between control and agent: loses, edits, repeats, delays and swaps."""

    def __init__(self, broker: HostileBroker, chance: random.Random) -> None:
        self._broker = broker
        self._chance = chance
        self._past: list[Published] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.delivered = 0

    def __call__(self, said: Published) -> None:
        reader = "agent-" if "/cmd/" in said.topic else "control-"
        if "/cmd/" not in said.topic and "/report/" not in said.topic:
            return
        self._past.append(said)
        copies = self._chance.choice([0, 1, 2, 5])
        replayed = self._chance.choices(self._past, k=2)
        for each in [*[said] * copies, *replayed]:
            for payload in (each.payload, _edited(each.payload, self._chance)):
                to = reader if each is said else "agent-" if "/cmd/" in each.topic else "control-"
                task = asyncio.create_task(self._deliver(to, each.topic, payload))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _deliver(self, reader: str, topic: str, payload: bytes) -> None:
        await asyncio.sleep(self._chance.random() * 0.3)
        async with asyncio.timeout(DEADLINE_S):
            client = await self._broker.client(reader)
            await client.deliver(topic, payload)
        self.delivered += 1

    async def end(self) -> None:
        self._broker.forward = lambda _: None
        await asyncio.gather(*self._tasks)


async def test_a_real_machine_behind_a_hostile_broker(run_directory: RunDirectory) -> None:
    """Verdict to freeze through a broker that does its worst: QEMU stops once, in the end."""
    chance = random.Random(1729)
    async with site(run_directory) as here:
        with Hypervisor(run_directory) as machine:
            agent = f'[trust]\ncontrols.{CONTROL} = "{CONTROL}.pub"\n{machine.table()}'
            async with (
                watching(machine) as watcher,
                here.running("agent", HOST, agent),
                here.running(*here.control()),
            ):
                confusion = here.broker.forward = Confusion(here.broker, chance)
                control = await here.broker.client("control-")
                verdict = here.sealed(here.verdict())
                for _ in range(10):
                    await control.deliver(VERDICTS, _edited(verdict, chance))
                    await control.deliver(VERDICTS, verdict)
                log = here.path / "control.log"
                await until(lambda: "incident state=answered" in log.read_text(), "the answer")
                await confusion.end()
                assert await watcher.status() == "paused"
                assert watcher.events == ["STOP"]
                print(f"{confusion.delivered} deliveries, 1 STOP")
