"""Every fuzzing target for a while: the same inputs each time, and nothing found."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.run import CORPUS, engine, run_target, target_names
from fuzz.targets import TARGETS

#: Of each target; a few seconds.
RUNS = 3000


def test_every_target_has_its_seeds() -> None:
    assert set(TARGETS) == set(target_names())
    for name, target in TARGETS.items():
        # Files named found-* were findings once.
        seeds = {
            path.name for path in (CORPUS / name).iterdir() if not path.name.startswith("found-")
        }
        assert set(target.seeds()) == seeds, f"{name}: run tests/fuzz/seeds.py"
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < 200_000


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_nothing_is_found(name: str, tmp_path: Path) -> None:
    outcome = run_target(name, tmp_path, runs=RUNS, seed=1)
    assert not outcome.findings, outcome.log[-4000:]
    assert outcome.status == 0, outcome.log[-4000:]
    assert outcome.executions >= RUNS
    assert outcome.engine != "atheris" or outcome.coverage > 0


@pytest.mark.parametrize("kind", ["atheris", "random"])
def test_a_finding_is_found(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A harness that fails at long inputs, so that silence is not taken for health.
    if engine() != "atheris":
        kind = "random"  # what this machine has
    worker = tmp_path / "worker.py"
    here = Path(__file__).parents[1] / "fuzz"
    worker.write_text(
        f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent / 'unit')!r}]\n"
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
