"""A whole run, from the machine's description to the goals."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np

from pyscan.bench import machine
from pyscan.bench.calls import measure_calls
from pyscan.bench.contenders import CONTENDERS
from pyscan.bench.detection import measure_detection
from pyscan.bench.document import Absent, Document
from pyscan.bench.latency import measure_latency
from pyscan.bench.measure import Measured, Plan, Progress, measure_shapes
from pyscan.bench.scaling import measure_series
from pyscan.bench.shapes import SHAPES, Shape
from pyscan.bench.targets import judge_goals
from pyscan.errors import LabError, UsageError
from pyscan.lab.process import unwind_on

ROUNDS: Final = 9
QUICK_ROUNDS: Final = 3
TRIALS: Final = 200
QUICK_TRIALS: Final = 0
#: Modifications of each lifetime.
LIVES_TRIALS: Final = 200
QUICK_LIVES_TRIALS: Final = 10


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What `pyscan bench` was asked for; empty and None stand for the usual."""

    quick: bool = False
    shapes: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    rounds: int | None = None
    trials: int | None = None
    seed: int | None = None
    note: str = ""
    guest_dir: Path = Path("build/guest")


def run_bench(options: BenchOptions, progress: Progress) -> Document:
    """Measure, and leave nothing behind when interrupted.

    Raises UsageError for a shape or contender that does not exist.
    """
    with unwind_on(signal.SIGINT, signal.SIGTERM):
        return _run(options, progress)


def _run(options: BenchOptions, progress: Progress) -> Document:
    started, clock = datetime.now(tz=UTC), time.monotonic()
    shapes = _shapes(options)
    description = machine.describe()
    seed = options.seed if options.seed is not None else time.time_ns() & 0xFFFF_FFFF
    plan = Plan(
        rounds=options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
        random=np.random.default_rng(seed),
        wanted=_wanted(options),
    )
    measured = Measured()
    measure_shapes(shapes, plan, progress, measured)
    if not options.shapes:
        _measure_rest(options, plan, progress, measured)
    return Document(
        machine=description,
        started=started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds=round(time.monotonic() - clock, 1),
        quick=options.quick,
        seed=seed,
        note=options.note,
        results=measured.results,
        ratios=measured.ratios,
        rates=measured.rates,
        targets=judge_goals(measured),
        series=measured.series,
        latency=measured.latency,
        detection=measured.detection,
        absent=measured.absent,
    )


def _measure_rest(
    options: BenchOptions, plan: Plan, progress: Progress, measured: Measured
) -> None:
    """Calls, scaling, detection, and the real guest last: it takes longest."""
    measured.rates += measure_calls(plan, progress)
    measured.series += measure_series(plan, options.quick, progress)
    lives = QUICK_LIVES_TRIALS if options.quick else LIVES_TRIALS
    measured.detection.append(measure_detection(plan, lives, progress))
    trials = options.trials
    if trials is None:
        trials = QUICK_TRIALS if options.quick else TRIALS
    if trials == 0:
        return
    try:
        measured.latency += measure_latency(options.guest_dir, trials, plan, progress)
    except LabError as error:
        measured.absent.append(Absent("end to end", "", str(error)))


def _shapes(options: BenchOptions) -> list[Shape]:
    known = {shape.name: shape for shape in SHAPES}
    for name in options.shapes:
        if name not in known:
            raise UsageError(f"shape {name!r} is unknown; use one of: {', '.join(known)}")
    if options.shapes:
        return [known[name] for name in options.shapes]
    return [shape for shape in SHAPES if shape.quick or not options.quick]


def _wanted(options: BenchOptions) -> frozenset[str]:
    known = {name for shape in SHAPES for name in shape.contenders}
    for name in options.contenders:
        if name not in known:
            raise UsageError(
                f"contender {name!r} is unknown; use one of: "
                f"{', '.join(each.name for each in CONTENDERS)}"
            )
    return frozenset(options.contenders)
