"""The virtual memory layout of Linux on x86-64, as data.

Source: Documentation/arch/x86/x86_64/mm.rst (Documentation/x86/ up to 6.4) and
arch/x86/include/asm/pgtable_64_types.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pyscan.translate import X86_64_4_LEVEL, X86_64_5_LEVEL, PagingFormat, Span

#: The kernel's own image; the size is that of kernels with KASLR (RANDOMIZE_BASE).
KERNEL_IMAGE: Final = Span(0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_BFFF_FFFF)

#: Modules, and other code made at run time (ftrace trampolines, kprobes, BPF).
MODULES: Final = Span(0xFFFF_FFFF_C000_0000, 0xFFFF_FFFF_FEFF_FFFF)

#: Read-only alias of the interrupt descriptor table, the same on every kernel with per-CPU
#: entry areas (arch/x86/include/asm/cpu_entry_area.h, CPU_ENTRY_AREA_RO_IDT_VADDR).
READ_ONLY_IDT: Final = 0xFFFF_FE00_0000_0000

#: The image lies at a multiple of this, virtually and physically (CONFIG_PHYSICAL_ALIGN,
#: at least the size of the large pages that map it).
IMAGE_ALIGN: Final = 2 << 20

#: Memory below this may hold the real-mode trampoline (arch/x86/realmode/init.c).
LOW_MEMORY_END: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class PagingLayout:
    """What depends on the number of paging levels.

    `direct_map` is where the map of all physical memory may lie: from its place without
    KASLR to the end of the area in which CONFIG_RANDOMIZE_MEMORY moves it, always ahead
    of the vmalloc area and the memory map, which share that area
    (arch/x86/mm/kaslr.c, kernel_randomize_memory).
    """

    form: PagingFormat
    direct_map: Span


LAYOUTS: Final = {
    4: PagingLayout(X86_64_4_LEVEL, Span(0xFFFF_8880_0000_0000, 0xFFFF_FDFF_FFFF_FFFF)),
    5: PagingLayout(X86_64_5_LEVEL, Span(0xFF11_0000_0000_0000, 0xFFFF_FDFF_FFFF_FFFF)),
}
