"""The kernel inside a boot image (vmlinuz), its relocation lists, and compressed modules.

A boot image holds the kernel's ELF file as a compressed payload (Documentation/arch/x86/
boot.rst). Behind that file, in the same payload, stand the lists of places that the
decompressor changes when it moves the kernel (arch/x86/boot/compressed/misc.c,
handle_relocations; arch/x86/tools/relocs.c, emit_relocs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.errors import PackageError
from pyscan.package.compression import Compression, decompress, detect

#: Of a decompressed kernel: half of what its address range takes (KERNEL_IMAGE_SIZE, 1 GiB).
PAYLOAD_BYTES_MAX: Final = 512 << 20

#: Of a decompressed module; the largest ones in distributions have less than 100 MiB.
MODULE_BYTES_MAX: Final = 256 << 20

#: Fields of the setup header, from the image's first byte.
_SETUP_SECTS: Final = 0x1F1
_BOOT_FLAG: Final = slice(0x1FE, 0x200)
_MAGIC: Final = slice(0x202, 0x206)
_VERSION: Final = slice(0x206, 0x208)
_PAYLOAD_OFFSET: Final = slice(0x248, 0x24C)
_PAYLOAD_LENGTH: Final = slice(0x24C, 0x250)

_SECTOR: Final = 512
_SETUP_SECTS_DEFAULT: Final = 4
_PROTOCOL_MIN: Final = 0x0208  # the first with a payload's place
_SIZE_BYTES: Final = 4  # behind the payload: its size when decompressed

_SUFFIXES: Final = {
    ".ko": Compression.NONE,
    ".ko.gz": Compression.GZIP,
    ".ko.xz": Compression.XZ,
    ".ko.zst": Compression.ZSTD,
}

#: A stop, the 64-bit list, a stop, the inverse list, a stop, the 32-bit list. Kernels since
#: 6.15, whose per-CPU data are ordinary addresses, have no inverse list.
_STOPS_WITH_INVERSE: Final = 3
_STOPS: Final = 2


@dataclass(frozen=True, slots=True, eq=False)
class Relocations:
    """Places in vmlinux that change with its address, as (n,) int64 of link addresses.

    An address is sign-extended, as the lists have it: `int(x) % 2**64` is the usual form.
    The distance that the kernel was moved is added to the values of 4 and 8 bytes at
    `absolute32` and `absolute64`, and subtracted from those of 4 bytes at `inverse32`.
    """

    absolute32: NDArray[np.int64]
    inverse32: NDArray[np.int64]
    absolute64: NDArray[np.int64]


def kernel_payload(image: bytes | memoryview) -> bytes:
    """The decompressed payload of a boot image: vmlinux, then its relocation lists.

    Raises PackageError: no boot image, an unknown compression, damaged, or oversize.
    """
    data = memoryview(image).cast("B")
    if (bytes(data[_BOOT_FLAG]), bytes(data[_MAGIC])) != (b"\x55\xaa", b"HdrS"):
        raise PackageError("vmlinuz: not a boot image of Linux for x86; check the package")
    version = int.from_bytes(data[_VERSION], "little")
    if version < _PROTOCOL_MIN or len(data) < _PAYLOAD_LENGTH.stop:
        raise PackageError(f"vmlinuz: boot protocol {version:#06x} is not supported")
    start = ((data[_SETUP_SECTS] or _SETUP_SECTS_DEFAULT) + 1) * _SECTOR
    start += int.from_bytes(data[_PAYLOAD_OFFSET], "little")
    length = int.from_bytes(data[_PAYLOAD_LENGTH], "little")
    if length <= _SIZE_BYTES or start + length > len(data):
        raise PackageError("vmlinuz: its payload lies outside the file; get the package again")
    packed = data[start : start + length]
    size = int.from_bytes(packed[-_SIZE_BYTES:], "little")
    compression = detect(packed)
    if compression is Compression.NONE:
        raise PackageError(
            f"vmlinuz: compressed in an unknown way (begins with {packed[:4].hex()}); "
            "known are gzip, xz, zstd and lz4"
        )
    if size > PAYLOAD_BYTES_MAX:
        raise PackageError(f"vmlinuz: its kernel has {size} bytes; get the package again")
    # A gzip file itself ends with the size; to the others the build adds it (size_append).
    if compression is not Compression.GZIP:
        packed = packed[:-_SIZE_BYTES]
    payload = decompress(packed, compression, "vmlinuz", size)
    if len(payload) != size:
        raise PackageError(
            f"vmlinuz: its kernel has {len(payload)} bytes, not {size}; get the package again"
        )
    return payload


def module_file(name: str, data: bytes | memoryview) -> bytes:
    """The ELF file of a module whose file in the package is called `name`.

    Raises PackageError: not a module's name, damaged, or oversize.
    """
    for suffix, compression in _SUFFIXES.items():
        if name.endswith(suffix):
            return decompress(data, compression, name, MODULE_BYTES_MAX)
    raise PackageError(f"{name}: not the name of a module; known are {', '.join(_SUFFIXES)}")


def is_module(name: str) -> bool:
    """Whether a file name is that of a module that `module_file` reads."""
    return name.endswith(tuple(_SUFFIXES))


def relocation_lists(payload: bytes | memoryview, start: int) -> Relocations:
    """The lists that stand from file offset `start` (`Elf.sections_end`) to the payload's end.

    Raises PackageError: there are none, or they are damaged.
    """
    rest = memoryview(payload).cast("B")[max(start, 0) :]
    if len(rest) % 4 or not len(rest):
        raise PackageError(
            f"vmlinuz: {len(rest)} bytes behind the kernel are no relocation lists; "
            "only relocatable kernels (CONFIG_RANDOMIZE_BASE) are supported"
        )
    words = np.frombuffer(rest, dtype="<i4").astype(np.int64)
    stops = np.flatnonzero(words == 0)
    if len(stops) not in (_STOPS, _STOPS_WITH_INVERSE) or stops[0] or np.any(words > 0):
        raise PackageError("vmlinuz: its relocation lists are damaged; get the package again")
    lists = np.split(words, stops[1:])
    absolute64, *inverse, absolute32 = (part[1:] for part in lists)
    nothing = np.empty(0, dtype=np.int64)
    return Relocations(absolute32, inverse[0] if inverse else nothing, absolute64)
