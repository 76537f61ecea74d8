"""The LeechCore source against LeechCore's own file device, and a device that misbehaves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract.targets import HIGH, MIB, write_lime, write_map

from pyscan.errors import FileFormatError, PyscanError, SourceUnavailable, UsageError
from pyscan.records import PAGE_SIZE, POISON, MemoryMap, MemoryRegion, PageStatus, RegionKind
from pyscan.sources import Source, build_uri, leechcore, open_source
from pyscan.sources.layout import Layout, Segment
from pyscan.sources.leechcore import LeechCoreSource, probe_leechcore

OK, HOLE, LINK_DOWN = PageStatus.OK, PageStatus.HOLE, PageStatus.LINK_DOWN
LENGTH = 16 * MIB  # the shortest that LeechCore takes


class FakeDevice:
    """A device as leechcorepyc shows it; pages start with their number."""

    def __init__(self, memmap: list[dict[str, int]] | None = None, volatile: bool = False) -> None:
        self.memmap = [{"base": 0, "size": LENGTH, "offset": 0}] if memmap is None else memmap
        self.is_volatile = volatile
        self.asked: list[list[int]] = []
        self.missing: set[int] = set()
        self.flaky: set[int] = set()  # missing once
        self.short: set[int] = set()
        self.closed = 0

    def read_scatter(self, addresses: list[int]) -> list[dict[str, Any]]:
        self.asked.append(addresses)
        answers = []
        for address in reversed(addresses):  # the order is not promised
            if address in self.missing or address in self.flaky:
                continue
            length = PAGE_SIZE - 1 if address in self.short else PAGE_SIZE
            answers.append({"addr": address, "data": bytes([address // PAGE_SIZE % 251]) * length})
        self.flaky -= set(addresses)
        return answers

    def close(self) -> None:
        self.closed += 1
        if self.closed > 1:
            raise RuntimeError("LeechCore object not initialized.")


def install(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> None:
    class Package:
        @staticmethod
        def LeechCore(_name: str) -> FakeDevice:  # noqa: N802 - the package's name
            return device

    monkeypatch.setitem(sys.modules, "leechcorepyc", Package)  # type: ignore[arg-type]


def read(source: Source, frames: list[int]) -> tuple[list[int], np.ndarray]:
    buffer = np.zeros((len(frames), PAGE_SIZE), dtype=np.uint8)
    return source.read(np.array(frames, dtype=np.uint64), buffer).tolist(), buffer


def fake_source(device: FakeDevice) -> LeechCoreSource:
    layout = Layout.of([Segment(MemoryRegion(0, LENGTH), 0)])
    return LeechCoreSource("leechcore:fake", device, layout)


def raw_image(directory: Path, length: int = LENGTH) -> Path:
    path = directory / "image.raw"
    path.touch()
    os.truncate(path, length)
    return path


def test_a_raw_image_is_memory_from_zero_on(tmp_path: Path) -> None:
    image = raw_image(tmp_path)
    with open_source(f"leechcore:file://{image}") as source:
        assert source.regions() == MemoryMap((MemoryRegion(0, LENGTH),))
        assert read(source, [0, LENGTH // PAGE_SIZE])[0] == [OK, HOLE]


def test_a_lime_dump_brings_its_map(tmp_path: Path) -> None:
    regions = (
        MemoryRegion(0x1000, 3 * PAGE_SIZE),
        MemoryRegion(16 * MIB, LENGTH),
        MemoryRegion(HIGH << 12, PAGE_SIZE),
    )
    dump = tmp_path / "dump.lime"
    layout = write_lime(dump, regions)
    with dump.open("r+b") as file:
        file.seek(layout.segments[2].offset)
        file.write(b"\x07" * PAGE_SIZE)
    with open_source(build_uri("leechcore", f"file://{dump}")) as source:
        assert source.regions() == MemoryMap(regions)
        statuses, pages = read(source, [0, 1, 3, 4, HIGH, HIGH + 1])
    assert statuses == [HOLE, OK, OK, HOLE, OK, HOLE]
    assert pages[:, 0].tolist() == [POISON, 0, 0, POISON, 7, POISON]


def test_a_map_of_ones_own(tmp_path: Path) -> None:
    """Its offsets are what the device is asked for, and its kinds count."""
    image = raw_image(tmp_path)
    with image.open("r+b") as file:
        file.seek(5 * PAGE_SIZE)
        file.write(b"\x05" * PAGE_SIZE)
    region = MemoryRegion(HIGH << 12, PAGE_SIZE, RegionKind.ROM)
    map_file = write_map(tmp_path, Layout.of([Segment(region, 5 * PAGE_SIZE)]))
    with open_source(build_uri("leechcore", f"file://{image}", map=str(map_file))) as source:
        assert source.regions() == MemoryMap((region,))
        statuses, pages = read(source, [HIGH, 5])
    assert statuses == [OK, HOLE]
    assert pages[:, 0].tolist() == [5, POISON]


def test_pages_that_were_dropped_are_not_shifted(tmp_path: Path) -> None:
    device = FakeDevice()
    device.missing = {2 * PAGE_SIZE, 4 * PAGE_SIZE}
    device.short = {5 * PAGE_SIZE}
    with fake_source(device) as source:
        statuses, pages = read(source, [1, 2, 3, 4, 5, 6, 3])
    assert statuses == [OK, LINK_DOWN, OK, LINK_DOWN, LINK_DOWN, OK, OK]
    assert pages[:, 4000].tolist() == [1, POISON, 3, POISON, POISON, 6, 3]
    # Asked for once more, and alone.
    assert device.asked[1] == [2 * PAGE_SIZE, 4 * PAGE_SIZE, 5 * PAGE_SIZE]
    assert len(device.asked) == 2


def test_a_page_that_comes_at_the_second_time_is_good() -> None:
    device = FakeDevice()
    device.flaky = {PAGE_SIZE}
    with fake_source(device) as source:
        assert read(source, [0, 1])[0] == [OK, OK]


def test_batches_are_modest_and_holes_are_never_asked_for() -> None:
    device = FakeDevice()
    with fake_source(device) as source:
        frames = [frame for frame in range(1200) for frame in (frame, LENGTH // PAGE_SIZE + frame)]
        statuses, pages = read(source, frames)
    assert statuses == [OK, HOLE] * 1200
    assert [len(batch) for batch in device.asked] == [512, 512, 176]
    assert max(max(batch) for batch in device.asked) < LENGTH
    assert pages[::2, 0].tolist() == [frame % 251 for frame in range(1200)]


def test_a_device_that_raises_has_lost_the_link() -> None:
    device = FakeDevice()

    def raises(_addresses: list[int]) -> list[dict[str, Any]]:
        raise RuntimeError("LeechCore object not initialized.")

    device.read_scatter = raises  # type: ignore[method-assign]
    with fake_source(device) as source:
        assert read(source, [0, LENGTH // PAGE_SIZE])[0] == [LINK_DOWN, HOLE]


def test_close_waits_for_a_batch_under_way() -> None:
    device = FakeDevice()
    inside, go_on = threading.Event(), threading.Event()
    real = device.read_scatter

    def slow(addresses: list[int]) -> list[dict[str, Any]]:
        inside.set()
        assert go_on.wait(timeout=20)
        assert not device.closed
        return real(addresses)

    device.read_scatter = slow  # type: ignore[method-assign]
    source = fake_source(device)
    results: list[list[int]] = []
    reader = threading.Thread(target=lambda: results.append(read(source, [5])[0]))
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
    assert results == [[OK]]
    source.close()
    assert device.closed == 1


def test_a_living_device_needs_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(volatile=True)
    install(monkeypatch, device)
    with pytest.raises(UsageError, match="add \\?map=FILE"):
        open_source("leechcore:fpga")
    assert device.closed == 1
    device.closed = 0
    with open_source("leechcore:fpga?machine=q35&size=4G") as source:
        assert read(source, [1, 0x80000, 1 << 20])[0] == [OK, HOLE, OK]
    assert device.asked == [[PAGE_SIZE, 4 << 30]]


@pytest.mark.parametrize(
    ("memmap", "message"),
    [
        ([], "0 regions"),
        ([{"base": i * PAGE_SIZE, "size": PAGE_SIZE, "offset": 0} for i in range(5000)], "5000"),
        ([{"base": 0, "size": 100, "offset": 0}], "no memory map"),
        ([{"base": 5, "size": PAGE_SIZE, "offset": 0}], "no memory map"),
        ([{"base": 0, "size": 0, "offset": 0}], "no memory map"),
        ([{"base": 0, "size": 2 * PAGE_SIZE, "offset": 0}] * 2, "no memory map"),
        ([{"base": 1 << 52, "size": PAGE_SIZE, "offset": 0}], "beyond"),
        ([{"base": 0, "size": (1 << 64) - PAGE_SIZE, "offset": 0}], "beyond"),
    ],
)
def test_wild_maps_of_a_dump(
    memmap: list[dict[str, int]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice(memmap)
    install(monkeypatch, device)
    with pytest.raises(FileFormatError, match=message):
        open_source("leechcore:vmware")
    assert device.closed == 1


def test_a_raw_image_of_odd_length(tmp_path: Path) -> None:
    """LeechCore takes it for 4 GiB."""
    image = raw_image(tmp_path, LENGTH + 100)
    with pytest.raises(FileFormatError, match="no multiple of 4096"):
        open_source(f"leechcore:file://{image}")


@pytest.mark.parametrize(
    ("uri", "message", "status"),
    [
        ("leechcore:file:///nowhere/dump.raw", "LeechCore does not open", 3),
        ("leechcore:nonsense", "LeechCore does not open", 3),
        ("leechcore:file://%FF", "LeechCore does not open", 3),
        ("leechcore:file:///" + "x" * 300, "at most 259 bytes", 2),
        ("leechcore:fpga?speed=9", "unknown parameter 'speed'", 2),
        ("leechcore:fpga?machine=q35", "size=... is missing", 2),
    ],
)
def test_wrong_devices_say_what_to_do(uri: str, message: str, status: int) -> None:
    with pytest.raises(PyscanError, match=message) as caught:
        open_source(uri)
    assert caught.value.exit_status == status
    assert "\n" not in str(caught.value)


def test_a_short_file_is_told(tmp_path: Path) -> None:
    image = raw_image(tmp_path, LENGTH - PAGE_SIZE)
    with pytest.raises(SourceUnavailable, match="at least 16 MiB"):
        open_source(f"leechcore:file://{image}")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe_leechcore().startswith("leechcorepyc 2.")
    monkeypatch.setattr(leechcore, "PACKAGE", "leechcorepyc_that_is_not_there")
    with pytest.raises(UsageError, match=r"pip install 'pyscan\[leechcore\]'"):
        open_source("leechcore:fpga")
    assert "is not installed" in probe_leechcore()


def test_the_package_is_imported_only_to_open() -> None:
    code = (
        "import sys, pyscan.sources as s; [b.probe() for b in s.BACKENDS];"
        "print('leechcorepyc' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
