"""`pyscan keys`: key pairs for approvers and programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pyscan import render
from pyscan.cli.base import add_command, add_group
from pyscan.errors import ExitStatus, UsageError
from pyscan.keys import SigningKey

if TYPE_CHECKING:
    from pyscan.cli.base import Commands


def add(commands: Commands) -> None:
    """Declare the commands."""
    group = add_group(commands, "keys", "make key pairs for approvers and programs")
    create = add_command(
        group,
        "create",
        run_create,
        "make an Ed25519 key pair: PATH (private, mode 0600) and PATH.pub",
        "pyscan keys create /etc/pyscan/monitor.key",
    )
    create.add_argument("path", metavar="PATH", type=Path, help="private key file to make")


def run_create(options: argparse.Namespace) -> ExitStatus:
    """Make both files or none; an existing file is never overwritten."""
    private: Path = options.path
    if not private.name:
        raise UsageError(f"{private}: not a file name")
    key = SigningKey.generate()
    public = private.with_name(private.name + ".pub")
    key.save(private)
    try:
        key.public.save(public)
    except UsageError:
        private.unlink()
        raise
    render.print_facts(
        render.console(),
        [("private", str(private)), ("public", str(public)), ("key id", key.key_id.hex())],
    )
    return ExitStatus.APPROVED
