"""How data that is read-only after init may differ from the package."""

from __future__ import annotations

from enum import StrEnum


class AfterInit(StrEnum):
    """What the kernel makes of a variable while it boots.

    Addresses that the package holds stay, but where it is said otherwise. A changed word
    leads to no code, but where it is said otherwise.
    """

    VALUE = "value"  # a number, or an address of allocated memory
    REPLACED = "replaced"  # as VALUE; addresses of the package are replaced, too
    OBJECT = "object"  # an address of other data of the image
    FUNCTIONS = "functions"  # addresses of functions' first instruction, and numbers
    STATIC_KEY = "static-key"  # a count, and the address of its jump entries
    HOOKS = "hooks"  # addresses of security hooks and of the heads of their lists
    VDSO = "vdso"  # an ELF image, whose alternatives are chosen by the processor
