"""Fuzz the targets of targets.py: `python tests/fuzz/run.py --seconds 60 [TARGET...]`.

Uses atheris (libFuzzer for Python, guided by coverage) when it is installed, else mutations
at random. What was learnt is kept in build/fuzz/corpus/, findings in build/fuzz/findings/.
Exit status: 0 nothing found, 1 findings, 2 a target that could not be run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
WORKER = HERE / "worker.py"
CORPUS = HERE / "corpus"
LENGTH_MAX = 1 << 16
#: A single input that takes longer, or more memory, is a finding.
TIMEOUT_S = 20
MEMORY_MIB = 4096


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one target. `coverage` and `features` are 0 without atheris."""

    target: str
    engine: str
    executions: int
    coverage: int  # edges of the code under test that were taken
    features: int  # the same with how often, as libFuzzer counts
    findings: tuple[Path, ...]
    status: int
    log: str


def engine() -> str:
    """What this installation fuzzes with."""
    return "atheris" if importlib.util.find_spec("atheris") else "random"


def target_names() -> list[str]:
    """All targets: those that have a seed corpus."""
    return sorted(path.name for path in CORPUS.iterdir())


def run_target(name: str, work: Path, *, runs: int = 0, seconds: int = 0, seed: int = 1) -> Outcome:
    """Fuzz one target, limited by executions, by seconds, or both; `work` keeps results."""
    learnt, findings = work / "corpus" / name, work / "findings" / name
    for directory in (learnt, findings):
        directory.mkdir(parents=True, exist_ok=True)
    known = set(findings.iterdir())
    kind = engine()
    if kind == "atheris":
        options = [
            *(f"-runs={runs}" if runs else "-runs=-1", f"-max_total_time={seconds}"),
            *(f"-seed={seed}", f"-max_len={LENGTH_MAX}", "-print_final_stats=1"),
            "-len_control=20",  # long inputs soon: an edit of a machine alone has 14 bytes
            *(f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={MEMORY_MIB}"),
            f"-artifact_prefix={findings}/",
            str(learnt),
        ]
    else:
        options = [f"--runs={runs}", f"--seconds={seconds}", f"--seed={seed}"]
        options += [f"--findings={findings}"]
    done = subprocess.run(
        [sys.executable, WORKER, name, kind, *options, CORPUS / name],
        # atheris writes tracebacks to the one, libFuzzer its numbers to the other.
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        # The order of sets decides what libFuzzer sees: let a run be repeatable.
        env=os.environ | {"PYTHONHASHSEED": "0"},
    )
    return Outcome(
        target=name,
        engine=kind,
        executions=_last(r"stat::number_of_executed_units: +(\d+)", done.stdout),
        coverage=_last(r"cov: (\d+)", done.stdout),
        features=_last(r"ft: (\d+)", done.stdout),
        findings=tuple(sorted(set(findings.iterdir()) - known)),
        status=done.returncode,
        log=done.stdout,
    )


def row(outcome: Outcome) -> str:
    """A line of the table that is printed."""
    numbers = f"{outcome.executions:>11} {outcome.coverage:>9} {outcome.features:>9}"
    return f"{outcome.target:<10} {numbers}  {len(outcome.findings)}"


def _last(pattern: str, text: str) -> int:
    found: Iterable[str] = re.findall(pattern, text)
    return int([*found, "0"][-2 if found else -1])


def main() -> int:
    """Run the targets one after the other and print a line for each."""
    parser = argparse.ArgumentParser(description="Fuzz what pyscan reads from hostile hands.")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default 60)")
    parser.add_argument("--runs", type=int, default=0, help="executions for each target")
    parser.add_argument("--seed", type=int, default=0, help="0: another one every time")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "build/fuzz")
    parser.add_argument("target", nargs="*", choices=[*target_names(), []], metavar="TARGET")
    options = parser.parse_args()
    if engine() == "random":
        print("atheris is not installed (extra `fuzz`): mutations at random, without coverage")
    print(f"{'target':<10} {'executions':>11} {'coverage':>9} {'features':>9}  findings")
    status = 0
    for name in options.target or target_names():
        outcome = run_target(
            name, options.work, runs=options.runs, seconds=options.seconds, seed=options.seed
        )
        print(row(outcome), flush=True)
        for path in outcome.findings:
            print(f"  {path}")
        if outcome.findings:
            status = status or 1
        elif outcome.status or not outcome.executions:
            status = 2
        if outcome.findings or outcome.status:
            print(outcome.log[-2000:], file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
