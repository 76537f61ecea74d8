"""What differs between kernel series, as data: the formats of tables and the layouts needed.

A series that is not listed is refused when its package is compiled. A new one is a new entry
here, and new encoders where the kernel patches itself in new ways (pyscan/validate/patch.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pyscan.errors import PackageError
from pyscan.kernel import after_init_6_1
from pyscan.kernel.after_init import Part


@dataclass(frozen=True, slots=True)
class Series:
    """Formats of one kernel series.

    `module_ro_after_init`: sections of a module that are protected after its init only
    (kernel/module/main.c). `after_init`: variables of vmlinux that the boot sets and that are
    read-only afterwards, with what becomes of them.
    """

    name: str
    alternative_bytes: int  # sizeof(struct alt_instr), arch/x86/include/asm/alternative.h
    paravirt_bytes: int  # sizeof(struct paravirt_patch_site)
    module_ro_after_init: frozenset[str]
    after_init: Mapping[str, tuple[Part, ...]]


SERIES: Final = {
    "6.1": Series(
        name="6.1",
        alternative_bytes=12,
        paravirt_bytes=16,
        module_ro_after_init=frozenset({".data..ro_after_init", "__jump_table"}),
        after_init=after_init_6_1.AFTER_INIT,
    ),
}


def series_of(banner: str) -> Series:
    """The series of a kernel by its linux_banner. Raises PackageError for an unknown one."""
    found = re.match(r"Linux version (\d+\.\d+)\.", banner)
    name = found[1] if found else "unknown"
    series = SERIES.get(name)
    if series is None:
        raise PackageError(
            f"kernel series {name} is not supported; known series: {', '.join(sorted(SERIES))}"
        )
    return series


#: Layouts that a validation needs: "type.member" for an offset, "type" for a size, in bytes.
TYPE_PATHS: Final = (
    "cpuinfo_x86.x86_capability",
    "cpuinfo_x86.x86_vendor_id",
    "static_key.enabled",
    "static_call_key.func",
    "paravirt_patch_template",
)
