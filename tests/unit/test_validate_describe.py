"""Findings for people: where, what was expected, what is there, and in which order."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_kernel import MIB
from fake_target import MODULES
from fake_validation import RO_AFTER_INIT, FakeValidation
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import Memory

from pyscan.approved.unit import Section
from pyscan.ids import new_id
from pyscan.protocol import LINE_CHARACTERS_MAX, PLACE_CHARACTERS_MAX, one_line
from pyscan.records import Finding, FindingKind, PageStatus
from pyscan.validate.code import Difference, add_differences
from pyscan.validate.describe import FINDINGS_MAX, TEXT_MAX, count_findings, findings
from pyscan.validate.disassembly import disassemble, instruction_start
from pyscan.validate.objects import LoadedModule
from pyscan.validate.problem import ProblemKind
from pyscan.validate.rules import Judged, Rule, StateFinding
from pyscan.validate.validation import Validation
from pyscan.validate.vector import StateChange, StateClass

SWEEP = new_id()
FUNCTION = 0x4000  # kernel_function
OTHER = 0x4100  # other_function

#: push %rbp; mov %rsp,%rbp; call other_function; mov $1,%eax; ret
CODE = (
    b"\x55\x48\x89\xe5\xe8" + struct.pack("<i", OTHER - FUNCTION - 9) + b"\xb8\x01\x00\x00\x00\xc3"
)


@pytest.fixture
def fake(tmp_path: Path) -> FakeValidation:
    found = FakeValidation(
        Memory(tmp_path / "ram", 64 * MIB),
        symbols={"table": 0x20_5000, "set_at_boot": RO_AFTER_INIT + 0x1000},
        sections=(Section(".text", 0, 0x1_0000), Section(".rodata", 0x20_0000, 0x20_0000)),
    )
    found.package(FUNCTION, CODE)
    found.pointer(0x20_5008, "kernel_function")
    returns = replace(found.sites, returns=np.array([FUNCTION + 14], dtype=np.uint32))
    found.sites = replace(returns, mcount=np.array([OTHER], dtype=np.uint32))
    return found


@pytest.fixture
def validation(fake: FakeValidation) -> Iterator[Validation]:
    with fake.memory.source() as source:
        yield fake.validation(source)


def differ(validation: Validation, offset: int, new: bytes, *, code: bool = True) -> None:
    """Let the comparison find `new` at `offset`."""
    placed = validation.units.vmlinux
    start = max(0, offset - 32)
    expected = placed.relocated(start, offset + 64)[0]
    actual = expected.copy()
    actual[offset - start : offset - start + len(new)] = list(new)
    result = validation.text if code else validation.rodata.code
    add_differences(placed, start, expected, actual, result)


def only(validation: Validation, judged: Judged | None = None) -> Finding:
    (finding,) = findings(validation, SWEEP, judged)
    return finding


def test_a_branch_to_elsewhere(fake: FakeValidation, validation: Validation) -> None:
    target = fake.address("aggr_pre_handler") - (fake.base + FUNCTION + 9)
    differ(validation, FUNCTION + 5, struct.pack("<i", target))
    finding = only(validation)
    assert finding.kind is FindingKind.CODE
    assert finding.status is PageStatus.OK
    assert finding.place == "kernel_function+0x4 (.text, kernel code)"
    assert finding.expected == "e8 f7 00 00 00 | call other_function"
    assert finding.actual == "e8 f7 01 00 00 | call aggr_pre_handler"
    # The address is that of the first byte that differs, the place that of its instruction.
    assert finding.address == fake.base + FUNCTION + 6
    assert finding.frame == (fake.fake.kernel.physical + FUNCTION) >> 12


def test_a_branch_into_a_module_of_no_package(fake: FakeValidation, validation: Validation) -> None:
    loaded = LoadedModule("rootkit", 0, 0, MODULES, 0x3000, 0x1000, 0x2000, 0, 0, 0, 0)
    validation.target = validation.target.with_modules((loaded,))
    displacement = MODULES + 0x10 - (fake.base + FUNCTION + 9)
    differ(validation, FUNCTION + 4, b"\xe8" + struct.pack("<i", displacement))
    assert only(validation).actual.endswith("| call rootkit:+0x10")


@pytest.mark.parametrize(
    ("offset", "new", "place"),
    [
        (FUNCTION + 14, b"\xcc", "kernel_function+0xe (.text, return site)"),
        (OTHER, b"\xe9", "other_function (.text, ftrace call)"),
        (FUNCTION, b"\xcc", "kernel_function (.text, kernel code)"),
    ],
)
def test_class_of_a_change_in_text(
    validation: Validation, offset: int, new: bytes, place: str
) -> None:
    differ(validation, offset, new)
    assert only(validation).place == place


def test_what_is_no_instruction(validation: Validation) -> None:
    differ(validation, FUNCTION, b"\x06\x07\x0e")
    assert only(validation).actual.endswith("(bad)")


def test_a_pointer_in_read_only_data(fake: FakeValidation, validation: Validation) -> None:
    new = struct.pack("<Q", fake.address("other_function") + 4)
    differ(validation, 0x20_5008, new, code=False)
    finding = only(validation)
    assert finding.kind is FindingKind.CODE
    assert finding.place == "table+0x8 (.rodata, read-only data)"
    assert finding.expected.endswith("ff ff ff ff | kernel_function")
    assert finding.actual.endswith("ff ff ff ff | other_function+0x4")


def test_numbers_in_read_only_data(validation: Validation) -> None:
    differ(validation, 0x20_5020, b"\x07", code=False)
    differ(validation, 0x20_5040, bytes(range(1, 33)), code=False)
    one, run = findings(validation, SWEEP)
    assert (one.expected, one.actual) == ("00", "07")
    assert run.actual == bytes(range(1, 17)).hex(" ") + " .."


def test_data_that_the_boot_sets(validation: Validation) -> None:
    differ(validation, RO_AFTER_INIT + 0x1000, b"\x01", code=False)
    assert only(validation).place == "set_at_boot (.rodata, data read-only after boot)"


@pytest.mark.parametrize("kind", list(ProblemKind))
def test_each_kind_of_problem(validation: Validation, kind: ProblemKind) -> None:
    address = validation.target.address("scratch")
    validation.problems.add(kind, address, "init_top_pgt", "entry 300 is not the kernel's")
    finding = only(validation)
    expected = {
        ProblemKind.UNREADABLE: FindingKind.UNREADABLE,
        ProblemKind.ORPHAN_CODE: FindingKind.CODE,
        ProblemKind.GENERATED_CODE: FindingKind.CODE,
        ProblemKind.PAGE_TABLE: FindingKind.MAPPING,
        ProblemKind.WRITABLE_EXECUTABLE: FindingKind.MAPPING,
        ProblemKind.WRITABLE_ALIAS: FindingKind.MAPPING,
    }
    assert finding.kind is expected.get(kind, FindingKind.STRUCTURE)
    unreadable = kind is ProblemKind.UNREADABLE
    assert (finding.status is PageStatus.OK) is not unreadable
    assert finding.place.startswith("init_top_pgt (")
    assert finding.actual == "entry 300 is not the kernel's"
    assert finding.address == address


def test_a_protected_page_that_leads_nowhere(validation: Validation) -> None:
    address = validation.target.address("kernel_function")
    validation.problems.add(ProblemKind.WILD_POINTER, address, "vmlinux", "not mapped")
    finding = only(validation)
    assert finding.kind is FindingKind.MAPPING
    assert finding.place == "vmlinux (unmapped page)"


@pytest.mark.parametrize(
    ("kind", "rule", "place", "expected"),
    [
        (StateClass.KPROBE, Rule.FORBID, "x (probe, forbidden)", "absent"),
        (StateClass.STATIC_KEY, Rule.PIN, "x (static key, changed since attach)", "off"),
        (StateClass.UNKNOWN_MODULE, Rule.FORBID, "x (module of no approved package)", "absent"),
    ],
)
def test_state(
    validation: Validation, kind: StateClass, rule: Rule, place: str, expected: str
) -> None:
    found = StateFinding(StateChange(kind, "x", "off", "on"), rule)
    finding = only(validation, Judged((found,), (), 1))
    assert finding.kind is FindingKind.STATE
    assert (finding.place, finding.expected, finding.actual) == (place, expected, "on")
    assert finding.address is finding.frame is None


def test_the_gravest_come_first_and_hide_none(validation: Validation) -> None:
    base = validation.target.address("_text")
    kinds = (ProblemKind.UNREADABLE, ProblemKind.ORPHAN_CODE, ProblemKind.SECURITY_HOOK)
    for number in range(20):
        for kind in kinds:
            validation.problems.add(kind, base + number * 0x1000, "p", "t")
    differ(validation, FUNCTION, b"\xcc")
    found = findings(validation, SWEEP)
    assert len(found) == count_findings(validation) == 61
    assert found[0].place.startswith("kernel_function")
    first = [finding.kind for finding in found[:32]]
    assert {FindingKind.CODE, FindingKind.STRUCTURE, FindingKind.UNREADABLE} <= set(first)
    assert found[1].address < found[2].address
    again = [replace(finding, id="") for finding in findings(validation, SWEEP)]
    assert again == [replace(finding, id="") for finding in found]


def test_bounds(validation: Validation) -> None:
    for number in range(FINDINGS_MAX + 9):
        validation.problems.add(ProblemKind.BROKEN_LIST, number, "p" * 500, "t" * 500)
    state = StateFinding(StateChange(StateClass.BPF, "n" * 500, "b" * 500, "a" * 500), Rule.PIN)
    judged = Judged((state,), (), 7)
    found = findings(validation, SWEEP, judged)
    assert len(found) == FINDINGS_MAX
    assert count_findings(validation, judged) == FINDINGS_MAX + 9 + 7
    assert TEXT_MAX == PLACE_CHARACTERS_MAX < LINE_CHARACTERS_MAX
    for finding in found:
        for text in (finding.place, finding.expected, finding.actual):
            assert one_line(text, PLACE_CHARACTERS_MAX) == text
    assert found[-1].place.endswith(")")


@settings(max_examples=60, deadline=None)
@given(data=st.binary(min_size=1, max_size=64), offset=st.integers(0, 0x20))
def test_any_bytes_can_be_described(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, offset: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-ram"
    path.unlink(missing_ok=True)
    fake = FakeValidation(Memory(path, 64 * MIB))
    with fake.memory.source() as source:
        validation = fake.validation(source)
        at = FUNCTION + offset
        expected = validation.units.vmlinux.relocated(at, at + len(data))[0].tobytes()
        row = Difference("vmlinux", at, fake.base + at, "", expected, data)
        validation.text.differences.append(row)
        validation.rodata.code.differences.append(replace(row, offset=0x20_5000 + offset))
        found = findings(validation, SWEEP)
    assert len(found) == 2
    assert all(len(f.expected) <= TEXT_MAX and len(f.actual) <= TEXT_MAX for f in found)


def test_instructions() -> None:
    assert instruction_start(CODE, 0) == 0
    assert instruction_start(CODE, 3) == 1
    assert instruction_start(CODE, 6) == 4
    assert instruction_start(CODE, 99) == 99
    text, size = disassemble(CODE, 0x1000, 2, lambda _: None)
    assert (text, size) == ("push rbp; mov rbp, rsp", 4)
    text, size = disassemble(b"\x06" * 20, 0, 20, lambda _: None)
    assert (text, size) == ("(bad)", 20)
    text, _ = disassemble(b"\xeb\xfe", 0x1000, 2, lambda address: f"<{address:#x}>")
    assert text == "jmp <0x1000>"
