"""``qemu:`` against real QEMU machines: the memory map, and what is said when it is wrong.

The machines run their firmware at most and have no guest, so that a RAM file of gigabytes
stays a file of holes.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pyscan.errors import SourceUnavailable, UsageError
from pyscan.lab.process import Child, RunDirectory
from pyscan.qmp import query
from pyscan.records import PAGE_SIZE, POISON, PageStatus
from pyscan.sources import build_uri, open_source

MIB = 1 << 20
RAM_FILE = "memory-backend-file,id=ram,size={size}M,mem-path={path},share=on"


@contextmanager
def machine(run: RunDirectory, *arguments: str) -> Iterator[tuple[Path, Child]]:
    """A stopped QEMU; its QMP socket and process."""
    path = run.path / "qmp"
    # fmt: off
    command = ["qemu-system-x86_64", "-S", "-accel", "tcg", "-nodefaults", "-display", "none",
               "-qmp", f"unix:{path},server=on,wait=off", *arguments]
    # fmt: on
    with Child("machine", command, run.path / "machine.log") as child:
        child.wait_until(lambda: listens(path), timeout_s=20, what="its QMP socket")
        yield path, child


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def shared(run: RunDirectory, name: str, size_mib: int) -> list[str]:
    return on_file(run.ram_file("map.ram", size_mib * MIB), name, size_mib)


def on_file(ram: Path, name: str, size_mib: int) -> list[str]:
    backend = f"memory-backend-file,id=ram,size={size_mib}M,mem-path={ram},share=on"
    return ["-m", f"{size_mib}M", "-object", backend, "-machine", f"{name},memory-backend=ram"]


def flat_view(path: Path) -> list[tuple[int, int, str, int]]:
    """Address, end, kind and file offset of the RAM that QEMU shows to its processor."""
    text = human(path, "info mtree -f")
    memory = next(view for view in text.split("FlatView #") if 'AS "memory"' in view)
    row = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16}) \(prio \d+, (ram|rom)\): ram(?: @(\w+))?")
    return [
        (int(start, 16), int(end, 16) + 1, kind, int(offset or "0", 16))
        for start, end, kind, offset in row.findall(memory)
    ]


def human(path: Path, command: str) -> str:
    (text,) = query(path, [("human-monitor-command", {"command-line": command})])
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("name", ["q35", "pc"])
@pytest.mark.parametrize("size_mib", [512, 2815, 2816, 3583, 3584, 5120])
def test_the_map_is_the_one_of_the_machine(
    run_directory: RunDirectory, name: str, size_mib: int
) -> None:
    with machine(run_directory, *shared(run_directory, name, size_mib)) as (path, child):
        query(path, [("cont", None)])
        child.wait_until(  # the firmware shadows itself and locks its copy
            lambda: (0xF0000, 0x100000, "rom", 0xF0000) in flat_view(path),
            timeout_s=30,
            what="the end of its firmware",
        )
        with open_source(f"qemu:{path}") as source:
            view = source.view()
            assert view is not None
            found = [
                (region.gpa, region.end, str(region.kind), int(offset))
                for region in source.regions()
                for offset in view.offsets(np.array([region.gpa >> 12], dtype=np.uint64))
            ]
        assert found == flat_view(path)


@pytest.mark.parametrize("name", ["q35", "pc"])
def test_content_appears_where_the_processor_sees_it(
    run_directory: RunDirectory, name: str
) -> None:
    """Written into the file by its offset, read by address: by QEMU and by the source."""
    low = {"q35": 0x8000_0000, "pc": 0xC000_0000}[name]
    high, size = 4 << 30, 5120 * MIB
    offsets = {
        0x1000: 0x1000,
        0x10_0000: 0x10_0000,
        low - PAGE_SIZE: low - PAGE_SIZE,
        high: low,
        high + size - low - PAGE_SIZE: size - PAGE_SIZE,
    }
    ram = run_directory.ram_file("map.ram", size)
    arguments = on_file(ram, name, size // MIB)
    with machine(run_directory, *arguments) as (path, _), open_source(f"qemu:{path}") as source:
        with ram.open("r+b") as file:
            for number, offset in enumerate(offsets.values(), 0x51):
                file.seek(offset)
                file.write(bytes([number]) * 8)
        pages = np.zeros((len(offsets) + 2, PAGE_SIZE), dtype=np.uint8)
        frames = [gpa >> 12 for gpa in (*offsets, low, high + size - low)]
        statuses = source.read(np.array(frames, dtype=np.uint64), pages)
        seen = [human(path, f"xp /1xg {gpa:#x}").split()[1] for gpa in offsets]
    assert statuses.tolist() == [PageStatus.OK] * len(offsets) + [PageStatus.HOLE] * 2
    assert seen == [f"0x{f'{number:02x}' * 8}" for number in range(0x51, 0x51 + len(offsets))]
    assert pages[: len(offsets), 0].tolist() == list(range(0x51, 0x51 + len(offsets)))
    assert (pages[len(offsets) :] == POISON).all()


def test_the_socket_is_free_again(run_directory: RunDirectory) -> None:
    with (
        machine(run_directory, *shared(run_directory, "q35", 64)) as (path, _),
        open_source(f"qemu:{path}"),
        open_source(f"qemu:{path}"),
    ):
        assert query(path, [("query-status", None)], timeout_s=2)


def test_a_machine_that_ends_takes_its_memory_along(run_directory: RunDirectory) -> None:
    """The RAM file is still there and still readable, but nobody runs on it."""
    page = np.zeros((1, PAGE_SIZE), dtype=np.uint8)
    frames = np.array([1], dtype=np.uint64)
    with machine(run_directory, *shared(run_directory, "pc", 64)) as (path, child):
        source = open_source(f"qemu:{path}")
        assert source.read(frames, page).tolist() == [PageStatus.OK]
        child.kill()
    with source:
        assert source.read(frames, page).tolist() == [PageStatus.LINK_DOWN]
        assert (page == POISON).all()
        assert source.view() is None
        with pytest.raises(SourceUnavailable, match="virtual machine ended"):
            source.regions()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-M q35 -m 64M", "anonymous memory; start QEMU with"),
        ("-M q35,memory-backend=r -object memory-backend-ram,share=on", "anonymous memory"),
        ("-M q35,memory-backend=r -object memory-backend-memfd", "anonymous memory"),
        ("-M q35,memory-backend=r -object memory-backend-file,mem-path={ram}", "not shared"),
        (
            "-M q35,memory-backend=r -object memory-backend-file,share=on,mem-path=relative.ram",
            "not an absolute file name",
        ),
        (
            "-M pc,memory-backend=r -object memory-backend-file,share=on,mem-path=/dev/shm",
            "not a file",
        ),
        ("-M microvm -m 64M", "machine type microvm-machine is not known"),
        ("-M none", "machine type none-machine is not known; known are q35, pc"),
    ],
)
def test_memory_that_cannot_be_read_from_outside(
    run_directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(run_directory.path)
    ram = run_directory.ram_file("private.ram", 128 * MIB)
    command = [
        f"{part.format(ram=ram)},id=r,size=128M" if part.startswith("memory-backend-") else part
        for part in arguments.split()
    ]
    with (
        machine(run_directory, *command) as (path, _),
        pytest.raises(UsageError, match=message) as caught,
    ):
        open_source(build_uri("qemu", path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "dead"])
def test_a_dead_socket(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a b.sock"
    if kind == "dead":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    with pytest.raises(SourceUnavailable, match="cannot reach QEMU") as caught:
        open_source(build_uri("qemu", path))
    assert caught.value.exit_status == 3
    assert "\n" not in str(caught.value)
