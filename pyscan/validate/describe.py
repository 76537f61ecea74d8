"""What a validation found, as findings that a person can read and act on.

A finding tells where ("do_sys_open+0x10 (.text, ftrace call)"), what the package implies there
and what is there instead, both as bytes and as instructions, or as the function that a
pointer leads to. Everything shown is bounded, and free text from the target is made fit for
a message by `pyscan.protocol`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np

from pyscan.approved.unit import VMLINUX, SegmentKind
from pyscan.ids import new_id
from pyscan.records import Finding, FindingKind, PageStatus
from pyscan.validate.code import Difference
from pyscan.validate.disassembly import INSTRUCTION_BYTES_MAX, disassemble, instruction_start
from pyscan.validate.names import PlaceNames
from pyscan.validate.placed import Placed
from pyscan.validate.predict import Keys, Predictor
from pyscan.validate.problem import Problem, ProblemKind
from pyscan.validate.rules import Judged, Rule, StateFinding
from pyscan.validate.validation import Validation
from pyscan.validate.vector import StateClass

#: Findings that one validation lists; `count_findings` counts all.
FINDINGS_MAX: Final = 256
#: Characters of a finding's place, expected and actual content (docs/spec/wire.md, 3.3).
TEXT_MAX: Final = 128
#: So many findings of one class come before the first of a class that is less grave, so that
#: a message that is cut still names every class.
_RUN: Final = 6

_WORD: Final = 8
_BYTES_SHOWN: Final = 16
#: So far from a function's first byte its instructions are decoded to find where one begins.
_FUNCTION_MAX: Final = 1 << 16

_SITES: Final = {
    "return": "return site",
    "lock": "lock prefix",
    "retpoline": "indirect branch",
    "alternative": "patched instruction",
}


class Severity(IntEnum):
    """The gravest first."""

    CODE = 0
    HIDDEN_CODE = 1
    POINTER = 2  # a table of functions, a hook
    PAGE_TABLE = 3
    DATA = 4
    UNKNOWN_MODULE = 5
    STATE = 6
    STRUCTURE = 7
    UNREADABLE = 8


_PROBLEMS: Final = {
    ProblemKind.UNREADABLE: (FindingKind.UNREADABLE, Severity.UNREADABLE, "unreadable"),
    ProblemKind.WILD_POINTER: (FindingKind.STRUCTURE, Severity.STRUCTURE, "wild pointer"),
    ProblemKind.BROKEN_LIST: (FindingKind.STRUCTURE, Severity.STRUCTURE, "broken list"),
    ProblemKind.IMPLAUSIBLE: (FindingKind.STRUCTURE, Severity.STRUCTURE, "impossible value"),
    ProblemKind.PAGE_TABLE: (FindingKind.MAPPING, Severity.PAGE_TABLE, "page table"),
    ProblemKind.WRITABLE_EXECUTABLE: (
        FindingKind.MAPPING,
        Severity.PAGE_TABLE,
        "page-table permission",
    ),
    ProblemKind.WRITABLE_ALIAS: (FindingKind.MAPPING, Severity.PAGE_TABLE, "writable alias"),
    ProblemKind.ORPHAN_CODE: (FindingKind.CODE, Severity.HIDDEN_CODE, "hidden code"),
    ProblemKind.GENERATED_CODE: (FindingKind.CODE, Severity.CODE, "generated code"),
    ProblemKind.INTERRUPT_TABLE: (FindingKind.STRUCTURE, Severity.POINTER, "interrupt table"),
    ProblemKind.SECURITY_HOOK: (FindingKind.STRUCTURE, Severity.POINTER, "security hook"),
    ProblemKind.HANDLER: (FindingKind.STRUCTURE, Severity.POINTER, "registered handler"),
}
_CLASSES: Final = {
    StateClass.UNKNOWN_MODULE: "module of no approved package",
    StateClass.FEATURES: "CPU feature or mitigation",
    StateClass.STATIC_KEY: "static key",
    StateClass.STATIC_CALL: "static call",
    StateClass.FTRACE: "function tracer",
    StateClass.KPROBE: "probe",
    StateClass.MODULE: "module",
    StateClass.BPF: "BPF program",
}


@dataclass(frozen=True, slots=True)
class _Row:
    """A finding before it has an identifier."""

    severity: Severity
    change: str  # class of the change, in words
    kind: FindingKind
    address: int | None
    place: str
    expected: str
    actual: str
    status: PageStatus = PageStatus.OK


def findings(
    validation: Validation, sweep: str, judged: Judged | None = None
) -> tuple[Finding, ...]:
    """At most FINDINGS_MAX findings of a validation, in order of gravity and of address.

    No class hides the others: see `_RUN`. `sweep`: identifier of their parent; `judged`: what
    the rules make of the state. Reads no memory of the target.
    """
    describer = Describer(validation)
    rows = [describer.difference(each) for each in validation.text.differences]
    rows += [describer.difference(each) for each in validation.rodata.code.differences]
    rows += [describer.problem(each) for each in validation.problems.kept]
    if judged is not None:
        rows += [describer.state(each) for each in judged.findings]
    return tuple(describer.finding(row, sweep) for row in ordered(rows)[:FINDINGS_MAX])


def count_findings(validation: Validation, judged: Judged | None = None) -> int:
    """How many findings there are, with those that are not listed."""
    total = validation.text.total + validation.rodata.code.total + validation.problems.total
    return total + (judged.findings_total if judged is not None else 0)


def ordered(rows: Iterable[_Row]) -> list[_Row]:
    """Rows by gravity and address, in runs of bounded length of each class."""
    ranked = sorted(rows, key=lambda row: (row.severity, row.address or 0, row.place, row.actual))
    seen: Counter[Severity] = Counter()
    runs = []
    for row in ranked:
        runs.append(seen[row.severity] // _RUN)
        seen[row.severity] += 1
    order = sorted(range(len(ranked)), key=lambda index: (runs[index], index))
    return [ranked[index] for index in order]


class Describer:
    """Describes what was found in one target. It reads no memory of the target."""

    def __init__(self, validation: Validation) -> None:
        self._target = validation.target
        self._names = PlaceNames(validation.units)
        self._units = {placed.unit.name: placed for placed in validation.units.all}
        # Of keys, what the validation has read: nothing is read to describe.
        enabled, functions = dict(validation.keys.enabled), dict(validation.keys.functions)
        key_of = validation.keys.key_of
        self._predictor = Predictor(
            validation.state,
            Keys(
                lambda keys: np.array(
                    [enabled.get(key, False) for key in keys.tolist()], dtype=bool
                ),
                lambda keys: np.array(
                    [functions.get(key_of(key), 0) for key in keys.tolist()], dtype=np.uint64
                ),
            ),
        )

    def finding(self, row: _Row, sweep: str) -> Finding:
        """The record of a row."""
        frame = None if row.address is None else self._target.memory.frame(row.address)
        return Finding(
            id=new_id(),
            sweep=sweep,
            kind=row.kind,
            status=row.status,
            address=row.address,
            frame=frame,
            place=row.place[:TEXT_MAX],
            expected=_cut(row.expected),
            actual=_cut(row.actual),
        )

    def difference(self, difference: Difference) -> _Row:
        """Bytes that the package does not explain."""
        placed = self._units[difference.unit]
        segment = _segment_kind(placed, difference.offset)
        code = segment is SegmentKind.TEXT
        change = _change(difference, segment)
        show = self._code if code else self._data
        address, expected, actual = show(difference)
        named = self._names.find(address)
        section = f"{named.section}, " if named is not None and named.section else ""
        return _Row(
            severity=Severity.CODE if code else Severity.DATA,
            change=change,
            kind=FindingKind.CODE,
            address=difference.address,
            place=f"{named} ({section}{change})",
            expected=expected,
            actual=actual,
        )

    def problem(self, problem: Problem) -> _Row:
        """A structure, mapping or piece of code that no legal kernel has."""
        kind, severity, change = _PROBLEMS[problem.kind]
        status = PageStatus.OK
        if problem.kind is ProblemKind.WILD_POINTER and self._protected(problem.address):
            kind, severity, change = FindingKind.MAPPING, Severity.PAGE_TABLE, "unmapped page"
        if problem.kind is ProblemKind.UNREADABLE:
            status = PageStatus.BLOCKED
        tail = f" ({change})"
        return _Row(
            severity=severity,
            change=change,
            kind=kind,
            address=problem.address,
            place=problem.place[: TEXT_MAX - len(tail)] + tail,
            expected="",
            actual=problem.text,
            status=status,
        )

    def state(self, finding: StateFinding) -> _Row:
        """A state that the rules do not let pass."""
        change = finding.change
        what = _CLASSES[change.kind]
        unknown = change.kind is StateClass.UNKNOWN_MODULE
        why = "forbidden" if finding.rule is Rule.FORBID else "changed since attach"
        tail = f" ({what})" if unknown else f" ({what}, {why})"
        before = "" if finding.rule is Rule.FORBID else change.before or "absent"
        return _Row(
            severity=Severity.UNKNOWN_MODULE if unknown else Severity.STATE,
            change=what,
            kind=FindingKind.STATE,
            address=None,
            place=change.name[: TEXT_MAX - len(tail)] + tail,
            expected=before or "absent",
            actual=change.after or "absent",
        )

    def _code(self, difference: Difference) -> tuple[int, str, str]:
        """Address of the first instruction that differs; expected and actual ones from there."""
        placed = self._units[difference.unit]
        named = self._names.find(difference.address)
        distance = named.distance if named is not None and named.symbol else 0
        if distance > _FUNCTION_MAX:
            distance = 0
        first, end = difference.offset - distance, difference.offset + len(difference.expected)
        code = self._predictor.text(placed, first, end + INSTRUCTION_BYTES_MAX).tobytes()
        start = instruction_start(code, distance)
        window = bytearray(code[start:])
        at, last = distance - start, distance - start + len(difference.expected)
        address = placed.address + first + start
        texts = []
        for content in (difference.expected, difference.actual):
            window[at:last] = content
            texts.append(self._instructions(bytes(window), address, last))
        return address, texts[0], texts[1]

    def _instructions(self, code: bytes, address: int, length: int) -> str:
        text, size = disassemble(code, address, length, self._name)
        return f"{_hex(code[: max(size, 1)])} | {text}"

    def _data(self, difference: Difference) -> tuple[int, str, str]:
        """Address, expected and actual bytes; of a pointer the whole word, and where it leads."""
        placed = self._units[difference.unit]
        word = difference.offset // _WORD * _WORD
        at = difference.offset - word
        plain = difference.address, _hex(difference.expected), _hex(difference.actual)
        if at + len(difference.expected) > _WORD:
            return plain
        data = bytearray(placed.relocated(word, word + _WORD)[0].tobytes())
        words = []
        for content in (difference.expected, difference.actual):
            data[at : at + len(content)] = content
            words.append(int.from_bytes(data, "little"))
        names = [self._name(value) or self._pointer(value) for value in words]
        if not any(names):
            return plain
        texts = []
        for value, name in zip(words, names, strict=True):
            meaning = name or ("no address" if value else "null")
            texts.append(f"{_hex(value.to_bytes(_WORD, 'little'))} | {meaning}")
        return difference.address - at, texts[0], texts[1]

    def _name(self, address: int) -> str | None:
        """Name of an address in a unit, or in a module of no approved package."""
        found = self._names.find(address)
        if found is not None:
            return str(found)
        for module in self._target.modules:
            if module.base <= address < module.base + module.size:
                return f"{module.name}:+{address - module.base:#x}"
        return None

    def _pointer(self, value: int) -> str:
        """What to call an address that lies in no unit."""
        mapped = value >> 47 and self._target.memory.frame(value) is not None
        return f"{value:#x}, outside of all known code" if mapped else ""

    def _protected(self, address: int) -> bool:
        placed = self._names.unit_at(address)
        return placed is not None and _segment_kind(placed, address - placed.address) is not None


def _segment_kind(placed: Placed, offset: int) -> SegmentKind | None:
    for segment in placed.unit.segments:
        if segment.offset <= offset < segment.offset + segment.length:
            return segment.kind
    return None


def _change(difference: Difference, segment: SegmentKind | None) -> str:
    """Class of a change, in words."""
    if segment is SegmentKind.RODATA:
        return "read-only data"
    if segment is SegmentKind.RO_AFTER_INIT:
        return "data read-only after boot"
    if difference.site:
        return _SITES.get(difference.site, difference.site)
    return "kernel code" if difference.unit == VMLINUX else "module code"


def _hex(data: bytes) -> str:
    more = " .." if len(data) > _BYTES_SHOWN else ""
    return data[:_BYTES_SHOWN].hex(" ") + more


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_MAX else text[: TEXT_MAX - 2] + ".."
