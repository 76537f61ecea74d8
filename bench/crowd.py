"""A thousand agents: commands and reports through the broker alone, and through a control."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleet import TIMEOUT_S, Account, Fleet, MqttClient, fleet

from pyscan import protocol
from pyscan.bench.measure import Progress
from pyscan.errors import LabError
from pyscan.ids import new_id
from pyscan.keys import KeyRing, SigningKey
from pyscan.lab.broker import Broker, Role
from pyscan.lab.process import Child, RunDirectory
from pyscan.records import (
    Action,
    Command,
    Finding,
    FindingKind,
    PageStatus,
    ReportState,
    Verdict,
    VerdictState,
)

MONITOR, CONTROL, ISSUER = "monitor-1", "control-1", "control-2"
LIFETIME_S: Final = 120
POLL_S: Final = 0.02
START_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Crowd:
    """What was measured with `agents` agents."""

    agents: int
    connect_s: float
    broker_kib_per_agent: float
    commands_s: float  # first command published -> last final report verified
    control_s: float  # first verdict published -> last incident answered
    again_s: float  # the same with as many incidents more
    control_mib: float  # after the first incidents
    control_kib_per_incident: float  # from the first incidents to the second ones


class _Site:
    """Broker, keys and accounts of a crowd, in a run directory."""

    def __init__(self, run: RunDirectory, agents: int) -> None:
        self.path = run.path
        self.hosts = [f"host-{number}" for number in range(agents)]
        roles = {MONITOR: Role.MONITOR, CONTROL: Role.CONTROL, ISSUER: Role.CONTROL}
        self.broker = Broker(run, {**roles, **dict.fromkeys(self.hosts, Role.AGENT)}, saving=False)
        self.keys = {name: SigningKey.generate() for name in (*roles, *self.hosts)}

    def password(self, name: str) -> str:
        return self.broker.password_file(name).read_text().strip()

    def accounts(self) -> list[Account]:
        return [Account(host, self.password(host), self.keys[host]) for host in self.hosts]

    def control_config(self) -> Path:
        self.keys[CONTROL].save(self.path / f"{CONTROL}.key")
        trust = []
        for name, kind in [(MONITOR, "monitors"), *((host, "agents") for host in self.hosts)]:
            self.keys[name].public.save(self.path / f"{name}.pub")
            trust.append(f'{kind}.{name} = "{name}.pub"')
        path = self.path / "control.toml"
        path.write_text(
            f'[identity]\nname = "{CONTROL}"\nkey = "{CONTROL}.key"\n'
            f"{self.broker.mqtt_table(CONTROL)}"
            '[state]\ndirectory = "control"\n'
            "[trust]\n" + "\n".join(trust) + "\n"
            '[policy]\nenforce = true\nunapproved = "freeze"\n'
            "[policy.limits]\nactions_per_minute = 1000000\nunapproved_percent_max = 100\n"
        )
        return path


def measure_crowd(agents: int, progress: Progress) -> Crowd:
    """Connect the agents, command them directly, then through a control. Raises LabError."""
    with RunDirectory() as run, ExitStack() as stack:
        progress(f"a broker for {agents} agents")
        site = _Site(run, agents)
        stack.enter_context(site.broker)
        commanders = {name: site.keys[name] for name in (CONTROL, ISSUER)}
        crowd = stack.enter_context(fleet(site.broker.port, site.accounts(), commanders))
        progress(f"{agents} agents connect")
        connect_s, kib = _connected(site, crowd, agents)
        progress(f"{agents} commands, reports verified")
        commands_s = asyncio.run(_command_all(site))
        progress(f"{agents} verdicts, answered by a control")
        control_s, again_s, before, after = _controlled(site)
    return Crowd(
        agents=agents,
        connect_s=connect_s,
        broker_kib_per_agent=kib,
        commands_s=commands_s,
        control_s=control_s,
        again_s=again_s,
        control_mib=before / 1024,
        control_kib_per_incident=(after - before) / agents,
    )


def _connected(site: _Site, crowd: Fleet, agents: int) -> tuple[float, float]:
    """Seconds until all are connected; KiB of the broker for each, without the first ones."""
    began, first = time.perf_counter(), agents // 5
    crowd.connect(first)
    few = _rss_kib(site.broker.pid)
    crowd.connect(agents - first)
    return (
        time.perf_counter() - began,
        (_rss_kib(site.broker.pid) - few) / (agents - first),
    )


def _rss_kib(pid: int) -> int:
    """VmRSS, proc(5)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise LabError(f"process {pid} has ended")


