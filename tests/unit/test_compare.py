"""Comparing by a keyed baseline finds what comparing exactly finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enrolled import Target, Wrapped

from pyscan.approved import Snapshot
from pyscan.digest import Comparison, Digester, DigestKey, open_digester
from pyscan.policy import judge
from pyscan.records import PageStatus, VerdictState
from pyscan.scanner import Scanner, compare
from pyscan.scanner.compare import Comparer, open_comparer
from pyscan.sources import Source
from pyscan.sources.file import Access
from pyscan.sources.layers import FaultSource

PAGES = 1024


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target.make(tmp_path / "ram")


@pytest.fixture
def snapshot(target: Target) -> Snapshot:
    return target.enrol()


@pytest.fixture(params=list(Access))
def access(request: pytest.FixtureRequest) -> Access:
    return Access(request.param)


@pytest.fixture(params=[("native", 1), ("native", 2), ("numba", 1)], ids=str)
def keyed(request: pytest.FixtureRequest) -> Iterator[Digester]:
    backend, threads = request.param
    with DigestKey.generate("nh4aes") as key:
        yield open_digester(backend, "nh4aes", key, threads)


@pytest.fixture
def nh4aes() -> Iterator[Digester]:
    with DigestKey.generate("nh4aes") as key:
        yield open_digester("native", "nh4aes", key)


def comparer(
    source: Source, snapshot: Snapshot, keyed: Any, audit_percent: float = 0.0
) -> Comparer:
    return open_comparer(source, snapshot, open_digester(), keyed, audit_percent)


def listed(found: Comparison) -> list[int]:
    assert found.ok + found.mismatched + found.unreadable == PAGES
    return found.indices.tolist()


def test_changes_and_their_undoing(
    target: Target, snapshot: Snapshot, access: Access, keyed: Digester
) -> None:
    with target.open(access) as source:
        pages = comparer(source, snapshot, keyed)
        assert [listed(pages.compare()) for _ in range(3)] == [[], [], []]
        for page in (0, 1, 511, 512, 777, 1023):
            target.flip(page, offset=(page * 13) % 4096)
            found = pages.compare()
            assert (listed(found), found.mismatched) == ([page], 1)
            target.flip(page, offset=(page * 13) % 4096)
            assert listed(pages.compare()) == []


def test_two_pages_that_change_places(
    target: Target, snapshot: Snapshot, access: Access, keyed: Digester
) -> None:
    first, second = target.content(3), target.content(900)
    assert first != second
    with target.open(access) as source:
        pages = comparer(source, snapshot, keyed)
        pages.compare()
        target.memory.write(target.gpa(3), second)
        target.memory.write(target.gpa(900), first)
        assert listed(pages.compare()) == [3, 900]


def test_a_page_that_is_wrong_from_the_start_is_never_learnt(
    target: Target, snapshot: Snapshot, access: Access, keyed: Digester
) -> None:
    target.flip(40)
    with target.open(access) as source:
        pages = comparer(source, snapshot, keyed)
        assert [listed(pages.compare()) for _ in range(3)] == [[40]] * 3
        target.flip(40)
        assert [listed(pages.compare()) for _ in range(2)] == [[], []]
        target.flip(40)
        assert listed(pages.compare()) == [40]


@pytest.mark.parametrize("status", [PageStatus.BLOCKED, PageStatus.LINK_DOWN, PageStatus.TORN])
def test_pages_that_cannot_be_read_are_unread_not_different(
    target: Target, snapshot: Snapshot, nh4aes: Digester, status: PageStatus
) -> None:
    faults = {target.frame(page): status for page in (5, 6, 700)}
    with FaultSource(target.open(), faults) as source:
        pages = comparer(source, snapshot, nh4aes, audit_percent=10)
        for _ in range(3):
            found = pages.compare()
            assert (listed(found), found.unreadable, found.mismatched) == ([5, 6, 700], 3, 0)
            assert found.statuses[[5, 6, 700]].tolist() == [status] * 3


def test_a_page_that_becomes_unreadable_later(
    target: Target, snapshot: Snapshot, nh4aes: Digester
) -> None:
    faults: dict[int, PageStatus] = {}
    with FaultSource(target.open(Access.PREAD), faults) as source:
        pages = comparer(source, snapshot, nh4aes)
        pages.compare()
        faults[target.frame(9)] = PageStatus.TIMEOUT
        found = pages.compare()
        assert (listed(found), found.unreadable) == ([9], 1)


class Blind:
    """A keyed digest whose key was lost to the attacker: it never sees a difference."""

    def __init__(self, digester: Digester) -> None:
        self._digester = digester

    def __getattr__(self, name: str) -> Any:
        return getattr(self._digester, name)

    def compare_view(self, *arguments: Any, **keywords: Any) -> Comparison:
        statuses = self._digester.compare_view(*arguments, **keywords).statuses
        nothing = np.empty(0, dtype=np.uint64)
        return Comparison(statuses, nothing, len(statuses), 0, 0)


@pytest.mark.parametrize(("audit_percent", "sweeps"), [(10, 10), (34, 3), (100, 1), (0.01, PAGES)])
def test_the_audit_sees_every_page_in_turn(
    target: Target, snapshot: Snapshot, nh4aes: Digester, audit_percent: float, sweeps: int
) -> None:
    with target.open() as source:
        pages = comparer(source, snapshot, Blind(nh4aes), audit_percent)
        pages.compare()
        target.flip(713)
        assert [713] in [listed(pages.compare()) for _ in range(sweeps)]


def test_without_an_audit_the_loss_of_the_key_is_not_seen(
    target: Target, snapshot: Snapshot, nh4aes: Digester
) -> None:
    with target.open() as source:
        pages = comparer(source, snapshot, Blind(nh4aes), 0)
        pages.compare()
        target.flip(713)
        assert [listed(pages.compare()) for _ in range(20)] == [[]] * 20


def test_the_audit_reads_its_share(target: Target, snapshot: Snapshot, nh4aes: Digester) -> None:
    read: list[int] = []
    with Wrapped(target.open(), before=read.extend) as source:
        pages = comparer(source, snapshot, nh4aes, 10)
        pages.compare()  # learns all
        read.clear()
        pages.compare()
    assert len(read) == 103  # a tenth of the pages, rounded up; the others by the view


def test_a_spoilt_baseline_is_made_anew(
    target: Target, snapshot: Snapshot, nh4aes: Digester, monkeypatch: pytest.MonkeyPatch
) -> None:
    with target.open() as source:
        scanner = Scanner(
            source, snapshot, open_digester(), target="t", keyed=nh4aes, audit_percent=0
        )
        assert scanner.sweep().sweep.transient == 0
        baseline = scanner._comparer._baseline  # type: ignore[attr-defined]
        baseline[17] ^= 1
        spoilt = scanner.sweep().sweep
        assert (spoilt.transient, judge(spoilt)[0]) == (1, VerdictState.APPROVED)
        assert scanner.sweep().sweep.transient == 0


def test_lists_are_bounded_and_counts_are_not(
    target: Target, snapshot: Snapshot, nh4aes: Digester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "LISTED_MAX", 50)
    with target.open() as source:
        pages = comparer(source, snapshot, nh4aes)
        pages.compare()
        for page in range(100, 300):
            target.flip(page)
        found = pages.compare()
    assert found.indices.tolist() == list(range(100, 150))
    assert (found.mismatched, found.ok, found.unreadable) == (200, PAGES - 200, 0)
