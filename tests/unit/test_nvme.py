"""The NVMe source against a controller that fails in every way that a real one will not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_bus import LANDING_PAGES, MEMORY_BAR, PAGE, RAM_PAGES, Command, FakeServer, fake_server

from pyscan.errors import FileFormatError, SourceUnavailable, UsageError
from pyscan.records import POISON, PageStatus
from pyscan.sources import open_source
from pyscan.sources.base import Source

OK, HOLE, BLOCKED = PageStatus.OK, PageStatus.HOLE, PageStatus.BLOCKED
LINK_DOWN, TIMEOUT, TORN = PageStatus.LINK_DOWN, PageStatus.TIMEOUT, PageStatus.TORN
FRAMES = list(range(RAM_PAGES))
LISTS = 0x2_0000


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeServer, Source]]:
    monkeypatch.setattr("pyscan.sources.nvme._TIMEOUT_S", 0.3)
    with fake_server(tmp_path) as (server, uri), open_source(uri) as source:
        server.commands.clear()  # the self-test's
        yield server, source


def read(source: Source, frames: list[int]) -> tuple[list[int], np.ndarray]:
    buffer = np.zeros((len(frames), PAGE), dtype=np.uint8)
    return source.read(np.array(frames, dtype=np.uint64), buffer).tolist(), buffer


def check(server: FakeServer, source: Source, frames: list[int], bad: dict[int, int]) -> None:
    """Read; every frame is OK and whole but those of `bad`, whose status that says."""
    statuses, pages = read(source, frames)
    assert statuses == [bad.get(frame, OK) for frame in frames]
    for frame, page in zip(frames, pages, strict=True):
        good = (page == POISON).all() if frame in bad else (page == server.ram[frame]).all()
        assert good, frame


def test_pages_in_any_order(target: tuple[FakeServer, Source]) -> None:
    server, source = target
    check(server, source, FRAMES, {})
    assert [len(command.frames) for command in server.commands] == [8] * 8
    check(server, source, [5, 3, 3, 63, 0, 12, 12, 1, 2, 9], {})
    for count in range(1, 12):  # one page, two, a list, the end of a slot
        check(server, source, FRAMES[-count:], {})


def test_holes_never_reach_the_bus(target: tuple[FakeServer, Source]) -> None:
    server, source = target
    outside = [RAM_PAGES, RAM_PAGES + 1, 1 << 40, (1 << 64) - 1]
    statuses, pages = read(source, [outside[0], 1, outside[1], outside[2], 2, 3, outside[3]])
    assert statuses == [HOLE, OK, HOLE, HOLE, OK, OK, HOLE]
    assert (pages[[0, 2, 3, 6]] == POISON).all()
    assert (pages[[1, 4, 5]] == server.ram[1:4]).all()
    assert [command.frames for command in server.commands] == [[1, 2, 3]]
    server.commands.clear()
    assert read(source, outside)[0] == [HOLE] * 4
    assert server.commands == []


def test_a_failing_page_does_not_hide_its_neighbours(target: tuple[FakeServer, Source]) -> None:
    server, source = target
    server.failing = {0, 13, 14, 63}
    check(server, source, FRAMES, dict.fromkeys(server.failing, BLOCKED))
    assert len(server.commands) <= 2 * RAM_PAGES
    server.failing = set(FRAMES)
    server.commands.clear()
    check(server, source, FRAMES, dict.fromkeys(FRAMES, BLOCKED))
    assert len(server.commands) <= 2 * RAM_PAGES
    server.failing = set()
    check(server, source, FRAMES, {})


def test_zeros_of_a_refused_page_are_not_its_content(target: tuple[FakeServer, Source]) -> None:
    server, source = target
    server.ram[20:30] = 0
    server.ram[40, :16] = server.ram[40, -8:] = 0  # looks like zeros at its edges
    server.refused = {3, 21, 62}
    check(server, source, FRAMES, dict.fromkeys(server.refused, BLOCKED))
    assert {c.frames[0] for c in server.commands if c.sgl} == {3, *range(20, 30), 40, 62}


def test_all_of_memory_empty(target: tuple[FakeServer, Source]) -> None:
    server, source = target
    server.ram[:] = 0
    check(server, source, FRAMES * 3, {})


@pytest.mark.parametrize(
    ("status", "expected"),
    [(0x04, BLOCKED), (0x13, BLOCKED), (0x07, TIMEOUT), (0x80, LINK_DOWN), (0x281, LINK_DOWN)],
)
def test_a_status_of_every_command(
    target: tuple[FakeServer, Source], status: int, expected: PageStatus
) -> None:
    server, source = target
    server.fate = lambda _command: status
    check(server, source, FRAMES[:16], dict.fromkeys(FRAMES, expected))
    if expected is not BLOCKED:  # the pages are not at fault: nothing is tried one by one
        assert len(server.commands) == 2


def test_what_never_landed_is_torn(target: tuple[FakeServer, Source]) -> None:
    server, source = target
    server.lands = False
    check(server, source, FRAMES, dict.fromkeys(FRAMES, TORN))
    server.lands = True
    check(server, source, FRAMES, {})


def test_a_page_that_landed_by_half_is_torn(target: tuple[FakeServer, Source]) -> None:
    server, source = target
    before: list[bytes] = []

    def undo(command: Command) -> None:
        """Put the second half of the first page back as it was before the command."""
        with server.landing.open("r+b") as file:
            file.seek(command.block * 512 + PAGE // 2)
            file.write(before[0][:8] * (PAGE // 16))

    def remember(command: Command) -> int:
        with server.landing.open("rb") as file:
            file.seek(command.block * 512)
            before.append(file.read(8))
        return 0

    server.fate, server.after = remember, undo
    check(server, source, FRAMES[:8], {0: TORN})


def test_a_list_that_the_server_changes_is_torn(target: tuple[FakeServer, Source]) -> None:
    server, source = target

    def tamper(command: Command) -> None:
        if 8 in command.frames:
            for slot in range(2):
                server.dma_write(MEMORY_BAR + LISTS + slot * PAGE, b"\0\x10")

    server.after = tamper
    statuses, pages = read(source, FRAMES)
    assert statuses[8:16] == [TORN] * 8
    assert (pages[8:16] == POISON).all()
    assert statuses[24:] == [OK] * 40


def test_a_command_that_the_server_changes_is_torn(target: tuple[FakeServer, Source]) -> None:
    server, source = target

    def tamper(_command: Command) -> None:
        server.dma_write(MEMORY_BAR + 0x1_0000, bytes(64 * 64))

    server.after = tamper
    check(server, source, [7], {7: TORN})


def test_no_completion_resets_the_controller(target: tuple[FakeServer, Source]) -> None:
    server, source = target
    server.fate = lambda _command: None
    resets = server.resets
    check(server, source, FRAMES, dict.fromkeys(FRAMES, TIMEOUT))
    assert server.resets > resets
    abandoned = {command.id for command in server.commands}
    assert len(abandoned) == 2  # what fits in the landing, and no more after the timeout

    # They complete after all, when others are under way: not believed.
    def late(command: Command) -> int | None:
        if command.frames == [MEMORY_BAR // PAGE]:  # the self-test of the new connection
            return 0
        for number in abandoned:
            server.complete(1, number, 0)
        return None

    server.fate = late
    check(server, source, FRAMES, dict.fromkeys(FRAMES, TIMEOUT))
    server.fate = lambda _command: 0
    check(server, source, FRAMES, {})


def test_completions_that_nobody_asked_for(target: tuple[FakeServer, Source]) -> None:
    server, source = target

    def noise(command: Command) -> None:
        for number in range(3):
            server.complete(1, command.id + 100 + number & 0xFFFF, 0x04)

    server.after = noise
    check(server, source, FRAMES, {})


def test_only_completions_that_nobody_asked_for(target: tuple[FakeServer, Source]) -> None:
    server, source = target

    def fate(command: Command) -> None:
        server.complete(1, command.id + 100 & 0xFFFF, 0)

    server.fate = fate
    check(server, source, FRAMES, dict.fromkeys(FRAMES, TIMEOUT))


def test_queues_out_of_reach(target: tuple[FakeServer, Source]) -> None:
    server, source = target
    server.queues_reachable = False
    for _ in range(2):
        check(server, source, FRAMES, dict.fromkeys(FRAMES, BLOCKED))
    assert source.regions().bytes_total == RAM_PAGES * PAGE
    server.queues_reachable = True
    check(server, source, FRAMES, {})


def test_a_source_behind_an_iommu_opens_and_reads_nothing(tmp_path: Path) -> None:
    with fake_server(tmp_path) as (server, uri):
        server.queues_reachable = False
        with open_source(uri) as source:
            check(server, source, FRAMES, dict.fromkeys(FRAMES, BLOCKED))
            server.queues_reachable = True
            check(server, source, FRAMES, {})


def test_registers_of_a_device_that_is_gone(target: tuple[FakeServer, Source]) -> None:
    server, source = target
    server.fate = lambda _command: None
    server.after = lambda _command: setattr(server, "gone", True)
    check(server, source, FRAMES, dict.fromkeys(FRAMES, LINK_DOWN))
    server.fate, server.after = (lambda _command: 0), (lambda _command: None)
    check(server, source, FRAMES, dict.fromkeys(FRAMES, LINK_DOWN))
    with pytest.raises(SourceUnavailable):
        source.regions()
    server.gone = False
    check(server, source, FRAMES, {})
    assert source.regions().bytes_total == RAM_PAGES * PAGE


def test_a_function_that_leaves_the_bus(target: tuple[FakeServer, Source]) -> None:
    server, source = target
    server.gone = True
    check(server, source, FRAMES, dict.fromkeys(FRAMES, LINK_DOWN))
    del server.functions[9 << 3]
    check(server, source, FRAMES, dict.fromkeys(FRAMES, LINK_DOWN))
    with pytest.raises(SourceUnavailable, match="nvme controller"):
        source.regions()


@pytest.mark.parametrize("name", ["landing", "memory"])
def test_files_that_shrink(target: tuple[FakeServer, Source], name: str) -> None:
    server, source = target
    path: Path = getattr(server, name)
    length = path.stat().st_size

    def shrink(_command: Command) -> None:
        os.truncate(path, 0)

    server.after = shrink
    check(server, source, FRAMES, dict.fromkeys(FRAMES, LINK_DOWN))
    server.after = lambda _command: None
    os.truncate(path, length)
    check(server, source, FRAMES, {})


def test_closed(target: tuple[FakeServer, Source]) -> None:
    server, source = target
    source.close()
    source.close()
    assert read(source, [0, RAM_PAGES])[0] == [LINK_DOWN] * 2
    with pytest.raises(SourceUnavailable, match="open the source again"):
        source.regions()
    assert source.view() is None
    assert server.stores[-1] == (0xE200_0014, 0)  # the controller is off


def test_bus_mastering_is_switched_on(target: tuple[FakeServer, Source]) -> None:
    server, _ = target
    assert server.configuration(9 << 3, 4) == 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"blocks": LANDING_PAGES * 8 - 1}, UsageError, "name the file behind the nvme device"),
        ({"lands": False}, UsageError, "does not land there"),
        ({"sgl": False}, UsageError, "takes no SGL"),
        ({"gone": True}, (UsageError, SourceUnavailable), "gone|is not the memory of the card"),
    ],
)
def test_a_server_that_does_not_fit(
    tmp_path: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    with fake_server(tmp_path) as (server, uri):
        for name, value in change.items():
            setattr(server, name, value)
        with pytest.raises(error, match=message) as caught:
            open_source(uri)
        assert "\n" not in str(caught.value)


def test_a_memory_file_of_another_card(tmp_path: Path) -> None:
    with fake_server(tmp_path) as (server, uri):
        (tmp_path / "other").write_bytes(server.memory.read_bytes())
        with pytest.raises(UsageError, match="is not the memory of the card on the bus"):
            open_source(uri.replace(str(server.memory), str(tmp_path / "other")))


@pytest.mark.parametrize("name", ["memory", "landing"])
def test_files_that_cannot_hold_it(tmp_path: Path, name: str) -> None:
    with fake_server(tmp_path) as (server, uri):
        path: Path = getattr(server, name)
        os.truncate(path, PAGE)
        server.blocks = 8
        with pytest.raises(UsageError, match="at least"):
            open_source(uri)
        path.unlink()
        with pytest.raises(SourceUnavailable, match="cannot open"):
            open_source(uri)
        os.mkfifo(path)
        with pytest.raises(UsageError, match="not a file"):
            open_source(uri)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("nvme-dma:/q", "memory=... and landing=... is missing"),
        ("nvme-dma:/q?memory=m&landing=l", "machine=... and size=... is missing"),
        ("nvme-dma:/q?memory=m&landing=l&map=x&size=1M", "give either map="),
        ("nvme-dma:/q?memory=m&landing=l&map=x&device=9", "is not bus:device.function"),
        ("nvme-dma:/q?memory=m&landing=l&map=x&engine=9", "unknown parameter 'engine'"),
        ("edu:/q?machine=q35&size=1M", "memory=... is missing"),
        ("edu:/q?memory=m&landing=l", "unknown parameter 'landing'"),
    ],
)
def test_uris(uri: str, message: str) -> None:
    with pytest.raises((UsageError, FileFormatError), match=message):
        open_source(uri)


@pytest.mark.parametrize("scheme", ["nvme-dma", "edu"])
def test_nobody_listens(tmp_path: Path, scheme: str) -> None:
    more = "&landing=l" if scheme == "nvme-dma" else ""
    with pytest.raises(SourceUnavailable, match="cannot reach QEMU"):
        open_source(f"{scheme}:{tmp_path}/q?memory=m{more}&machine=q35&size=1M")
