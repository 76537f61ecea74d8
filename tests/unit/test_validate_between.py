"""Between validations: what is looked at again, what is waited for, and when nothing is judged."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_kernel import MIB
from fake_target import DATA, OFFSETS, SYMBOLS
from fake_validation import FakeValidation, structures
from tables import PRESENT, WRITE, Memory

from pyscan.sources.base import Source
from pyscan.validate import is_starting, recheck
from pyscan.validate.context import Target
from pyscan.validate.objects import LoadedModule, read_structures
from pyscan.validate.settle import _may_lead_to
from pyscan.validate.validation import Validation

STATE = DATA + 0x2_1700  # of system_state
SYSTEM_BOOTING, SYSTEM_FREEING_INITMEM, SYSTEM_RUNNING = 0, 2, 3


@pytest.fixture
def fake(tmp_path: Path) -> FakeValidation:
    memory = Memory(tmp_path / "ram", 64 * MIB)
    return FakeValidation(memory, symbols={"system_state": STATE})


@pytest.fixture
def source(fake: FakeValidation) -> Iterator[Source]:
    with fake.memory.source() as source:
        yield source


# --- recheck --------------------------------------------------------------------------


def validated(fake: FakeValidation, source: Source) -> Validation:
    """A validation of a healthy kernel, as far as lists go."""
    return fake.validation(source, objects=replace(read_structures(fake.target(source))))


def test_nothing_has_changed(fake: FakeValidation, source: Source) -> None:
    validation = validated(fake, source)
    assert not recheck(validation)
    fake.fake.write(fake.fake.scratch(5), b"anything")
    assert not recheck(validation)


def test_a_tracer_is_registered(fake: FakeValidation, source: Source) -> None:
    validation = validated(fake, source)
    ops = fake.fake.scratch(1)
    fake.fake.write(ops + OFFSETS["ftrace_ops.func"], struct.pack("<Q", fake.address("_text")))
    fake.fake.write(
        ops + OFFSETS["ftrace_ops.next"], struct.pack("<Q", fake.address("ftrace_list_end"))
    )
    fake.fake.put("ftrace_ops_list", struct.pack("<Q", ops))
    assert recheck(validation)


def test_an_interrupt_leads_elsewhere_and_back(fake: FakeValidation, source: Source) -> None:
    healthy = validated(fake, source)
    fake.fake.gate(14, fake.address("other_function"))
    assert recheck(healthy)
    fake.fake.gate(14, fake.address("asm_exc_page_fault"))
    assert not recheck(healthy)


def test_what_was_found_is_gone(fake: FakeValidation, source: Source) -> None:
    healthy = validated(fake, source)
    fake.fake.gate(14, fake.address("other_function"))
    found = validated(fake, source)
    assert recheck(found)
    fake.fake.gate(14, fake.address("asm_exc_page_fault"))
    assert not recheck(healthy)


# --- settle ---------------------------------------------------------------------------


@pytest.fixture
def target(fake: FakeValidation, source: Source) -> Target:
    module = LoadedModule("m", 0x1000, 0, 0xFFFF_FFFF_C000_0000, 0x4000, 0x1000, 0x2000, 0, 0, 0, 0)
    return fake.target(source).with_modules((module,))


@pytest.mark.parametrize(
    ("site", "name", "may"),
    [
        ("ftrace call", "ftrace_caller", True),
        ("ftrace call", "ftrace_regs_caller", True),
        ("ftrace call", "kernel_function", False),
        ("static call", "kernel_function", True),
        ("static call", "_etext", False),
        ("static call trampoline", "other_function", True),
        ("static call trampoline", "scratch", False),
        ("jump label", "_etext", True),
    ],
)
def test_where_a_site_may_lead(
    fake: FakeValidation, target: Target, site: str, name: str, may: bool
) -> None:
    assert _may_lead_to(target, site, fake.base + SYMBOLS[name]) == may


def test_a_traced_function_may_call_a_trampoline_but_no_module(target: Target) -> None:
    assert not _may_lead_to(target, "ftrace call", 0xFFFF_FFFF_C000_0010)
    assert _may_lead_to(target, "ftrace call", 0xFFFF_FFFF_C000_4000)


# --- starting -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "writable", "starting"),
    [
        (SYSTEM_BOOTING, True, True),
        (SYSTEM_FREEING_INITMEM, True, True),
        (SYSTEM_RUNNING, True, False),  # then a writable text is a finding
        (SYSTEM_BOOTING, False, False),  # it has protected itself, and is judged
        (1 << 31, True, False),
    ],
)
def test_starting(
    fake: FakeValidation, source: Source, state: int, writable: bool, starting: bool
) -> None:
    fake.write(STATE, struct.pack("<I", state))
    if writable:
        kernel = fake.fake.kernel
        kernel.memory.set_entry(
            kernel.level2, (fake.base >> 21) & 511, kernel.text | PRESENT | WRITE | 1 << 7
        )
    assert is_starting(fake.validation(source, objects=structures()).attached) == starting


def test_a_kernel_that_does_not_say_is_not_starting(tmp_path: Path) -> None:
    fake = FakeValidation(Memory(tmp_path / "other", 64 * MIB))
    with fake.memory.source() as source:
        assert not is_starting(fake.validation(source).attached)
