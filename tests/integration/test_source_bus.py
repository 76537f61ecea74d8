"""Memory read over a real bus: a card's function, an NVMe engine, and QEMU's edu device."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bus_server import BusServer, bus_server

from pyscan.errors import SourceUnavailable
from pyscan.lab.bus import EDU_SLOT, ENGINE_SLOT, CardBus, ServerBus
from pyscan.lab.guest import Guest, GuestOptions
from pyscan.lab.process import RunDirectory
from pyscan.lab.ram import Machine
from pyscan.qmp import query
from pyscan.records import PAGE_SIZE, POISON, MemoryRegion, PageStatus
from pyscan.sources import open_source
from pyscan.sources.base import Source
from pyscan.sources.layout import Layout, Segment
from pyscan.sources.pci import EcamSpace, PciBus, PortSpace
from pyscan.sources.qtest import QtestClient
from pyscan.sources.testdev import CardFunction

BootGuest = Callable[..., Guest]

OK, HOLE, BLOCKED = PageStatus.OK, PageStatus.HOLE, PageStatus.BLOCKED
LINK_DOWN, TIMEOUT = PageStatus.LINK_DOWN, PageStatus.TIMEOUT
HIGH = (4 << 30) // PAGE_SIZE
MIB = 1 << 20


def read(source: Source, frames: Any) -> tuple[np.ndarray, np.ndarray]:
    frames = np.asarray(frames, dtype=np.uint64)
    buffer = np.zeros((len(frames), PAGE_SIZE), dtype=np.uint8)
    return source.read(frames, buffer), buffer


def bus_of(guest: Guest) -> ServerBus:
    assert guest.bus is not None
    return guest.bus


@pytest.fixture(scope="module")
def guest(guest_dir: Path) -> Iterator[Guest]:
    options = GuestOptions(guest_dir, card=CardBus(edu=True))
    with RunDirectory() as run, Guest(options, run) as guest:
        guest.wait_ready()
        yield guest


@pytest.fixture(scope="module")
def server() -> Iterator[BusServer]:
    """A server that each test leaves running, its memory full of noise."""
    with RunDirectory() as run, bus_server(run) as server:
        server.ram_path.write_bytes(np.random.default_rng(3).bytes(48 * MIB))
        yield server


def ram_of(server: BusServer, frames: Any) -> np.ndarray:
    """The pages as the RAM file has them."""
    ram = np.fromfile(server.ram_path, dtype=np.uint8).reshape(-1, PAGE_SIZE)
    offsets = server.layout.offsets(np.asarray(frames, dtype=np.uint64))
    return ram[(offsets // PAGE_SIZE).astype(np.int64)]


def all_frames(server: BusServer) -> np.ndarray:
    return np.concatenate(
        [
            np.arange(region.gpa // PAGE_SIZE, region.end // PAGE_SIZE, dtype=np.uint64)
            for region in server.layout.memory_map
        ]
    )


@pytest.mark.guest
def test_the_card_is_there_and_its_bell_rings_both_ways(guest: Guest) -> None:
    assert guest.card_seen_inside()
    with QtestClient(guest.qtest_socket) as client:
        bus = PciBus(client)
        assert isinstance(bus.space, EcamSpace)
        card = CardFunction(bus)
        place = f"/sys/bus/pci/devices/0000:{card.slot}"
        windows = [line.split() for line in guest.shell(f"head -3 {place}/resource").splitlines()]
        sizes = [int(end, 16) - int(start, 16) + 1 for start, end, _ in windows]
        presence = card.presence()
        assert [presence.register_bytes, presence.port_bytes, presence.mailbox_bytes] == sizes
        assert sizes == [4096, 256, MIB]
        assert not presence.mailbox_backed  # QEMU 7.2

        address = int(windows[0][0], 16)
        assert guest.shell(f"devmem {address:#x} 8") == "0x00\n"  # after all that, as it was
        card.select()
        assert card.count() == 0
        for _ in range(3):
            card.ring()
        assert int(guest.shell(f"devmem {address + 12:#x} 32"), 16) == 3
        guest.shell(f"devmem {address + 2048:#x} 8 0xfa && devmem {address + 2048:#x} 8 0xfa")
        assert card.count() == 5
        card.select()
        assert int(guest.shell(f"devmem {address + 12:#x} 32"), 16) == 0


@pytest.mark.guest
def test_a_stopped_guest_reads_as_its_ram_file(guest: Guest) -> None:
    frames = np.random.default_rng(5).permutation(np.arange(4096, 4096 + 16384))
    query(guest.lab_qmp, [("stop", None)])
    try:
        with open_source(bus_of(guest).nvme_uri(machine="q35", size="512M")) as source:
            statuses, pages = read(source, frames)
            again, low = read(source, range(256))
        ram = np.fromfile(guest.ram_file, dtype=np.uint8).reshape(-1, PAGE_SIZE)
    finally:
        query(guest.lab_qmp, [("cont", None)])
    assert (statuses == OK).all()
    assert (pages == ram[frames]).all()
    assert not pages.any(axis=1).all()  # pages of zeros are among them, and OK
    assert (again == OK).all()  # below 1 MiB, with what the chipset shadows
    assert (low == ram[:256]).all()
    assert guest.shell("echo alive") == "alive\n"


@pytest.mark.guest
def test_memory_above_4_gib_and_the_ports_of_pc(boot_guest: BootGuest) -> None:
    guest = boot_guest(machine=Machine.PC, memory_mib=4096, card=CardBus())
    low, high = 0xC000_0000 // PAGE_SIZE, HIGH + (1 << 30) // PAGE_SIZE
    query(guest.lab_qmp, [("stop", None)])
    for gpa in (low - 1, HIGH, high - 1):
        guest.ram.flip(gpa * PAGE_SIZE, 0x5A)
    with open_source(bus_of(guest).nvme_uri(machine="pc", size="4G")) as source:
        statuses, pages = read(source, [low - 1, low, HIGH - 1, HIGH, high - 1, high, 256])
    assert statuses.tolist() == [OK, HOLE, HOLE, OK, OK, HOLE, OK]
    for index, frame in ((0, low - 1), (3, HIGH), (4, high - 1), (6, 256)):
        assert pages[index].tobytes() == guest.ram.read(frame * PAGE_SIZE, PAGE_SIZE)
    with QtestClient(guest.qtest_socket) as client:
        assert isinstance(PciBus(client).space, PortSpace)


@pytest.mark.guest
def test_a_page_that_a_guest_changes_is_read_anew(guest: Guest) -> None:
    frame = guest.text_physical() // PAGE_SIZE
    with open_source(bus_of(guest).nvme_uri(machine="q35", size="512M")) as source:
        (status,), before = read(source, [frame])
        guest.ram.flip(guest.text_physical(), 0xFF)
        try:
            _, after = read(source, [frame])
        finally:
            guest.ram.flip(guest.text_physical(), 0xFF)
    assert status == OK
    assert np.flatnonzero(before != after).tolist() == [guest.text_physical() % PAGE_SIZE]


@pytest.mark.guest
def test_holes_cost_no_command(guest: Guest) -> None:
    def written() -> int:
        (answer,) = query(guest.lab_qmp, [("query-blockstats", None)])
        assert isinstance(answer, list)
        (stats,) = (each["stats"] for each in answer if each.get("node-name") == "landing0")
        return int(stats["wr_operations"])

    with open_source(bus_of(guest).nvme_uri(machine="q35", size="512M")) as source:
        outside = [1 << 17, (1 << 17) + 1, HIGH - 1, HIGH, (1 << 52) - 1, (1 << 64) - 1]
        before = written()
        statuses, pages = read(source, outside * 100)
        assert (statuses == HOLE).all()
        assert (pages == POISON).all()
        assert written() == before
        assert read(source, [*outside, 256])[0].tolist() == [HOLE] * 6 + [OK]
        assert written() == before + 1


@pytest.mark.guest
def test_without_bus_mastering_nothing_is_read(guest: Guest) -> None:
    """The guest's own kernel switches it off, and every engine obeys."""

    def set_command(slot: str, value: str) -> None:
        file = f"/sys/bus/pci/devices/0000:{slot}/config"
        guest.shell(f"printf '\\{value}' | dd of={file} bs=1 seek=4 conv=notrunc 2>/dev/null")

    frame = guest.text_physical() // PAGE_SIZE
    content = guest.ram.read(frame * PAGE_SIZE, PAGE_SIZE)
    with open_source(bus_of(guest).edu_uri(machine="q35", size="512M")) as source:
        for value, expected in (("006", OK), ("002", BLOCKED), ("006", OK)):
            set_command(EDU_SLOT, value)
            statuses, pages = read(source, [frame])
            assert statuses.tolist() == [expected]
            assert pages[0].tobytes() == (content if expected == OK else b"\xa5" * PAGE_SIZE)
    with open_source(bus_of(guest).nvme_uri(machine="q35", size="512M")) as source:
        assert read(source, [frame])[0].tolist() == [OK]
        set_command(ENGINE_SLOT, "002")
        statuses, pages = read(source, [frame, frame + 1])
        assert statuses.tolist() == [BLOCKED] * 2
        assert (pages == POISON).all()
        statuses, pages = read(source, [frame])  # the card switches it on when it starts anew
        assert statuses.tolist() == [OK]
        assert pages[0].tobytes() == content


