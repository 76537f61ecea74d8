"""A server whose kernel translates what its devices reach: the card is one of them.

The card has no way around it. Refused, it says so for every page and never approves; where
the server's own administrator permits it, and nobody else, it reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from operator_shell import Operator

from pyscan.lab.bus import EDU_SLOT, ENGINE_SLOT, CardBus, ServerBus
from pyscan.lab.guest import Guest, GuestOptions
from pyscan.lab.process import RunDirectory
from pyscan.records import PAGE_SIZE, POISON, PageStatus
from pyscan.sources import open_source
from pyscan.sources.base import Source

pytestmark = pytest.mark.guest

OK, BLOCKED = PageStatus.OK, PageStatus.BLOCKED
FRAMES = np.arange(4096, 4096 + 1000, dtype=np.uint64)


@pytest.fixture(scope="module")
def guest(guest_dir: Path) -> Iterator[Guest]:
    options = GuestOptions(guest_dir, card=CardBus(edu=True, iommu=True))
    with RunDirectory() as run, Guest(options, run) as guest:
        guest.wait_ready(timeout_s=120)
        yield guest


@pytest.fixture
def bus(guest: Guest) -> Iterator[ServerBus]:
    """The card's bus; after the test the card is refused again."""
    assert guest.bus is not None
    yield guest.bus
    permit(guest, "DMA")


def permit(guest: Guest, kind: str, slot: str = ENGINE_SLOT) -> None:
    """Change what the domain of a function's group is; no driver holds the function."""
    group = f"/sys/bus/pci/devices/0000:{slot}/iommu_group"
    guest.shell(f"ls {group}/devices | grep -qx 0000:{slot} && echo {kind} >{group}/type")


def domain(guest: Guest, slot: str) -> str:
    return guest.shell(f"cat /sys/bus/pci/devices/0000:{slot}/iommu_group/type").strip()


def faults(guest: Guest) -> list[tuple[str, str]]:
    """Function and reason of the DMA faults in the guest's log, oldest first."""
    log = guest.shell("dmesg | grep 'DMAR: .DMA' || true")
    print(log)
    return re.findall(r"DMAR: \[DMA \w+.*\] Request device \[(\S+)\] .*\[fault reason (\w+)\]", log)


def statuses(source: Source, frames: np.ndarray = FRAMES) -> set[int]:
    """The statuses of a read; what was not read is poisoned."""
    pages = np.zeros((len(frames), PAGE_SIZE), dtype=np.uint8)
    found = source.read(frames, pages)
    assert (pages[found != OK] == POISON).all()
    return set(found.tolist())


def scan(operator: Operator, uri: str) -> tuple[int, dict[str, Any]]:
    done = operator.run("scan", uri, "--approved", operator.approved, "--json")
    return done.returncode, json.loads(done.stdout) if done.stdout else {}


def test_a_card_that_is_not_permitted(guest: Guest, bus: ServerBus, operator: Operator) -> None:
    uri = bus.nvme_uri(machine="q35", size="512M")
    before = len(faults(guest))
    assert domain(guest, ENGINE_SLOT).startswith("DMA")
    with open_source(uri) as source:
        for _ in range(2):
            assert statuses(source) == {BLOCKED}
        assert source.regions().bytes_total == 512 << 20
    with open_source(bus.edu_uri(machine="q35", size="512M")) as source:
        assert statuses(source, FRAMES[:1]) == {BLOCKED}
    seen = faults(guest)[before:]
    assert (ENGINE_SLOT, "0x06") in seen  # "PTE Read access is not set"

    status, document = scan(operator, uri)
    assert status == 3
    assert document.get("verdict") != "approved"


def test_only_the_function_that_is_permitted(
    guest: Guest, bus: ServerBus, operator: Operator
) -> None:
    permit(guest, "identity")
    assert domain(guest, ENGINE_SLOT) == "identity"
    assert domain(guest, EDU_SLOT).startswith("DMA")
    uri = bus.nvme_uri(machine="q35", size="512M")
    with open_source(uri) as source:
        assert statuses(source) == {OK}
        frame = guest.text_physical() // PAGE_SIZE
        page = np.zeros((1, PAGE_SIZE), dtype=np.uint8)
        source.read(np.array([frame], dtype=np.uint64), page)
        assert page.tobytes() == guest.ram.read(frame * PAGE_SIZE, PAGE_SIZE)
    with open_source(bus.edu_uri(machine="q35", size="512M")) as source:
        assert statuses(source, FRAMES[:2]) == {BLOCKED}
    status, document = scan(operator, uri)
    assert (status, document["verdict"]) == (0, "approved")


def test_a_permission_that_is_taken_away_and_given_again(guest: Guest, bus: ServerBus) -> None:
    with open_source(bus.nvme_uri(machine="q35", size="512M")) as source:
        assert statuses(source) == {BLOCKED}
        for _ in range(2):
            permit(guest, "identity")
            assert statuses(source) == {OK}
            permit(guest, "DMA")
            assert statuses(source) == {BLOCKED}
