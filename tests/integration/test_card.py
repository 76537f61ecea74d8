"""A card machine that watches a real guest: the full chain, and each link of it broken.

The chain: host program, mailbox, the card's firmware, the emulated link, an NVMe controller on
the guest's bus, its DMA (and IOMMU), the guest's memory. What the card says is held against
the guest's RAM file, which nothing in the chain but the guest itself has open.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import numpy as np
import pytest
from operator_shell import Operator

from pyscan.approved import LinuxApproved
from pyscan.digest import DigestKey, open_digester
from pyscan.errors import TargetUnavailable
from pyscan.lab.bus import ENGINE_SLOT, CardBus
from pyscan.lab.card import CardMachine
from pyscan.lab.guest import Guest, GuestOptions
from pyscan.lab.process import RunDirectory
from pyscan.policy import judge
from pyscan.qmp import query
from pyscan.records import PAGE_SIZE, POISON, FindingKind, PageStatus, VerdictState
from pyscan.scanner import Sweeper, SweepOptions, SweepResult, open_scanner
from pyscan.sources import open_source
from pyscan.sources.card import CardSource
from pyscan.sources.link import Engine

pytestmark = pytest.mark.guest

FIRMWARE = Path(__file__).parents[2] / "build/firmware/firmware.elf"
OK, BLOCKED, LINK_DOWN = PageStatus.OK, PageStatus.BLOCKED, PageStatus.LINK_DOWN
FRAMES = np.arange(0x1000, 0x1000 + 1000, dtype=np.uint64)
MEMORY = 512 << 20


@pytest.fixture(scope="module")
def guest(guest_dir: Path) -> Iterator[Guest]:
    with RunDirectory() as run, Guest(GuestOptions(guest_dir, card=CardBus()), run) as guest:
        guest.wait_ready()
        yield guest


@pytest.fixture(scope="module")
def card(guest: Guest) -> Iterator[CardMachine]:
    with RunDirectory() as run:
        assert guest.bus is not None
        with CardMachine(run, guest.bus, FIRMWARE) as card:
            card.link.wait_up()
            yield card


@pytest.fixture
def source(card: CardMachine) -> Iterator[CardSource]:
    with open_source(card.uri("q35", MEMORY)) as source:
        assert isinstance(source, CardSource)
        yield source


@pytest.fixture
def scanner(source: CardSource, approved_linux: LinuxApproved) -> Iterator[Sweeper]:
    with (
        DigestKey.generate("nh4aes") as key,
        open_scanner(
            source,
            [approved_linux],
            open_digester(),
            target="guest",
            keyed=open_digester("native", "nh4aes", key),
            options=SweepOptions(live=True),
        ) as scanner,
    ):
        yield scanner


def eventually(condition: Callable[[], bool]) -> None:
    deadline_s = monotonic() + 30
    while not condition():
        assert monotonic() < deadline_s


def statuses(source: CardSource, frames: np.ndarray = FRAMES) -> set[int]:
    made = source.digest_pages(frames, ("sha256",))
    assert (made.digests[0][made.statuses != OK] == POISON).all()
    return set(made.statuses.tolist())


def approved(result: SweepResult) -> bool:
    state, reason = judge(result.sweep)
    print(state, reason)
    return state is VerdictState.APPROVED


def access_is_lost(scanner: Sweeper) -> bool:
    """Whether a sweep tells the alarm by its name, and is no verdict of anything else."""
    try:
        state, reason = judge(scanner.sweep().sweep)
    except TargetUnavailable as error:
        state, reason = VerdictState.UNDECIDED, str(error)
    print(state, reason)
    return state is VerdictState.UNDECIDED and "access lost" in reason


def test_digests_of_a_stopped_guest_are_those_of_its_memory(
    guest: Guest, card: CardMachine, source: CardSource
) -> None:
    frames = np.arange(0x1000, 0x1000 + 16384, dtype=np.uint64)
    before, served = card.page(), card.link.served
    query(guest.lab_qmp, [("stop", None)], 10)
    try:
        made = source.digest_pages(frames, ("sha256", "nh4aes"))
        pages = np.empty((1000, PAGE_SIZE), dtype=np.uint8)
        read = source.read(frames[:1000], pages)
        memory = guest.ram.read(int(frames[0]) * PAGE_SIZE, len(frames) * PAGE_SIZE)
    finally:
        query(guest.lab_qmp, [("cont", None)], 10)
    native = [
        hashlib.sha256(memory[at : at + PAGE_SIZE]).digest()
        for at in range(0, len(memory), PAGE_SIZE)
    ]
    assert set(made.statuses.tolist()) == set(read.tolist()) == {OK}
    assert [digest.tobytes() for digest in made.digests[0]] == native
    assert pages.tobytes() == memory[: pages.nbytes]
    after = card.page()
    assert after.pages - before.pages == len(frames) + 1000
    assert (after.engine, after.unread, card.link.refused) == (Engine.DMA, before.unread, 0)
    assert card.link.served > served


def test_tampering_is_found_through_the_card(guest: Guest, scanner: Sweeper) -> None:
    assert approved(scanner.sweep())
    physical = guest.text_physical()
    guest.ram.flip(physical, 0x01)
    try:
        result = scanner.sweep()
        state, reason = judge(result.sweep)
        assert state is VerdictState.UNAPPROVED, reason
        (finding,) = result.sweep.findings
        assert (finding.kind, finding.frame) == (FindingKind.CODE, physical // PAGE_SIZE)
        (suspect,) = result.suspects
        start = physical - physical % PAGE_SIZE
        assert suspect.data == guest.ram.read(start, PAGE_SIZE)
    finally:
        guest.ram.flip(physical, 0x01)
    assert approved(scanner.sweep())


def test_a_card_that_is_switched_off_is_never_approved(
    card: CardMachine, source: CardSource, scanner: Sweeper
) -> None:
    assert approved(scanner.sweep())
    key = source.digest_pages(FRAMES, ("nh4aes",)).key
    card.kill()
    try:
        for _ in range(2):
            with pytest.raises(TargetUnavailable):
                scanner.sweep()
            assert statuses(source) == {LINK_DOWN}
    finally:
        card.restart()
    assert approved(scanner.sweep())
    assert source.digest_pages(FRAMES, ("nh4aes",)).key != key


def test_a_card_that_stands_still(card: CardMachine, source: CardSource) -> None:
    card.pause()
    try:
        assert statuses(source) == {LINK_DOWN}
    finally:
        card.resume()
    eventually(lambda: statuses(source) == {OK})


def test_a_link_that_goes_down_and_comes_back(
    card: CardMachine, source: CardSource, scanner: Sweeper
) -> None:
    assert approved(scanner.sweep())
    resets = card.page().resets
    card.link.take_down()
    try:
        eventually(lambda: statuses(source) == {LINK_DOWN})
        assert access_is_lost(scanner)
    finally:
        card.link.bring_back()
    eventually(lambda: statuses(source) == {OK})
    assert approved(scanner.sweep())
    assert card.page().resets > resets


def test_what_an_operator_sees(card: CardMachine, operator: Operator) -> None:
    approving = ("--approved", operator.approved, "--json")
    done = operator.run("scan", card.uri("q35", MEMORY), *approving)
    assert (done.returncode, json.loads(done.stdout)["verdict"]) == (0, "approved")
    document = json.loads(operator.run("card", "status", card.mailbox, "--json").stdout)
    assert (document["alive"], document["state"], document["firmware"]) == (True, "ready", "1.0")
    assert document["engine"].startswith("DMA")
    assert document["pages"]["read"] == card.page().pages
    log = operator.run("card", "log", card.mailbox)
    assert log.returncode == 0
    assert f"boot {card.page().boot:#x}" in log.stdout
    card.pause()
    try:
        done = operator.run("card", "status", card.mailbox)
        assert (done.returncode, "no heartbeat" in done.stdout) == (3, True)
    finally:
        card.resume()


def test_a_server_that_is_gone(guest_dir: Path) -> None:
    options = GuestOptions(guest_dir, card=CardBus())
    with RunDirectory() as run, Guest(options, run) as guest:
        guest.wait_ready()
        assert guest.bus is not None
        with CardMachine(run, guest.bus, FIRMWARE) as card:
            card.link.wait_up()
            with open_source(card.uri("q35", MEMORY)) as source:
                assert isinstance(source, CardSource)
                assert statuses(source) == {OK}
                guest.close()
                eventually(lambda: statuses(source) == {LINK_DOWN})
                assert not card.link.up
                pages = np.zeros((100, PAGE_SIZE), dtype=np.uint8)
                assert set(source.read(FRAMES[:100], pages).tolist()) == {LINK_DOWN}
                assert (pages == POISON).all()


def test_through_a_window_the_bus_has_no_say(guest: Guest, card: CardMachine) -> None:
    """Faster, and says nothing of access control; the card tells which engine it has."""
    assert guest.bus is not None
    with (
        RunDirectory() as run,
        CardMachine(run, guest.bus, FIRMWARE, window=guest.ram_file) as window,
        open_source(window.uri("q35", MEMORY)) as source,
    ):
        assert isinstance(source, CardSource)
        query(guest.lab_qmp, [("stop", None)], 10)
        try:
            made = source.digest_pages(FRAMES, ("sha256",))
            memory = guest.ram.read(int(FRAMES[0]) * PAGE_SIZE, len(FRAMES) * PAGE_SIZE)
        finally:
            query(guest.lab_qmp, [("cont", None)], 10)
        assert set(made.statuses.tolist()) == {OK}
        assert made.digests[0].tobytes() == b"".join(
            hashlib.sha256(memory[at : at + PAGE_SIZE]).digest()
            for at in range(0, len(memory), PAGE_SIZE)
        )
        assert window.page().engine == Engine.WINDOW
        assert window.link.served == 0


def test_an_iommu_decides_over_the_full_chain(
    guest_dir: Path, approved_linux: LinuxApproved
) -> None:
    """Refused, permitted and refused again, by the server's own kernel."""
    options = GuestOptions(guest_dir, card=CardBus(iommu=True))
    with RunDirectory() as run, Guest(options, run) as guest:
        guest.wait_ready(timeout_s=120)
        assert guest.bus is not None

        def permit(kind: str) -> None:
            group = f"/sys/bus/pci/devices/0000:{ENGINE_SLOT}/iommu_group"
            guest.shell(f"echo {kind} >{group}/type")

        with (
            CardMachine(run, guest.bus, FIRMWARE) as card,
            open_source(card.uri("q35", MEMORY)) as source,
            open_scanner(source, [approved_linux], open_digester(), target="guest") as scanner,
        ):
            assert isinstance(source, CardSource)
            card.link.wait_up()
            assert statuses(source) == {BLOCKED}
            assert access_is_lost(scanner)
            assert "DMAR: [DMA" in guest.shell("dmesg | grep DMAR")
            permit("identity")
            assert statuses(source) == {OK}
            assert approved(scanner.sweep())
            permit("DMA")
            assert statuses(source) == {BLOCKED}
            assert access_is_lost(scanner)
            permit("identity")
            assert statuses(source) == {OK}
            assert approved(scanner.sweep())