def test_every_page_and_none_in_between(server: BusServer) -> None:
    frames = all_frames(server)
    with open_source(server.nvme_uri) as source:
        statuses, pages = read(source, frames)
        assert (statuses == OK).all()
        assert (pages == ram_of(server, frames)).all()
        mixed = np.random.default_rng(4).permutation(np.concatenate([frames[:3000], frames[:3000]]))
        mixed[::7] = 1 << 30
        statuses, pages = read(source, mixed)
    inside = mixed != 1 << 30
    assert ((statuses == OK) == inside).all()
    assert (pages[inside] == ram_of(server, mixed[inside])).all()
    assert (pages[~inside] == POISON).all()


def test_pages_that_the_bus_refuses_among_good_ones(server: BusServer) -> None:
    """Nobody answers behind the end of memory: QEMU's controller then gathers zeros.

    At the controller's own registers it fails the command.
    """
    nowhere, registers = 0x8000_0000 // PAGE_SIZE, 0xE200_0000 // PAGE_SIZE
    more = [MemoryRegion(0x8000_0000, 16 * PAGE_SIZE), MemoryRegion(0xE200_0000, PAGE_SIZE)]
    server.write_map(Layout.of([*server.layout.segments, *(Segment(region, 0) for region in more)]))
    frames = np.arange(256, 256 + 1200)
    frames[5:1200:100] = nowhere + np.arange(12)
    frames[700] = registers
    bad = frames >= nowhere
    try:
        with open_source(server.nvme_uri) as source:
            statuses, pages = read(source, frames)
        with open_source(server.edu_uri) as source:
            slow, _ = read(source, [nowhere, 256])
    finally:
        server.write_map(server.layout)
    assert (statuses == np.where(bad, BLOCKED, OK)).all()
    assert (pages[bad] == POISON).all()
    assert (pages[~bad] == ram_of(server, frames[~bad])).all()
    assert slow.tolist() == [BLOCKED, OK]


