"""The vDSO, code that the kernel maps into every process: its image after patching.

The image is an ELF file in read-only-after-init data. Before it is used, its alternatives are
applied in place, as the kernel's own are (arch/x86/entry/vdso/vma.c, init_vdso_image).
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final

from pyscan.approved.unit import ALTERNATIVE_NOT
from pyscan.validate.patch import NOPS, nops
from pyscan.validate.state import PatchState

#: struct alt_instr of 6.1: places relative to their own, feature, lengths of both.
_ALTERNATIVE: Final = Struct("<iiHBB")
_SECTIONS_MAX: Final = 64
_CLASS_AT: Final = 4
#: By EI_CLASS: place of e_shoff, of e_shentsize (then e_shnum, e_shstrndx), and a section's
#: header up to its size (ELF specification, figures 1-3 and 1-9).
_FORMS: Final = {
    1: (Struct("<I"), 32, 46, Struct("<IIIIII")),
    2: (Struct("<Q"), 40, 58, Struct("<IIQQQQ")),
}
_COUNTS: Final = Struct("<HHH")
_NAME: Final = b".altinstructions\0"


def patched_vdso(image: bytes, state: PatchState) -> bytes:
    """An image from the package with its alternatives applied; as it is, if it has none."""
    data = bytearray(image)
    for start, end in _sections(image, _NAME):
        for at in range(start, end - _ALTERNATIVE.size + 1, _ALTERNATIVE.size):
            site, source, feature, length, copied = _ALTERNATIVE.unpack_from(image, at)
            site, source = site + at, source + at + 4
            if site < 0 or source < 0 or max(site + length, source + copied) > len(image):
                continue
            wanted = not feature & ALTERNATIVE_NOT
            if state.has(feature & (ALTERNATIVE_NOT - 1)) is wanted and copied <= length:
                code = image[source : source + copied] + NOPS[0] * (length - copied)
            else:
                code = bytes(data[site : site + length])
            data[site : site + length] = _merged(code)
    return bytes(data)


def _merged(code: bytes) -> bytes:
    """Code whose nops at the end are as few as possible (optimize_nops)."""
    kept = code.rstrip(NOPS[0])
    return kept + nops(len(code) - len(kept))


def _sections(image: bytes, name: bytes) -> Iterator[tuple[int, int]]:
    """Where sections of that name lie in an ELF file of either class."""
    form = _FORMS.get(image[_CLASS_AT]) if len(image) > 64 else None
    if form is None:
        return
    offset, offset_at, counts_at, header = form
    table = int(offset.unpack_from(image, offset_at)[0])
    size, count, names = _COUNTS.unpack_from(image, counts_at)
    count = min(count, _SECTIONS_MAX)
    if size < header.size or table + size * count > len(image) or names >= count:
        return
    headers = [header.unpack_from(image, table + size * index) for index in range(count)]
    strings = headers[names][4]
    for label, _kind, _flags, _address, start, length in headers:
        at = strings + label
        if image[at : at + len(name)] == name and start + length <= len(image):
            yield start, start + length
