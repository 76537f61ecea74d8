"""What the response costs: from a tampering to the frozen guest, a command, a fleet, a control.

    python bench/response.py                # all of it, about three minutes
    python bench/response.py --quick        # less of each
    python bench/response.py --trials 200   # enough for a 99th percentile

A real guest under TCG, and monitor, control, agent and broker as processes, all on the
processors that measure. Times need a machine with nothing else to do: fdatasync and the
scheduler are in every stage. With fewer than 100 trials the 99th percentile is the slowest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from crowd import Crowd, measure_crowd
from orders import Orders, measure_orders
from rich.table import Table

from pyscan import render
from pyscan.bench.stages import STAGES, StagedTrials, measure_stages
from pyscan.lab.process import RunDirectory

GUEST_DIR: Final = Path("build/guest")
#: The wanted times hold for the first; the others show what the interval costs.
INTERVALS_MS: Final = (20, 50)
AGENTS: Final = 1000
SYNCS: Final = 200
CONTROL_BENCH: Final = Path(__file__).with_name("bench_control.py")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A figure that must be reached."""

    figure: str
    wanted: str
    measured: str
    met: bool


@dataclass(frozen=True, slots=True)
class Measured:
    """All that a run gave."""

    staged: list[StagedTrials]
    orders: list[Orders]
    crowd: Crowd
    rates: dict[str, float]  # verdicts a second by kind and store
    sync_ms: list[float]  # of small appends to a file, each with fdatasync
    load: float  # of the last minute, when it began
    seconds: float


