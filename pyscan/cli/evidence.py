"""`pyscan evidence`: check, show and hand on what the programs recorded."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.text import Text

from pyscan import render
from pyscan.cli.base import add_command, add_group, add_json, add_trust, key_ring
from pyscan.errors import ExitStatus
from pyscan.evidence import verify_directory
from pyscan.evidence.cloudevents import cloudevents
from pyscan.evidence.events import Event, moment, read_events
from pyscan.evidence.ocsf import detection_findings
from pyscan.evidence.timeline import describe
from pyscan.keys import KeyRing
from pyscan.protocol import one_line

if TYPE_CHECKING:
    from pyscan.cli.base import Commands

_FORMATS: Final[dict[str, Callable[[Iterable[Event]], Iterator[dict[str, object]]]]] = {
    "cloudevents": cloudevents,
    "ocsf": detection_findings,
}
_SHOWN_CHARACTERS_MAX: Final = 400


def add(commands: Commands) -> None:
    """Declare the commands."""
    group = add_group(commands, "evidence", "check, show and export evidence")
    verify = add_command(
        group,
        "verify",
        run_verify,
        "check hash chains, signatures and files of an evidence directory, offline",
        "pyscan evidence verify /var/lib/pyscan/evidence",
    )
    _add_directory(verify)
    add_json(verify)
    show = add_command(
        group,
        "show",
        run_show,
        "show what happened, in the order of time",
        "pyscan evidence show /var/lib/pyscan/evidence",
    )
    _add_directory(show)
    export = add_command(
        group,
        "export",
        run_export,
        "write evidence for a SIEM, one JSON document a line",
        "pyscan evidence export /var/lib/pyscan/evidence --format ocsf >findings.jsonl",
    )
    _add_directory(export)
    export.add_argument(
        "--format",
        choices=sorted(_FORMATS),
        required=True,
        help="cloudevents: every event as a CloudEvent 1.0; ocsf: Detection Findings, class 2004",
    )


def run_verify(options: argparse.Namespace) -> ExitStatus:
    """Verify and print a summary; what is wrong comes as an error, exit 2."""
    document = verify_directory(options.directory, _ring(options)).to_json()
    if options.json:
        render.print_json(document)
    else:
        shown = {name: value for name, value in document.items() if value != []}
        render.print_facts(render.console(), render.fact_rows(shown))
    return ExitStatus.APPROVED


def run_show(options: argparse.Namespace) -> ExitStatus:
    """Print a line for each event."""
    out = render.console()
    for event in read_events(options.directory, _ring(options)):
        time = moment(event.time_ns)
        stamp = f"{time:%Y-%m-%d %H:%M:%S}.{time.microsecond // 1000:03}" if time else "-"
        text = one_line(describe(event), _SHOWN_CHARACTERS_MAX)
        style = "" if event.verified else "yellow"
        out.print(
            Text(f"{stamp:<23}  {event.writer:<16}  {event.kind:<10}  {text}", style=style),
            soft_wrap=True,
        )
    return ExitStatus.APPROVED


def run_export(options: argparse.Namespace) -> ExitStatus:
    """Print the documents; messages without a key at hand are counted on standard error."""
    unverified = 0

    def counted() -> Iterator[Event]:
        nonlocal unverified
        for event in read_events(options.directory, _ring(options)):
            unverified += not event.verified
            yield event

    for document in _FORMATS[options.format](counted()):
        json.dump(document, sys.stdout, separators=(",", ":"))
        sys.stdout.write("\n")
    if unverified:
        print(
            f"pyscan: messages left out: {unverified}, because the keys of their signers are not "
            "at hand; pass them with --trust, or give the directory of all logs",
            file=sys.stderr,
        )
    return ExitStatus.APPROVED


def _add_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=Path, help="evidence directory")
    add_trust(parser, "a writer or signer (default: the keys stored beside the logs)")


def _ring(options: argparse.Namespace) -> KeyRing | None:
    return key_ring(options.trust) if options.trust else None
