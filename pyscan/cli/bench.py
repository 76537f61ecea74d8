"""`pyscan bench`: our digests beside everything else that could be used."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pyscan import bench, render
from pyscan.cli.base import add_command
from pyscan.errors import ExitStatus, UsageError

if TYPE_CHECKING:
    from pyscan.cli.base import Commands


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "bench",
        run,
        "measure the scan core beside other ways to do its work",
        "pyscan bench --quick --json figures.json",
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds and shapes; ends within three minutes"
    )
    parser.add_argument(
        "--shape",
        metavar="NAME",
        action="append",
        default=[],
        help="only this shape, and no scaling or end-to-end runs; may be given several times: "
        + ", ".join(shape.name for shape in bench.SHAPES),
    )
    parser.add_argument(
        "--contender",
        metavar="NAME",
        action="append",
        default=[],
        help="only this contender; may be given several times",
    )
    parser.add_argument("--rounds", metavar="N", type=_at_least(1), help="rounds of each contender")
    parser.add_argument(
        "--trials",
        metavar="N",
        type=_at_least(0),
        help="tamperings of a real guest, 0 for none (200; with --quick none)",
    )
    parser.add_argument("--seed", metavar="N", type=int, help="seed of contents and places (time)")
    parser.add_argument(
        "--note", metavar="TEXT", default="", help="what else ran on the machine, for the report"
    )
    parser.add_argument(
        "--guest",
        metavar="DIR",
        type=Path,
        default=Path("build/guest"),
        help="guest kernel and initramfs, made by `make setup` (build/guest)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")
    parser.add_argument(
        "--from", dest="stored", metavar="FILE", type=Path,
        help="measure nothing; read figures that --json wrote",
    )  # fmt: skip
    parser.add_argument("--report", metavar="FILE", type=Path, help="write a Markdown page here")
    parser.add_argument("--plots", metavar="DIR", type=Path, help="write plots here, SVG and PNG")


def run(options: argparse.Namespace) -> ExitStatus:
    """Measure or read, then print and write what was asked for."""
    out = render.console()
    if options.stored is not None:
        if options.json is not None:
            raise UsageError("--from measures nothing, so --json has nothing to write; drop one")
        document = bench.load(options.stored)
    else:
        _prepare_outputs(options)
        document = _measure(options)
    if options.json is not None:
        bench.save(document, options.json)
    plots = bench.save_plots(document, options.plots) if options.plots is not None else []
    if options.report is not None:
        bench.save_markdown(document, options.report, plots)
    bench.print_document(out, document)
    return ExitStatus.APPROVED


def _prepare_outputs(options: argparse.Namespace) -> None:
    """Whatever would keep the results from being written must show before the measuring.

    Raises UsageError.
    """
    if options.plots is not None:
        bench.require_plots()
    files = [path for path in (options.json, options.report) if path is not None]
    for folder in {*(path.parent for path in files), *filter(None, [options.plots])}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder}: cannot be made: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise UsageError(f"{folder}: cannot be written; choose another place for the results")


def _measure(options: argparse.Namespace) -> bench.Document:
    wanted = bench.BenchOptions(
        quick=options.quick,
        shapes=tuple(options.shape),
        contenders=tuple(options.contender),
        rounds=options.rounds,
        trials=options.trials,
        seed=options.seed,
        note=options.note,
        guest_dir=options.guest,
    )
    status = render.console(stderr=True)
    if not status.is_terminal:
        return bench.run_bench(wanted, lambda _step: None)
    with status.status("") as spinner:
        return bench.run_bench(wanted, spinner.update)


def _at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a number from `least` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    return number