def main() -> int:
    """Measure, print, and write what was asked for; 0 whatever the figures are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less of each")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")
    parser.add_argument("--trials", metavar="N", type=int, help="tamperings for each interval")
    options = parser.parse_args()
    measured = _measure(options.quick, options.trials or (3 if options.quick else 15))
    wanted = list(_judge(measured))
    if options.json is not None:
        document = {**asdict(measured), "stages": STAGES, "wanted": [asdict(w) for w in wanted]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    _print(measured, wanted)
    return 0


def _measure(quick: bool, trials: int) -> Measured:
    began, load = time.monotonic(), os.getloadavg()[0]
    sync_ms = _sync_times()
    intervals = INTERVALS_MS[:1] if quick else INTERVALS_MS
    dice = random.Random()  # noqa: S311 - moments, no secrets
    staged = measure_stages(GUEST_DIR, intervals, trials, dice, _progress)
    orders = measure_orders(GUEST_DIR, 50 if quick else 300, _progress)
    crowd = measure_crowd(AGENTS // 5 if quick else AGENTS, _progress)
    rates = _control_rates(quick)
    return Measured(staged, orders, crowd, rates, sync_ms, load, time.monotonic() - began)


def _progress(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _sync_times() -> list[float]:
    """Milliseconds of what every record of evidence and every transaction waits for."""
    times = []
    with RunDirectory() as run, (run.path / "file").open("wb", buffering=0) as file:
        for _ in range(SYNCS):
            began = time.perf_counter()
            file.write(bytes(500))
            os.fdatasync(file.fileno())
            times.append(1e3 * (time.perf_counter() - began))
    return sorted(times)


def _control_rates(quick: bool) -> dict[str, float]:
    """Verdicts a second of a worker, by bench_control.py."""
    _progress("verdicts a second of a control")
    with tempfile.TemporaryDirectory() as directory:
        figures = Path(directory) / "figures.json"
        command = [sys.executable, "-m", "pytest", str(CONTROL_BENCH), "-p", "no:cacheprovider"]
        command += ["--override-ini", "python_files=bench_*.py"]
        command += ["--override-ini", "python_functions=bench_*"]
        command += ["--benchmark-json", str(figures), "--benchmark-disable-gc"]
        command += ["-k", "file"] if quick else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        benchmarks = json.loads(figures.read_text())["benchmarks"]
    return {each["name"]: each["extra_info"]["verdicts_per_s"] for each in benchmarks}


def _judge(measured: Measured) -> Iterable[Wanted]:
    first, crowd = measured.staged[0], measured.crowd
    frozen = sorted(trial.frozen_ms for trial in first.trials)
    name = f"tamper -> frozen, sweeps every {first.interval_ms} ms"
    yield _at_most(f"{name}, median", statistics.median(frozen), 30, "ms")
    yield _at_most(f"{name}, p99 of {len(frozen)}", _quantile(frozen, 0.99), 150, "ms")
    tls = next(orders for orders in measured.orders if orders.tls)
    yield _at_most(
        "command -> accepted, mutual TLS, median", statistics.median(tls.accepted_ms), 5, "ms"
    )
    yield _at_most(f"{crowd.agents} commands, final reports verified", crowd.commands_s, 2, "s")
    for kind, rate in measured.rates.items():
        yield _at_least(f"control, {kind}", rate, 1000, "verdicts/s")


def _quantile(ascending: Sequence[float], share: float) -> float:
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]


def _at_least(figure: str, measured: float, least: float, unit: str) -> Wanted:
    return Wanted(figure, f">= {least:g} {unit}", f"{measured:.4g} {unit}", measured >= least)


def _at_most(figure: str, measured: float, most: float, unit: str) -> Wanted:
    return Wanted(figure, f"<= {most:g} {unit}", f"{measured:.3g} {unit}", measured <= most)


def _print(measured: Measured, wanted: list[Wanted]) -> None:
    out = render.console()
    rows = [
        (each.figure, each.wanted, each.measured, "yes" if each.met else "NO") for each in wanted
    ]
    out.print(_table("Must reach", ("figure", "wanted", "measured", "met"), rows))
    for staged in measured.staged:
        title = f"\nFrom tamper to frozen, sweeps every {staged.interval_ms} ms, ms"
        out.print(_table(title, ("stage", "median", "p99"), list(_stage_rows(staged))))
    out.print(_table("\nDetails", ("what", "median", "p99"), list(_detail_rows(measured))))
    out.print(f"\n{measured.seconds:.0f} s, load when it began {measured.load:.2f}")


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    grid = Table(title=title, title_justify="left", box=None)
    for number, heading in enumerate(headings):
        grid.add_column(heading, justify="right" if number else "left")
    for row in rows:
        grid.add_row(*row)
    return grid


def _stage_rows(staged: StagedTrials) -> Iterable[tuple[str, str, str]]:
    for name, times in zip(
        STAGES, zip(*(t.stages_ms for t in staged.trials), strict=True), strict=True
    ):
        yield _row(name, times)
    yield _row(f"all of it, {len(staged.trials)} trials", [t.frozen_ms for t in staged.trials])


def _detail_rows(measured: Measured) -> Iterable[tuple[str, str, str]]:
    crowd = measured.crowd
    yield _row("fdatasync of 500 bytes, ms", measured.sync_ms, 3)
    for orders in measured.orders:
        way = "mutual TLS" if orders.tls else "no TLS"
        yield _row(f"command -> accepted, {way}, ms", orders.accepted_ms)
        yield _row(f"query -> final report, {way}, ms", orders.final_ms)
    yield f"{crowd.agents} agents connect, s", f"{crowd.connect_s:.2f}", ""
    yield "broker's memory for an agent, KiB", f"{crowd.broker_kib_per_agent:.1f}", ""
    yield f"{crowd.agents} alarms -> incidents answered, s", f"{crowd.control_s:.2f}", ""
    yield f"{crowd.agents} more, s", f"{crowd.again_s:.2f}", ""
    yield f"control's memory after the first {crowd.agents}, MiB", f"{crowd.control_mib:.1f}", ""
    yield "control's memory for an incident, KiB", f"{crowd.control_kib_per_incident:.2f}", ""


def _row(name: str, times: Sequence[float], digits: int = 2) -> tuple[str, str, str]:
    ascending = sorted(times)
    median, slow = statistics.median(ascending), _quantile(ascending, 0.99)
    return name, f"{median:.{digits}f}", f"{slow:.{digits}f}"


if __name__ == "__main__":
    raise SystemExit(main())
