"""Memory maps of QEMU's x86 machines, as data.

Sources: QEMU hw/i386/pc_q35.c (`pc_q35_init`), hw/i386/pc_piix.c (`pc_init1`),
hw/pci-host/pam.c, and `info mtree -f` of the machines themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyscan.errors import UsageError
from pyscan.records import PAGE_SIZE, MemoryRegion, RegionKind
from pyscan.sources.layout import Layout, Segment, load_map
from pyscan.sources.uri import SourceUri, parse_size

_GIB = 1 << 30
_ABOVE_GPA = 4 * _GIB

#: Ranges that the chipset's PAM registers turn into ROM once the firmware has copied
#: itself there (SeaBIOS); QEMU then shows the same bytes of the RAM file read-only.
ROM_RANGES = ((0xC3000, 0xE8000), (0xF0000, 0x100000))

#: RAM from which QEMU moves the upper part away for AMD processors (1 TiB hole of
#: HyperTransport, hw/i386/pc.c): such machines need an explicit map.
SIZE_MAX = 1000 * _GIB


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a machine type splits its RAM around the 32-bit PCI hole; bytes."""

    name: str
    type_prefix: str  # of the versioned QOM type: pc-q35-7.2-machine
    low_max: int  # RAM smaller than this lies below 4 GiB as a whole
    low_split: int  # otherwise this much does
    below_4g_max: int  # default of the machine property max-ram-below-4g


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("q35", "pc-q35-", 0xB000_0000, 0x8000_0000, 4 * _GIB),
        Machine("pc", "pc-i440fx-", 0xE000_0000, 0xC000_0000, 0xE000_0000),
    )
}


def find_machine(name: str) -> Machine:
    """The machine called `name`. Raises UsageError that lists the known ones."""
    machine = MACHINES.get(name)
    if machine is None:
        raise UsageError(
            f"unknown machine {name!r}; known are {', '.join(MACHINES)} "
            "(describe any other with map=FILE)"
        )
    return machine


def uri_layout(uri: SourceUri) -> Layout:
    """The layout that a URI describes by `map=FILE`, or by `machine=NAME&size=SIZE`.

    Raises UsageError (ConfigError for what stands in the map file).
    """
    if "map" in uri.parameters:
        if "machine" in uri.parameters or "size" in uri.parameters:
            raise UsageError(f"{uri.text}: give either map=, or machine= and size=")
        return load_map(Path(uri.parameters["map"]))
    uri.require("machine", "size")
    return machine_layout(
        find_machine(uri.parameters["machine"]), parse_size(uri.parameters["size"])
    )


def machine_layout(machine: Machine, size: int, below_4g_max: int | None = None) -> Layout:
    """Layout of the RAM file of a machine with `size` bytes of RAM.

    `below_4g_max` is QEMU's machine property max-ram-below-4g, by default the machine's
    own default. Raises UsageError.
    """
    below = machine.below_4g_max if below_4g_max is None else below_4g_max
    if below > machine.below_4g_max:  # QEMU then splits by another rule
        raise UsageError(
            f"max-ram-below-4g={below:#x} is above the default of machine {machine.name}; "
            "leave it out, or describe the memory with map=FILE"
        )
    if size <= 0 or size % PAGE_SIZE or size > SIZE_MAX:
        raise UsageError(
            f"RAM size of {size} bytes must be a multiple of {PAGE_SIZE}, at most "
            f"{SIZE_MAX >> 30}G; describe other machines with map=FILE"
        )
    split = machine.low_split if size >= machine.low_max else machine.low_max
    low = min(size, split, below)
    return Layout.of([*_low_segments(low), *_high_segments(low, size)])


def _low_segments(low: int) -> Iterator[Segment]:
    start = 0
    for rom_start, rom_end in ROM_RANGES:
        yield from _segment(start, min(rom_start, low), RegionKind.RAM)
        yield from _segment(rom_start, min(rom_end, low), RegionKind.ROM)
        start = rom_end
    yield from _segment(start, low, RegionKind.RAM)


def _segment(start: int, end: int, kind: RegionKind) -> Iterator[Segment]:
    if start < end:
        yield Segment(MemoryRegion(start, end - start, kind), offset=start)


def _high_segments(low: int, size: int) -> Iterator[Segment]:
    if size > low:
        yield Segment(MemoryRegion(_ABOVE_GPA, size - low), offset=low)
