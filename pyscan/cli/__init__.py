"""The command `pyscan`: arguments, exit status, and nothing that decides.

One module per group of commands; each has `add(commands)`, which declares its arguments
and names the function that runs them.

Exit status: 0 approved or done, 1 unapproved, 2 wrong usage or a bad file, 3 undecided
(unreadable, kernel not found), 4 failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from pyscan import __version__
from pyscan.cli import (
    approve,
    bench,
    card,
    demo,
    events,
    evidence,
    incidents,
    keys,
    policy,
    programs,
    scan,
    sources,
    vm,
)
from pyscan.cli.base import Command
from pyscan.errors import ExitStatus, PyscanError

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. No traceback reaches an operator."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may be any bytes
    options = _parser().parse_args(arguments)
    command: Command = options.command
    try:
        status = int(command(options))
        sys.stdout.flush()
    except PyscanError as error:
        print(f"pyscan: {error}", file=sys.stderr)
        return int(error.exit_status)
    except KeyboardInterrupt:
        print("pyscan: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"pyscan: {error}; check disk space and permissions", file=sys.stderr)
        # What could not be written must not fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitStatus.FAILED)
    except Exception as error:
        if os.environ.get("PYSCAN_TRACEBACK"):
            raise
        print(
            f"pyscan: internal error: {type(error).__name__}: {error}; "
            "please report it with the traceback that PYSCAN_TRACEBACK=1 prints",
            file=sys.stderr,
        )
        return int(ExitStatus.FAILED)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyscan",
        description="Out-of-band memory integrity for servers and virtual machines.",
        epilog="Exit status: 0 approved or done, 1 unapproved, 2 wrong usage or bad file, "
        "3 undecided, 4 failed. Every command has --help with an example.",
    )
    parser.add_argument("--version", action="version", version=f"pyscan {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    groups = (demo, approve, scan, programs, vm, incidents, events, policy, evidence, keys)
    for group in (*groups, sources, card, bench):
        group.add(commands)
    return parser
