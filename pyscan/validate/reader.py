"""Reading the state that decides how a kernel patches itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.validate.context import Target
from pyscan.validate.predict import Keys
from pyscan.validate.problem import ProblemKind, Problems
from pyscan.validate.state import INDIRECT_THUNK_ITS, PatchState

U64 = NDArray[np.uint64]
_WORD: Final = 8


def read_state(target: Target) -> PatchState:
    """The state of the whole image.

    Raises AccessFailed when it cannot be read: then nothing can be said about any text.
    """
    memory = target.memory
    first = target.offset("cpuinfo_x86.x86_capability")
    # The array ends where the next member begins.
    size = target.offset("cpuinfo_x86.x86_vendor_id") - first
    raw = memory.read(target.address("boot_cpu_data") + first, size)
    features = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), bitorder="little") != 0
    words = target.offset("paravirt_patch_template") // _WORD
    paravirt = memory.read(target.address("pv_ops"), words * _WORD)
    its = len(features) > INDIRECT_THUNK_ITS and bool(features[INDIRECT_THUNK_ITS])
    return PatchState(
        features=features,
        indirect_its=its,
        return_thunk=memory.u64(target.address("x86_return_thunk")),
        its_return_thunk=_optional(target, "its_return_thunk"),
        static_call_return=_optional(target, "__static_call_return"),
        static_call_return0=_optional(target, "__static_call_return0"),
        uniprocessor=bool(memory.u8(target.address("uniproc_patched"))),
        paravirt=np.frombuffer(paravirt, dtype="<u8"),
        paravirt_nop=target.address("_paravirt_nop"),
        paravirt_bug=_optional(target, "paravirt_BUG"),
    )


def _optional(target: Target, symbol: str) -> int:
    return target.address(symbol) if target.has(symbol) else 0


class KeyReader:
    """Reads static keys and static calls, each once, and remembers them for the report."""

    def __init__(self, target: Target, trampolines: Mapping[int, int], problems: Problems) -> None:
        self._target = target
        self._problems = problems
        self._trampolines = trampolines
        self.enabled: dict[int, bool] = {}
        self.functions: dict[int, int] = {}

    def keys(self) -> Keys:
        """The functions that a Predictor asks."""
        return Keys(self._read_enabled, self._read_functions)

    def key_of(self, address: int) -> int:
        """A static call's key by its own address or that of its trampoline."""
        return self._trampolines.get(address, address)

    def _read_enabled(self, addresses: U64) -> NDArray[np.bool_]:
        unique, inverse = np.unique(addresses, return_inverse=True)
        offset = np.uint64(self._target.offset("static_key.enabled"))
        values, good = self._target.memory.read_array(unique + offset, 4)
        self._complain(unique[~good], "static key")
        # static_key_count(): a negative count is a key that is being enabled.
        enabled = values != 0
        self.enabled.update(zip(unique.tolist(), enabled.tolist(), strict=True))
        found: NDArray[np.bool_] = enabled[inverse]
        return found

    def _read_functions(self, addresses: U64) -> U64:
        unique, inverse = np.unique(addresses, return_inverse=True)
        keys = np.array([self.key_of(each) for each in unique.tolist()], dtype=np.uint64)
        offset = np.uint64(self._target.offset("static_call_key.func"))
        values, good = self._target.memory.read_array(keys + offset, 8)
        self._complain(keys[~good], "static call key")
        self.functions.update(zip(keys.tolist(), values.tolist(), strict=True))
        found: U64 = values[inverse]
        return found

    def _complain(self, addresses: U64, what: str) -> None:
        for address in addresses.tolist():
            kind = ProblemKind.WILD_POINTER
            if self._target.memory.frame(address) is not None:
                kind = ProblemKind.UNREADABLE
            self._problems.add(kind, address, what, "it cannot be read")
