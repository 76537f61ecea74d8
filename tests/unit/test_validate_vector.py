"""The state of a kernel by name: made of a validation, and compared."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from fake_kernel import MIB, FakeKernel
from fake_target import MODULES
from fake_validation import FakeValidation, state, structures
from tables import Memory

from pyscan.validate.names import NAME_MAX, PlaceNames
from pyscan.validate.objects import BpfSymbol, FtraceOps, Kprobe, LoadedModule
from pyscan.validate.state import INDIRECT_THUNK_ITS, RETPOLINE, RETPOLINE_LFENCE
from pyscan.validate.units import PlacedUnits
from pyscan.validate.validation import Validation
from pyscan.validate.vector import (
    CHANGES_MAX,
    ENTRIES_MAX,
    RetpolineMode,
    StateChange,
    StateClass,
    StateVector,
    changes,
    features_text,
    retpoline_mode,
    state_vector,
)

VECTOR = StateVector(
    features="1f",
    return_thunk="__x86_return_thunk",
    retpoline=RetpolineMode.THUNK,
    uniprocessor=False,
    static_keys={"a": True, "b": False},
    static_calls={"x": "f", "y": ""},
    ftrace=("function_trace_call",),
    kprobes=("vfs_read",),
    modules=("ext4", "nvme"),
    unknown_modules=(),
    bpf=("bpf_prog_1", "bpf_prog_1"),
)


@pytest.fixture
def fake(tmp_path: Path) -> FakeValidation:
    names = {"key_one": 0x42_4000, "key_two": 0x42_4010, "call": 0x42_4100}
    return FakeValidation(Memory(tmp_path / "ram", 64 * MIB), symbols=names)


def probe(address: int) -> Kprobe:
    return Kprobe(0, address, 0x55, 0, 0, 0, 0, 0, (), 0, 0, b"")


def module(name: str) -> LoadedModule:
    return LoadedModule(name, 0, 0, MODULES, 0x3000, 0x1000, 0x2000, 0, 0, 0, 0)


def full(fake: FakeValidation, validation: Validation) -> Validation:
    """A state with one of everything."""
    at = fake.address
    validation.structures = structures(
        ftrace=(FtraceOps(0, at("ftrace_ops_assist_func"), 0, 0, 0),) * 2,
        kprobes=(probe(at("other_function") + 5), probe(at("kernel_function"))),
        bpf=(
            BpfSymbol(1, 2, "bpf_prog_b", True),
            BpfSymbol(3, 4, "bpf_trampoline_1", False),
            BpfSymbol(5, 6, "bpf_prog_a", True),
        ),
    )
    validation.keys.enabled.update({at("key_two"): True, at("key_one"): False})
    validation.keys.functions.update({at("call"): at("kernel_function"), at("call") + 16: 0})
    units = validation.units
    validation.units = PlacedUnits(units.vmlinux, (), (module("evil\\x20"),), units.keys)
    return validation


def test_vector_of_a_validation(fake: FakeValidation) -> None:
    with fake.memory.source() as source:
        patching = state(0, 4, RETPOLINE, return_thunk=fake.address("kernel_function"))
        vector = state_vector(full(fake, fake.validation(source, patching)))
    assert vector == StateVector(
        features=f"{1 << RETPOLINE | 0x11:x}",
        return_thunk="kernel_function",
        retpoline=RetpolineMode.THUNK,
        uniprocessor=False,
        static_keys={"key_one": False, "key_two": True},
        static_calls={"call": "kernel_function", "call+0x10": ""},
        ftrace=("ftrace_ops_assist_func", "ftrace_ops_assist_func"),
        kprobes=("kernel_function", "other_function+0x5"),
        modules=(),
        unknown_modules=("evil\\x20",),
        bpf=("bpf_prog_a", "bpf_prog_b"),
    )
    assert list(vector.static_keys) == ["key_one", "key_two"]
    text = str(vector)
    assert "\n" not in text
    assert "keys 1/2" in text
    assert "unknown modules 1" in text


def test_vector_does_not_depend_on_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = []
    for number, base in enumerate((0xFFFF_FFFF_9A00_0000, 0xFFFF_FFFF_B120_0000)):
        monkeypatch.setattr("fake_target.FakeKernel", partial(FakeKernel, virtual=base))
        names = {"key_one": 0x42_4000, "key_two": 0x42_4010, "call": 0x42_4100}
        fake = FakeValidation(Memory(tmp_path / f"ram{number}", 64 * MIB), symbols=names)
        assert fake.base == base
        with fake.memory.source() as source:
            patching = state(1, return_thunk=fake.address("kernel_function"))
            vectors.append(state_vector(full(fake, fake.validation(source, patching))))
    assert vectors[0] == vectors[1]


def test_namesakes_are_told_apart(fake: FakeValidation) -> None:
    fake.symbols = {"key_a": 0x42_4000, "key_b": 0x42_4010}
    with fake.memory.source() as source:
        validation = fake.validation(source)
        unit = validation.units.vmlinux.unit
        names = unit.symbols.names.tobytes().replace(b"key_a\0", b"key_b\0")
        symbols = replace(unit.symbols, names=unit.symbols.names.copy())
        symbols.names[:] = list(names)
        placed = replace(validation.units.vmlinux, unit=replace(unit, symbols=symbols))
        validation.units = PlacedUnits(placed, (), (), {})
        validation.target = replace(validation.target, names=type(validation.target.names)(symbols))
        found = PlaceNames(validation.units)
        assert found.key(fake.base + 0x42_4000) == "key_b@0x424000"
        assert found.key(fake.base + 0x42_4010) == "key_b@0x424010"
        assert found.text(fake.base + 0x42_4010) == "key_b"
        assert found.text(7) == "0x7"


def test_lists_are_bounded(fake: FakeValidation) -> None:
    with fake.memory.source() as source:
        validation = fake.validation(source)
        programs = tuple(BpfSymbol(0, 1, f"{n:06}" + "x" * 500, True) for n in range(5000))
        validation.structures = structures(bpf=programs)
        vector = state_vector(validation)
    assert len(vector.bpf) == ENTRIES_MAX
    assert vector.omitted == 5000 - ENTRIES_MAX
    assert all(len(name) == NAME_MAX for name in vector.bpf)


def test_json_is_plain(fake: FakeValidation) -> None:
    document = json.loads(json.dumps(VECTOR.to_json()))
    assert document["static_calls"] == {"x": "f", "y": ""}
    assert document["retpoline"] == "thunk"
    assert document["bpf"] == ["bpf_prog_1"] * 2


@pytest.mark.parametrize(
    ("features", "mode"),
    [
        ((), RetpolineMode.INDIRECT),
        ((RETPOLINE,), RetpolineMode.THUNK),
        ((RETPOLINE, RETPOLINE_LFENCE), RetpolineMode.LFENCE),
        ((INDIRECT_THUNK_ITS,), RetpolineMode.ITS),
        ((RETPOLINE, INDIRECT_THUNK_ITS), RetpolineMode.THUNK),
    ],
)
def test_retpoline_mode(features: tuple[int, ...], mode: RetpolineMode) -> None:
    assert retpoline_mode(state(*features)) is mode


def test_features_as_a_number() -> None:
    assert features_text(state().features) == "0"
    assert features_text(state(0, 9, 700).features) == f"{1 << 700 | 1 << 9 | 1:x}"


def test_equal_states_have_no_changes() -> None:
    assert changes(VECTOR, VECTOR) == ()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"features": "1e"}, StateChange(StateClass.FEATURES, "cpu", "1f", "1e")),
        ({"return_thunk": "r"}, ("features", "return-thunk", "__x86_return_thunk", "r")),
        ({"retpoline": RetpolineMode.ITS}, ("features", "retpoline", "thunk", "its")),
        ({"uniprocessor": True}, ("features", "uniprocessor", "no", "yes")),
        ({"static_keys": {"a": False, "b": False}}, ("static-key", "a", "on", "off")),
        ({"static_keys": {"a": True, "b": True}}, ("static-key", "b", "off", "on")),
        ({"static_calls": {"x": "g", "y": ""}}, ("static-call", "x", "f", "g")),
        ({"static_calls": {"x": "", "y": ""}}, ("static-call", "x", "f", "none")),
        ({"static_calls": {"x": "f", "y": "h"}}, ("static-call", "y", "none", "h")),
        ({"ftrace": ()}, ("ftrace", "function_trace_call", "present", "")),
        ({"kprobes": ("vfs_read", "z")}, ("kprobe", "z", "", "present")),
        ({"modules": ("ext4",)}, ("module", "nvme", "present", "")),
        ({"unknown_modules": ("rk",)}, ("unknown-module", "rk", "", "present")),
        ({"bpf": ("bpf_prog_1",)}, ("bpf", "bpf_prog_1", "present 2 times", "present")),
    ],
)
def test_each_change(change: dict[str, object], expected: tuple[str, str, str, str]) -> None:
    found = changes(VECTOR, replace(VECTOR, **change))
    if not isinstance(expected, StateChange):
        expected = StateChange(StateClass(expected[0]), *expected[1:])
    assert found == (expected,)


def test_keys_that_come_and_go_with_a_module_are_no_changes() -> None:
    more = replace(VECTOR, static_keys={"b": False, "mod:k": True}, static_calls={"mod:c": "f"})
    assert changes(VECTOR, more) == changes(more, VECTOR) == ()


def test_changes_are_bounded() -> None:
    before = replace(VECTOR, static_keys={f"k{n}": False for n in range(2 * CHANGES_MAX)})
    after = replace(VECTOR, static_keys={f"k{n}": True for n in range(2 * CHANGES_MAX)})
    assert len(changes(before, after)) == CHANGES_MAX


def test_a_change_as_text() -> None:
    text = str(StateChange(StateClass.KPROBE, "vfs_read", "", "present"))
    assert text == "kprobe vfs_read: absent -> present"
