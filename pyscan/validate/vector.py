"""The state that a kernel is in, by name: what policy judges and people read.

A kernel may legally be in many states: a static key and all its jumps switched, a function
traced, a module loaded. Bytes cannot tell which of them is wanted, so the state is put down
here, without addresses, and compared by `pyscan.validate.rules`. Two boots in the same state
have equal vectors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from pyscan.validate.names import NAME_MAX, PlaceNames
from pyscan.validate.state import INDIRECT_THUNK_ITS, RETPOLINE, RETPOLINE_LFENCE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pyscan.validate.state import PatchState
    from pyscan.validate.validation import Validation

_Entry = TypeVar("_Entry")

#: Entries that a vector holds of each kind; a kernel has some thousand keys and calls.
KEYS_MAX: Final = 1 << 15
ENTRIES_MAX: Final = 4096

#: Changes that are listed of one comparison.
CHANGES_MAX: Final = 4096


class StateClass(StrEnum):
    """Kinds of state, as rules and configuration files name them; the gravest first."""

    UNKNOWN_MODULE = "unknown-module"  # in no approved package; no rule allows it
    FEATURES = "features"  # of the CPU, and how branches, returns and locks are patched
    STATIC_KEY = "static-key"
    STATIC_CALL = "static-call"
    FTRACE = "ftrace"
    KPROBE = "kprobe"
    MODULE = "module"
    BPF = "bpf"


class RetpolineMode(StrEnum):
    """How indirect branches are made (arch/x86/kernel/alternative.c, patch_retpoline)."""

    THUNK = "thunk"  # a retpoline
    INDIRECT = "indirect"  # the plain branch
    LFENCE = "lfence"  # a fence before the plain branch
    ITS = "its"  # a plain branch, in a thunk where Indirect Target Selection applies


@dataclass(frozen=True, slots=True)
class StateChange:
    """One difference of two vectors; "" for what was or is not there."""

    kind: StateClass
    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.before or 'absent'} -> {self.after or 'absent'}"


@dataclass(frozen=True, slots=True)
class StateVector:
    """A kernel's state by names. Tuples are sorted, and hold a name as often as it is there.

    `features`: x86_capability of boot_cpu_data as one hexadecimal number, feature 0 its
    lowest bit. `omitted` counts entries beyond the bounds.
    """

    features: str
    return_thunk: str
    retpoline: RetpolineMode
    uniprocessor: bool
    static_keys: Mapping[str, bool]
    static_calls: Mapping[str, str]  # key -> function; "" for none
    ftrace: tuple[str, ...]  # functions that traced ones call
    kprobes: tuple[str, ...]  # probed places
    modules: tuple[str, ...]
    unknown_modules: tuple[str, ...]
    bpf: tuple[str, ...]  # programs; their names hold a digest of the program
    omitted: int = 0

    def patching(self) -> dict[str, str]:
        """What is compared as class `features`, by name."""
        return {
            "cpu": self.features,
            "return-thunk": self.return_thunk,
            "retpoline": str(self.retpoline),
            "uniprocessor": "yes" if self.uniprocessor else "no",
        }

    def listed(self) -> dict[StateClass, tuple[str, ...]]:
        """What is there or not, by class."""
        return {
            StateClass.UNKNOWN_MODULE: self.unknown_modules,
            StateClass.MODULE: self.modules,
            StateClass.KPROBE: self.kprobes,
            StateClass.FTRACE: self.ftrace,
            StateClass.BPF: self.bpf,
        }

    def to_json(self) -> dict[str, object]:
        """A document of plain values."""
        return {
            "features": self.features,
            "return_thunk": self.return_thunk,
            "retpoline": str(self.retpoline),
            "uniprocessor": self.uniprocessor,
            "static_keys": dict(self.static_keys),
            "static_calls": dict(self.static_calls),
            "ftrace": list(self.ftrace),
            "kprobes": list(self.kprobes),
            "modules": list(self.modules),
            "unknown_modules": list(self.unknown_modules),
            "bpf": list(self.bpf),
            "omitted": self.omitted,
        }

    def __str__(self) -> str:
        """One line for a table."""
        on = sum(self.static_keys.values())
        calls = sum(1 for function in self.static_calls.values() if function)
        features = int(self.features or "0", 16).bit_count()
        parts = [
            f"{features} CPU features",
            f"returns {self.return_thunk}",
            f"branches {self.retpoline}",
            "one CPU" if self.uniprocessor else "SMP",
            f"keys {on}/{len(self.static_keys)}",
            f"calls {calls}/{len(self.static_calls)}",
            f"ftrace {len(self.ftrace)}",
            f"kprobes {len(self.kprobes)}",
            f"modules {len(self.modules)}",
            f"bpf {len(self.bpf)}",
        ]
        if self.unknown_modules:
            parts.append(f"unknown modules {len(self.unknown_modules)}")
        return ", ".join(parts)


def state_vector(validation: Validation) -> StateVector:
    """The state that a validation has seen. It reads no memory."""
    names = PlaceNames(validation.units)
    structures, state = validation.structures, validation.state
    enabled = _by_name(validation.keys.enabled, names)
    functions = {
        key: names.text(function) if function else ""
        for key, function in _by_name(validation.keys.functions, names).items()
    }
    lists = {
        "ftrace": (names.text(ops.func) for ops in structures.ftrace),
        "kprobes": (names.text(probe.address) for probe in structures.kprobes),
        "modules": (each.module.name for each in validation.units.modules),
        "unknown": (module.name for module in validation.units.unknown),
        "bpf": (symbol.name for symbol in structures.bpf if symbol.program),
    }
    kept = {key: _sorted(found) for key, found in lists.items()}
    omitted = sum(count - len(rows) for rows, count in kept.values())
    omitted += len(validation.keys.enabled) - len(enabled)
    omitted += len(validation.keys.functions) - len(functions)
    return StateVector(
        features=features_text(state.features),
        return_thunk=names.text(state.return_thunk),
        retpoline=retpoline_mode(state),
        uniprocessor=state.uniprocessor,
        static_keys=enabled,
        static_calls=functions,
        ftrace=kept["ftrace"][0],
        kprobes=kept["kprobes"][0],
        modules=kept["modules"][0],
        unknown_modules=kept["unknown"][0],
        bpf=kept["bpf"][0],
        omitted=omitted,
    )


def features_text(features: NDArray[np.bool_]) -> str:
    """Features (n,) as a hexadecimal number, feature 0 its lowest bit."""
    packed = np.packbits(features, bitorder="little").tobytes()
    return f"{int.from_bytes(packed, 'little'):x}"


def retpoline_mode(state: PatchState) -> RetpolineMode:
    """What patch_retpoline() makes of indirect branches under a state."""
    if state.has(RETPOLINE_LFENCE):
        return RetpolineMode.LFENCE
    if state.has(RETPOLINE):
        return RetpolineMode.THUNK
    return RetpolineMode.ITS if state.has(INDIRECT_THUNK_ITS) else RetpolineMode.INDIRECT


def changes(before: StateVector, after: StateVector) -> tuple[StateChange, ...]:
    """What differs, by class and name; at most CHANGES_MAX.

    Of keys and calls only those that both vectors have are compared: others have come or
    gone with a module, which is a change of its own.
    """
    found = []
    kind = StateClass.FEATURES
    new = after.patching()
    for name, value in before.patching().items():
        if value != new[name]:
            found.append(StateChange(kind, name, value, new[name]))
    new_lists = after.listed()
    for kind, names in before.listed().items():
        found += _changed_lists(kind, names, new_lists[kind])
    for name, function in before.static_calls.items():
        now = after.static_calls.get(name, function)
        if now != function:
            change = StateChange(StateClass.STATIC_CALL, name, function or "none", now or "none")
            found.append(change)
    for name, on in before.static_keys.items():
        if after.static_keys.get(name, on) != on:
            old, new_text = ("on", "off") if on else ("off", "on")
            found.append(StateChange(StateClass.STATIC_KEY, name, old, new_text))
    return tuple(found[:CHANGES_MAX])


def present_text(count: int) -> str:
    """How a change tells that something is there, once or several times."""
    return "" if not count else "present" if count == 1 else f"present {count} times"


def _changed_lists(
    kind: StateClass, before: tuple[str, ...], after: tuple[str, ...]
) -> list[StateChange]:
    old, new = Counter(before), Counter(after)
    return [
        StateChange(kind, name, present_text(old[name]), present_text(new[name]))
        for name in sorted(old.keys() | new.keys())
        if old[name] != new[name]
    ]


def _by_name(values: Mapping[int, _Entry], names: PlaceNames) -> dict[str, _Entry]:
    """Values by the names of their addresses, in order of the names."""
    found = {names.key(address): values[address] for address in sorted(values)[:KEYS_MAX]}
    return dict(sorted(found.items()))


def _sorted(names: Iterable[str]) -> tuple[tuple[str, ...], int]:
    """At most ENTRIES_MAX names in order, each of bounded length, and how many there were."""
    found = sorted(name[:NAME_MAX] for name in names)
    return tuple(found[:ENTRIES_MAX]), len(found)
