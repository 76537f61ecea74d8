"""Hand-made files of a distribution's formats, by rules written down a second time."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
from dataclasses import dataclass

import lz4.block
import zstandard

RELEASE = "6.1.0-9-test"
CONTROL = b"Package: linux-image-test\nVersion: 6.1.9-1\nArchitecture: amd64\n"


@dataclass
class Section:
    name: str
    kind: int = 1
    flags: int = 2
    data: bytes = b""
    address: int = 0
    link: int = 0
    info: int = 0
    alignment: int = 8
    entry_size: int = 0


def make_elf(
    *sections: Section, kind: int = 1, segments: tuple[tuple[int, ...], ...] = ()
) -> bytes:
    """Header, program headers, contents, section headers; names are the last section."""
    rows = [Section("", 0, 0, alignment=0), *sections, Section(".shstrtab", 3, 0)]
    names = b""
    starts = []
    for row in rows:
        starts.append(len(names))
        names += row.name.encode() + b"\0"
    rows[-1].data = names
    body = bytearray(64)
    for segment in segments:
        body += struct.pack("<IIQQQQQQ", *segment)
    headers = b""
    for start, row in zip(starts, rows, strict=True):
        body += bytes(-len(body) % 8)
        headers += struct.pack(
            "<IIQQQQIIQQ",
            start,
            row.kind,
            row.flags,
            row.address,
            len(body),
            len(row.data),
            row.link,
            row.info,
            row.alignment,
            row.entry_size,
        )
        body += row.data
    body += bytes(-len(body) % 8)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    body[:64] = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(ident, kind, 62, 1, 0x1000, 64 if segments else 0, len(body), 0, 64),
        *(56, len(segments), 64, len(rows), len(rows) - 1),
    )
    return bytes(body) + headers


def make_module() -> bytes:
    """A module with a text of 32 bytes, two symbols and one relocation."""
    symbols = struct.pack("<IBBHQQ", 0, 0, 0, 0, 0, 0)
    symbols += struct.pack("<IBBHQQ", 1, 0x12, 0, 1, 16, 4)
    symbols += struct.pack("<IBBHQQ", 6, 0x10, 0, 0, 0, 0)
    return make_elf(
        Section(".text", 1, 6, bytes(range(32)), alignment=16),
        Section(".symtab", 2, 0, symbols, link=3, info=1, entry_size=24),
        Section(".strtab", 3, 0, b"\0here\0there\0"),
        Section(
            ".rela.text",
            *(4, 0x40, struct.pack("<QQq", 5, 2 << 32 | 4, -4)),
            link=2,
            info=1,
            entry_size=24,
        ),
        Section(".bss", 8, 3, alignment=32),
    )


def lz4_frame(data: bytes, block_bytes: int = 8 << 20) -> bytes:
    frame = b"\x02\x21\x4c\x18"
    for start in range(0, len(data), block_bytes):
        packed = lz4.block.compress(data[start : start + block_bytes], store_size=False)
        frame += struct.pack("<I", len(packed)) + packed
    return frame


def compress(data: bytes, form: str) -> bytes:
    match form:
        case "gzip" | ".gz":
            return gzip.compress(data)
        case "xz" | ".xz":
            return lzma.compress(data, check=lzma.CHECK_CRC32)
        case "zstd" | ".zst":
            return zstandard.ZstdCompressor().compress(data)
        case "lz4":
            return lz4_frame(data)
        case ".bz2":
            return bz2.compress(data)
    return data


def make_bzimage(payload: bytes, form: str, size: int | None = None) -> bytes:
    packed = compress(payload, form)
    if form != "gzip":
        packed += struct.pack("<I", len(payload) if size is None else size)
    image = bytearray(512 * 3)
    image[0x1F1] = 2
    image[0x1FE:0x208] = b"\x55\xaa\xeb\x6aHdrS\x0f\x02"
    image[0x248:0x250] = struct.pack("<II", 100, len(packed))
    return bytes(image) + bytes(100) + packed + bytes(64)


def make_tar(*files: tuple[str, bytes], links: tuple[tuple[str, str], ...] = ()) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        for name, target in links:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    return out.getvalue()


def make_ar(*members: tuple[str, bytes]) -> bytes:
    archive = b"!<arch>\n"
    for name, data in members:
        archive += b"%-16s%-12d%-6d%-6d%-8o%-10d`\n" % (name.encode(), 0, 0, 0, 0o100644, len(data))
        archive += data + bytes(len(data) % 2)
    return archive


def make_deb(data_tar: bytes, suffix: str = ".xz", control: bytes = CONTROL) -> bytes:
    return make_ar(
        ("debian-binary", b"2.0\n"),
        ("control.tar" + suffix, compress(make_tar(("./control", control)), suffix)),
        ("data.tar" + suffix, compress(data_tar, suffix)),
    )


def kernel_files(release: str = RELEASE) -> list[tuple[str, bytes]]:
    folder = f"./lib/modules/{release}/kernel"
    return [
        (f"./boot/vmlinuz-{release}", b"boot image"),
        (f"{folder}/fs/one-two.ko", make_module()),
        (f"{folder}/net/three.ko.xz", compress(make_module(), "xz")),
        (f"./lib/modules/{release}/modules.order", b"kernel/fs/one-two.ko\n"),
    ]


# ------------------------------------------------------------------------------- kallsyms

LINK = 0xFFFF_FFFF_8100_0000
NAMES = [
    (0x0, "D", "__per_cpu_start"),
    (0x1F000, "D", "current_task"),
    *((LINK + 64 * index, "Tt"[index % 2], f"function_{index}") for index in range(600)),
    (LINK + 0x10_0000, "D", "data"),
    (LINK + 0x10_0000, "d", "alias_of_data"),
    (LINK + 0x10_0100, "t", "function_7"),
    (LINK + 0x10_0200, "B", "x" * 300),
    (LINK + 0x20_0000, "B", "_end"),
]


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def make_kallsyms(new_order: bool = False, absolute_percpu: bool = True) -> bytes:
    """Read-only data with the tables of NAMES in the order of 6.1, or of 6.4 and later."""
    tokens = [chr(code) if 32 < code < 127 else "" for code in range(256)]
    tokens[200] = "function_"
    tokens[255] = "xx"
    strings = [token.encode() + b"\0" for token in tokens]
    index = struct.pack("<256H", *(len(b"".join(strings[:code])) for code in range(256)))
    names, markers = b"", []
    for number, (_, kind, name) in enumerate(NAMES):
        if number % 256 == 0:
            markers.append(len(names))
        packed = (kind + name).encode().replace(b"function_", b"\xc8")
        length = len(packed)
        head = [length] if length < 0x80 else [length & 0x7F | 0x80, length >> 7]
        names += bytes(head) + packed
    if absolute_percpu:
        values = [LINK - 1 - where if where >= LINK else where for where, _, _ in NAMES]
    else:
        values = [max(where - LINK, 0) for where, _, _ in NAMES]
    offsets = _pad(struct.pack(f"<{len(values)}i", *values))
    base = struct.pack("<Q", LINK)
    count = struct.pack("<Q", len(NAMES))
    listed = _pad(names) + _pad(struct.pack(f"<{len(markers)}I", *markers))
    text = _pad(b"".join(strings)) + index
    filler = b"0\x001\x002\x003\x00 no table".ljust(256, b"\xee") + base + count
    parts = (
        (count, listed, text, offsets, base) if new_order else (offsets, base, count, listed, text)
    )
    return _pad(filler) + b"".join(parts) + bytes(range(256)) * 4


# ------------------------------------------------------------------------------------ BTF


class BtfMaker:
    """Types by number, from 1 on, in the order of the calls."""

    def __init__(self) -> None:
        self.types = b""
        self.names = b"\0"
        self.count = 0

    def name(self, text: str) -> int:
        if not text:
            return 0
        self.names += text.encode() + b"\0"
        return len(self.names) - len(text) - 1

    def add(
        self,
        kind: int,
        name: str = "",
        size: int = 0,
        members: int = 0,
        *,
        flag: bool = False,
        body: bytes = b"",
    ) -> int:
        info = kind << 24 | members | flag << 31
        self.types += struct.pack("<III", self.name(name), info, size) + body
        self.count += 1
        return self.count

    def struct(
        self,
        name: str,
        size: int,
        *members: tuple[str, int, int],
        kind: int = 4,
        flag: bool = False,
    ) -> int:
        body = b"".join(struct.pack("<III", self.name(n), t, bits) for n, t, bits in members)
        return self.add(kind, name, size, len(members), flag=flag, body=body)

    def array(self, element: int, count: int) -> int:
        return self.add(3, body=struct.pack("<III", element, 1, count))

    def blob(self) -> bytes:
        header = struct.pack(
            "<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.names)
        )
        return header + self.types + self.names


# ----------------------------------------------------------------------------- mutations


def one_line(error: Exception) -> None:
    """The message of an error is one line that can be printed."""
    assert str(error).isprintable(), repr(error)


#: Changes of a file: places (as a share of its length) and new bytes.
Edits = list[tuple[float, bytes]]


def edited(data: bytes, edits: Edits, cut: float = 1.0) -> bytes:
    out = bytearray(data)
    for where, new in edits:
        start = int(where * max(len(out) - len(new), 0))
        out[start : start + len(new)] = new
    return bytes(out[: int(cut * len(out))])
