"""What every validation needs at hand: the approved kernel, and where it lies in memory.

Addresses are virtual and at run time, unless they are called offsets: those count from the
first byte of a unit's image, as in `pyscan.approved.unit`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Self

import numpy as np
from numpy.typing import NDArray

from pyscan.approved.linux import LinuxApproved
from pyscan.approved.unit import VMLINUX, SymbolKind, Symbols
from pyscan.errors import ApprovedFileError
from pyscan.kernel.discover import KernelImage
from pyscan.validate.memory import VirtualMemory
from pyscan.validate.placed import place

if TYPE_CHECKING:
    from pyscan.validate.objects import LoadedModule

U64 = NDArray[np.uint64]

#: Longest name that kallsyms holds (KSYM_NAME_LEN, include/linux/kallsyms.h; 6.1: 512).
_NAME_MAX: Final = 512

_ADDRESS_MASK: Final = (1 << 64) - 1


class SymbolNames:
    """Look-up of a unit's symbols by name and by offset."""

    def __init__(self, symbols: Symbols) -> None:
        self._offsets: list[int] = symbols.offsets.tolist()
        self._starts: list[int] = symbols.starts.tolist()
        self._data = symbols.names.tobytes()
        self._by_name: dict[str, int] = {}
        self._shared: frozenset[bytes] | None = None  # made when it is asked for
        for row in range(len(self._starts)):
            self._by_name.setdefault(self._name(row), self._offsets[row])

    def offset(self, name: str) -> int | None:
        """Offset of the first symbol of that name, or None."""
        return self._by_name.get(name)

    def near(self, offset: int) -> tuple[str, int] | None:
        """The symbol at or ahead of an offset and the distance to it, or None."""
        row = bisect_right(self._offsets, offset) - 1
        if row < 0:
            return None
        while row and self._offsets[row - 1] == self._offsets[row]:
            row -= 1
        return self._name(row), offset - self._offsets[row]

    def end(self, offset: int) -> int | None:
        """Offset of the next symbol behind the one at `offset`, or None."""
        row = bisect_right(self._offsets, offset)
        return self._offsets[row] if row < len(self._offsets) else None

    def is_shared(self, name: str) -> bool:
        """Whether several symbols have that name."""
        if self._shared is None:
            counts = Counter(self._data.split(b"\0"))
            self._shared = frozenset(each for each, count in counts.items() if count > 1)
        return name.encode("ascii", "replace") in self._shared

    def ending(self, suffix: str, first: int, last: int) -> Iterator[tuple[str, int]]:
        """Name and offset of each symbol in [first, last) whose name ends with `suffix`."""
        for row in range(bisect_right(self._offsets, first - 1), len(self._offsets)):
            if self._offsets[row] >= last:
                return
            name = self._name(row)
            if name.endswith(suffix):
                yield name, self._offsets[row]

    def _name(self, row: int) -> str:
        start = self._starts[row]
        end = self._data.find(0, start, start + _NAME_MAX)
        return self._data[start : end if end >= 0 else start].decode("ascii", "replace")


@lru_cache(maxsize=1024)
def names_of(symbols: Symbols) -> SymbolNames:
    """One look-up of a unit for all targets that have it in memory."""
    return SymbolNames(symbols)


