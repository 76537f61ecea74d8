"""Targets: a source of each kind, the memory behind it, and the way to lose it."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bus_server import bus_server
from card_site import card_site

from pyscan.lab.process import RunDirectory
from pyscan.records import PAGE_SIZE, MemoryMap, MemoryRegion, PageStatus, RegionKind
from pyscan.sources import Source, build_uri, open_source
from pyscan.sources.base import NO_OFFSET
from pyscan.sources.file import Access, FileSource
from pyscan.sources.layers import CountingSource, DelaySource, Faults, FaultSource
from pyscan.sources.layout import Layout, Segment

MIB = 1 << 20
HIGH = (4 << 30) >> 12

#: RAM, ROM, a hole, RAM above 4 GiB that lies first in the file.
LAYOUT = Layout.of(
    [
        Segment(MemoryRegion(0, 8 * PAGE_SIZE), 4 * PAGE_SIZE),
        Segment(MemoryRegion(8 * PAGE_SIZE, 2 * PAGE_SIZE, RegionKind.ROM), 12 * PAGE_SIZE),
        Segment(MemoryRegion(HIGH << 12, 4 * PAGE_SIZE), 0),
    ]
)


@dataclass
class Memory:
    """A target's memory in a file."""

    path: Path
    layout: Layout

    def fill(self, frames: list[int]) -> None:
        """Give every page a content of its own."""
        random = np.random.default_rng(1)
        for frame in frames:
            self.write(frame, random.bytes(PAGE_SIZE))

    def read(self, frame: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self._offset(frame))
            return file.read(PAGE_SIZE)

    def write(self, frame: int, content: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(self._offset(frame))
            file.write(content)

    def _offset(self, frame: int) -> int:
        offset = self.layout.offsets(np.array([frame], dtype=np.uint64))[0]
        assert offset != NO_OFFSET
        return int(offset)


@dataclass
class Target:
    """A source, the memory behind it, and what can become of the way between them."""

    open: Callable[[], Source]
    memory: Memory
    lose_link: Callable[[], None]
    return_link: Callable[[], None]
    has_view: bool = False
    #: Whether a page of zeros can be told from a refused one; else it counts as refused.
    tells_zeros: bool = True
    frames_max: int = 32

    def __post_init__(self) -> None:
        self.frames = edges(self.memory.layout.memory_map)[: self.frames_max]
        self.memory.fill(self.frames)
        self.source = self.open()

    @property
    def outside(self) -> list[int]:
        """Frames that no region holds: beside the regions, and far away."""
        memory = self.memory.layout.memory_map
        beside = [
            frame
            for region in memory
            for frame in ((region.gpa >> 12) - 1, region.end >> 12, (region.end >> 12) + 1)
            if frame >= 0 and memory.find(frame << 12) is None
        ]
        return [*beside, 1 << 40, (1 << 52) - 1, (1 << 64) - 1]


def edges(memory: MemoryMap) -> list[int]:
    """First and last frames of every region; the last ones of the map come early."""
    frames: list[int] = []
    for region in sorted(memory, key=lambda region: region.gpa, reverse=True):
        first, end = region.gpa >> 12, region.end >> 12
        frames += sorted({*range(first, min(first + 4, end)), *range(max(first, end - 4), end)})
    return frames


@contextmanager
def _file(tmp_path: Path, kind: str) -> Iterator[Target]:
    path = tmp_path / "ram"
    path.touch()
    os.truncate(path, LAYOUT.file_bytes)

    def opened() -> Source:
        # As qemu: does it; this process does not end.
        pidfd = os.pidfd_open(os.getpid()) if kind == "process" else None
        access = Access.PREAD if kind == "pread" else Access.MAP
        return FileSource(f"file:{path}", path, LAYOUT, access, pidfd)

    lose, bring_back = _truncation(path)
    yield Target(opened, Memory(path, LAYOUT), lose, bring_back, has_view=kind != "pread")


@contextmanager
def _layer(tmp_path: Path, kind: str) -> Iterator[Target]:
    faults: Faults = {}
    with _file(tmp_path, "map") as inner:

        def wrapped() -> Source:
            source = inner.open()
            if kind in {"fault", "stack"}:
                source = FaultSource(source, lambda: faults)
            if kind in {"delay", "stack"}:
                source = DelaySource(source, latency_s=1e-5, jitter_s=1e-5, bytes_per_s=1e9)
            if kind in {"counting", "stack"}:
                source = CountingSource(source)
            return source

        def lose() -> None:
            nonlocal faults
            faults = PageStatus.LINK_DOWN

        def bring_back() -> None:
            nonlocal faults
            faults = {}

        scripted = kind in {"fault", "stack"}
        yield Target(
            wrapped,
            inner.memory,
            lose if scripted else inner.lose_link,
            bring_back if scripted else inner.return_link,
        )
        inner.source.close()


#: Where the configuration block's identifier stands (xdma/libxdma.h), and what it reads.
XDMA_CONTROL = bytes(0x3000) + (0x1FC3_0006).to_bytes(4, "little")


@contextmanager
def _xdma(tmp_path: Path, channels: int) -> Iterator[Target]:
    """Regular files in place of the driver's nodes; the image's offsets are AXI addresses."""
    card, image = tmp_path / "xdma0", tmp_path / "axi"
    image.touch()
    os.truncate(image, LAYOUT.file_bytes)
    for number in range(channels):
        (tmp_path / f"xdma0_c2h_{number}").symlink_to(image)
    control = tmp_path / "xdma0_control"
    control.write_bytes(XDMA_CONTROL)
    uri = build_uri("xdma", card, map=str(write_map(tmp_path, LAYOUT)), channels=str(channels))
    yield Target(
        lambda: open_source(uri),
        Memory(image, LAYOUT),
        lambda: _overwrite(control, b"\xff" * len(XDMA_CONTROL)),
        lambda: _overwrite(control, XDMA_CONTROL),
    )


def _overwrite(path: Path, content: bytes) -> None:
    """As a register changes: at once, and in the file that is open."""
    with path.open("r+b") as file:
        file.write(content)


@contextmanager
def _leechcore_raw(tmp_path: Path, _kind: str) -> Iterator[Target]:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 16 * MIB)  # what LeechCore wants at least
    uri = build_uri("leechcore", f"file://{image}", map=str(write_map(tmp_path, LAYOUT)))
    yield _dump(image, LAYOUT, uri)


