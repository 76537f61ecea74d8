"""One watched target: what is told, when, how often, and what a lost target does.

Nothing here sleeps for luck: a test waits for a verdict, or for sweeps that began after
what it did.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from enrolled import SIZE, Target, Wrapped
from fake_kernel import MIB
from tables import PRESENT

from pyscan.digest import DigestKey, open_digester
from pyscan.errors import UsageError
from pyscan.monitor import watch
from pyscan.monitor.watch import Digesters, Judgement, Watch, WatchSettings
from pyscan.records import FindingKind, Verdict, VerdictState
from pyscan.scanner import SweepOptions
from pyscan.sources import View, build_uri
from pyscan.sources.file import FileSource

APPROVED, UNAPPROVED, UNDECIDED = (
    VerdictState.APPROVED,
    VerdictState.UNAPPROVED,
    VerdictState.UNDECIDED,
)
DEADLINE_S = 20
NEVER_S = 1e6


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses, and nothing is said twice, unless a test wants it."""
    monkeypatch.setattr(watch, "RETRY_S", 0.005)
    monkeypatch.setattr(watch, "REFRESH_FIRST_S", NEVER_S)


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target.make(tmp_path / "ram")


class Observed:
    """A running watch and what it published."""

    def __init__(self, target: Target, uri: str = "", *, rereads: int = 2) -> None:
        options = SweepOptions(rereads)
        settings = WatchSettings("card-1", "web-1", "host-1", "vm-1", uri or target.uri, 2, options)
        self.queue: asyncio.Queue[Judgement] = asyncio.Queue()
        self._key = DigestKey.generate("nh4aes")
        keyed = open_digester("native", "nh4aes", self._key)
        digesters = Digesters(open_digester(), keyed)
        self.watch = Watch(settings, [target.enrol()], digesters, self.queue.put)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Observed]:
        task = asyncio.create_task(self.watch.run())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.wait({task})
        assert task.cancelled(), task.exception()

    async def judgement(self) -> Judgement:
        async with asyncio.timeout(DEADLINE_S):
            return await self.queue.get()

    async def verdict(self, state: VerdictState) -> Verdict:
        """The next verdict, which must be of this state."""
        verdict = (await self.judgement()).verdict
        assert verdict.state is state, verdict.reason
        return verdict

    async def sweeps(self, count: int = 2) -> None:
        """Wait for sweeps; the first may have begun before this call, the others have not."""
        wanted = self.watch.counters.sweeps + count
        deadline_s = time.monotonic() + DEADLINE_S
        while self.watch.counters.sweeps < wanted:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.001)

    async def quiet(self, sweeps: int = 20) -> None:
        """Nothing is published over some sweeps."""
        await self.sweeps(sweeps)
        assert self.queue.empty(), self.queue.get_nowait().verdict


async def test_the_first_verdict(target: Target) -> None:
    async with Observed(target).running() as observed:
        verdict = await observed.verdict(APPROVED)
        await observed.quiet()
    assert (verdict.monitor, verdict.target) == ("card-1", "web-1")
    assert (verdict.host, verdict.vm) == ("host-1", "vm-1")
    assert (verdict.watched, verdict.ok, verdict.unreadable) == (1024, 1024, 0)
    counters = observed.watch.counters
    assert counters.pages == counters.sweeps * observed.watch.pages
    assert counters.state is APPROVED
    assert counters.busy_ns > 0


