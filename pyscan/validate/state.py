"""The state that decides how a kernel patches itself, as it is read from a target."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

#: Bits of boot_cpu_data.x86_capability by word and bit (arch/x86/include/asm/cpufeatures.h).
RETPOLINE: Final = 11 * 32 + 12
RETPOLINE_LFENCE: Final = 11 * 32 + 13
RETHUNK: Final = 11 * 32 + 14
INDIRECT_THUNK_ITS: Final = 21 * 32 + 5


@dataclass(frozen=True, slots=True, eq=False)
class PatchState:
    """What the whole image agrees on.

    `features` (n,) bool: CPU features and bugs by their number. `paravirt` (n,) uint64: the
    functions in pv_ops. Addresses are virtual; 0 stands for a symbol that is not there.
    """

    features: NDArray[np.bool_]
    indirect_its: bool  # branches in the lower half of a cache line go through ITS thunks
    return_thunk: int  # x86_return_thunk
    its_return_thunk: int
    static_call_return: int  # __static_call_return, where a conditional tail call ends
    static_call_return0: int  # __static_call_return0
    uniprocessor: bool  # lock prefixes are patched away (uniproc_patched)
    paravirt: NDArray[np.uint64]
    paravirt_nop: int  # _paravirt_nop
    paravirt_bug: int  # paravirt_BUG

    def has(self, feature: int) -> bool:
        """Whether the kernel counts a feature as present."""
        return 0 <= feature < len(self.features) and bool(self.features[feature])


def same_state(one: PatchState, other: PatchState) -> bool:
    """Whether two states agree in everything."""
    return all(
        np.array_equal(getattr(one, each.name), getattr(other, each.name)) for each in fields(one)
    )
