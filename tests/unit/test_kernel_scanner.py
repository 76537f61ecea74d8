"""Sweeps of a kernel that is known by its package, on real pages with scripted validations.

Pages, digests and comparison are real. What a validation finds, what settles and which state
the kernel is in is told by the test: `pyscan.validate` has tests of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from enrolled import Target
from units import build_linux

from pyscan.digest import open_digester
from pyscan.errors import KernelNotFound, KernelStarting, SourceUnavailable
from pyscan.kernel import KernelImage
from pyscan.policy import judge
from pyscan.records import PAGE_SIZE, Finding, FindingKind, PageStatus, VerdictState
from pyscan.scanner import KernelScanner, SweepResult, compare, kernel
from pyscan.scanner.mapping import FINDINGS_MAX, MappingCheck
from pyscan.sources import Source
from pyscan.sources.layers import FaultSource
from pyscan.validate import AccessFailed, Difference, Settled, StateRules, StateVector
from pyscan.validate.code import CodeResult
from pyscan.validate.problem import Problem, ProblemKind, Problems
from pyscan.validate.vector import RetpolineMode

APPROVED, UNAPPROVED, UNDECIDED = (
    VerdictState.APPROVED,
    VerdictState.UNAPPROVED,
    VerdictState.UNDECIDED,
)
TEXT_PAGES = 512  # of the target's pages; as many of read-only data follow
HIDDEN = Problem(ProblemKind.ORPHAN_CODE, 0x1000, "nowhere", "hidden")
BROKEN = Problem(ProblemKind.BROKEN_LIST, 0x2000, "modules", "does not point back")
VECTOR = StateVector(
    features="ff",
    return_thunk="__x86_return_thunk",
    retpoline=RetpolineMode.THUNK,
    uniprocessor=False,
    static_keys={},
    static_calls={},
    ftrace=(),
    kprobes=(),
    modules=("virtio",),
    unknown_modules=(),
    bpf=(),
)
FEWER = replace(VECTOR, features="0f")


@dataclass
class Stage:
    """A target, and what is made of it. Every list of `script` is one validation's problems."""

    target: Target
    kernel: KernelImage
    script: list[list[Problem]] = field(default_factory=list)  # then: no problems
    vector: StateVector = VECTOR
    differing: frozenset[int] = frozenset()  # pages that a full validation finds differing
    unread: frozenset[int] = frozenset()  # and those that it cannot read
    legal: frozenset[int] = frozenset()  # pages that may hold what they hold
    changed: bool = False  # beyond pages
    starting: bool = False
    gone: bool = False
    validations: list[Any] = field(default_factory=list)
    settled: list[tuple[int, ...]] = field(default_factory=list)

    def attach(self, source: Source, candidates: Any, known: KernelImage | None = None) -> Any:
        del known
        if self.gone:
            raise KernelNotFound("no kernel")
        return SimpleNamespace(source=source, kernel=self.kernel, approved=candidates[0])

    def difference(self, page: int) -> Difference:
        offset = page * PAGE_SIZE + 5
        return Difference("vmlinux", offset, self.target.address(page) + 5, "", b"\0", b"\1")

    def validate(self, attached: Any) -> Any:
        self.unit = SimpleNamespace(
            unit=SimpleNamespace(name="vmlinux"), address=self.target.address(0)
        )
        problems = Problems()
        problems.extend(self.script.pop(0) if self.script else [])
        text = [page for page in self.differing if page < TEXT_PAGES]
        result = SimpleNamespace(
            attached=attached,
            problems=problems,
            text=CodeResult(
                [self.difference(page) for page in text],
                len(text),
                pages={("vmlinux", page * PAGE_SIZE) for page in text},
            ),
            rodata=SimpleNamespace(
                code=CodeResult(
                    pages={("vmlinux", p * PAGE_SIZE) for p in self.differing if p >= TEXT_PAGES}
                )
            ),
            units=SimpleNamespace(all=[self.unit]),
            extents=[self.extent(0, executable=True), self.extent(TEXT_PAGES, executable=False)],
            target=SimpleNamespace(
                memory=SimpleNamespace(forget=lambda: None), place=lambda address: f"{address:#x}"
            ),
            lasting=lambda: frozenset((str(p.kind), p.address) for p in problems.kept),
        )
        self.validations.append(result)
        return result

    def extent(self, first: int, *, executable: bool) -> Any:
        statuses = np.zeros(TEXT_PAGES, dtype=np.uint8)
        statuses[[page - first for page in self.unread if 0 <= page - first < TEXT_PAGES]] = (
            PageStatus.BLOCKED
        )
        return SimpleNamespace(
            placed=self.unit,
            offset=first * PAGE_SIZE,
            legal=np.empty(TEXT_PAGES * PAGE_SIZE, dtype=np.uint8),
            statuses=statuses,
            executable=executable,
        )

    def settle(self, validation: Any, pages: Iterable[tuple[str, int]]) -> Settled:
        del validation
        numbers = tuple(sorted(offset // PAGE_SIZE for _, offset in pages))
        self.settled.append(numbers)
        bad = [page for page in numbers if page not in self.legal]
        content = {
            ("vmlinux", page * PAGE_SIZE): np.frombuffer(self.target.content(page), np.uint8)
            for page in numbers
            if page in self.legal
        }
        # As the original does, it lists no more than some.
        found = tuple(self.difference(page) for page in bad)
        return Settled(found[:8], len(found), content, len(bad), frozenset(), 1, None)


def findings(validation: Any, sweep: str, judged: Any) -> tuple[Finding, ...]:
    rows = [(FindingKind.CODE, each.address) for each in validation.text.differences]
    rows += [(FindingKind.CODE, 0) for _ in validation.rodata.code.pages]
    rows += [(FindingKind.STRUCTURE, each.address) for each in validation.problems.kept]
    rows += [(FindingKind.STATE, 0) for _ in judged.findings]
    return tuple(
        Finding(id=f"{sweep}{n}", sweep=sweep, kind=kind, status=PageStatus.OK, address=address)
        for n, (kind, address) in enumerate(rows)
    )


def count(validation: Any, judged: Any) -> int:
    beyond = len(validation.rodata.code.pages) + validation.problems.total
    return int(validation.text.total + beyond + judged.findings_total)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    target = Target.make(tmp_path / "ram")
    snapshot = target.enrol()
    stage = Stage(target, snapshot.kernel)

    def fresh(*_: object) -> Any:
        return replace(snapshot, digests=snapshot.digests.copy())

    monkeypatch.setattr(kernel, "attach", stage.attach)
    monkeypatch.setattr(kernel, "validate", stage.validate)
    monkeypatch.setattr(kernel, "settle", stage.settle)
    monkeypatch.setattr(kernel, "baseline", fresh)
    monkeypatch.setattr(kernel, "state_vector", lambda _: stage.vector)
    monkeypatch.setattr(kernel, "findings", findings)
    monkeypatch.setattr(kernel, "count_findings", count)
    monkeypatch.setattr(kernel, "is_starting", lambda _: stage.starting)
    monkeypatch.setattr(kernel, "recheck", lambda _: stage.changed)
    monkeypatch.setattr(kernel, "check_mapping", lambda *_: MappingCheck((), 0, 0))
    monkeypatch.setattr(kernel, "_PAUSE_S", 0.0)
    return stage


class Swept:
    """A scanner whose every sweep must add up."""

    def __init__(self, stage: Stage, source: Source | None = None, **options: Any) -> None:
        self.source = source or stage.target.open()
        self.scanner = KernelScanner(
            self.source,
            [build_linux()],
            open_digester(),
            target="t",
            rules=StateRules(),
            **options,
        )

    def sweep(self, expected: VerdictState, *, walk_tables: bool = True) -> SweepResult:
        result = self.scanner.sweep(walk_tables=walk_tables)
        sweep = result.sweep
        assert sweep.watched == sweep.ok + sweep.mismatched + sweep.unreadable == 1024
        assert min(sweep.ok, sweep.mismatched, sweep.unreadable) >= 0
        assert sweep.transient <= sweep.ok
        assert len(sweep.findings) <= min(FINDINGS_MAX, sweep.findings_total)
        assert {finding.sweep for finding in sweep.findings} <= {sweep.id}
        state, reason = judge(sweep)
        assert state is expected, reason
        return result


@pytest.fixture
def swept(stage: Stage) -> Iterator[Swept]:
    swept = Swept(stage)
    with swept.source, swept.scanner:
        yield swept


# --- pages ----------------------------------------------------------------------------


def test_one_validation_a_boot(stage: Stage, swept: Swept) -> None:
    first = swept.sweep(APPROVED)
    assert (first.sweep.number, first.sweep.ok, first.walked_tables) == (1, 1024, True)
    second = swept.sweep(APPROVED, walk_tables=False)
    assert (second.sweep.number, second.walked_tables) == (2, False)
    assert len(stage.validations) == 1
    assert stage.settled == []


def test_the_bytes_of_a_validation_are_not_kept(stage: Stage, swept: Swept) -> None:
    swept.sweep(APPROVED)
    assert [validation.extents for validation in stage.validations] == [[]]
    assert swept.scanner.report is not None
    swept.scanner.close()
    assert swept.scanner.report is None


def test_a_legal_change_is_transient_and_taken_over(stage: Stage, swept: Swept) -> None:
    swept.sweep(APPROVED)
    stage.target.flip(3)
    stage.target.flip(7)
    stage.legal = frozenset({3, 7})
    result = swept.sweep(APPROVED)
    assert (result.sweep.transient, result.sweep.ok) == (2, 1024)
    assert stage.settled == [(3, 7)]
    assert swept.sweep(APPROVED).sweep.transient == 0
    assert len(stage.settled) == 1
    # The old content is now what differs.
    stage.legal = frozenset()
    stage.target.flip(3)
    assert swept.sweep(UNAPPROVED).sweep.mismatched == 1


def test_an_illegal_change_is_found_for_as_long_as_it_lasts(stage: Stage, swept: Swept) -> None:
    swept.sweep(APPROVED)
    stage.target.flip(3)
    for _ in range(3):
        result = swept.sweep(UNAPPROVED, walk_tables=False)
        assert (result.sweep.mismatched, result.sweep.findings_total) == (1, 1)
        assert result.sweep.findings[0].address == stage.target.address(3) + 5
    stage.target.flip(3)
    result = swept.sweep(APPROVED, walk_tables=False)
    assert (result.sweep.findings, result.sweep.findings_total) == ((), 0)
    assert len(stage.validations) == 1


def test_all_pages_that_differ_are_counted(stage: Stage, swept: Swept) -> None:
    """Also those whose differences are not listed."""
    swept.sweep(APPROVED)
    for page in range(40):
        stage.target.flip(page)
    stage.legal = frozenset(range(10))
    sweep = swept.sweep(UNAPPROVED).sweep
    assert (sweep.mismatched, sweep.transient, sweep.findings_total) == (30, 10, 30)


def test_read_only_data_that_differs_is_validated(stage: Stage, swept: Swept) -> None:
    swept.sweep(APPROVED)
    stage.target.flip(TEXT_PAGES + 3)
    stage.differing = frozenset({TEXT_PAGES + 3})
    for validations in (2, 3):
        assert swept.sweep(UNAPPROVED, walk_tables=False).sweep.mismatched == 1
        assert len(stage.validations) == validations


def test_more_than_is_listed_is_validated(
    stage: Stage, swept: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "LISTED_MAX", 4)
    swept.sweep(APPROVED)
    for page in range(5):
        stage.target.flip(page)
    stage.differing = frozenset(range(5))
    assert swept.sweep(UNAPPROVED).sweep.mismatched == 5
    assert len(stage.validations) == 2


@pytest.mark.parametrize(
    ("differing", "unread"),
    [(0, 0), (1, 0), (0, 1), (3, 2), (512, 512), (1024, 0), (0, 1024), (1024, 1024)],
)
def test_counts_of_a_validation(stage: Stage, swept: Swept, differing: int, unread: int) -> None:
    stage.differing = frozenset(range(differing))
    stage.unread = frozenset(range(1024 - unread, 1024))
    expected = UNAPPROVED if differing else UNDECIDED if unread else APPROVED
    sweep = swept.sweep(expected).sweep
    assert sweep.unreadable == unread
    assert sweep.mismatched == min(differing, 1024 - unread)


def test_pages_that_cannot_be_read_any_more(stage: Stage, swept: Swept) -> None:
    faults: dict[int, PageStatus] = {}
    source = FaultSource(stage.target.open(), faults)
    with source, Swept(stage, source).scanner as scanner:
        assert judge(scanner.sweep().sweep)[0] is APPROVED
        faults[stage.target.frame(3)] = PageStatus.TIMEOUT
        sweep = scanner.sweep().sweep
        assert (sweep.ok, sweep.unreadable, sweep.findings_total) == (1023, 1, 1)
        assert [(f.kind, f.status) for f in sweep.findings] == [
            (FindingKind.UNREADABLE, PageStatus.TIMEOUT)
        ]
        assert judge(sweep)[0] is UNDECIDED
        faults.clear()
        assert judge(scanner.sweep().sweep)[0] is APPROVED


# --- beyond pages ---------------------------------------------------------------------


def test_what_is_found_beyond_pages_stays_until_it_is_gone(stage: Stage, swept: Swept) -> None:
    stage.script = [[HIDDEN], [HIDDEN]]
    swept.sweep(UNAPPROVED)
    for walk_tables in (False, True, False):
        result = swept.sweep(UNAPPROVED, walk_tables=walk_tables)
        assert [finding.kind for finding in result.sweep.findings] == [FindingKind.STRUCTURE]
        assert result.sweep.ok == 1024
    # A legal change of a page does not make it forgotten either.
    stage.target.flip(3)
    stage.legal = frozenset({3})
    swept.sweep(UNAPPROVED)
    stage.changed = True
    swept.sweep(APPROVED)


def test_a_change_beyond_pages_is_validated(stage: Stage, swept: Swept) -> None:
    swept.sweep(APPROVED)
    stage.changed = True
    stage.script = [[HIDDEN], [HIDDEN]]
    swept.sweep(APPROVED, walk_tables=False)
    swept.sweep(UNAPPROVED)


def test_what_only_one_validation_sees_is_not_believed(stage: Stage, swept: Swept) -> None:
    stage.script = [[BROKEN], []]
    swept.sweep(APPROVED)
    stage.changed = True
    stage.script = [[BROKEN], [HIDDEN], [HIDDEN, BROKEN]]
    result = swept.sweep(UNAPPROVED)
    assert [finding.address for finding in result.sweep.findings] == [HIDDEN.address]
    assert result.sweep.findings_total == 1


def test_a_kernel_that_shows_another_fault_each_time_is_not_approved(
    stage: Stage, swept: Swept
) -> None:
    stage.script = [[HIDDEN], [BROKEN]] * 10
    swept.sweep(UNAPPROVED)
    assert len(stage.validations) < 10


# --- state ----------------------------------------------------------------------------


def test_the_first_state_of_a_boot_stays_the_measure(stage: Stage, swept: Swept) -> None:
    swept.sweep(APPROVED)
    stage.vector, stage.changed = FEWER, True
    for _ in range(2):
        result = swept.sweep(UNAPPROVED)
        assert [finding.kind for finding in result.sweep.findings] == [FindingKind.STATE]
    stage.changed = False
    swept.sweep(UNAPPROVED)
    stage.vector, stage.changed = VECTOR, True
    swept.sweep(APPROVED)


def test_a_moment_out_of_sight_does_not_renew_the_measure(stage: Stage, swept: Swept) -> None:
    swept.sweep(APPROVED)
    stage.gone = stage.changed = True
    with pytest.raises(KernelNotFound):
        swept.sweep(UNDECIDED)
    stage.gone, stage.vector = False, FEWER
    swept.sweep(UNAPPROVED)


def test_another_boot_has_a_measure_of_its_own(stage: Stage, swept: Swept) -> None:
    swept.sweep(APPROVED)
    stage.kernel = replace(stage.kernel, virtual_base=stage.kernel.virtual_base + (2 << 20))
    stage.vector, stage.changed = FEWER, True
    swept.sweep(APPROVED)
    stage.vector = VECTOR
    swept.sweep(UNAPPROVED)


def test_a_state_that_cannot_be_read(
    stage: Stage, swept: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise AccessFailed(0x1000, "not mapped")

    swept.sweep(APPROVED)
    stage.target.flip(3)
    monkeypatch.setattr(kernel, "settle", fail)
    with pytest.raises(SourceUnavailable, match="state cannot be read: 0x1000"):
        swept.sweep(UNDECIDED)
    monkeypatch.setattr(kernel, "validate", fail)
    stage.changed = True
    with pytest.raises(SourceUnavailable, match="state cannot be read: 0x1000"):
        swept.sweep(UNDECIDED)


# --- reboots --------------------------------------------------------------------------


def test_a_starting_kernel_is_not_judged(stage: Stage, swept: Swept) -> None:
    stage.starting = True
    stage.script = [[HIDDEN], [HIDDEN]]
    with pytest.raises(KernelStarting, match="still starting"):
        swept.sweep(UNDECIDED)
    with Swept(stage, judge_starting=True).source as source:
        Swept(stage, source, judge_starting=True).sweep(UNAPPROVED)


class FakePulse:
    """The clock of a kernel that goes on after some looks at it."""

    looks = 0

    @classmethod
    def of(cls, _attached: object) -> FakePulse:
        return cls()

    def beats(self) -> bool:
        FakePulse.looks -= 1
        return FakePulse.looks < 0


@pytest.fixture
def live(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Swept]:
    monkeypatch.setattr(kernel, "Pulse", FakePulse)
    monkeypatch.setattr(FakePulse, "looks", 0)
    swept = Swept(stage, live=True)
    with swept.source, swept.scanner:
        swept.sweep(APPROVED)
        stage.changed = True
        yield swept


def test_findings_in_a_running_kernel_are_believed(stage: Stage, live: Swept) -> None:
    stage.script = [[HIDDEN], [HIDDEN]]
    FakePulse.looks = 3
    live.sweep(UNAPPROVED)
    assert FakePulse.looks == -1


def test_what_is_left_of_a_kernel_is_no_attack(
    stage: Stage, live: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(_: float) -> None:
        stage.gone = True

    stage.script = [[HIDDEN], [HIDDEN]]
    FakePulse.looks = 100
    monkeypatch.setattr(kernel.time, "sleep", vanish)
    with pytest.raises(KernelNotFound):
        live.sweep(UNDECIDED)


def test_the_next_kernel_is_validated_in_the_place_of_the_last(
    stage: Stage, live: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(stage.kernel, virtual_base=stage.kernel.virtual_base + (2 << 20))

    def boot(_: float) -> None:
        stage.kernel = other

    stage.script = [[HIDDEN], [HIDDEN]]
    FakePulse.looks = 100
    monkeypatch.setattr(kernel.time, "sleep", boot)
    live.sweep(APPROVED)
    assert live.scanner.report is not None
    assert live.scanner.report.validation.attached.kernel == other


def test_a_kernel_without_pulse_does_not_hide_findings_for_ever(
    stage: Stage, live: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "PULSE_S", 0.01)
    stage.script = [[HIDDEN], [HIDDEN]]
    FakePulse.looks = 1 << 60
    live.sweep(UNAPPROVED)


def test_a_few_pages_of_code_are_believed_at_once(stage: Stage, live: Swept) -> None:
    stage.changed = False
    stage.target.flip(3)
    FakePulse.looks = 1 << 60
    live.sweep(UNAPPROVED)
    assert FakePulse.looks == 1 << 60
