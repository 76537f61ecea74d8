"""Every group of fuzzing targets for a minute, and nothing is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzz.run import CORPUS, engine, row, run_target, target_names
from fuzz.targets import TARGETS
from numpy.typing import NDArray

from pyscan.validate.code import TextComparer

#: Targets by what they attack, and seconds for each target of a group: a minute a group.
GROUPS = {
    "package": ("approved", "bzimage", "deb", "elf", "module", "symbols", "types", "unit"),
    "attach": ("attach",),
    "validate": ("validate",),
}
SECONDS = {"package": 8, "attach": 60, "validate": 60}
TARGETS_OF = [(group, name) for group, names in GROUPS.items() for name in names]


def test_every_target_has_its_seeds() -> None:
    assert set(TARGETS) == set(target_names())
    for name, target in TARGETS.items():
        # Files named found-* were findings once.
        seeds = {
            path.name for path in (CORPUS / name).iterdir() if not path.name.startswith("found-")
        }
        assert set(target.seeds()) == seeds, f"{name}: run tests/fuzz/seeds.py"
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < 200_000


def test_every_target_is_in_a_group() -> None:
    assert sorted(name for _, name in TARGETS_OF) == sorted(TARGETS)


@pytest.mark.parametrize(("group", "name"), TARGETS_OF)
def test_nothing_is_found(
    group: str, name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    outcome = run_target(name, tmp_path, seconds=SECONDS[group], seed=1)
    for key in ("engine", "executions", "coverage", "features"):
        record_property(key, getattr(outcome, key))
    print(row(outcome))
    assert not outcome.findings, outcome.log[-4000:]
    assert outcome.status == 0, outcome.log[-4000:]
    assert outcome.executions > len(list((CORPUS / name).iterdir()))
    assert outcome.engine != "atheris" or outcome.coverage > 0


@pytest.mark.parametrize("kind", ["atheris", "random"])
def test_a_finding_is_found(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A harness that fails at long inputs, so that silence is not taken for health.
    if engine() != "atheris":
        kind = "random"  # what this machine has
    worker = tmp_path / "worker.py"
    here = Path(__file__).parents[1] / "fuzz"
    worker.write_text(
        f"import sys; sys.path[:0] = {[str(here), str(here.parent), str(here.parent / 'unit')]!r}\n"
        "import targets, worker as real\n"
        "def fail(data):\n"
        "    if len(data) > 700: raise IndexError(len(data))\n"
        "targets.TARGETS['elf'] = targets.Target(fail, dict)\n"
        "sys.exit(real.main(sys.argv[1:]))\n"
    )
    monkeypatch.setattr("fuzz.run.WORKER", worker)
    monkeypatch.setattr("fuzz.run.engine", lambda: kind)
    outcome = run_target("elf", tmp_path / "work", runs=100)
    assert outcome.status != 0
    (finding,) = outcome.findings
    assert len(finding.read_bytes()) > 700
    assert "IndexError" in outcome.log
    assert outcome.engine == kind


def test_mutations_without_coverage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.run.engine", lambda: "random")
    outcome = run_target("types", tmp_path, runs=500)
    assert not outcome.findings, outcome.log[-4000:]
    assert (outcome.status, outcome.executions, outcome.coverage) == (0, 500, 0)


def blind(
    self: TextComparer, start: int, actual: NDArray[np.uint8], *_rest: object
) -> NDArray[np.uint8]:
    """A comparison that finds nothing."""
    return actual


@pytest.mark.parametrize("mode", ["code", "branch", "form"])
def test_a_blind_validation_is_found(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = (CORPUS / "validate" / mode).read_bytes()
    TARGETS["validate"].run(seed)
    monkeypatch.setattr(TextComparer, "compare", blind)
    with pytest.raises(AssertionError, match="not found"):
        TARGETS["validate"].run(seed)
