"""`pyscan sources`: the ways to read a target's memory."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pyscan import render
from pyscan.cli.base import add_command, add_json
from pyscan.errors import ExitStatus
from pyscan.sources import BACKENDS

if TYPE_CHECKING:
    from pyscan.cli.base import Commands


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "sources",
        run,
        "list the ways to read a target's memory, and what of them is on this machine",
        "pyscan sources",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> ExitStatus:
    """Print name, description and requirements of every source, and what of it is here."""
    if options.json:
        render.print_json(
            [
                {
                    "scheme": backend.scheme,
                    "form": backend.form,
                    "summary": backend.summary,
                    "requires": backend.requires,
                    "found": backend.probe(),
                }
                for backend in BACKENDS
            ]
        )
        return ExitStatus.APPROVED
    for backend in BACKENDS:
        render.print_facts(
            render.console(),
            [
                (backend.scheme, backend.summary),
                ("  form", backend.form),
                ("  needs", backend.requires),
                ("  found", backend.probe()),
            ],
        )
    return ExitStatus.APPROVED
