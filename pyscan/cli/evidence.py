"""`pyscan evidence`: check what the programs recorded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pyscan import render
from pyscan.cli.base import add_command, add_group, add_json, add_trust, key_ring
from pyscan.errors import ExitStatus
from pyscan.evidence import verify_directory

if TYPE_CHECKING:
    from pyscan.cli.base import Commands


def add(commands: Commands) -> None:
    """Declare the commands."""
    group = add_group(commands, "evidence", "check evidence")
    verify = add_command(
        group,
        "verify",
        run_verify,
        "check hash chains, signatures and files of an evidence directory, offline",
        "pyscan evidence verify /var/lib/pyscan/evidence",
    )
    verify.add_argument("directory", metavar="DIR", type=Path, help="evidence directory")
    add_trust(verify, "a writer (default: the keys stored beside the logs)")
    add_json(verify)


def run_verify(options: argparse.Namespace) -> ExitStatus:
    """Verify and print a summary; what is wrong comes as an error, exit 2."""
    ring = key_ring(options.trust) if options.trust else None
    document = verify_directory(options.directory, ring).to_json()
    if options.json:
        render.print_json(document)
    else:
        render.print_facts(render.console(), render.fact_rows(document))
    return ExitStatus.APPROVED
