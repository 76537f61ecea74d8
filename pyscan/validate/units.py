"""Placing units: vmlinux, and each module that the kernel says it has loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.approved.unit import Slot, SlotKind, Unit
from pyscan.validate.context import Target
from pyscan.validate.objects import LoadedModule
from pyscan.validate.placed import Placed, place
from pyscan.validate.problem import ProblemKind, Problems

U64 = NDArray[np.uint64]
_MASK: Final = (1 << 64) - 1
_PAGE_MASK: Final = 4095


@dataclass(frozen=True, slots=True, eq=False)
class PlacedModule:
    """A loaded module whose package is known."""

    module: LoadedModule
    placed: Placed


@dataclass(frozen=True, slots=True, eq=False)
class PlacedUnits:
    """All text objects of a target. `keys` maps a static call's trampoline to its key."""

    vmlinux: Placed
    modules: tuple[PlacedModule, ...]
    unknown: tuple[LoadedModule, ...]  # in no approved package
    keys: Mapping[int, int]

    @property
    def all(self) -> tuple[Placed, ...]:
        """Every placed unit, the kernel first."""
        return (self.vmlinux, *(each.placed for each in self.modules))


def place_units(target: Target, problems: Problems) -> PlacedUnits:
    """Place what is loaded. A module of another layout than its package's is a problem."""
    base = (target.virtual_base - target.approved.vmlinux.link_address) & _MASK
    vmlinux = place(target.approved.vmlinux, target.virtual_base, lambda _slot: None)
    known, unknown = [], []
    for module in target.modules:
        unit = target.approved.modules.get(module.name)
        if unit is None:
            unknown.append(module)
        elif _fits(unit, module):
            known.append((module, unit))
        else:
            problems.add(
                ProblemKind.IMPLAUSIBLE,
                module.base,
                f"module {module.name}",
                f"text of {module.text_size} and read-only parts up to {module.ro_size} bytes; "
                f"its package has {unit.sizes[0]} and {unit.sizes[1]}",
            )
            unknown.append(module)
    exports = _kernel_exports(target.approved.vmlinux, base)
    for module, unit in known:
        exports.update(_module_exports(module, unit))
    modules = tuple(
        PlacedModule(module, place(unit, module.base, _resolver(module, unit, exports)))
        for module, unit in known
    )
    units = (vmlinux, *(each.placed for each in modules))
    return PlacedUnits(vmlinux, modules, tuple(unknown), _trampoline_keys(units))


def _fits(unit: Unit, module: LoadedModule) -> bool:
    return unit.sizes[:2] == (module.text_size, module.ro_size) and module.size >= unit.sizes[2]


def _kernel_exports(unit: Unit, base: int) -> dict[str, int]:
    # What is no kernel address is an offset into the per-CPU area, and is not moved.
    return {
        name: (addend + base if addend < 0 else addend) & _MASK for name, _, addend in unit.exports
    }


def _module_exports(module: LoadedModule, unit: Unit) -> dict[str, int]:
    bases = {SlotKind.BASE: module.base, SlotKind.PERCPU: module.percpu}
    return {
        name: (bases[unit.slots[slot].kind] + addend) & _MASK
        for name, slot, addend in unit.exports
        if unit.slots[slot].kind in bases
    }


def _init_base(module: LoadedModule, unit: Unit) -> int | None:
    """Where the module's init sections were, by its init function."""
    if unit.init_function is None or not module.init:
        return None
    base = module.init - unit.init_function
    return base if base > 0 and not base & _PAGE_MASK else None


def _resolver(
    module: LoadedModule, unit: Unit, exports: Mapping[str, int]
) -> Callable[[Slot], int | None]:
    init = _init_base(module, unit)

    def value(slot: Slot) -> int | None:
        if slot.kind is SlotKind.PERCPU:
            return module.percpu
        if slot.kind is SlotKind.INIT:
            return init
        return exports.get(slot.name)

    return value


def _trampoline_keys(units: tuple[Placed, ...]) -> dict[int, int]:
    keys: dict[int, int] = {}
    for placed in units:
        rows = placed.unit.sites.trampolines
        found = placed.resolve(rows["key_slot"], rows["key_addend"])
        for offset, key in zip(rows["offset"].tolist(), found.tolist(), strict=True):
            keys[placed.address + offset] = key
    return keys
