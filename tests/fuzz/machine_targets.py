"""Harnesses that edit the memory of a whole machine: attaching to it, and validating it.

Beyond "no exception but pyscan's own", validation is held against a second account of what is
legal (legal.py): with only code edited, what breaks that must be found, and nothing else. With
structures edited as well, at least what lies where nothing is ever patched.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Final

import numpy as np
from fuzz.legal import Law
from fuzz.machine import CODE_MODES, MODES, Edit, decode_edits, machine
from numpy.typing import NDArray

from pyscan.digest import Digester, open_digester
from pyscan.errors import PyscanError
from pyscan.ids import new_id
from pyscan.kernel import find_kernel
from pyscan.records import PageStatus
from pyscan.sources import Source
from pyscan.validate import (
    StateRules,
    StateVector,
    Validation,
    attach,
    baseline,
    count_findings,
    findings,
    is_starting,
    judge_state,
    recheck,
    settle,
    state_vector,
    take_over,
    validate,
)
from pyscan.validate.describe import FINDINGS_MAX, TEXT_MAX
from pyscan.validate.invariants import check_invariants
from pyscan.validate.memory import walk_kernel
from pyscan.validate.objects import read_structures
from pyscan.validate.problem import PROBLEMS_MAX, Problems

Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]

#: First byte of an input for `validate`: only code is edited.
CODE_ONLY: Final = 1
_CODE: Final = MODES.index(CODE_MODES[0])
#: What a pause takes by the clock that settling sees. Nothing waits.
_PAUSE_S: Final = 2.0


def seeds_of(*, flag: bool) -> Mapping[str, bytes]:
    """Inputs of one edit each; `flag`: with a first byte."""
    made = {
        "healthy": b"",
        "write": Edit(0, 100, 0, 7).encode(),
        "point": Edit(1, 200, 50, 8).encode(),
        "flip": Edit(2, 300, 1, 0).encode() + Edit(2, 17, 63, 0).encode(),
        "add": Edit(3, 400, 0, 255).encode(),
        "fail": Edit(4, 500, 2, 0).encode(),
        "copy": Edit(5, 600, 601, 3).encode(),
        "fill": Edit(6, 700, 0xFF, 0).encode(),
    }
    if not flag:
        return made
    found = {name: b"\0" + data for name, data in made.items()}
    for mode, edit in enumerate(
        (Edit(0, 0xA080, 0x90, 0), Edit(1, 0, 5, 0), Edit(2, 1, 1, 0), Edit(3, 0, 0, 0x10))
    ):
        found[CODE_MODES[mode]] = bytes([CODE_ONLY]) + edit.encode()
    return found


def fuzz_attach(data: bytes) -> None:
    """Finding a kernel, walking its tables, reading its structures, checking them."""
    made = machine()
    with made.edited(decode_edits(data)) as source:
        with suppress(PyscanError):
            find_kernel(source)
        with suppress(PyscanError):
            walk_kernel(source, made.kernel)
        with suppress(PyscanError):
            attached = attach(source, [made.approved], made.kernel)
            structures = read_structures(attached.target)
            _check_bounds(structures.problems)
            target = attached.target.with_modules(structures.modules)
            found = check_invariants(target, structures, attached.walked)
            assert len(found.problems) <= PROBLEMS_MAX
            assert found.problems_total >= len(found.problems)


def _check_bounds(problems: Problems) -> None:
    assert len(problems.kept) <= PROBLEMS_MAX
    assert problems.total >= len(problems.kept)
    for problem in problems.kept:
        assert str(problem).isprintable(), problem


def fuzz_validate(data: bytes) -> None:
    """Validation: reports what is not legal, and nothing that is, when only code is edited."""
    made = machine()
    edits = decode_edits(data[1:])
    code_only = bool(data[:1]) and bool(data[0] & CODE_ONLY)
    if code_only:
        edits = [replace(edit, mode=_CODE + edit.mode % len(CODE_MODES)) for edit in edits]
    with made.edited(edits) as source, suppress(PyscanError):
        attached = attach(source, [made.approved], made.kernel)
        is_starting(attached)
        validation = validate(attached)
        probes = [probe.address for probe in validation.structures.kprobes]
        judge = _law().everywhere if code_only else _law().outside_sites(probes)
        wrong = _law().breaches(validation, judge)
        _judge(validation, wrong, exact=code_only)
        with no_waiting():
            settled = settle(validation, validation.text.pages)
        take_over(validation, settled)
        text = {page for page in wrong if page in validation.text.pages}
        _judge(validation, wrong, exact=code_only)
        assert settled.differences_total or not text
        changed = recheck(validation)
        assert not (code_only and changed) or validation.problems.total
        _use(validation, source)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let settling see a clock that only its own pauses move."""
    module = importlib.import_module("pyscan.validate.settle")
    now = [0.0]

    def sleep(_seconds: float) -> None:
        now[0] += _PAUSE_S

    kept = module.time
    module.time = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.time = kept  # type: ignore[attr-defined]


def _judge(validation: Validation, wrong: set[tuple[str, int]], *, exact: bool) -> None:
    """All pages that hold what is not legal are found and, when `exact`, no others."""
    found = validation.text.pages | validation.rodata.code.pages
    assert wrong <= found, f"not found: {sorted(wrong - found)}"
    if wrong:
        assert not validation.clean
    if exact:
        assert found == wrong, f"legal: {sorted(found - wrong)}"
        if not wrong:
            assert validation.clean, validation.problems.kept
    for extent in validation.extents:
        assert (extent.statuses == PageStatus.OK).all() or not validation.clean


@cache
def _law() -> Law:
    return Law(machine())


@cache
def _digester() -> Digester:
    return open_digester()


@cache
def _pinned() -> StateVector:
    return state_vector(machine().healthy)


def _use(validation: Validation, source: Source) -> None:
    """Everything that is done with a validation."""
    vector = state_vector(validation)
    assert str(vector).isprintable()
    assert vector.to_json()
    judged = judge_state(StateRules(), _pinned(), vector)
    listed = findings(validation, new_id(), judged)
    assert len(listed) <= FINDINGS_MAX
    assert count_findings(validation, judged) >= len(listed)
    for finding in listed:
        for text in (finding.place, finding.expected, finding.actual):
            assert len(text) <= TEXT_MAX
            assert text.isprintable()
    if not validation.clean:
        assert listed
    _check_bounds(validation.problems)
    snapshot = baseline(validation, _digester(), 1)
    assert snapshot.pages <= sum(len(extent.statuses) for extent in validation.extents)
    assert source.regions() == snapshot.memory_map
