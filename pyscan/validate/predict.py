"""The exact bytes of protected memory, from the package and the state of the target.

Nothing is canonicalised or masked: under one state every patch site has one content, and the
few whose content only the target knows (which functions are traced, where a trampoline lies)
are settled against explicit lists in `pyscan.validate.code`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.approved.unit import VMLINUX, Unit
from pyscan.validate import patch
from pyscan.validate.patch import Window
from pyscan.validate.placed import EDGE, Placed
from pyscan.validate.state import PatchState

U64 = NDArray[np.uint64]
_REPLACEMENTS: Final = ".altinstr_replacement"


@dataclass(frozen=True, slots=True)
class Keys:
    """How the target's static keys and static calls stand.

    `enabled` and `functions` take virtual addresses (n,) uint64 of struct static_key and
    struct static_call_key, and give (n,) bool or uint64.
    """

    enabled: Callable[[U64], NDArray[np.bool_]]
    functions: Callable[[U64], U64]


class Predictor:
    """Predicts units of one target under one state."""

    def __init__(self, state: PatchState, keys: Keys) -> None:
        self.state = state
        self.keys = keys
        self._replacements: dict[str, Window] = {}

    def text(self, placed: Placed, start: int, end: int) -> NDArray[np.uint8]:
        """Text from offset `start` to `end`."""
        window = self._linked(placed, max(0, start - EDGE), end + EDGE)
        patch.patch_alternatives(window, self._replacement(placed), self.state)
        patch.patch_locks(window, self.state, own_text(placed.unit))
        patch.patch_mcount(window)
        self._patch_keys(window)
        return window.data[start - window.start : end - window.start]

    def linked(self, placed: Placed, start: int, end: int) -> NDArray[np.uint8]:
        """Text as the package has it, linked, with only its returns and branches patched."""
        window = self._linked(placed, max(0, start - EDGE), end + EDGE)
        return window.data[start - window.start : end - window.start]

    def _linked(self, placed: Placed, start: int, end: int) -> Window:
        """Relocated text, patched as far as no alternative is concerned."""
        data, _ = placed.relocated(start, end)
        window = Window(placed, start, data)
        patch.patch_paravirt(window, self.state)
        patch.patch_retpolines(window, self.state)
        patch.patch_returns(window, self.state)
        return window

    def _replacement(self, placed: Placed) -> Window:
        """The unit's alternative instructions, made once."""
        found = self._replacements.get(placed.unit.name)
        if found is None:
            start, end = section_range(placed.unit, _REPLACEMENTS)
            found = self._replacements[placed.unit.name] = self._linked(placed, start, end)
        return found

    def _patch_keys(self, window: Window) -> None:
        placed = window.placed
        sites = placed.unit.sites
        labels = window.rows(sites.jump_labels, 5)
        if len(labels):
            keys = placed.resolve(labels["key_slot"], labels["key_addend"])
            patch.patch_jump_labels(window, self.keys.enabled(keys), labels)
        calls = window.rows(sites.static_calls, 6)
        if len(calls):
            keys = placed.resolve(calls["key_slot"], calls["key_addend"])
            patch.patch_static_calls(window, self.keys.functions(keys), calls, self.state)
        trampolines = window.rows(sites.trampolines, 8)
        if len(trampolines):
            keys = placed.resolve(trampolines["key_slot"], trampolines["key_addend"])
            patch.patch_trampolines(window, self.keys.functions(keys), trampolines, self.state)


def section_range(unit: Unit, name: str) -> tuple[int, int]:
    """Offsets where a section begins and ends; (0, 0) when the unit has none of that name."""
    for section in unit.sections:
        if section.name == name:
            return section.offset, section.offset + section.length
    return 0, 0


def own_text(unit: Unit) -> tuple[int, int]:
    """The range in which lock prefixes are patched: all text of vmlinux, .text of a module."""
    if unit.name == VMLINUX:
        return 0, unit.segments[0].length
    return section_range(unit, ".text")
