"""`pyscan monitor`, `pyscan control`, `pyscan agent`: the three programs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pyscan import agent, control, monitor
from pyscan.cli.base import add_command
from pyscan.errors import ExitStatus

if TYPE_CHECKING:
    from pyscan.cli.base import Commands

PROGRAMS = (
    ("monitor", monitor.run_program, "read targets' memory, judge it, publish signed verdicts"),
    ("control", control.run_program, "answer verdicts by policy with signed commands"),
    ("agent", agent.run_program, "carry commands out on this host's virtual machines"),
)


def add(commands: Commands) -> None:
    """Declare the commands."""
    for name, program, text in PROGRAMS:
        example = f"pyscan {name} --config /etc/pyscan/{name}.toml"
        parser = add_command(commands, name, partial(run, program), text, example)
        parser.add_argument(
            "--config", metavar="FILE", type=Path, required=True, help="configuration (TOML)"
        )
        parser.add_argument(
            "--check-config", action="store_true", help="check the configuration and exit"
        )


def run(program: Callable[[Path, bool], int], options: argparse.Namespace) -> ExitStatus:
    """Run one program until it is told to stop."""
    return ExitStatus(program(options.config, options.check_config))
