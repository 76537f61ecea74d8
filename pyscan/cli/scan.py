"""`pyscan scan`: one sweep of one target."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
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
from pyscan.scanner import KernelReport, SweepResult, check_approved, open_scanner
from pyscan.sources import open_source

if TYPE_CHECKING:
    from pyscan.cli.base import Commands


@dataclass(frozen=True, slots=True)
class _Found:
    """What one scan found; no result where the target could not be read or understood."""

    state: VerdictState
    reason: str
    result: SweepResult | None
    report: KernelReport | None
    timings_ms: dict[str, float]


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
        "--approved",
        metavar="FILE",
        type=Path,
        required=True,
        action="append",
        help="approved configuration; several of kind linux may be given, and the one that "
        "fits the running kernel is used",
    )
    add_trust(parser, "an approver (default: your own)")
    add_json(parser)


def run(options: argparse.Namespace) -> ExitStatus:
    """Scan, print, and give the verdict as exit status."""
    clock = [time.perf_counter()]
    ring = approvers(options.trust)
    approved = [load_approved(path, ring) for path in options.approved]
    check_approved([content for content, _ in approved])
    digester = open_digester(options.backend)
    clock.append(time.perf_counter())
    result: SweepResult | None = None
    report: KernelReport | None = None
    try:
        with open_source(options.source) as source:
            clock.append(time.perf_counter())
            contents = [content for content, _ in approved]
            with open_scanner(source, contents, digester, target=options.source) as scanner:
                result = scanner.sweep()
                report = scanner.report
        state, reason = judge(result.sweep)
    except TargetUnavailable as error:
        state, reason = VerdictState.UNDECIDED, str(error)
    clock.append(time.perf_counter())
    timings_ms = {"load": 1e3 * (clock[1] - clock[0]), "total": 1e3 * (clock[-1] - clock[0])}
    if result is not None:
        timings_ms["open"] = 1e3 * (clock[2] - clock[1])
        timings_ms["sweep"] = result.sweep.duration_ns / 1e6
    found = _Found(state, reason, result, report, timings_ms)
    if options.json:
        render.print_json(_document(options, found))
    else:
        used = [
            f"{path} ({render.approved_text(content)}, by {approver})"
            for path, (content, approver) in zip(options.approved, approved, strict=True)
            if report is None or content is report.approved
        ]
        _print(options, "\n".join(used), found)
    return EXIT_BY_VERDICT[state]


def _print(options: argparse.Namespace, approved: str, found: _Found) -> None:
    out = render.console()
    rows: list[tuple[str, str | Text]] = [
        ("verdict", render.verdict_text(found.state, found.reason)),
        ("source", options.source),
        ("approved", approved),
    ]
    if found.result is not None:
        sweep, unlisted = found.result.sweep, found.result.unlisted_executable
        rows.append(
            ("pages", f"watched {sweep.watched}  ok {sweep.ok}  unreadable {sweep.unreadable}")
        )
        not_judged = render.NOT_JUDGED
        if found.report is not None:
            rows += render.kernel_rows(found.report)
            not_judged = render.kernel_not_judged(found.report)
        elif unlisted:
            not_judged += f", {unlisted} executable pages that the snapshot does not list"
        rows.append(("not judged", not_judged))
    spent = "  ".join(f"{name} {value:.1f} ms" for name, value in found.timings_ms.items())
    render.print_facts(out, [*rows, ("timings", spent)])
    if found.result is not None:
        render.print_findings(out, found.result.sweep.findings, found.result.sweep.findings_total)


def _document(options: argparse.Namespace, found: _Found) -> dict[str, object]:
    sweep = found.result.sweep if found.result else None
    document: dict[str, object] = {
        "verdict": str(found.state),
        "reason": found.reason,
        "source": options.source,
        "approved": [str(path) for path in options.approved],
        "pages": {
            "watched": sweep.watched if sweep else 0,
            "ok": sweep.ok if sweep else 0,
            "mismatched": sweep.mismatched if sweep else 0,
            "unreadable": sweep.unreadable if sweep else 0,
            "transient": sweep.transient if sweep else 0,
            "unlisted_executable": found.result.unlisted_executable if found.result else None,
        },
        "findings": [render.finding_json(finding) for finding in (sweep.findings if sweep else ())],
        "findings_total": sweep.findings_total if sweep else 0,
        "not_judged": render.NOT_JUDGED.split(", "),
        "timings_ms": {name: round(value, 3) for name, value in found.timings_ms.items()},
    }
    if found.report is not None:
        document |= render.kernel_json(found.report)
        document["not_judged"] = render.kernel_not_judged(found.report).split(", ")
    return document
