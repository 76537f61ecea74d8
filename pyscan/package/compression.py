"""Decompression of what kernels and packages come in, in pieces and within bounds."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Final

import zstandard
from lz4 import block as lz4

from pyscan.errors import PackageError

#: Called with bytes of input taken so far, and all.
Progress = Callable[[int, int], None]


class Compression(StrEnum):
    """How bytes are compressed."""

    NONE = "none"
    GZIP = "gzip"
    XZ = "xz"
    ZSTD = "zstd"
    LZ4 = "lz4"  # legacy frame, only in boot images


#: First bytes of each format (lib/decompress.c; LZ4: lib/decompress_unlz4.c).
MAGIC: Final = {
    Compression.GZIP: b"\x1f\x8b",
    Compression.XZ: b"\xfd7zXZ\x00",
    Compression.ZSTD: b"\x28\xb5\x2f\xfd",
    Compression.LZ4: b"\x02\x21\x4c\x18",
}

_OUTPUT_BYTES: Final = 1 << 20  # made at a time, where the library can be told
_INPUT_BYTES: Final = 1 << 16

#: One block of Zstandard takes 4 bytes at least and gives 128 KiB at most (RFC 8878, 3.1.1.2):
#: pieces of this size give at most 32 MiB.
_ZSTD_INPUT_BYTES: Final = 1 << 10

#: Window of `zstd -22`, dictionary of `xz -9`; the kernel's own are not greater
#: (scripts/Makefile.lib, scripts/xz_wrap.sh).
_ZSTD_WINDOW_BYTES_MAX: Final = 1 << 27
_XZ_MEMORY_BYTES_MAX: Final = 256 << 20

_LZ4_BLOCK_BYTES: Final = 8 << 20  # LZ4_DEFAULT_UNCOMPRESSED_CHUNK_SIZE
_LZ4_HEADER_BYTES: Final = 4


def detect(data: bytes | memoryview) -> Compression:
    """The format of `data` by its first bytes; NONE when it is none of them."""
    for compression, magic in MAGIC.items():
        if data[: len(magic)] == magic:
            return compression
    return Compression.NONE


def decompress(
    data: bytes | memoryview, compression: Compression, what: str, bytes_max: int
) -> bytes:
    """All of `data` decompressed; `what` names it in errors.

    Raises PackageError: damaged, truncated, something behind its end, or more than
    `bytes_max`.
    """
    return b"".join(pieces(data, compression, what, bytes_max))


def pieces(
    data: bytes | memoryview,
    compression: Compression,
    what: str,
    bytes_max: int,
    progress: Progress | None = None,
) -> Iterator[bytes]:
    """The same piece by piece, so that memory stays small; errors come when they are met."""
    made = 0
    try:
        for piece in _READERS[compression](memoryview(data), progress or _silent):
            made += len(piece)
            if made > bytes_max:
                raise PackageError(f"{what}: more than {bytes_max} bytes when decompressed")
            yield piece
    except (lzma.LZMAError, zlib.error, zstandard.ZstdError, _BadDataError) as error:
        raise PackageError(
            f"{what}: its {compression} data are damaged ({error}); get the package again"
        ) from error


class _BadDataError(Exception):
    """What is wrong with compressed data."""


def _silent(_done: int, _total: int) -> None:
    pass


def _slices(data: memoryview, size: int, progress: Progress) -> Iterator[memoryview]:
    for start in range(0, len(data), size):
        progress(start, len(data))
        yield data[start : start + size]
    progress(len(data), len(data))


def _plain(data: memoryview, progress: Progress) -> Iterator[bytes]:
    return (bytes(part) for part in _slices(data, _OUTPUT_BYTES, progress))


def _gzip(data: memoryview, progress: Progress) -> Iterator[bytes]:
    reader = zlib.decompressobj(wbits=31)
    for part in _slices(data, _INPUT_BYTES, progress):
        if reader.eof:
            raise _BadDataError("something lies behind their end")
        left: bytes | memoryview = part
        while left and not reader.eof:
            yield reader.decompress(left, _OUTPUT_BYTES)
            left = reader.unconsumed_tail
    yield from _drain_gzip(reader)
    _check_end(reader.eof, reader.unused_data)


def _drain_gzip(reader: zlib._Decompress) -> Iterator[bytes]:
    """What the library still holds when its input is at an end."""
    while not reader.eof and (piece := reader.decompress(b"", _OUTPUT_BYTES)):
        yield piece


def _xz(data: memoryview, progress: Progress) -> Iterator[bytes]:
    reader = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES_MAX)
    for part in _slices(data, _INPUT_BYTES, progress):
        if reader.eof:
            raise _BadDataError("something lies behind their end")
        yield reader.decompress(part, _OUTPUT_BYTES)
        while not reader.needs_input and not reader.eof:
            yield reader.decompress(b"", _OUTPUT_BYTES)
    _check_end(reader.eof, reader.unused_data)


def _zstd(data: memoryview, progress: Progress) -> Iterator[bytes]:
    reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES_MAX).decompressobj()
    for part in _slices(data, _ZSTD_INPUT_BYTES, progress):
        if reader.eof:
            raise _BadDataError("something lies behind their end")
        yield reader.decompress(part)
    _check_end(reader.eof, reader.unused_data)


def _lz4(data: memoryview, progress: Progress) -> Iterator[bytes]:
    """Blocks of a legacy frame, each behind its length; the frame ends with its data."""
    magic = MAGIC[Compression.LZ4]
    if data[: len(magic)] != magic:
        raise _BadDataError("no frame")
    position = len(magic)
    while position < len(data):
        progress(position, len(data))
        length = int.from_bytes(data[position : position + _LZ4_HEADER_BYTES], "little")
        position += _LZ4_HEADER_BYTES
        if not 0 < length <= len(data) - position:
            raise _BadDataError("a block lies outside of them")
        try:
            piece = lz4.decompress(
                data[position : position + length], uncompressed_size=_LZ4_BLOCK_BYTES
            )
        except (lz4.LZ4BlockError, ValueError) as error:
            raise _BadDataError("a block cannot be read") from error
        yield bytes(piece)
        position += length
    progress(len(data), len(data))


def _check_end(eof: bool, unused: bytes) -> None:
    if not eof:
        raise _BadDataError("they end too early")
    if unused:
        raise _BadDataError("something lies behind their end")


_READERS: Final[dict[Compression, Callable[[memoryview, Progress], Iterator[bytes]]]] = {
    Compression.NONE: _plain,
    Compression.GZIP: _gzip,
    Compression.XZ: _xz,
    Compression.ZSTD: _zstd,
    Compression.LZ4: _lz4,
}
