"""Whether a kernel is still starting: nothing is as its package implies until it has.

A starting kernel patches its code in place, and maps all of it writable and executable, up
to the moment when it protects itself. What is found before says nothing.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from pyscan.translate import WRITABLE
from pyscan.validate.attach import Attached
from pyscan.validate.memory import AccessFailed

#: enum system_states, include/linux/kernel.h (6.1): set by kernel_init(), init/main.c, right
#: after mark_readonly().
SYSTEM_RUNNING: Final = 3


def is_starting(attached: Attached) -> bool:
    """Whether the kernel says that it is not up yet, and has not protected its text yet.

    Both could be made so in a kernel that is up, by whoever can write all of it: so it is
    no verdict, and the caller must not believe it for ever.
    """
    target = attached.target
    if not target.has("system_state"):
        return False
    try:
        state = target.memory.u32(target.address("system_state"))
    except AccessFailed:
        return False
    if state >= SYSTEM_RUNNING:
        return False
    leaves = target.memory.leaves
    row = int(np.searchsorted(leaves.address, np.uint64(target.virtual_base), side="right")) - 1
    if row < 0 or target.virtual_base >= int(leaves.address[row]) + int(leaves.size[row]):
        return False
    return bool(leaves.flags[row] & WRITABLE)
