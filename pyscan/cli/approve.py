"""`pyscan approve`: make and show approved configurations."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pyscan import render
from pyscan.approved import LinuxApproved, enrol, load_approved, save_approved
from pyscan.cli import approve_linux
from pyscan.cli.base import (
    add_command,
    add_group,
    add_json,
    add_source,
    add_trust,
    approvers,
    own_key,
)
from pyscan.digest import open_digester
from pyscan.errors import ExitStatus
from pyscan.keys import SigningKey
from pyscan.sources import open_source

if TYPE_CHECKING:
    from pyscan.cli.base import Commands

STEPS = ("find kernel", "digest", "verify")


def add(commands: Commands) -> None:
    """Declare the commands."""
    group = add_group(commands, "approve", "make and show approved configurations")
    snapshot = add_command(
        group,
        "snapshot",
        run_snapshot,
        "enrol a target that is known to be good, as it is now",
        "pyscan approve snapshot qemu:/run/vm/web-1.qmp --out web-1.approved",
    )
    add_source(snapshot)
    snapshot.add_argument("--out", metavar="FILE", type=Path, required=True, help="file to write")
    snapshot.add_argument(
        "--sign", metavar="KEY", type=Path, help="private key to sign with (default: your own)"
    )
    approve_linux.add(group)
    show = add_command(
        group,
        "show",
        run_show,
        "verify an approved configuration and tell what it covers",
        "pyscan approve show web-1.approved --json",
    )
    show.add_argument("file", metavar="FILE", type=Path, help="approved configuration")
    add_trust(show, "an approver (default: your own)")
    add_json(show)


def run_snapshot(options: argparse.Namespace) -> ExitStatus:
    """Enrol, sign and write."""
    out = render.console()
    key = SigningKey.load(options.sign) if options.sign else own_key()
    digester = open_digester(options.backend)
    with open_source(options.source) as source, render.progress(out) as bar:
        tasks = {step: bar.add_task(step, total=None) for step in STEPS}
        snapshot = enrol(
            source,
            digester,
            time.time_ns(),
            lambda step, done, total: bar.update(tasks[step], completed=done, total=total),
        )
    size = save_approved(snapshot, options.out, key)
    kernel = snapshot.kernel
    render.print_facts(
        out,
        [
            ("approved", f"{options.out} ({size} bytes, signed by key {key.key_id.hex()})"),
            ("pages", f"{snapshot.pages} executable or read-only kernel pages, SHA-256"),
            (
                "kernel",
                f"{kernel.virtual_base:#x} -> {kernel.physical_base:#x}, "
                f"{kernel.paging_levels}-level tables at {kernel.root_gpa:#x}",
            ),
        ],
    )
    return ExitStatus.APPROVED


def run_show(options: argparse.Namespace) -> ExitStatus:
    """Verify and print."""
    approved, approver = load_approved(options.file, approvers(options.trust))
    if isinstance(approved, LinuxApproved):
        document = approve_linux.show_json(approved, approver)
    else:
        document = render.snapshot_json(approved, approver)
    if options.json:
        render.print_json(document)
    else:
        # Hundreds of names help nobody on a terminal; --json has them.
        document.pop("modules", None)
        render.print_facts(render.console(), render.fact_rows(document))
    return ExitStatus.APPROVED
