"""Page-table formats as data.

x86-64: Intel SDM vol. 3A, section 4.5 (4-level and 5-level paging), tables 4-14 to 4-20.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ENTRIES: Final = 512  # 8-byte entries of one table
INDEX_BITS: Final = 9


@dataclass(frozen=True, slots=True)
class Level:
    """One level of tables.

    `shift`: log2 of the bytes that one entry maps. `leaf`: whether an entry may map a page
    ("never", "large" when its large bit is set, "always" on the last level). `reserved`:
    bits that must be zero in an entry that leads to a table, `leaf_reserved` in a leaf.
    """

    name: str
    shift: int
    leaf: str
    reserved: int
    leaf_reserved: int

    @property
    def span(self) -> int:
        """Bytes that one entry maps."""
        return 1 << self.shift


@dataclass(frozen=True, slots=True)
class PagingFormat:
    """A page-table format; `levels` from the top down."""

    name: str
    levels: tuple[Level, ...]
    present: int
    writable: int
    user: int
    large: int
    no_execute: int
    address: int  # mask of the physical address in an entry

    @property
    def address_bits(self) -> int:
        """Bits of a virtual address that are translated; those above repeat the top one."""
        return self.levels[0].shift + INDEX_BITS


_LARGE: Final = 1 << 7

_PT = Level("PT", 12, "always", 0, 0)
_PD = Level("PD", 21, "large", 0, 0x001F_E000)  # bits 20:13
_PDPT = Level("PDPT", 30, "large", 0, 0x3FFF_E000)  # bits 29:13
_PML4 = Level("PML4", 39, "never", _LARGE, 0)
_PML5 = Level("PML5", 48, "never", _LARGE, 0)


def _x86(name: str, levels: tuple[Level, ...]) -> PagingFormat:
    return PagingFormat(
        name=name,
        levels=levels,
        present=1 << 0,
        writable=1 << 1,
        user=1 << 2,
        large=_LARGE,
        no_execute=1 << 63,
        address=0x000F_FFFF_FFFF_F000,
    )


X86_64_4_LEVEL: Final = _x86("x86-64 4-level", (_PML4, _PDPT, _PD, _PT))
X86_64_5_LEVEL: Final = _x86("x86-64 5-level", (_PML5, _PML4, _PDPT, _PD, _PT))

#: Formats by number of levels.
X86_64: Final = {len(form.levels): form for form in (X86_64_4_LEVEL, X86_64_5_LEVEL)}
