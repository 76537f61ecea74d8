"""The monitor as a process: a real broker, a RAM file that holds a synthetic kernel."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import cbor2
import msgspec
import pytest
from enrolled import APPROVER, Target
from site_parts import DEADLINE_S, HOST, MONITOR, OBSERVER, VM, Site

from pyscan import protocol
from pyscan.approved import save_approved
from pyscan.evidence import verify_directory
from pyscan.keys import KeyRing, SigningKey
from pyscan.lab.broker import Broker
from pyscan.lab.process import Child, RunDirectory
from pyscan.protocol import TopicKind
from pyscan.records import FindingKind, Verdict, VerdictState

APPROVED, UNAPPROVED, UNDECIDED = (
    VerdictState.APPROVED,
    VerdictState.UNAPPROVED,
    VerdictState.UNDECIDED,
)


class Watched(Site):
    """A site with one target that was good when it was approved."""

    def __init__(self, run: RunDirectory, broker: Broker) -> None:
        super().__init__(run, broker)
        self.target = Target.make(self.path / "ram")
        self.approved = self.path / "web-1.approved"
        APPROVER.public.save(self.path / "approver.pub")
        self.approve()
        self.config = self.write(
            "monitor",
            MONITOR,
            f"""
[trust]
approvers = ["approver.pub"]
[sweep]
interval_ms = 5
heartbeat_ms = 100
[[target]]
name = "web-1"
host = "{HOST}"
vm = "{VM}"
source = "{self.target.uri}"
approved = "{self.approved.name}"
""",
        )

    def approve(self, key: SigningKey = APPROVER) -> None:
        save_approved(self.target.enrol(), self.approved, key)

    @property
    def evidence(self) -> Path:
        return self.path / "monitor" / "evidence"

    def edit(self, old: str, new: str) -> int:
        """Change the configuration; returns the number of the changed line."""
        text = self.config.read_text()
        assert text.count(old) == 1
        self.config.write_text(text.replace(old, new))
        return text[: text.index(old)].count("\n") + 1

    def run(self, *arguments: str) -> tuple[int, list[str]]:
        """Run the program to its end; returns status and all lines it wrote, without its log."""
        command = [sys.executable, "-m", "pyscan", "monitor", "--config", str(self.config)]
        with Child("monitor", [*command, *arguments], self.log("monitor")) as child:
            status = child.wait(DEADLINE_S)
        lines = self.log("monitor").read_text().splitlines()
        return status, [line for line in lines if " info pyscan." not in line]


@pytest.fixture
def site(run_directory: RunDirectory, broker: Broker) -> Iterator[Watched]:
    site = Watched(run_directory, broker)
    yield site
    if site.log("monitor").exists():
        print(site.log("monitor").read_text())  # shown on failure


class Ears:
    """What arrives over the broker, verified as control verifies it."""

    def __init__(self, site: Watched) -> None:
        self._ring = site.ring(MONITOR)
        self.verdicts: asyncio.Queue[Verdict] = asyncio.Queue()
        self.sweeps: asyncio.Queue[dict[str, object]] = asyncio.Queue()
        self.status: asyncio.Queue[str] = asyncio.Queue()
        kinds = (TopicKind.VERDICT, TopicKind.SWEEP, TopicKind.MONITOR_STATUS)
        self.link = site.link(OBSERVER, *map(protocol.subscription, kinds))

    async def listen(self) -> None:
        async for message in self.link.messages:
            kind = protocol.Topic.parse(message.topic).kind
            if kind is TopicKind.VERDICT:
                await self.verdicts.put(
                    protocol.decode_verdict(
                        message.payload, self._ring, topic=message.topic, now_ns=time.time_ns()
                    )
                )
            elif kind is TopicKind.SWEEP:
                await self.sweeps.put(msgspec.json.decode(message.payload))
            else:
                await self.status.put(msgspec.json.decode(message.payload)["state"])
            message.acknowledge()

    async def verdict(self, state: VerdictState) -> Verdict:
        """The next verdict of this state."""
        async with asyncio.timeout(DEADLINE_S):
            while (verdict := await self.verdicts.get()).state is not state:
                pass
        return verdict

    async def says(self, state: str) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while await self.status.get() != state:
                pass


@asynccontextmanager
async def listening(site: Watched) -> AsyncIterator[Ears]:
    ears = Ears(site)
    tasks = [asyncio.create_task(ears.link.run()), asyncio.create_task(ears.listen())]
    try:
        yield ears
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@asynccontextmanager
async def monitor(site: Watched) -> AsyncIterator[Child]:
    """The running program; it must stop cleanly, and its evidence must then verify."""
    with site.start("monitor", site.config) as child:
        await site.wait_log("monitor", "state=running")
        yield child
        assert child.stop() == 0, child.failure("did not stop cleanly")
    assert "state=stopped" in site.log("monitor").read_text()
    summary = verify_directory(site.evidence, KeyRing.of({MONITOR: site.keys[MONITOR].public}))
    assert summary.messages_unverified == 0


def records(site: Watched, kind: str) -> list[dict[str, object]]:
    """The bodies of all evidence records of one kind, read with another CBOR library."""
    found = []
    with (site.evidence / "log.cborseq").open("rb") as file:
        while file.peek(1):
            record = cbor2.loads(cbor2.load(file))
            if record["kind"] == kind:
                found.append(record["body"])
    return found


async def test_verdicts_arrive_signed(site: Watched) -> None:
    async with listening(site) as ears:
        await ears.link.wait_online()
        async with monitor(site):
            await ears.says("online")
            first = await ears.verdict(APPROVED)
            assert (first.monitor, first.target, first.host, first.vm) == (
                MONITOR,
                "web-1",
                HOST,
                VM,
            )
            assert first.watched == first.ok == 1024
            site.target.flip(100)
            verdict = await ears.verdict(UNAPPROVED)
            page = site.target.content(100)
            site.target.flip(100)
            await ears.verdict(APPROVED)
        await ears.says("offline")
    (finding,) = verdict.findings
    assert (finding.kind, finding.frame) == (FindingKind.DIGEST, site.target.frame(100))
    # Finding and page were there before the verdict left, and are there still.
    (record,) = [body for body in records(site, "finding") if body["id"] == finding.id]
    assert record["address"] == site.target.address(100)
    assert (site.evidence / "blobs" / str(record["page"])).read_bytes() == page
    assert verdict.id in {body["id"] for body in records(site, "verdict")}


async def test_sweeps_are_counted(site: Watched) -> None:
    async with listening(site) as ears:
        await ears.link.wait_online()
        async with monitor(site), asyncio.timeout(DEADLINE_S):
            counted: list[dict[str, object]] = []
            while len(counted) < 2 or counted[-1]["sweeps"] == counted[0]["sweeps"]:
                targets = (await ears.sweeps.get())["targets"]
                assert isinstance(targets, list)
                counted += targets
    last = counted[-1]
    assert (last["target"], last["state"], last["pages"]) == ("web-1", "approved", 1024)
    assert isinstance(last["sweeps"], int)
    assert last["bytes"] == last["sweeps"] * 1024 * 4096
    assert last["unreadable"] == 0


async def test_a_broker_that_comes_later(site: Watched) -> None:
    site.broker.stop()
    async with monitor(site):
        await site.wait_log("monitor", "verdict=approved")
        site.target.flip(100)
        await site.wait_log("monitor", "verdict=unapproved")
        site.broker.start()
        async with listening(site) as ears:
            # The one that waited comes, or one that says it again.
            await ears.verdict(UNAPPROVED)


async def test_a_broker_that_is_killed_loses_no_verdict(site: Watched) -> None:
    async with listening(site) as ears:
        await ears.link.wait_online()
        async with monitor(site):
            await ears.verdict(APPROVED)
            site.broker.kill()
            site.target.flip(100)
            await site.wait_log("monitor", "verdict=unapproved")
            site.broker.start()
            verdict = await ears.verdict(UNAPPROVED)
            assert verdict.findings[0].frame == site.target.frame(100)


async def test_a_monitor_that_is_killed_loses_no_verdict(site: Watched) -> None:
    """What it had decided and not sent leaves when it runs again."""
    site.broker.stop()
    with site.start("monitor", site.config) as child:
        await site.wait_log("monitor", "verdict=approved")
        site.target.flip(100)
        await site.wait_log("monitor", "verdict=unapproved")
        child.kill()
    site.target.flip(100)  # the second run will find nothing by itself
    told = records(site, "verdict")[-1]["id"]
    site.broker.start()
    async with listening(site) as ears:
        await ears.link.wait_online()
        async with monitor(site):
            verdict = await ears.verdict(UNAPPROVED)
            assert verdict.id == told
            await ears.verdict(APPROVED)


async def test_a_target_out_of_reach_is_undecided(site: Watched) -> None:
    hidden = site.target.path.rename(site.path / "hidden")
    async with listening(site) as ears:
        await ears.link.wait_online()
        async with monitor(site):
            verdict = await ears.verdict(UNDECIDED)
            assert verdict.unreadable == verdict.watched == 1024
            hidden.rename(site.target.path)
            await ears.verdict(APPROVED)


def test_check_config(site: Watched) -> None:
    assert site.run("--check-config") == (0, [f"{site.config}: ok"])
    assert not site.evidence.exists()


@pytest.mark.parametrize("arguments", [(), ("--check-config",)])
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("interval_ms = 5", "interval_ms = 0", "interval_ms"),
        ("interval_ms = 5", "intervall_ms = 5", "intervall_ms"),
        ("heartbeat_ms = 100", "heartbeat_ms = ", "TOML"),
        ('approved = "web-1.approved"', 'approved = "nothing"', "no readable file"),
        ('name = "web-1"', 'name = "web/1"', "name"),
    ],
)
def test_a_bad_configuration(
    site: Watched, arguments: tuple[str, ...], old: str, new: str, says: str
) -> None:
    line = site.edit(old, new)
    status, lines = site.run(*arguments)
    assert status == 2
    (text,) = lines
    assert text.startswith(f"pyscan monitor: {site.config}:{line}: ")
    assert says in text


@pytest.mark.parametrize("arguments", [(), ("--check-config",)])
def test_an_approved_file_of_a_foreign_signer(site: Watched, arguments: tuple[str, ...]) -> None:
    site.approve(site.keys["foreign"])
    status, lines = site.run(*arguments)
    assert status == 2
    (text,) = lines
    assert text.startswith(f"pyscan monitor: {site.approved}: not a valid approved configuration")
    assert site.keys["foreign"].key_id.hex() in text


@pytest.mark.parametrize("arguments", [(), ("--check-config",)])
def test_an_edited_approved_file(site: Watched, arguments: tuple[str, ...]) -> None:
    content = bytearray(site.approved.read_bytes())
    content[len(content) // 2] ^= 1
    site.approved.write_bytes(content)
    status, lines = site.run(*arguments)
    assert status == 2
    (text,) = lines
    assert "not a valid approved configuration" in text


def test_a_source_that_is_none(site: Watched) -> None:
    site.edit(site.target.uri, "nonsense")
    status, (text,) = site.run("--check-config")
    assert (status, "nonsense" in text) == (2, True)


def test_a_machine_type_that_is_unknown(site: Watched) -> None:
    site.edit("machine=q35", "machine=pdp11")
    status, (text,) = site.run()
    assert (status, "pdp11" in text) == (2, True)
    verify_directory(site.evidence)