LIME_MAGIC, LIME_HEADER_BYTES = 0x4C69_4D45, 32

#: The second region only makes the file long enough for LeechCore.
LIME_REGIONS = (MemoryRegion(0, 10 * PAGE_SIZE), MemoryRegion(16 * MIB, 16 * MIB))


@contextmanager
def _leechcore_lime(tmp_path: Path, _kind: str) -> Iterator[Target]:
    image = tmp_path / "dump.lime"
    regions = (*LIME_REGIONS, MemoryRegion(HIGH << 12, 4 * PAGE_SIZE))
    layout = write_lime(image, regions)
    yield _dump(image, layout, build_uri("leechcore", f"file://{image}"))


def write_lime(path: Path, regions: tuple[MemoryRegion, ...]) -> Layout:
    """A dump of empty regions; returns where they lie in the file."""
    segments = []
    with path.open("wb") as file:
        for region in regions:
            header = (LIME_MAGIC, 1, region.gpa, region.end - 1, 0)
            file.write(struct.pack("<IIQQQ", *header))
            segments.append(Segment(region, file.tell()))
            file.seek(region.length, os.SEEK_CUR)
        file.truncate()
    return Layout.of(segments)


def _dump(image: Path, layout: Layout, uri: str) -> Target:
    lose, bring_back = _truncation(image)
    return Target(lambda: open_source(uri), Memory(image, layout), lose, bring_back)


def _truncation(path: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """Empty a file that stays open, and give it its content back."""
    content = b""

    def lose() -> None:
        nonlocal content
        content = path.read_bytes()
        os.truncate(path, 0)

    return lose, lambda: _overwrite(path, content)


@contextmanager
def _bus(_tmp_path: Path, kind: str) -> Iterator[Target]:
    with RunDirectory() as run, bus_server(run) as server:
        uri = server.edu_uri if kind == "edu" else server.nvme_uri
        yield Target(
            lambda: open_source(uri),
            Memory(server.ram_path, server.layout),
            server.kill,
            server.restart,
            tells_zeros=kind != "edu",
            frames_max=2 if kind == "edu" else 32,
        )


@contextmanager
def _card(tmp_path: Path, engine: str) -> Iterator[Target]:
    """A card whose own link to the target goes ("dma"), or that loses power ("window")."""
    with card_site(tmp_path, LAYOUT, engine=engine) as site:

        def soon(act: Callable[[], None], good: bool) -> Callable[[], None]:
            """The card notices a little later."""

            def run() -> None:
                act()
                deadline_s = time.monotonic() + CARD_NOTICES_S
                while _reads(target.source, target.frames[0]) != good:
                    assert time.monotonic() < deadline_s

            return run

        power = engine == "window"
        target = Target(
            lambda: open_source(site.uri),
            Memory(site.ram_path, LAYOUT),
            site.kill if power else soon(site.lose_link, good=False),
            site.restart if power else soon(site.return_link, good=True),
        )
        yield target


CARD_NOTICES_S = 20


def _reads(source: Source, frame: int) -> bool:
    buffer = np.zeros((1, PAGE_SIZE), dtype=np.uint8)
    return bool(source.read(np.array([frame], dtype=np.uint64), buffer)[0] == PageStatus.OK)


def write_map(directory: Path, layout: Layout) -> Path:
    """The layout as a map file."""
    path = directory / "map.toml"
    path.write_text(
        "".join(
            f"[[region]]\ngpa = {segment.region.gpa}\nlength = {segment.region.length}\n"
            f'offset = {segment.offset}\nkind = "{segment.region.kind}"\n'
            for segment in layout.segments
        )
    )
    return path


#: Every kind of source that needs no guest.
TARGETS: dict[str, Callable[[Path], AbstractContextManager[Target]]] = {
    "file-map": lambda path: _file(path, "map"),
    "file-pread": lambda path: _file(path, "pread"),
    "file-process": lambda path: _file(path, "process"),
    "fault": lambda path: _layer(path, "fault"),
    "delay": lambda path: _layer(path, "delay"),
    "counting": lambda path: _layer(path, "counting"),
    "stack": lambda path: _layer(path, "stack"),
    "xdma": lambda path: _xdma(path, 1),
    "xdma-4": lambda path: _xdma(path, 4),
    "leechcore-raw": lambda path: _leechcore_raw(path, "raw"),
    "leechcore-lime": lambda path: _leechcore_lime(path, "lime"),
    "nvme-dma": lambda path: _bus(path, "nvme"),
    "edu": lambda path: _bus(path, "edu"),
    "card": lambda path: _card(path, "dma"),
    "card-window": lambda path: _card(path, "window"),
}

#: Those that move ten kilobytes a second.
SLOW = frozenset({"edu"})


@contextmanager
def open_target(kind: str, tmp_path: Path) -> Iterator[Target]:
    """A target of one kind; its source is closed in the end."""
    with ExitStack() as stack:
        target = stack.enter_context(TARGETS[kind](tmp_path))
        stack.callback(target.source.close)
        yield target
