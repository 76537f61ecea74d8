"""Sweeps of a target whose pages a card digests by itself, under a key that it does not tell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from card_site import CardSite, card_site
from enrolled import Target
from test_watch import Observed

from pyscan.approved import Snapshot
from pyscan.digest import Digester, DigestKey, open_digester
from pyscan.errors import SourceUnavailable
from pyscan.policy import judge
from pyscan.records import FindingKind, PageStatus, Sweep, VerdictState
from pyscan.scanner import Scanner
from pyscan.scanner.compare import Comparer, open_comparer
from pyscan.sources import Digested, Source, open_source
from pyscan.sources.card import CardSource

PAGES = 1024


class Unused:
    """A digester of this program: it must not be needed for pages."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the host's own digester was used: {name}")


class Recorded:
    """A card's source, and what it was asked to digest."""

    def __init__(self, source: CardSource) -> None:
        self._source = source
        self.asked: list[tuple[int, tuple[str, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def digest_pages(self, frames: np.ndarray, digests: tuple[str, ...]) -> Digested:
        self.asked.append((len(frames), digests))
        return self._source.digest_pages(frames, digests)


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target.make(tmp_path / "ram")


@pytest.fixture
def snapshot(target: Target) -> Snapshot:
    return target.enrol()


@pytest.fixture
def site(tmp_path: Path, target: Target) -> Iterator[CardSite]:
    """A simulated card over the target's own file."""
    with card_site(tmp_path, target.memory.layout(), ram=target.path) as site:
        yield site


@pytest.fixture
def source(site: CardSite) -> Iterator[Source]:
    with open_source(site.uri) as source:
        yield source


@pytest.fixture
def keyed() -> Iterator[Digester]:
    with DigestKey.generate("nh4aes") as key:
        yield open_digester("native", "nh4aes", key)


def comparer(source: Any, snapshot: Snapshot, audit_percent: float = 0.0) -> Comparer:
    unused: Any = Unused()
    return open_comparer(source, snapshot, unused, unused, audit_percent)


def listed(pages: Comparer) -> list[int]:
    found = pages.compare()
    assert found.ok + found.mismatched + found.unreadable == PAGES
    return found.indices.tolist()


def test_changes_and_their_undoing(target: Target, snapshot: Snapshot, source: Source) -> None:
    for audit in (0.0, 10.0):
        pages = comparer(source, snapshot, audit)
        assert [listed(pages) for _ in range(2)] == [[], []]
        for page in (0, 511, 1023):
            target.flip(page, offset=(page * 13) % 4096)
            assert listed(pages) == [page]
            target.flip(page, offset=(page * 13) % 4096)
            assert listed(pages) == []


def test_what_is_asked_for(snapshot: Snapshot, source: CardSource) -> None:
    """The first sweep approves and learns from one read; then digests alone cross the link."""
    recorded = Recorded(source)
    pages = comparer(recorded, snapshot, audit_percent=10)
    assert [listed(pages) for _ in range(3)] == [[]] * 3
    both, alone = ("sha256", "nh4aes"), ("nh4aes",)
    assert recorded.asked == [
        (PAGES, both),
        (PAGES, alone),
        (103, both),
        (PAGES, alone),
        (103, both),
    ]


def test_without_a_keyed_digest_all_is_exact(
    target: Target, snapshot: Snapshot, source: CardSource
) -> None:
    recorded: Any = Recorded(source)
    unused: Any = Unused()
    pages = open_comparer(recorded, snapshot, unused, None, 1.0)
    assert listed(pages) == []
    target.flip(77)
    assert listed(pages) == [77]
    assert recorded.asked == [(PAGES, ("sha256",))] * 2


def test_another_key_makes_a_new_baseline(
    target: Target, snapshot: Snapshot, site: CardSite, source: CardSource
) -> None:
    recorded = Recorded(source)
    pages = comparer(recorded, snapshot)
    assert listed(pages) == []
    site.restart()
    target.flip(40)
    recorded.asked.clear()
    assert listed(pages) == [40]  # and no page beside it, though all keyed digests differ
    assert recorded.asked == [(PAGES, ("nh4aes",)), (PAGES, ("sha256", "nh4aes"))]
    target.flip(40)
    assert [listed(pages) for _ in range(2)] == [[], []]
    target.flip(41)
    assert listed(pages) == [41]


def test_two_pages_that_change_places(target: Target, snapshot: Snapshot, source: Source) -> None:
    first, second = target.content(3), target.content(900)
    pages = comparer(source, snapshot)
    assert listed(pages) == []
    target.memory.write(target.gpa(3), second)
    target.memory.write(target.gpa(900), first)
    assert listed(pages) == [3, 900]


def test_a_spoilt_baseline_is_made_anew(
    snapshot: Snapshot, source: Source, keyed: Digester
) -> None:
    scanner = Scanner(source, snapshot, open_digester(), target="t", keyed=keyed, audit_percent=0)
    assert scanner.sweep().sweep.transient == 0
    scanner._comparer._baseline[17] ^= 1  # type: ignore[attr-defined]
    spoilt = scanner.sweep().sweep
    assert (spoilt.transient, judge(spoilt)[0]) == (1, VerdictState.APPROVED)
    assert scanner.sweep().sweep.transient == 0


def test_sweeps_find_the_tampered_page_with_its_bytes(
    target: Target, snapshot: Snapshot, source: Source, keyed: Digester
) -> None:
    scanner = Scanner(source, snapshot, open_digester(), target="t", keyed=keyed)
    assert verdict(scanner.sweep().sweep) is VerdictState.APPROVED
    target.flip(713)
    result = scanner.sweep(walk_tables=False)
    (finding,) = result.sweep.findings
    assert (finding.kind, finding.frame) == (FindingKind.DIGEST, target.frame(713))
    (suspect,) = result.suspects
    assert suspect.data == target.content(713)
    assert verdict(result.sweep) is VerdictState.UNAPPROVED


@pytest.mark.parametrize("with_key", [False, True])
def test_a_card_that_is_lost_is_an_alarm_and_nothing_else(
    snapshot: Snapshot, site: CardSite, source: Source, keyed: Digester, with_key: bool
) -> None:
    scanner = Scanner(
        source, snapshot, open_digester(), target="t", keyed=keyed if with_key else None
    )
    assert verdict(scanner.sweep().sweep) is VerdictState.APPROVED
    site.kill()
    with pytest.raises(SourceUnavailable):
        scanner.sweep()
    site.restart()
    assert verdict(scanner.sweep().sweep) is VerdictState.APPROVED


def test_a_bus_that_refuses_the_card(
    tmp_path: Path, target: Target, snapshot: Snapshot, keyed: Digester
) -> None:
    faults = ["refused-dma:0:0x100000000"]
    with (
        card_site(tmp_path, target.memory.layout(), ram=target.path, faults=faults) as site,
        open_source(site.uri) as source,
    ):
        scanner = Scanner(source, snapshot, open_digester(), target="t", keyed=keyed)
        sweep = scanner.sweep().sweep
    state, reason = judge(sweep)
    assert state is VerdictState.UNDECIDED
    assert reason.startswith("access lost: none of 1024 pages could be read")
    assert sweep.unreadable == sweep.watched
    assert PageStatus.BLOCKED in {finding.status for finding in sweep.findings}


def verdict(sweep: Sweep) -> VerdictState:
    return judge(sweep)[0]


async def test_a_watch_tells_of_a_lost_card_and_goes_on_when_it_is_back(
    target: Target, site: CardSite
) -> None:
    async with Observed(target, site.uri).running() as observed:
        await observed.verdict(VerdictState.APPROVED)
        site.kill()
        lost = await observed.verdict(VerdictState.UNDECIDED)
        assert lost.reason.startswith("access lost: none of 1024 pages could be read (link down)")
        assert lost.unreadable == lost.watched == 1024
        site.restart()
        await observed.verdict(VerdictState.APPROVED)
        target.flip(5)
        await observed.verdict(VerdictState.UNAPPROVED)
