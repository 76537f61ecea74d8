"""`pyscan scan`: one sweep of one target."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from pyscan import render
from pyscan.approved import load_approved
from pyscan.cli.base import add_command, add_json, add_source, add_trust, approvers
from pyscan.digest import open_digester
from pyscan.errors import ExitStatus, TargetUnavailable
from pyscan.policy import judge
from pyscan.records import VerdictState
from pyscan.scanner import Scanner, SweepResult
from pyscan.sources import open_source

if TYPE_CHECKING:
    from pyscan.cli.base import Commands

EXIT_BY_VERDICT = {
    VerdictState.APPROVED: ExitStatus.APPROVED,
    VerdictState.UNAPPROVED: ExitStatus.UNAPPROVED,
    VerdictState.UNDECIDED: ExitStatus.UNDECIDED,
}


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "scan",
        run,
        "sweep a target once and compare it with an approved configuration",
        "pyscan scan 'file:ram.img?machine=q35&size=512M' --approved web-1.approved --json",
    )
    add_source(parser)
    parser.add_argument(
        "--approved", metavar="FILE", type=Path, required=True, help="approved configuration"
    )
    add_trust(parser, "an approver (default: your own)")
    add_json(parser)


def run(options: argparse.Namespace) -> ExitStatus:
    """Scan, print, and give the verdict as exit status."""
    clock = [time.perf_counter()]
    snapshot, approver = load_approved(options.approved, approvers(options.trust))
    digester = open_digester(options.backend)
    clock.append(time.perf_counter())
    result: SweepResult | None = None
    try:
        with open_source(options.source) as source:
            clock.append(time.perf_counter())
            with Scanner(source, snapshot, digester, target=options.source) as scanner:
                result = scanner.sweep()
        state, reason = judge(result.sweep)
    except TargetUnavailable as error:
        state, reason = VerdictState.UNDECIDED, str(error)
    clock.append(time.perf_counter())
    timings_ms = {"load": 1e3 * (clock[1] - clock[0]), "total": 1e3 * (clock[-1] - clock[0])}
    if result is not None:
        timings_ms["open"] = 1e3 * (clock[2] - clock[1])
        timings_ms["sweep"] = result.sweep.duration_ns / 1e6
    if options.json:
        render.print_json(_document(options, state, reason, result, timings_ms))
    else:
        approved = (
            f"{options.approved} (snapshot of {render.time_text(snapshot.created_ns)}, "
            f"{snapshot.pages} pages, by {approver})"
        )
        _print(options, approved, render.verdict_text(state, reason), result, timings_ms)
    return EXIT_BY_VERDICT[state]


def _print(
    options: argparse.Namespace,
    approved: str,
    verdict: Text,
    result: SweepResult | None,
    timings_ms: dict[str, float],
) -> None:
    out = render.console()
    rows: list[tuple[str, str | Text]] = [
        ("verdict", verdict),
        ("source", options.source),
        ("approved", approved),
    ]
    if result is not None:
        sweep, unlisted = result.sweep, result.unlisted_executable
        rows.append(
            ("pages", f"watched {sweep.watched}  ok {sweep.ok}  unreadable {sweep.unreadable}")
        )
        not_judged = render.NOT_JUDGED
        if unlisted:
            not_judged += f", {unlisted} executable pages that the snapshot does not list"
        rows.append(("not judged", not_judged))
    spent = "  ".join(f"{name} {value:.1f} ms" for name, value in timings_ms.items())
    render.print_facts(out, [*rows, ("timings", spent)])
    if result is not None:
        render.print_findings(out, result.sweep.findings, result.sweep.findings_total)


def _document(
    options: argparse.Namespace,
    state: VerdictState,
    reason: str,
    result: SweepResult | None,
    timings_ms: dict[str, float],
) -> dict[str, object]:
    sweep = result.sweep if result else None
    return {
        "verdict": str(state),
        "reason": reason,
        "source": options.source,
        "approved": str(options.approved),
        "pages": {
            "watched": sweep.watched if sweep else 0,
            "ok": sweep.ok if sweep else 0,
            "mismatched": sweep.mismatched if sweep else 0,
            "unreadable": sweep.unreadable if sweep else 0,
            "transient": sweep.transient if sweep else 0,
            "unlisted_executable": result.unlisted_executable if result else None,
        },
        "findings": [render.finding_json(finding) for finding in (sweep.findings if sweep else ())],
        "findings_total": sweep.findings_total if sweep else 0,
        "not_judged": render.NOT_JUDGED.split(", "),
        "timings_ms": {name: round(value, 3) for name, value in timings_ms.items()},
    }
