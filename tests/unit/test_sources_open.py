"""URIs, memory maps and what is said about wrong ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyscan.errors import ConfigError, FileFormatError, SourceUnavailable, UsageError
from pyscan.records import PAGE_SIZE, MemoryMap, MemoryRegion, RegionKind
from pyscan.sources import BACKENDS, NO_OFFSET, build_uri, open_source
from pyscan.sources.base import populated
from pyscan.sources.layout import Layout, Segment, load_map
from pyscan.sources.machines import MACHINES, machine_layout
from pyscan.sources.uri import parse_size, parse_uri

MIB = 1 << 20
GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "scheme", "path", "parameters"),
    [
        ("file:/a/b.img", "file", "/a/b.img", {}),
        ("file:ram?machine=pc&size=1G", "file", "ram", {"machine": "pc", "size": "1G"}),
        ("qemu:/run/a%20b%3F%25", "qemu", "/run/a b?%", {}),
        ("file:/x?map=/m%26%3Dn+1", "file", "/x", {"map": "/m&=n+1"}),
        ("file:/%FF", "file", os.fsdecode(b"/\xff"), {}),
        ("leechcore:file:///d.lime", "leechcore", "file:///d.lime", {}),
    ],
)
def test_uris(text: str, scheme: str, path: str, parameters: dict[str, str]) -> None:
    uri = parse_uri(text)
    assert (uri.scheme, uri.path, uri.parameters) == (scheme, path, parameters)


@given(
    path=st.binary(min_size=1, max_size=60).filter(lambda name: b"\0" not in name),
    value=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
)
def test_uris_come_back(path: bytes, value: str) -> None:
    uri = parse_uri(build_uri("file", os.fsdecode(path), map=value))
    assert os.fsencode(uri.path) == path
    assert uri.parameters == {"map": value}


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "is not a source"),
        ("/path/ram.img", "is not a source"),
        ("FILE:/x", "is not a source"),
        ("file:", "no path"),
        ("file:?machine=q35", "no path"),
        ("ftp:/x", "known are file, qemu"),
        ("file:/x%2", "must be written as %25"),
        ("file:/x%00", "NUL"),
        ("file:/x?machine", "not key=value"),
        ("file:/x?machine=", "not key=value"),
        ("file:/x?a=1&&b=2", "not key=value"),
        ("file:/x?machine=pc&machine=pc&size=1M", "given twice"),
        ("file:/x?machine=pc&size=1M&speed=9", "unknown parameter 'speed'; it takes machine"),
        ("file:/x?machine=pc", "size=... is missing"),
        ("file:/x", "machine=... and size=... is missing"),
        ("file:/x?machine=pc&size=1M&map=/m", "either map="),
        ("file:/x?machine=pc&size=1M&access=mmap", "access must be map or pread"),
        ("file:/x?machine=virt&size=1M", "unknown machine 'virt'; known are q35, pc"),
        ("file:/x?machine=pc&size=1Q", "size '1Q'"),
        ("file:/x?machine=pc&size=-1M", "size '-1M'"),
        ("file:/x?machine=pc&size=0", "multiple of 4096"),
        ("file:/x?machine=pc&size=5000", "multiple of 4096"),
        ("file:/x?machine=pc&size=2000G", "at most 1000G"),
        ("file:/x?map=/nowhere/map.toml", "cannot read the memory map"),
        ("qemu:/x?size=1G", "unknown parameter 'size'; it takes no parameters"),
        ("file:/" + "x" * 20000, "at most 16384"),
    ],
)
def test_wrong_uris_say_what_to_do(uri: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_source(uri)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("0x1000", 4096), ("512M", 512 * MIB), ("6G", 6 * GIB), ("8K", 8192)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def spans(memory: MemoryMap) -> list[tuple[int, int, str]]:
    return [(region.gpa, region.end, region.kind) for region in memory]


LOW = [
    (0, 0xC3000, "ram"),
    (0xC3000, 0xE8000, "rom"),
    (0xE8000, 0xF0000, "ram"),
    (0xF0000, 0x100000, "rom"),
]


@pytest.mark.parametrize(
    ("machine", "size", "low"),
    [
        ("q35", 512 * MIB, 512 * MIB),
        ("q35", 0xB000_0000 - PAGE_SIZE, 0xB000_0000 - PAGE_SIZE),
        ("q35", 0xB000_0000, 0x8000_0000),
        ("q35", 6 * GIB, 0x8000_0000),
        ("pc", 512 * MIB, 512 * MIB),
        ("pc", 0xE000_0000 - PAGE_SIZE, 0xE000_0000 - PAGE_SIZE),
        ("pc", 0xE000_0000, 0xC000_0000),
        ("pc", 6 * GIB, 0xC000_0000),
    ],
)
def test_machines_split_their_ram(machine: str, size: int, low: int) -> None:
    layout = machine_layout(MACHINES[machine], size)
    high = [(4 * GIB, 4 * GIB + size - low, "ram")] if size > low else []
    assert spans(layout.memory_map) == [*LOW, (0x100000, low, "ram"), *high]
    assert layout.file_bytes == size
    frames = np.array([0, 0xC3, 0x100, (low >> 12) - 1, low >> 12], dtype=np.uint64)
    assert layout.offsets(frames).tolist() == [0, 0xC3000, 0x100000, low - 4096, int(NO_OFFSET)]
    if high:
        ends = np.array([1 << 20, (1 << 20) + ((size - low) >> 12) - 1], dtype=np.uint64)
        assert layout.offsets(ends).tolist() == [low, size - PAGE_SIZE]


@pytest.mark.parametrize("size", [PAGE_SIZE, 0xC3000, 0xC4000, 0xF0000, 0x100000])
def test_tiny_machines(size: int) -> None:
    layout = machine_layout(MACHINES["pc"], size)
    assert layout.memory_map.bytes_total == layout.file_bytes == size


def test_max_ram_below_4g() -> None:
    layout = machine_layout(MACHINES["q35"], 3 * GIB, below_4g_max=1 * GIB)
    assert spans(layout.memory_map)[-2:] == [(MIB, GIB, "ram"), (4 * GIB, 6 * GIB, "ram")]
    with pytest.raises(UsageError, match="max-ram-below-4g"):
        machine_layout(MACHINES["pc"], 3 * GIB, below_4g_max=0xF000_0000)


def test_a_map_file(tmp_path: Path) -> None:
    ram, memory_map = tmp_path / "a b.img", tmp_path / "map 100%.toml"
    ram.write_bytes(bytes([1]) * PAGE_SIZE + bytes([2]) * PAGE_SIZE)
    memory_map.write_text(
        "[[region]]\ngpa = 0x100000000\nlength = 4096\noffset = 0\n"
        '[[region]]\ngpa = 0\nlength = 4096\noffset = 4096\nkind = "rom"\n'
    )
    with open_source(build_uri("file", ram, map=str(memory_map))) as source:
        assert spans(source.regions()) == [(0, 4096, "rom"), (4 * GIB, 4 * GIB + 4096, "ram")]
        pages = np.zeros((2, PAGE_SIZE), dtype=np.uint8)
        assert source.read(np.array([1 << 20, 0], dtype=np.uint64), pages).tolist() == [0, 0]
        assert pages[:, 0].tolist() == [1, 2]


REGION = "[[region]]\ngpa = 0\nlength = 8192\noffset = 0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[region", "not a TOML file"),
        ("", "expected .*region"),
        ("region = 1", "expected .*region"),
        (REGION + "[other]", "expected .*region"),
        ("region = [1]", "region 1: needs gpa, length and offset"),
        ("[[region]]\ngpa = 0\nlength = 4096\n", "region 1: needs"),
        (REGION + "color = 1", "region 1: needs"),
        (REGION + "kind = 'flash'", "kind must be"),
        (REGION + "kind = []", "kind must be"),
        (REGION.replace("8192", "-4096"), "length must be"),
        (REGION.replace("8192", "100"), "length must be"),
        (REGION.replace("8192", "true"), "length must be"),
        (REGION.replace("8192", "4096.0"), "length must be"),
        (REGION.replace("8192", str(1 << 52)), "length must be"),
        (REGION.replace("8192", "0"), "empty"),
        (REGION + REGION.replace("gpa = 0", "gpa = 4096"), "overlaps"),
        ("region = [" + "{gpa=0,length=4096,offset=0}," * 5000 + "]", "at most 4096"),
        ("# " + "x" * (1 << 20), "longer than"),
        ("x = " + "[" * 5000, "not a TOML file"),
    ],
)
def test_wrong_map_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "map.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_map(path)


def test_a_map_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "map.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_map(path)


def test_a_file_shorter_than_its_map(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(MIB - 1))
    with pytest.raises(FileFormatError, match=r"1048575 bytes.*needs 1048576") as caught:
        open_source(f"file:{ram}?machine=q35&size=1M")
    assert caught.value.exit_status == 2


def test_files_that_are_none(tmp_path: Path) -> None:
    parameters = "?machine=q35&size=1M"
    with pytest.raises(SourceUnavailable, match="cannot open the RAM file") as caught:
        open_source(f"file:{tmp_path}/missing{parameters}")
    assert caught.value.exit_status == 3
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(UsageError, match="not a file"):
            open_source(f"file:{path}{parameters}")


def test_opening_and_closing_leaves_no_descriptor(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(MIB))
    before = os.listdir("/proc/self/fd")
    for access in ("map", "pread"):
        with open_source(f"file:{ram}?machine=pc&size=1M&access={access}") as source:
            assert source.uri.endswith(access)
        with pytest.raises(FileFormatError):
            open_source(f"file:{ram}?machine=pc&size=2M&access={access}")
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("replace", [True, False])
def test_a_file_that_is_replaced_or_removed_is_not_the_target_any_more(
    tmp_path: Path, replace: bool
) -> None:
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(MIB))
    with open_source(f"file:{ram}?machine=q35&size=1M") as source:
        source.regions()
        if replace:
            (tmp_path / "new").write_bytes(bytes(MIB))
            (tmp_path / "new").rename(ram)
        else:
            ram.unlink()
        with pytest.raises(SourceUnavailable, match="replaced"):
            source.regions()


def test_the_file_is_opened_read_only(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(MIB))
    with open_source(f"file:{ram}?machine=pc&size=1M") as source:
        view = source.view()
        assert view is not None
        with pytest.raises(TypeError, match="read-only"):
            view.data[0] = 1


def test_holes_are_not_searched(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    with ram.open("wb") as file:
        file.truncate(64 * MIB)
        for offset in (3 * MIB, 3 * MIB + 0x5000, 40 * MIB + 100, 64 * MIB - 1):
            file.seek(offset)
            file.write(b"x")
    with open_source(f"file:{ram}?machine=q35&size=64M") as source:
        found = populated(source)
        total = found.bytes_total
        holds = [found.find(gpa) is not None for gpa in (3 * MIB + 0x5000, 40 * MIB, 20 * MIB)]
        last = found.find(64 * MIB - 1)
    assert holds == [True, True, False]
    assert last is not None
    assert total < 2 * MIB


def test_a_file_of_holes_alone(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    ram.touch()
    os.truncate(ram, 8 * MIB)
    with open_source(f"file:{ram}?machine=q35&size=8M") as source:
        assert populated(source).regions == ()


@given(st.data())
def test_layout_offsets_are_those_of_the_segments(data: st.DataObject) -> None:
    """Against the obvious definition, for any disjoint segments."""
    cuts = data.draw(st.lists(st.integers(0, 1 << 24), min_size=2, max_size=12, unique=True))
    cuts.sort()
    segments = [
        Segment(
            MemoryRegion(start << 12, (end - start) << 12, data.draw(st.sampled_from(RegionKind))),
            data.draw(st.integers(0, 1 << 20)) << 12,
        )
        for start, end in zip(cuts[::2], cuts[1::2], strict=False)
    ]
    frames = data.draw(st.lists(st.integers(0, (1 << 64) - 1) | st.sampled_from(cuts)))
    expected = []
    for frame in frames:
        inside = [s for s in segments if s.region.gpa <= frame << 12 < s.region.end]
        expected.append(
            inside[0].offset + (frame << 12) - inside[0].region.gpa if inside else int(NO_OFFSET)
        )
    assert Layout.of(segments).offsets(np.array(frames, dtype=np.uint64)).tolist() == expected


def test_backends_are_listed_with_what_they_need() -> None:
    for backend in BACKENDS:
        assert backend.form.startswith(f"{backend.scheme}:")
        assert backend.summary
        assert backend.requires
