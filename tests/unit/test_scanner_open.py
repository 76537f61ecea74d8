"""Which scanner an approved configuration gets, and what does not go together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from enrolled import Target
from units import build_linux

from pyscan.approved import LinuxApproved, Snapshot
from pyscan.digest import open_digester
from pyscan.errors import KernelNotFound, UsageError
from pyscan.records import PageStatus
from pyscan.scanner import KernelScanner, Scanner, check_approved, open_scanner
from pyscan.scanner.pulse import Pulse
from pyscan.validate.memory import Unreadable


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target.make(tmp_path / "ram")


def test_nothing_approved() -> None:
    with pytest.raises(UsageError, match="no approved configuration"):
        check_approved([])


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0), (1, 2, 0)])
def test_a_snapshot_is_given_alone(target: Target, order: Sequence[int]) -> None:
    kinds: list[Snapshot | LinuxApproved] = [target.enrol(), build_linux(), build_linux()]
    approved = [kinds[index] for index in order]
    with pytest.raises(UsageError, match=r"a snapshot .* is given alone"):
        check_approved(approved)
    with target.open() as source, pytest.raises(UsageError, match="is given alone"):
        open_scanner(source, approved, open_digester(), target="t")


def test_the_scanner_fits_the_kind(target: Target) -> None:
    snapshot = target.enrol()
    check_approved([snapshot])
    check_approved([build_linux(), build_linux()])
    with target.open() as source:
        with open_scanner(source, [snapshot], open_digester(), target="t") as scanner:
            assert isinstance(scanner, Scanner)
            assert scanner.report is None
        kernels = [build_linux(), build_linux()]
        with open_scanner(source, kernels, open_digester(), target="t") as scanner:
            assert isinstance(scanner, KernelScanner)
            with pytest.raises(KernelNotFound, match="none of the approved ones"):
                scanner.sweep()
            assert scanner.report is None


class Clock:
    """A kernel whose counter of ticks says what it is told."""

    def __init__(self, ticks: int) -> None:
        self.ticks: int | None = ticks
        self.status = PageStatus.OK
        self.target = SimpleNamespace(memory=self, address=lambda _: 0x1000)

    def read_range(self, address: int, length: int) -> tuple[Any, Any]:
        if self.ticks is None:
            raise Unreadable(address, "gone")
        data = np.frombuffer(self.ticks.to_bytes(length, "little"), dtype=np.uint8)
        return data, np.array([self.status], dtype=np.uint8)


@pytest.mark.parametrize(
    ("before", "after", "beats"),
    [
        (1000, 1000, False),
        (1000, 1001, True),
        (1000, 1000 + 30_000, True),
        (1000, 999, False),
        (1000, 1 << 40, False),  # written over, not counted on
        (1000, None, False),
        (None, None, True),  # nothing is known of it: no reason to wait
    ],
)
def test_pulse(before: int | None, after: int | None, beats: bool) -> None:
    clock: Any = Clock(0)
    clock.ticks = before
    watched = Pulse.of(clock)
    clock.ticks = after
    assert watched.beats() == beats


def test_a_clock_that_cannot_be_read_does_not_beat() -> None:
    clock: Any = Clock(1000)
    watched = Pulse.of(clock)
    clock.ticks, clock.status = 1001, PageStatus.BLOCKED
    assert not watched.beats()
