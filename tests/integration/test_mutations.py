"""Every change of protected memory of a real, stopped kernel is found; nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matrix.edits import EDITS, Outcome, try_edits
from matrix.mutate import APART, clean_validation, mutate

from pyscan.approved import LinuxApproved
from pyscan.lab.guest import Guest, GuestOptions
from pyscan.lab.process import RunDirectory
from pyscan.qmp import query
from pyscan.sources import Source, build_uri, open_source
from pyscan.validate.predict import Predictor

pytestmark = pytest.mark.guest

#: Its return thunk and lock prefixes differ from those of the guest's default processor.
CPU_MODEL = "EPYC-Rome"

#: Flips anywhere, in sites, in data read-only after init; full validations.
COUNTS = (300, 150, 50, 8)

#: What such a guest has no place for: nothing is traced or probed in it, and its processor
#: needs retpolines.
NOT_HERE = {
    "indirect call replaced by a retpoline",
    "probe's place with another breakpoint",
    "ftrace_ops with a foreign trampoline",
}

PARTS = 2000


@pytest.fixture(scope="module")
def stopped(guest_dir: Path) -> Iterator[Source]:
    """Memory of a guest that has settled and is stopped."""
    options = GuestOptions(guest_dir, cpu_model=CPU_MODEL, cpus=2)
    with RunDirectory() as run, Guest(options, run) as guest:
        guest.wait_ready()
        query(guest.lab_qmp, [("stop", None)])
        with open_source(build_uri("qemu", guest.monitor_qmp)) as source:
            yield source


@pytest.fixture(scope="module")
def outcomes(stopped: Source, approved_linux: LinuxApproved) -> dict[str, Outcome]:
    """What came of every edit."""
    return {each.name: each for each in try_edits(stopped, approved_linux, together=True)}


def test_untouched_memory_is_as_predicted(stopped: Source, approved_linux: LinuxApproved) -> None:
    validation = clean_validation(stopped, approved_linux)
    assert validation.clean, validation.problems.kept[:3]
    assert validation.text.bytes > 14 << 20
    assert validation.rodata.code.bytes > 8 << 20
    assert validation.rodata.unknown_bytes == 0


def test_any_part_of_the_kernels_text_is_predicted_as_in_the_whole(
    stopped: Source, approved_linux: LinuxApproved
) -> None:
    validation = clean_validation(stopped, approved_linux)
    predictor = Predictor(validation.state, validation.keys.keys())
    random = np.random.default_rng(7)
    for placed in validation.units.all:
        length = placed.unit.segments[0].length
        whole = predictor.text(placed, 0, length)
        count = 1 + PARTS * length // validation.text.bytes
        # A page each at random, and its edges moved by some bytes.
        for page in random.permutation(length // 4096)[:count].tolist():
            start = max(0, page * 4096 + int(random.integers(-40, 40)))
            end = min(length, start + int(random.integers(1, 4200)))
            part = predictor.text(placed, start, end)
            assert np.array_equal(part, whole[start:end]), (placed.unit.name, start, end)


def test_flipped_bytes_are_found(stopped: Source, approved_linux: LinuxApproved) -> None:
    tally = mutate(stopped, approved_linux, COUNTS)
    assert [str(miss) for miss in tally.misses] == []
    assert tally.flips.total() == sum(COUNTS[:3])
    assert tally.flips[APART] == COUNTS[2]
    assert tally.sampled == COUNTS[3]
    assert [str(miss) for miss in tally.disagreements] == []
    assert {kind for kind in tally.flips if kind.startswith("site: ")} == {
        *("site: mcount", "site: returns", "site: locks", "site: trampolines"),
        *("site: retpolines", "site: paravirt", "site: alternatives"),
        *("site: jump_labels", "site: static_calls"),
    }


@pytest.mark.parametrize("name", [edit.name for edit in EDITS])
def test_an_edit_is_found_where_it_is(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    if name in NOT_HERE:
        assert outcome.note.startswith("not here")
    else:
        assert outcome.address, outcome.note
        assert outcome.found, outcome


def test_names_of_edits_are_unique() -> None:
    assert len({edit.name for edit in EDITS}) == len(EDITS)
    assert {edit.name for edit in EDITS} >= NOT_HERE