@lru_cache(maxsize=1024)
def function_offsets(symbols: Symbols) -> U64:
    """Offsets of a unit's functions, ascending; one array for all targets."""
    offsets = symbols.offsets[symbols.kinds == SymbolKind.FUNCTION]
    return np.unique(offsets).astype(np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One attached kernel. `of` builds it; `with_modules` and `with_functions` add to it."""

    memory: VirtualMemory
    approved: LinuxApproved
    names: SymbolNames  # of vmlinux
    virtual_base: int  # of the first byte of vmlinux' image
    physical_base: int
    modules: tuple[LoadedModule, ...] = ()
    functions: tuple[tuple[int, U64], ...] = ()  # entries: a base, and ascending offsets from it

    @classmethod
    def of(cls, memory: VirtualMemory, approved: LinuxApproved, kernel: KernelImage) -> Self:
        """The context of a kernel that was found at `kernel`."""
        names = names_of(approved.vmlinux.symbols)
        return cls(
            memory=memory,
            approved=approved,
            names=names,
            virtual_base=kernel.virtual_base,
            physical_base=kernel.physical_base,
            functions=((kernel.virtual_base, function_offsets(approved.vmlinux.symbols)),),
        )

    @property
    def slide(self) -> int:
        """What is added to link addresses of vmlinux, modulo 2**64."""
        return (self.virtual_base - self.approved.vmlinux.link_address) & _ADDRESS_MASK

    @property
    def image_end(self) -> int:
        """First address behind vmlinux in memory."""
        return self.virtual_base + self.approved.vmlinux.length

    def with_modules(self, modules: tuple[LoadedModule, ...]) -> Target:
        """This context with the modules that are loaded."""
        return replace(self, modules=modules)

    def with_functions(self, base: int, offsets: U64) -> Target:
        """This context with further entries of functions, such as a module's, ascending."""
        return replace(self, functions=(*self.functions, (base, offsets)))

    def has(self, symbol: str) -> bool:
        """Whether vmlinux has a symbol of that name."""
        return self.names.offset(symbol) is not None

    def symbol(self, symbol: str) -> int:
        """Offset of a symbol in vmlinux' image. Raises ApprovedFileError."""
        offset = self.names.offset(symbol)
        if offset is None:
            raise ApprovedFileError(
                f"approved configuration of {self.approved.release}: vmlinux has no symbol "
                f"{symbol}; this kernel series is not supported"
            )
        return offset

    def address(self, symbol: str) -> int:
        """Where a symbol of vmlinux is at run time. Raises ApprovedFileError."""
        return (self.virtual_base + self.symbol(symbol)) & _ADDRESS_MASK

    def link_address(self, symbol: str) -> int:
        """Link address of a symbol: of per-CPU variables the offset in their area."""
        return (self.approved.vmlinux.link_address + self.symbol(symbol)) & _ADDRESS_MASK

    def offset(self, path: str) -> int:
        """Offset of a type's member, or a type's size. Raises ApprovedFileError."""
        try:
            return self.approved.offsets[path]
        except KeyError:
            raise ApprovedFileError(
                f"approved configuration of {self.approved.release}: it has no offset of "
                f"{path}; compile it anew from the kernel package"
            ) from None

    def knows(self, path: str) -> bool:
        """Whether the approved configuration has the offset of that member."""
        return path in self.approved.offsets

    def are_functions(self, addresses: U64) -> NDArray[np.bool_]:
        """Which addresses are the entry of a function of vmlinux or a placed module."""
        found = np.zeros(len(addresses), dtype=bool)
        for base, entries in self.functions:
            if len(entries):
                offsets = addresses - np.uint64(base)
                row = np.minimum(np.searchsorted(entries, offsets), len(entries) - 1)
                found |= entries[row] == offsets
        return found

    def is_function(self, address: int) -> bool:
        """Whether one address is the entry of a function."""
        if not 0 <= address <= _ADDRESS_MASK:
            return False
        return bool(self.are_functions(np.array([address], dtype=np.uint64))[0])

    def place(self, address: int) -> str:
        """Name of an address for a report: "vmlinux sys_call_table+0x1d8"."""
        for module in self.modules:
            if module.base <= address < module.base + module.size:
                return f"module {module.name}+{address - module.base:#x}"
        if self.virtual_base <= address < self.image_end:
            near = self.names.near(address - self.virtual_base)
            if near is not None:
                return f"{VMLINUX} {near[0]}+{near[1]:#x}"
        return f"{address:#x}"

    def packaged(self, offset: int, length: int) -> bytes | None:
        """Bytes of vmlinux as the package has them, relocated for where it runs.

        None: the image that the approved configuration keeps does not reach so far.
        """
        unit = self.approved.vmlinux
        if not 0 <= offset <= offset + length <= len(unit.image):
            return None
        placed = place(unit, self.virtual_base, lambda _slot: None)
        return placed.relocated(offset, offset + length)[0].tobytes()
