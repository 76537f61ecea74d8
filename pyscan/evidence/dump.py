"""Single pages out of a memory dump: an ELF core file as QEMU and libvirt write it.

System V gABI chapter 5; QEMU dump/dump.c. The file may be as large as the machine's memory,
so it is neither read nor mapped whole. What its headers say is the hypervisor's word: every
read is bounded by them and by the file.
"""

from __future__ import annotations

from struct import Struct
from typing import BinaryIO, Final

from pyscan.errors import FileFormatError
from pyscan.records import PAGE_SIZE

_IDENT: Final = b"\x7fELF\x02\x01\x01"  # magic, ELFCLASS64, ELFDATA2LSB, EV_CURRENT
_FILE: Final = Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = Struct("<IIQQQQQQ")
_SECTION: Final = Struct("<IIQQQQIIQQ")
_CORE: Final = 4  # ET_CORE
_LOAD: Final = 1  # PT_LOAD
_EXTENDED: Final = 0xFFFF  # PN_XNUM: the number is sh_info of section 0
_SEGMENTS_MAX: Final = 1 << 16


class MemoryDump:
    """The physical memory in an open dump. The caller closes the file."""

    def __init__(self, file: BinaryIO) -> None:
        """Read the headers. Raises FileFormatError for anything but a 64-bit core file."""
        self._file = file
        head = self._read(0, _FILE.size)
        if len(head) < _FILE.size or not head.startswith(_IDENT):
            raise FileFormatError("not a 64-bit little-endian ELF file")
        fields = _FILE.unpack(head)
        kind, table, sections, size, count = fields[1], *fields[5:7], *fields[9:11]
        if kind != _CORE or size != _SEGMENT.size:
            raise FileFormatError("not an ELF core file")
        if count == _EXTENDED:
            section = self._read(sections, _SECTION.size)
            if len(section) < _SECTION.size:
                raise FileFormatError("a core file that is cut off")
            count = _SECTION.unpack(section)[7]
        if count > _SEGMENTS_MAX:
            raise FileFormatError(f"{count} segments, at most {_SEGMENTS_MAX} are read")
        segments = self._read(table, count * _SEGMENT.size)
        if len(segments) < count * _SEGMENT.size:
            raise FileFormatError("a core file that is cut off")
        #: Physical address, offset in the file, bytes in the file.
        self._ranges = [
            (physical, offset, stored)
            for kind, _, offset, _, physical, stored, _, _ in _SEGMENT.iter_unpack(segments)
            if kind == _LOAD
        ]

    def page(self, frame: int) -> bytes | None:
        """One page; None if the dump does not have all of it."""
        address = frame * PAGE_SIZE
        for physical, offset, stored in self._ranges:
            if physical <= address and address + PAGE_SIZE <= physical + stored:
                page = self._read(offset + address - physical, PAGE_SIZE)
                return page if len(page) == PAGE_SIZE else None
        return None

    def _read(self, offset: int, length: int) -> bytes:
        try:
            self._file.seek(offset)
        except (OSError, OverflowError) as error:
            raise FileFormatError(f"a core file with an offset of {offset}") from error
        return self._file.read(length)
