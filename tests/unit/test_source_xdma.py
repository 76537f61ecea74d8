"""The XDMA source against cards that fail in every way in which AMD's driver lets them fail.

A character device in user space (CUSE) needs /dev/cuse, which few machines have; and no file
system fails on demand. So the nodes are regular files, and a stand-in for pread(2) takes the
place that the binding has for it. What a transfer may look like: native/xdma/driver.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract.targets import XDMA_CONTROL
from pyscan.sources._xdma import ffi, lib

from pyscan.errors import PyscanError, SourceUnavailable, UsageError
from pyscan.records import PAGE_SIZE, POISON, MemoryRegion, PageStatus
from pyscan.sources import build_uri, open_source, xdma
from pyscan.sources.layout import Layout, Segment
from pyscan.sources.xdma import TIMEOUTS_MAX, Channel, Register, XdmaSource, wait_event

OK, HOLE, BLOCKED, LINK_DOWN, TIMEOUT, TORN = PageStatus
PAGES = 700
AXI = 0x10_0000_0000
ERESTARTSYS = 512

#: A hole of one page in the middle.
LAYOUT = Layout.of(
    [
        Segment(MemoryRegion(0, 600 * PAGE_SIZE), AXI),
        Segment(MemoryRegion(601 * PAGE_SIZE, 99 * PAGE_SIZE), AXI + 601 * PAGE_SIZE),
    ]
)
HOLE_FRAME = 600


class FakeCard:
    """A card whose pages start with their frame number, and what becomes of a transfer."""

    def __init__(self, directory: Path, channels: int = 1) -> None:
        self.device = directory / "xdma7"
        self.control = directory / "xdma7_control"
        self.control.write_bytes(XDMA_CONTROL)
        for number in range(channels):
            (directory / f"xdma7_c2h_{number}").touch()
        self.calls: list[tuple[int, int]] = []  # first frame, pages
        self.threads: set[int] = set()
        self.errors: dict[int, int] = {}  # frame: errno of a transfer that holds it
        self.before: Callable[[int, int], int | None] = lambda _frame, _pages: None
        self._lock = threading.Lock()
        self.call = ffi.callback("ps_xdma_call", self._transfer, error=-1)

    def _transfer(self, _fd: int, buffer: Any, length: int, offset: int) -> int:
        frame, pages = (offset - AXI) // PAGE_SIZE, length // PAGE_SIZE
        with self._lock:
            self.calls.append((frame, pages))
            self.threads.add(threading.get_native_id())
            answer = self.before(frame, pages)
        if answer is None:
            bad = [self.errors[f] for f in range(frame, frame + pages) if f in self.errors]
            answer = -bad[0] if bad else length
        if answer < 0:
            ffi.errno = -answer
            return -1
        whole = min(answer // PAGE_SIZE, pages)
        content = np.frombuffer(ffi.buffer(buffer, whole * PAGE_SIZE), dtype=np.uint8)
        content.reshape(whole, PAGE_SIZE)[:] = np.arange(frame, frame + whole)[:, None] % 251
        return answer

    def open(self, channels: int = 1) -> XdmaSource:
        return XdmaSource("xdma:fake", self.device, LAYOUT, channels=channels, call=self.call)

    def set_control(self, content: bytes) -> None:
        with self.control.open("r+b") as file:
            file.write(content)


@pytest.fixture
def card(tmp_path: Path) -> FakeCard:
    return FakeCard(tmp_path)


@pytest.fixture
def source(card: FakeCard) -> Iterator[XdmaSource]:
    with card.open() as opened:
        yield opened


def read(source: XdmaSource, frames: list[int]) -> list[int]:
    """The statuses, once the pages were seen to fit them."""
    buffer = np.zeros((len(frames), PAGE_SIZE), dtype=np.uint8)
    statuses = source.read(np.array(frames, dtype=np.uint64), buffer).tolist()
    for frame, status, page in zip(frames, statuses, buffer, strict=True):
        assert (page == (frame % 251 if status == OK else POISON)).all(), (frame, status)
    return statuses


EVERYTHING = list(range(PAGES))


def expected(**bad: int) -> list[int]:
    """OK but for the hole, and for frames given as f5=STATUS."""
    return [HOLE if frame == HOLE_FRAME else bad.get(f"f{frame}", OK) for frame in range(PAGES)]


def test_runs_are_as_long_as_a_transfer_may_be(card: FakeCard, source: XdmaSource) -> None:
    assert read(source, EVERYTHING) == expected()
    assert card.calls == [(0, 512), (512, 88), (601, 99)]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errno.EIO, BLOCKED),
        (errno.ETIMEDOUT, TIMEOUT),
        (ERESTARTSYS, TIMEOUT),
        (errno.EINTR, TIMEOUT),
        (errno.EINVAL, LINK_DOWN),
        (errno.EFAULT, LINK_DOWN),
        (errno.ENOMEM, LINK_DOWN),
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_one_bad_page_does_not_hide_its_neighbours(
    card: FakeCard, source: XdmaSource, error: int, status: PageStatus
) -> None:
    card.errors[100] = error
    assert read(source, EVERYTHING) == expected(f100=status)
    assert card.calls[0] == (0, 512)
    assert card.calls[1:513] == [(frame, 1) for frame in range(512)]  # and no second time
    assert card.calls[513:] == [(512, 88), (601, 99)]


def test_bad_first_and_last_pages(card: FakeCard, source: XdmaSource) -> None:
    card.errors = dict.fromkeys((0, 511, 512, 599, 601, 699), errno.EIO)
    assert read(source, EVERYTHING) == expected(**{f"f{f}": BLOCKED for f in card.errors})


def test_all_pages_refused(card: FakeCard, source: XdmaSource) -> None:
    card.errors = dict.fromkeys(EVERYTHING, errno.EIO)
    assert set(read(source, EVERYTHING)) == {BLOCKED, HOLE}
    assert len(card.calls) == PAGES - 1 + 3


@pytest.mark.parametrize("short", [1, 99 * PAGE_SIZE + 1, 511 * PAGE_SIZE])
def test_short_counts_are_progress(card: FakeCard, source: XdmaSource, short: int) -> None:
    """A transfer of many descriptors ends early: what was done counts, the rest is asked again."""
    first = iter([short])
    card.before = lambda _frame, _pages: next(first, None)
    assert read(source, EVERYTHING) == expected()


def test_a_short_count_before_a_bad_page(card: FakeCard, source: XdmaSource) -> None:
    card.errors[300] = errno.EIO
    first = iter([300 * PAGE_SIZE])
    card.before = lambda _frame, _pages: next(first, None)
    assert read(source, EVERYTHING) == expected(f300=BLOCKED)


def test_the_end_of_a_file_is_a_page_that_is_lost(card: FakeCard, source: XdmaSource) -> None:
    card.before = lambda frame, pages: 0 if frame <= 5 < frame + pages else None
    assert read(source, EVERYTHING) == expected(f5=LINK_DOWN)


def test_a_transfer_that_is_complete_but_was_not_written(
    card: FakeCard, source: XdmaSource
) -> None:
    """The buffer still holds the pages of the transfer before."""
    assert read(source, [3]) == [OK]
    lazy = ffi.callback("ps_xdma_call", lambda _fd, _buffer, length, _offset: length, error=-1)
    with XdmaSource("xdma:lazy", card.device, LAYOUT, call=lazy) as other:
        assert read(other, [3, 4, 600]) == [TORN, TORN, HOLE]


def test_a_busy_channel_is_asked_again(
    card: FakeCard, source: XdmaSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xdma, "BUSY_PAUSE_S", 0)
    busy = iter([-errno.EBUSY] * 5)
    card.before = lambda _frame, _pages: next(busy, None)
    assert read(source, EVERYTHING) == expected()


@pytest.mark.parametrize("error", [errno.EBUSY, errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN])
def test_a_device_that_is_gone(
    card: FakeCard, source: XdmaSource, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xdma, "BUSY_PAUSE_S", 0)
    card.before = lambda frame, _pages: -error if frame >= 512 else None
    statuses = read(source, EVERYTHING)
    assert statuses[:512] == [OK] * 512
    assert set(statuses[512:]) == {LINK_DOWN, HOLE}
    assert len(card.calls) <= 2 + xdma.BUSY_RETRIES


def test_timeouts_are_bounded(card: FakeCard, source: XdmaSource) -> None:
    """Each takes the driver ten seconds: a card that hangs must not hold a sweep for hours."""
    card.errors = dict.fromkeys(range(100, PAGES), errno.ETIMEDOUT)
    statuses = read(source, EVERYTHING)
    assert statuses[:100] == [OK] * 100
    assert set(statuses[100:]) == {TIMEOUT, HOLE}
    failed = [call for call in card.calls if any(f in card.errors for f in range(*span(call)))]
    assert len(failed) == TIMEOUTS_MAX


def span(call: tuple[int, int]) -> tuple[int, int]:
    frame, pages = call
    return frame, frame + pages


def test_a_link_that_dies_under_a_transfer(card: FakeCard, source: XdmaSource) -> None:
    def dies(frame: int, _pages: int) -> int | None:
        if frame < 512:
            return None
        card.set_control(b"\xff" * len(XDMA_CONTROL))
        return -errno.EIO

    card.before = dies
    statuses = read(source, EVERYTHING)
    assert statuses[:512] == [OK] * 512
    assert set(statuses[512:]) == {LINK_DOWN, HOLE}
    calls = len(card.calls)
    assert set(read(source, EVERYTHING)) == {LINK_DOWN, HOLE}
    assert len(card.calls) == calls  # a dead card is not touched
    with pytest.raises(SourceUnavailable, match="link down"):
        source.regions()
    card.set_control(XDMA_CONTROL)
    card.before = lambda _frame, _pages: None
    assert read(source, EVERYTHING) == expected()
    assert source.regions() == LAYOUT.memory_map


def test_holes_never_reach_the_card(card: FakeCard, source: XdmaSource) -> None:
    assert read(source, [HOLE_FRAME, PAGES, 1 << 40, (1 << 64) - 1]) == [HOLE] * 4
    assert card.calls == []


def test_channels_share_a_request_and_a_thread_reads_each(tmp_path: Path) -> None:
    card = FakeCard(tmp_path, channels=4)
    with card.open(channels=4) as source:
        for _ in range(4):  # the first channel changes
            assert read(source, EVERYTHING) == expected()
            assert read(source, [7]) == [OK]
    assert len(card.threads) == 4
    assert threading.get_native_id() not in card.threads
    assert sum(pages for _, pages in card.calls) == 4 * (PAGES - 1) + 4
    assert {frame for frame, _ in card.calls} >= {0, 175, 350, 525, 7}


def test_close_waits_for_a_transfer_under_way(card: FakeCard) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow(_frame: int, _pages: int) -> None:
        inside.set()
        assert go_on.wait(timeout=20)

    card.before = slow
    source = card.open()
    results: list[list[int]] = []
    reader = threading.Thread(target=lambda: results.append(read(source, [5])))
    closer = threading.Thread(target=source.close)
    reader.start()
    assert inside.wait(timeout=20)
    closer.start()
    closer.join(timeout=0.1)
    waits = closer.is_alive()
    go_on.set()
    reader.join(timeout=20)
    closer.join(timeout=20)
    assert waits
    assert not closer.is_alive()
    assert results == [[OK]]
    assert read(source, [5]) == [LINK_DOWN]


def test_opening_and_closing_leaves_no_descriptor_and_no_thread(tmp_path: Path) -> None:
    card = FakeCard(tmp_path, channels=2)
    before, threads = os.listdir("/proc/self/fd"), threading.active_count()
    with card.open(channels=2) as source:
        assert read(source, EVERYTHING) == expected()
    with pytest.raises(SourceUnavailable):
        card.open(channels=3)
    card.set_control(bytes(len(XDMA_CONTROL)))
    with pytest.raises(SourceUnavailable, match="does not answer"):
        card.open()
    assert os.listdir("/proc/self/fd") == before
    assert threading.active_count() == threads


def test_without_a_control_node_the_link_is_not_watched(card: FakeCard) -> None:
    card.control.unlink()
    with card.open() as source:
        assert read(source, [1]) == [OK]
        assert source.regions() == LAYOUT.memory_map


def test_a_user_register_is_watched(card: FakeCard) -> None:
    user = card.device.with_name("xdma7_user")
    user.write_bytes(bytes(0x10) + b"\x01\0\0\0")
    source = XdmaSource("xdma:u", card.device, LAYOUT, user_register=0x10, call=card.call)
    with source:
        assert read(source, [1]) == [OK]
        user.write_bytes(b"\xff" * 0x14)
        assert read(source, [1]) == [LINK_DOWN]
        user.write_bytes(b"")  # cannot be read at all
        assert read(source, [1]) == [LINK_DOWN]


def test_a_register_that_is_closed_is_dead(card: FakeCard) -> None:
    register = Register(card.control, 0x3000, 0x1FC3)
    assert register.alive()
    register.close()
    register.close()
    assert not register.alive()


def test_nodes_that_are_made_anew_are_another_card(card: FakeCard, source: XdmaSource) -> None:
    node = card.device.with_name("xdma7_c2h_0")
    node.rename(node.with_name("old"))
    with pytest.raises(SourceUnavailable, match="driver reloaded"):
        source.regions()
    node.touch()
    with pytest.raises(SourceUnavailable, match="driver reloaded"):
        source.regions()


@pytest.mark.parametrize(("alignment", "fits"), [(1, True), (64, True), (4096, True), (0, False)])
def test_the_alignment_is_asked_for(
    card: FakeCard, alignment: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ioctl(_fd: int, request: int, argument: bytes) -> bytes:
        # _IOR('q', 6, int): read, four bytes, 'q', 6
        assert request == 2 << 30 | 4 << 16 | ord("q") << 8 | 6
        assert argument == bytes(4)
        return alignment.to_bytes(4, "little")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    if fits:
        card.open().close()
    else:
        with pytest.raises(SourceUnavailable, match="aligned to"):
            card.open()


@pytest.mark.parametrize("alignment", [3, 8192])
def test_alignments_that_pages_do_not_have(
    card: FakeCard, alignment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: alignment.to_bytes(4, "little"))
    with pytest.raises(SourceUnavailable, match=f"aligned to {alignment} bytes"):
        card.open()


def test_a_character_device_that_is_no_channel() -> None:
    with pytest.raises(SourceUnavailable, match="not an XDMA channel"):
        Channel(Path("/dev/null"))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "machine=... and size=... is missing"),
        ({"machine": "q35", "size": "1M", "channels": "0"}, "channels must be 1 to 4"),
        ({"machine": "q35", "size": "1M", "channels": "5"}, "channels must be 1 to 4"),
        ({"machine": "q35", "size": "1M", "base": "0x801"}, "base must be a multiple"),
        ({"machine": "q35", "size": "1M", "base": hex(1 << 52)}, "base must be a multiple"),
        ({"map": "/m", "base": "4K"}, "base= goes with machine="),
        ({"machine": "q35", "size": "1M", "user": "3"}, "no register"),
        ({"machine": "q35", "size": "1M", "speed": "9"}, "unknown parameter 'speed'"),
        ({"machine": "q35", "size": "1M"}, "cannot be opened"),
    ],
)
def test_wrong_uris_say_what_to_do(
    tmp_path: Path, parameters: dict[str, str], message: str
) -> None:
    with pytest.raises(PyscanError, match=message) as caught:
        open_source(build_uri("xdma", tmp_path / "xdma0", **parameters))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UsageError | SourceUnavailable)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_nodes_that_are_none(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "xdma0_c2h_0")
    with pytest.raises(UsageError, match="not a device node"):
        open_source(build_uri("xdma", tmp_path / "xdma0", machine="q35", size="1M"))


def test_a_window_at_an_axi_address(tmp_path: Path) -> None:
    """With machine=, physical addresses follow base; also those above 4 GiB."""
    image = tmp_path / "xdma0_c2h_0"
    with image.open("wb") as file:
        for address in (0x1000, 0x1_0000_0000):
            file.seek(0x4000_0000 + address)
            file.write(bytes([address >> 30 or 1]) * PAGE_SIZE)
    uri = build_uri("xdma", tmp_path / "xdma0", machine="q35", size="3G", base="1G")
    buffer = np.zeros((2, PAGE_SIZE), dtype=np.uint8)
    with open_source(uri) as source:
        assert source.read(np.array([1, 1 << 20], dtype=np.uint64), buffer).tolist() == [OK, OK]
    assert buffer[:, 0].tolist() == [1, 4]


def test_events(tmp_path: Path) -> None:
    """A terminal is a character device that has nothing to read until somebody writes."""
    card, node = tmp_path / "xdma0", tmp_path / "xdma0_events_3"
    with pytest.raises(SourceUnavailable, match="cannot be opened"):
        wait_event(card, 3, 0)
    driver, end = os.openpty()
    try:
        tty.setraw(end)
        node.symlink_to(os.ttyname(end))
        assert wait_event(card, 3, 0) == 0
        os.write(driver, (5).to_bytes(4, "little"))
        assert wait_event(card, 3, 20) == 5
    finally:
        os.close(driver)
        os.close(end)
    node.unlink()
    node.write_bytes(b"\1\2")
    with pytest.raises(SourceUnavailable, match="cannot read events"):
        wait_event(card, 3, 0)
    with pytest.raises(ValueError, match="not in 0 to 15"):
        wait_event(card, 16, 0)


def test_the_header_and_the_source_agree() -> None:
    assert lib.PS_XDMA_PAGE_BYTES == PAGE_SIZE
    assert lib.PS_XDMA_TRANSFER_PAGES == 512