async def _command_all(site: _Site) -> float:
    """Seconds from the first of one command to each agent to the last verified final report."""
    ring = KeyRing.of({host: site.keys[host].public for host in site.hosts}, "agent")
    envelopes = [_freeze(site, host) for host in site.hosts]
    missing, done = {command for command, _, _ in envelopes}, asyncio.Event()

    def take(_client: MqttClient, topic: str, payload: bytes) -> None:
        report = protocol.decode_report(payload, ring, topic=topic)
        if report.state is ReportState.SUCCEEDED:
            missing.discard(report.command)
            if not missing:
                done.set()

    client = MqttClient(ISSUER, site.password(ISSUER), take)
    await client.connect(site.broker.port, protocol.subscription(protocol.TopicKind.REPORT))
    began = time.perf_counter()
    for _, topic, envelope in envelopes:
        client.publish(topic, envelope)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await done.wait()
    except TimeoutError:
        raise LabError(f"{len(missing)} of {len(envelopes)} commands got no final report") from None
    return time.perf_counter() - began


def _freeze(site: _Site, host: str) -> tuple[str, str, bytes]:
    """A signed command: its id, topic and bytes."""
    now_s = int(time.time())
    command = Command(
        id=new_id(),
        issuer=ISSUER,
        audience=host,
        sequence=time.time_ns() // 10**6,
        issued_s=now_s,
        expires_s=now_s + LIFETIME_S,
        action=Action.FREEZE,
        vm="web-0",
    )
    topic = protocol.command_topic(host, command.vm)
    return command.id, topic, protocol.encode_command(command, site.keys[ISSUER])


def _controlled(site: _Site) -> tuple[float, float, int, int]:
    """Seconds of both rounds of verdicts, and the control's VmRSS after each, in KiB."""
    log = site.path / "control.log"
    command = [sys.executable, "-m", "pyscan", "control", "--config", site.control_config()]
    with Child("control", command, log, environment=dict(os.environ)) as control:
        control.wait_until(
            lambda: "link state=online" in log.read_text(), START_TIMEOUT_S, "the broker"
        )
        first_s = asyncio.run(_answer_all(site, control, 0))
        before = _rss_kib(control.pid)
        second_s = asyncio.run(_answer_all(site, control, 1))
        return first_s, second_s, before, _rss_kib(control.pid)


async def _answer_all(site: _Site, control: Child, number: int) -> float:
    """Seconds from the first alarm about a machine of each host to the last incident answered."""
    topics = [_alarm(site, host, f"web-{number}") for host in site.hosts]
    client = MqttClient(MONITOR, site.password(MONITOR), lambda *_: None)
    await client.connect(site.broker.port)
    wanted = (number + 1) * len(topics)
    with closing(_open_database(site.path / "control" / "state.sqlite")) as database:
        began = time.perf_counter()
        for topic, envelope in topics:
            client.publish(topic, envelope)
        while (answered := _answered(database)) < wanted:
            await asyncio.sleep(POLL_S)
            if time.perf_counter() - began > TIMEOUT_S or control.exit_status is not None:
                raise control.failure(f"answered {answered} of {wanted} incidents")
        return time.perf_counter() - began


def _alarm(site: _Site, host: str, vm: str) -> tuple[str, bytes]:
    sweep = new_id()
    finding = Finding(new_id(), sweep, FindingKind.CODE, PageStatus.OK, 1, 1, "ksys_read")
    verdict = Verdict(
        id=new_id(),
        sweep=sweep,
        monitor=MONITOR,
        target=f"{host}-{vm}",
        host=host,
        vm=vm,
        state=VerdictState.UNAPPROVED,
        reason="1 of 10000 pages is not as approved",
        decided_ns=time.time_ns(),
        watched=10_000,
        ok=9_999,
        unreadable=0,
        findings=(finding,),
        findings_total=1,
    )
    topic = protocol.verdict_topic(MONITOR, verdict.target)
    return topic, protocol.encode_verdict(verdict, site.keys[MONITOR])


def _open_database(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True)


def _answered(database: sqlite3.Connection) -> int:
    with contextlib.suppress(sqlite3.OperationalError):  # busy
        row = database.execute("SELECT count(*) FROM incidents WHERE state = 'answered'").fetchone()
        return int(row[0])
    return 0
