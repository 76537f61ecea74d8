"""Boot images, their relocation lists, and compressed modules."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from package_files import compress, edited, lz4_frame, make_bzimage, make_module, one_line

from pyscan.errors import PackageError
from pyscan.package import bzimage
from pyscan.package.bzimage import is_module, kernel_payload, module_file, relocation_lists
from pyscan.package.compression import Compression, decompress, pieces
from pyscan.package.elf import Elf

FORMS = ["gzip", "xz", "zstd", "lz4"]
PAYLOAD = bytes(range(256)) * 300
EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4)


def lists(*words: int) -> bytes:
    return struct.pack(f"<{len(words)}i", *words)


@pytest.fixture(scope="module")
def payload(guest_dir: Path) -> bytes:
    return kernel_payload((guest_dir / "vmlinuz").read_bytes())


def test_a_real_kernel(payload: bytes) -> None:
    """Relocated places hold addresses of the kernel, which an independent count confirms."""
    elf = Elf(payload)
    found = relocation_lists(payload, elf.sections_end)
    words = len(found.absolute32) + len(found.inverse32) + len(found.absolute64)
    assert (words + 3) * 4 == len(payload) - elf.sections_end
    assert min(map(len, (found.absolute32, found.absolute64, found.inverse32))) > 1000
    rodata = elf.section(".rodata")
    assert rodata is not None
    places = found.absolute64.astype(np.uint64)
    inside = (places >= rodata.address) & (places < rodata.address + rodata.size - 8)
    content = np.frombuffer(elf.content(rodata), dtype=np.uint8)
    starts = (places[inside] - np.uint64(rodata.address)).astype(np.int64)
    values = content[starts[:, None] + np.arange(8)].view("<u8")[:, 0]
    assert len(values) > 10000
    top = max(s.address + s.size for s in elf.sections)
    assert np.all((values >= np.uint64(0xFFFF_FFFF_8000_0000)) & (values <= np.uint64(top)))


def test_every_absolute_pointer_of_rodata_is_listed(payload: bytes) -> None:
    """The system call table: each entry is in the 64-bit list, eight bytes apart."""
    elf = Elf(payload)
    found = set(relocation_lists(payload, elf.sections_end).absolute64.tolist())
    entries = elf.section(".rodata")
    assert entries is not None
    runs = sum(1 for place in found if place + 8 in found and place + 16 in found)
    assert runs > 5000


@pytest.mark.parametrize("form", FORMS)
def test_every_compression(form: str) -> None:
    assert kernel_payload(make_bzimage(PAYLOAD, form)) == PAYLOAD


@pytest.mark.parametrize("form", FORMS)
def test_it_must_have_the_size_that_it_says(form: str) -> None:
    image = bytearray(make_bzimage(PAYLOAD, form))
    end = len(image) - 64
    for size in (0, len(PAYLOAD) - 1, len(PAYLOAD) + 1, 1 << 31, (1 << 32) - 1):
        image[end - 4 : end] = struct.pack("<I", size)
        with pytest.raises(PackageError):
            kernel_payload(image)


def test_lz4_blocks() -> None:
    data = np.random.default_rng(1).integers(0, 4, 1000, dtype=np.uint8).tobytes()
    assert decompress(lz4_frame(data, 300), Compression.LZ4, "x", 1000) == data
    with pytest.raises(PackageError, match="more than 999 bytes"):
        decompress(lz4_frame(data, 300), Compression.LZ4, "x", 999)
    for bad in (b"\1\0", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x02\x21\x4c\x18"):
        with pytest.raises(PackageError, match="block"):
            decompress(lz4_frame(data)[:4] + bad, Compression.LZ4, "x", 1000)


def test_a_damaged_lz4_block() -> None:
    bad = bytearray(lz4_frame(b"abcd" * 100))
    bad[10:] = b"\xff" * (len(bad) - 10)
    with pytest.raises(PackageError, match="a block cannot be read"):
        decompress(bad, Compression.LZ4, "x", 1000)


@pytest.mark.parametrize("form", FORMS)
def test_bombs_stop_at_the_bound(form: str) -> None:
    """16 MiB of zeros: no more than the bound and one piece is ever made."""
    made: list[int] = []
    bomb = compress(bytes(16 << 20), form)
    with pytest.raises(PackageError, match="more than 1048576 bytes"):
        made.extend(map(len, pieces(bomb, Compression(form), "x", 1 << 20)))
    assert sum(made) <= 1 << 20


@pytest.mark.parametrize("form", ["gzip", "xz", "zstd"])
def test_truncated_or_followed_by_something(form: str) -> None:
    whole = compress(PAYLOAD, form)
    for bad in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0", whole + bytes(1 << 17)):
        with pytest.raises(PackageError, match=f"its {form} data are damaged"):
            decompress(bad, Compression(form), "x", 1 << 20)


def test_a_dictionary_that_takes_all_memory() -> None:
    """The header of an xz block that asks for 4 GiB."""
    import lzma

    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    data = lzma.compress(b"x" * 100, lzma.FORMAT_RAW, filters=filters)
    header = bytes([2, 0, 0x21, 1, 40, 0, 0, 0])  # dictionary size 40: 4 GiB - 1
    import binascii

    flags = b"\x00\x01"
    stream = b"\xfd7zXZ\x00" + flags + struct.pack("<I", binascii.crc32(flags))
    stream += header + struct.pack("<I", binascii.crc32(header)) + data
    with pytest.raises(PackageError, match="xz data are damaged"):
        decompress(stream, Compression.XZ, "x", 1 << 20)


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    data = compress(PAYLOAD, "xz")
    whole = b"".join(
        pieces(data, Compression.XZ, "x", 1 << 20, lambda done, total: seen.append((done, total)))
    )
    assert whole == PAYLOAD
    assert seen[0] == (0, len(data))
    assert seen[-1] == (len(data), len(data))


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (0x1FE, b"\0\0", "not a boot image"),
        (0x202, b"hDRS", "not a boot image"),
        (0x206, b"\x07\x02", "protocol 0x0207"),
        (0x1F1, b"\xff", "outside the file"),
        (0x248, b"\xff\xff\xff\xff", "outside the file"),
        (0x24C, b"\xff\xff\xff\x7f", "outside the file"),
        (0x24C, b"\x04\0\0\0", "outside the file"),
        (0x248, b"\x00", "unknown way"),
    ],
)
def test_a_damaged_setup_header(place: int, value: bytes, reason: str) -> None:
    image = bytearray(make_bzimage(PAYLOAD, "xz"))
    image[place : place + len(value)] = value
    with pytest.raises(PackageError, match=reason):
        kernel_payload(image)


@pytest.mark.parametrize("size", [0, 0x1F2, 0x206, 0x208, 0x24F])
def test_short_images(size: int) -> None:
    with pytest.raises(PackageError):
        kernel_payload(make_bzimage(PAYLOAD, "xz")[:size])


def test_modules() -> None:
    module = make_module()
    for suffix in ("", ".gz", ".xz", ".zst"):
        name = f"kernel/fs/ext4/ext4.ko{suffix}"
        assert is_module(name)
        assert module_file(name, compress(module, suffix)) == module
    for name in ("a.ko.bz2", "ko", "a.kox", ""):
        assert not is_module(name)
        with pytest.raises(PackageError, match="not the name of a module"):
            module_file(name, module)


def test_an_oversize_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bzimage, "MODULE_BYTES_MAX", 1000)
    for suffix in ("", ".gz", ".xz", ".zst"):
        with pytest.raises(PackageError, match="more than 1000 bytes"):
            module_file(f"a.ko{suffix}", compress(bytes(1001), suffix))


def test_relocation_lists() -> None:
    data = b"\x7fELF" + lists(0, -40, -32, 0, -7, 0, -100, -96, -92)
    found = relocation_lists(data, 4)
    assert found.absolute64.tolist() == [-40, -32]
    assert found.inverse32.tolist() == [-7]
    assert found.absolute32.tolist() == [-100, -96, -92]
    assert found.absolute32.dtype == np.int64


def test_relocation_lists_without_inverse() -> None:
    found = relocation_lists(lists(0, -40, 0, -100), 0)
    assert found.absolute64.tolist() == [-40]
    assert found.inverse32.tolist() == []
    assert found.absolute32.tolist() == [-100]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        lists(0),
        lists(-1, 0, -2, 0, -3, 0, -4),
        lists(0, -1, 0, -2, 0, 7),
        lists(0, 0, 0, 0),
        lists(-1, 0, -2, 0),
        lists(0, -1, 0, -2, 0, -3) + b"\0",
    ],
)
def test_damaged_relocation_lists(data: bytes) -> None:
    with pytest.raises(PackageError):
        relocation_lists(data, 0)
    with pytest.raises(PackageError):
        relocation_lists(data, 1 << 40)


@settings(max_examples=300, deadline=None)
@given(edits=EDITS, cut=st.floats(0, 1), form=st.sampled_from(FORMS))
def test_any_damage(edits: list[tuple[float, bytes]], cut: float, form: str) -> None:
    """Either an error, or a kernel that is as long as the image says."""
    image = edited(make_bzimage(PAYLOAD[:1024], form), edits, cut)
    try:
        assert len(kernel_payload(image)) < 1 << 24
    except PackageError as error:
        one_line(error)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=64), start=st.integers(-8, 80))
def test_any_relocation_lists(data: bytes, start: int) -> None:
    try:
        found = relocation_lists(data, start)
    except PackageError:
        return
    for part in (found.absolute32, found.inverse32, found.absolute64):
        assert np.all(part < 0)
