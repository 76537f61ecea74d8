"""Thunks against Indirect Target Selection: indirect branches in pages of their own.

On processors with that fault an indirect branch must not end in the lower half of a cache
line. The kernel then leads it through a thunk, which it makes in pages that no list names
(arch/x86/kernel/alternative.c: its_allocate_thunk, its_init_thunk). Their content is known to
the byte, so it speaks for itself.
"""

from __future__ import annotations

from typing import Final

from pyscan.records import PAGE_SHIFT, PAGE_SIZE
from pyscan.validate.context import Target
from pyscan.validate.memory import AccessFailed

_FIRST: Final = 32  # offset of a page's first thunk
_INT3: Final = 0xCC
_REX_B: Final = 0x41  # registers 8 to 15
_JUMP: Final = (0xFF, 0xE0)  # jmp *%reg; the register in the low three bits
#: Thunks of the package, which are used where no page could be had.
_STATIC: Final = "__x86_indirect_its_thunk_"


def thunks_in(page: bytes) -> dict[int, int]:
    """Register of every thunk by its offset, of a page that holds thunks and nothing else.

    Empty for any other page. Thunks follow each other, `jmp *%reg; int3` each; one whose end
    would lie in the lower half of a cache line goes to the next upper half. Elsewhere is int3.
    """
    found: dict[int, int] = {}
    expected = bytearray([_INT3]) * PAGE_SIZE
    offset = _FIRST
    while True:
        size = 3 if page[_upper(offset, 3) :][:1] == bytes(_JUMP[:1]) else 4
        offset = _upper(offset, size)
        register = _register(page[offset : offset + size])
        if register is None:
            break
        expected[offset : offset + size] = page[offset : offset + size]
        found[offset] = register
        offset += size
    return found if page == bytes(expected) else {}


def _upper(offset: int, size: int) -> int:
    """Where a thunk goes that would end in the lower half of a cache line."""
    if (offset + size - 1) % 64 < 32:
        return ((offset - 1) | 0x3F) + 33
    return offset


def _register(code: bytes) -> int | None:
    """The register that a thunk of 3 or 4 bytes jumps through; None for other code."""
    high = len(code) == 4
    if len(code) < 3 or (high and code[0] != _REX_B):
        return None
    jump, where, end = code[-3:]
    if jump != _JUMP[0] or where & 0xF8 != _JUMP[1] or end != _INT3:
        return None
    return where % 8 + 8 * high


class Thunks:
    """Registers of a target's thunks by their addresses; pages are read when asked for."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._pages: dict[int, dict[int, int]] = {}

    def get(self, address: int) -> int | None:
        """The register that the thunk at an address jumps through; None: there is none."""
        target = self._target
        if target.virtual_base <= address < target.image_end:
            return self._packaged(address)
        page = address >> PAGE_SHIFT
        if page not in self._pages:
            try:
                self._pages[page] = thunks_in(target.memory.read(page << PAGE_SHIFT, PAGE_SIZE))
            except AccessFailed:
                self._pages[page] = {}
        return self._pages[page].get(address % PAGE_SIZE)

    def _packaged(self, address: int) -> int | None:
        """Of a thunk in the kernel's text, which is compared by itself."""
        offset = address - self._target.virtual_base
        near = self._target.names.near(offset)
        code = self._target.packaged(offset, 4)
        if near is None or near[1] or not near[0].startswith(_STATIC) or code is None:
            return None
        return _register(code if code[0] == _REX_B else code[:3])