def test_edu_reads_both_ends_of_memory(server: BusServer) -> None:
    frames = [256, HIGH, HIGH + 4095]
    with open_source(server.edu_uri) as source:
        statuses, pages = read(source, [*frames, HIGH + 4096])
    assert statuses.tolist() == [OK, OK, OK, HOLE]
    assert (pages[:3] == ram_of(server, frames)).all()


@pytest.mark.parametrize("scheme", ["nvme_uri", "edu_uri"])
def test_a_server_that_ends_and_comes_back(server: BusServer, scheme: str) -> None:
    with open_source(getattr(server, scheme)) as source:
        assert read(source, [256])[0].tolist() == [OK]
        server.kill()
        try:
            for _ in range(2):
                statuses, pages = read(source, [256, HIGH])
                assert statuses.tolist() == [LINK_DOWN] * 2
                assert (pages == POISON).all()
            with pytest.raises(SourceUnavailable, match="cannot reach QEMU"):
                source.regions()
        finally:
            server.restart()
        statuses, pages = read(source, [256, HIGH])
        assert statuses.tolist() == [OK] * 2
        assert (pages == ram_of(server, [256, HIGH])).all()
        assert source.regions() == server.layout.memory_map


def test_a_server_that_ends_while_it_is_read(server: BusServer) -> None:
    frames = all_frames(server)
    good = ram_of(server, frames)
    seen = []
    started = threading.Event()

    def reader() -> None:
        while True:
            statuses, pages = read(source, frames)
            started.set()
            ok = statuses == OK
            assert (pages[ok] == good[ok]).all()
            assert (pages[~ok] == POISON).all()
            if not ok.all():
                seen.append(set(statuses.tolist()))
                return

    with open_source(server.nvme_uri) as source:
        thread = threading.Thread(target=reader, daemon=True)
        thread.start()
        try:
            assert started.wait(timeout=60)
            server.kill()
            thread.join(timeout=60)
        finally:
            server.restart()
        assert seen
        assert seen[0] <= {int(OK), int(LINK_DOWN)}
        assert (read(source, frames)[0] == OK).all()


def test_a_server_that_is_stopped(server: BusServer) -> None:
    with open_source(server.nvme_uri) as source:
        server.child.signal(signal.SIGSTOP)
        try:
            statuses, pages = read(source, [256, 257])
        finally:
            server.child.signal(signal.SIGCONT)
        assert statuses.tolist() == [TIMEOUT] * 2
        assert (pages == POISON).all()
        assert read(source, [256, 257])[0].tolist() == [OK] * 2


def test_many_readers_and_a_close(server: BusServer) -> None:
    frames = all_frames(server)[:2000]
    good = ram_of(server, frames)
    wrong, ended = [], []
    ready = threading.Barrier(5)

    def reader(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(frames))
        for turn in range(10_000):
            statuses, pages = read(source, frames[order])
            ok = statuses == OK
            if not ((pages[ok] == good[order][ok]).all() and (pages[~ok] == POISON).all()):
                wrong.append(seed)
            if turn == 3:
                ready.wait(timeout=60)
            if not ok.any():
                ended.append(set(statuses.tolist()))
                return

    with open_source(server.nvme_uri) as source:
        threads = [threading.Thread(target=reader, args=(n,), daemon=True) for n in range(4)]
        for thread in threads:
            thread.start()
        ready.wait(timeout=60)
        source.close()
        for thread in threads:
            thread.join(timeout=60)
    assert wrong == []
    assert ended == [{int(LINK_DOWN)}] * 4


def test_one_client_at_a_time(server: BusServer) -> None:
    with (
        open_source(server.nvme_uri),
        pytest.raises(SourceUnavailable, match="no other client holds this socket"),
    ):
        open_source(server.nvme_uri)
    with open_source(server.nvme_uri) as source:
        assert read(source, [256])[0].tolist() == [OK]
