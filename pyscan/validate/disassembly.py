"""Instructions as a person reads them, with symbols where branches lead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import capstone

#: Longest instruction (Intel SDM vol. 2A, 2.3.11).
INSTRUCTION_BYTES_MAX: Final = 15
INSTRUCTIONS_MAX: Final = 3

_DECODER: Final = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
_BRANCHES: Final = re.compile(r"^(?:(?:notrack|bnd) )?(?:call|j[a-z]+|loop[a-z]*)$")
_ADDRESS: Final = re.compile(r"^0x[0-9a-f]+$")


def instruction_start(code: bytes, distance: int) -> int:
    """Where in a function's `code` the instruction begins that covers byte `distance`.

    `distance` itself where that cannot be told.
    """
    if not 0 <= distance <= len(code) - 1:
        return distance
    for at, size, _mnemonic, _operands in _DECODER.disasm_lite(code, 0):
        if at <= distance < at + size:
            return int(at)
    return distance


def disassemble(
    code: bytes, address: int, length: int, name: Callable[[int], str | None]
) -> tuple[str, int]:
    """The instructions that begin in the first `length` bytes, and how many bytes they are.

    At most INSTRUCTIONS_MAX of them; `name` gives the name of an address, or None. What is no
    instruction is shown as `(bad)`.
    """
    parts = []
    end = 0
    for at, size, mnemonic, operands in _DECODER.disasm_lite(code, address, INSTRUCTIONS_MAX):
        if at - address >= length:
            break
        end = at - address + size
        parts.append(_text(mnemonic, operands, name))
    if len(parts) < INSTRUCTIONS_MAX and end < length:
        parts.append("(bad)")
        end = length
    return "; ".join(parts), end


def _text(mnemonic: str, operands: str, name: Callable[[int], str | None]) -> str:
    if _BRANCHES.match(mnemonic) and _ADDRESS.match(operands):
        operands = name(int(operands, 16)) or operands
    return f"{mnemonic} {operands}".strip()
