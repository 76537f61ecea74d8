"""How data that is read-only after init may differ from the package."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class AfterInit(StrEnum):
    """What the kernel makes of a variable, or a part of it, while it boots.

    Addresses that the package holds stay, and no changed word leads to code, but where it is
    said otherwise.
    """

    VALUE = "value"  # a number
    POINTER = "pointer"  # an address of allocated memory, or of data
    PER_CPU = "per-cpu"  # addresses of the CPUs' areas, also in place of the package's
    OBJECT = "object"  # an address of other data of the image, also in place of the package's
    FUNCTIONS = "functions"  # addresses of functions' first instruction, and numbers
    STATIC_KEY = "static-key"  # a count, and the address of its jump entries
    HOOKS = "hooks"  # addresses of security hooks and of the heads of their lists
    VDSO = "vdso"  # an ELF image, whose alternatives are chosen by the processor


class Part(NamedTuple):
    """Bytes of a variable, from `offset` on. A length of 0 reaches to the next symbol."""

    kind: AfterInit
    offset: int
    length: int
