"""Several controls on one PostgreSQL: the load is shared, nothing is done twice or lost."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import Postgres
from site_parts import CONTROL, HOST, MONITOR, VM, Site, until
from test_control import Outside

from pyscan.keys import KeyRing, SigningKey
from pyscan.lab.broker import Broker, Role
from pyscan.lab.process import Child, RunDirectory
from pyscan.records import ReportState

SECOND = "control-2"
WORKERS = (CONTROL, SECOND)
IDENTITIES = {
    MONITOR: Role.MONITOR,
    HOST: Role.AGENT,
    **dict.fromkeys(WORKERS, Role.CONTROL),
}
POLICY = """[policy]
enforce = true
[policy.limits]
actions_per_minute = 1000
unapproved_percent_max = 100
"""
TARGETS = 30


class Workers(Site):
    """A site whose agents believe two controls."""

    def __init__(self, run: RunDirectory, broker: Broker) -> None:
        super().__init__(run, broker)
        self.keys[SECOND] = SigningKey.generate()
        self.keys[SECOND].save(self.path / f"{SECOND}.key")

    def ring(self, *names: str) -> KeyRing:
        return super().ring(*names, *(SECOND for name in names if name == CONTROL))

    def worker_config(self, name: str, url: str) -> Path:
        trust = f'[trust]\nmonitors.{MONITOR} = "{MONITOR}.pub"\nagents.{HOST} = "{HOST}.pub"\n'
        path = self.write("control", name, f'{trust}[store]\nurl = "{url}"\n{POLICY}')
        text = path.read_text().replace('directory = "control"', f'directory = "{name}"')
        config = self.path / f"{name}.toml"
        config.write_text(f'group = "control"\n{text}')
        return config

    def worker(self, name: str, config: Path) -> Child:
        words = [sys.executable, "-m", "pyscan", "control", "--config", config]
        return Child(name, words, self.log(name))


@pytest.fixture
def site(run_directory: RunDirectory) -> Iterator[Workers]:
    with Broker(run_directory, IDENTITIES) as broker:
        site = Workers(run_directory, broker)
        yield site
        for name in WORKERS:
            print(site.log(name).read_text())  # shown on failure


@pytest.fixture
def url() -> Iterator[str]:
    with Postgres() as server:
        yield server.create()


async def test_workers_share_the_load_and_take_over(site: Workers, url: str) -> None:
    configs = {name: site.worker_config(name, url) for name in WORKERS}
    first, second = (site.worker(name, configs[name]) for name in WORKERS)
    with first, second:
        for name in WORKERS:
            await site.wait_log(name, "state=online")
        async with Outside(site).connected() as outside:
            verdicts = [outside.verdict(target=f"web-{n}", vm=f"web-{n}") for n in range(TARGETS)]
            for verdict in verdicts * 2:
                await outside.tell(verdict)
            await until(lambda: len(outside.commands) >= TARGETS, "a command for each target")
            taken = {name: site.log(name).read_text().count("verdict id=") for name in WORKERS}
            assert sum(taken.values()) == TARGETS
            assert min(taken.values()) > 0
            assert sorted(c.vm for c in outside.commands) == sorted(v.vm for v in verdicts)
            assert {c.issuer for c in outside.commands} == set(WORKERS)

            # Nobody has answered. Who gave a command is gone: the other one follows it up.
            orphans = {c.id for c in outside.commands if c.issuer == CONTROL}
            first.kill()
            outside.repeated.clear()
            await site.wait_log(SECOND, "work of a worker that is gone taken over")
            await until(
                lambda: any(f"repeated id={o}" in site.log(SECOND).read_text() for o in orphans),
                "a repeated command of the other worker",
            )
            answered = next(c for c in outside.commands if c.id in orphans)
            for _ in range(20):
                # The broker may give some to the session of the worker that is gone.
                await outside.report(answered, ReportState.SUCCEEDED)
                if f"state=succeeded command={answered.id}" in site.log(SECOND).read_text():
                    break
                await asyncio.sleep(0.1)
            await site.wait_log(SECOND, f"incident state=answered id={answered.cause.incident}")
            assert len(outside.commands) == TARGETS
            assert VM in {command.vm for command in outside.commands}


async def test_a_verdict_waits_for_the_store(site: Workers) -> None:
    with Postgres() as server:
        config = site.worker_config(CONTROL, server.create())
        site.log(SECOND).touch()
        with site.worker(CONTROL, config) as child:
            await site.wait_log(CONTROL, "state=online")
            async with Outside(site).connected() as outside:
                server.stop()
                told = outside.verdict()
                await outside.tell(told)
                await site.wait_log(CONTROL, "store away")
                assert outside.commands == []
                server.start()
                command = await outside.commanded()
                assert command.cause.verdict == told.id
                await outside.report(command, ReportState.SUCCEEDED)
                await site.wait_log(CONTROL, "incident state=answered")
            assert child.stop() == 0