async def test_a_stop_waits_for_the_sweep_that_is_under_way(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapping and key are still in use: releasing them under a sweep ends the process."""
    entered, leave, closed = threading.Event(), threading.Event(), threading.Event()

    class Slow(Wrapped):
        def close(self) -> None:
            closed.set()
            super().close()

    def hold(_frames: object) -> None:
        entered.set()
        assert leave.wait(DEADLINE_S)

    monkeypatch.setattr(watch, "open_source", lambda _uri: Slow(target.open(), before=hold))
    task = asyncio.create_task(Observed(target).watch.run())
    assert await asyncio.to_thread(entered.wait, DEADLINE_S)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=0.2)
    assert not done
    assert not closed.is_set()
    leave.set()
    await asyncio.wait({task}, timeout=DEADLINE_S)
    assert task.cancelled()
    assert closed.is_set()


async def test_a_change_is_told_once_and_so_is_its_end(target: Target) -> None:
    async with Observed(target).running() as observed:
        await observed.verdict(APPROVED)
        target.flip(100)
        judgement = await observed.judgement()
        verdict = judgement.verdict
        assert verdict.state is UNAPPROVED
        (finding,) = verdict.findings
        assert (finding.kind, finding.frame) == (FindingKind.DIGEST, target.frame(100))
        (suspect,) = judgement.suspects
        assert (suspect.finding, suspect.data) == (finding.id, target.content(100))
        await observed.quiet()
        target.flip(100)
        await observed.verdict(APPROVED)
        await observed.quiet()


async def test_a_further_change_is_news(target: Target) -> None:
    async with Observed(target).running() as observed:
        await observed.verdict(APPROVED)
        target.flip(100)
        await observed.verdict(UNAPPROVED)
        target.flip(50)
        verdict = await observed.verdict(UNAPPROVED)
        assert [f.frame for f in verdict.findings] == [target.frame(50), target.frame(100)]
        await observed.quiet()


async def test_tables_are_walked_again_and_again(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "WALK_INTERVAL_S", 0.02)
    async with Observed(target).running() as observed:
        await observed.verdict(APPROVED)
        target.map(9, 40 * MIB, PRESENT)
        verdict = await observed.verdict(UNAPPROVED)
        assert [f.kind for f in verdict.findings] == [FindingKind.MAPPING]


async def test_a_finding_in_the_tables_does_not_come_and_go_with_the_walks(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "WALK_INTERVAL_S", NEVER_S)  # after the first sweep
    observed = Observed(target)
    target.map(9, 40 * MIB, PRESENT)
    async with observed.running():
        await observed.verdict(UNAPPROVED)
        await observed.quiet()
        target.map(9, target.gpa(9), PRESENT)
        await observed.verdict(APPROVED)
        target.map(9, 40 * MIB, PRESENT)
        await observed.quiet()  # between two walks it cannot be seen


async def test_a_transient_is_counted_and_not_told(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The view shows another file than the reads: every page differs once, for ever."""
    observed = Observed(target)
    other = target.path.with_name("other")
    other.touch()
    os.truncate(other, SIZE)
    shown = FileSource("file:other", other, target.memory.layout())

    class Crossed(Wrapped):
        def view(self) -> View | None:
            return shown.view()

    monkeypatch.setattr(watch, "open_source", lambda _uri: Crossed(target.open()))
    async with observed.running():
        await observed.verdict(APPROVED)
        await observed.quiet(3)
    assert observed.watch.counters.transient >= 1024


# --- a target that is out of reach ------------------------------------------------------


async def test_a_truncated_file_and_its_return(target: Target) -> None:
    content = target.path.read_bytes()
    async with Observed(target).running() as observed:
        await observed.verdict(APPROVED)
        os.truncate(target.path, 0)
        verdict = await observed.verdict(UNDECIDED)
        assert (verdict.ok, verdict.unreadable) == (0, 1024)
        with target.path.open("r+b") as file:
            file.write(content)
        await until_approved(observed)
        target.flip(3)
        await observed.verdict(UNAPPROVED)


async def until_approved(observed: Observed) -> None:
    """While a target comes back, in parts, undecided verdicts are right."""
    while (verdict := (await observed.judgement()).verdict).state is not APPROVED:
        assert verdict.state is UNDECIDED


async def test_another_file_in_its_place(target: Target) -> None:
    """The old file is gone for good: the watch must go to the new one."""
    copy = target.path.with_name("copy")
    copy.write_bytes(target.path.read_bytes())
    async with Observed(target).running() as observed:
        await observed.verdict(APPROVED)
        os.truncate(target.path, 0)
        await observed.verdict(UNDECIDED)
        copy.replace(target.path)
        await until_approved(observed)
        target.flip(3)
        await observed.verdict(UNAPPROVED)


async def test_a_target_that_comes_later(target: Target) -> None:
    observed = Observed(target)
    hidden = target.path.rename(target.path.with_name("hidden"))
    async with observed.running():
        verdict = await observed.verdict(UNDECIDED)
        assert "cannot open the RAM file" in verdict.findings[0].actual
        assert (verdict.watched, verdict.unreadable) == (1024, 1024)
        await observed.quiet(3)
        hidden.rename(target.path)
        await observed.verdict(APPROVED)


async def test_a_file_that_is_too_short_yet(target: Target) -> None:
    observed = Observed(target)
    content = target.path.read_bytes()
    os.truncate(target.path, 5 * MIB)
    async with observed.running():
        verdict = await observed.verdict(UNDECIDED)
        assert str(target.path) in verdict.findings[0].actual
        with target.path.open("r+b") as file:
            file.write(content)
        await until_approved(observed)


@pytest.mark.parametrize(
    "uri", ["nonsense", "tape:/dev/st0", "file:/ram", "file:/ram?machine=pdp11&size=64M"]
)
async def test_a_wrong_uri_ends_the_watch_at_once(target: Target, uri: str) -> None:
    observed = Observed(target, uri)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(UsageError):
            await observed.watch.run()
    assert observed.queue.empty()


async def test_a_target_that_comes_back_unusable_does_not_end_the_watch(target: Target) -> None:
    """The same UsageError, once the watch has begun, is a lost target and no wrong argument."""
    layout = target.path.with_name("layout.toml")
    text = f"[[region]]\ngpa = 0\nlength = {SIZE}\noffset = 0\n"
    layout.write_text(text)
    uri = build_uri("file", target.path, map=str(layout))
    content = target.path.read_bytes()
    async with Observed(target, uri).running() as observed:
        await observed.verdict(APPROVED)
        layout.write_text("no map any more")
        os.truncate(target.path, 0)
        await observed.verdict(UNDECIDED)
        await observed.sweeps(5)
        layout.write_text(text)
        with target.path.open("r+b") as file:
            file.write(content)
        await until_approved(observed)


# --- how often ------------------------------------------------------------------------


async def test_what_is_not_approved_is_said_again_ever_more_rarely(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "REFRESH_FIRST_S", 0.05)
    monkeypatch.setattr(watch, "REFRESH_MAX_S", 0.2)
    async with Observed(target).running() as observed:
        await observed.verdict(APPROVED)
        target.flip(100)
        told = [await observed.verdict(UNAPPROVED) for _ in range(5)]
        assert len({verdict.id for verdict in told}) == 5
        assert len({verdict.sweep for verdict in told}) == 5
        assert {len(verdict.findings) for verdict in told} == {1}
        gaps_s = [
            (later.decided_ns - earlier.decided_ns) / 1e9 for earlier, later in pairwise(told)
        ]
        for gap_s, least_s in zip(gaps_s, (0.05, 0.1, 0.2, 0.2), strict=True):
            assert gap_s > 0.9 * least_s  # never earlier than it may
        target.flip(100)
        while (verdict := (await observed.judgement()).verdict).state is not APPROVED:
            assert verdict.state is UNAPPROVED
        await observed.quiet(60)  # approved is not repeated


async def test_a_change_is_said_again_soon(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the pauses had become before it."""
    monkeypatch.setattr(watch, "REFRESH_MAX_S", NEVER_S)
    observed = Observed(target)  # with a long pause
    monkeypatch.setattr(watch, "REFRESH_FIRST_S", 0.01)
    target.flip(100)
    async with observed.running():
        first, second = [await observed.verdict(UNAPPROVED) for _ in range(2)]
        assert first.id != second.id


async def test_flapping_is_bounded(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "CHANGES_MAX", 4)
    monkeypatch.setattr(watch, "CHANGES_WINDOW_S", NEVER_S)
    async with Observed(target).running() as observed:
        for _ in range(10):
            await observed.sweeps()
            target.flip(100)
        await observed.sweeps()
        states = [observed.queue.get_nowait().verdict.state for _ in range(observed.queue.qsize())]
    # What was told last stays an alarm, however the target looks at the end.
    assert states == [APPROVED, UNAPPROVED, APPROVED, UNAPPROVED]
    assert observed.watch.counters.state is APPROVED


async def test_the_latest_state_is_told_when_the_window_has_moved_on(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "CHANGES_MAX", 4)
    monkeypatch.setattr(watch, "CHANGES_WINDOW_S", 1.0)
    async with Observed(target).running() as observed:
        await observed.verdict(APPROVED)
        for page in (1, 2, 3):
            target.flip(page)
            told = await observed.verdict(UNAPPROVED)
        for page in (1, 2, 3):
            target.flip(page)
        last = await observed.verdict(APPROVED)
        assert last.decided_ns > told.decided_ns
        await observed.quiet()


async def test_a_first_alarm_is_not_held_back(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "CHANGES_MAX", 2)
    monkeypatch.setattr(watch, "CHANGES_WINDOW_S", NEVER_S)
    content = target.path.read_bytes()
    async with Observed(target).running() as observed:
        await observed.verdict(APPROVED)
        os.truncate(target.path, 0)
        await observed.verdict(UNDECIDED)  # and with it the budget is spent
        with target.path.open("r+b") as file:
            file.write(content)
        await observed.quiet(5)
        target.flip(100)
        verdict = await observed.verdict(UNAPPROVED)
        assert verdict.findings[0].frame == target.frame(100)
        target.flip(100)
        await observed.quiet()
