"""`pyscan demo`: the main job on a real guest, in one command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pyscan.cli.base import add_command, add_json
from pyscan.demo import DemoOptions, run_demo
from pyscan.errors import ExitStatus
from pyscan.lab.guest import Accelerator
from pyscan.lab.ram import Machine
from pyscan.records import Action

if TYPE_CHECKING:
    from pyscan.cli.base import Commands


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "demo",
        run,
        "boot a guest, watch it, tamper with it, and see it found out and frozen",
        "pyscan demo --action kill --tamper external --json",
    )
    parser.add_argument(
        "--source",
        choices=("qemu", "card"),
        default="qemu",
        help="how the guest's memory is read: through its RAM file, or by a card machine with "
        "firmware of its own, whose engine gathers pages over the guest's bus (qemu)",
    )
    parser.add_argument(
        "--action", choices=("freeze", "kill"), default="freeze", help="the answer (freeze)"
    )
    parser.add_argument(
        "--tamper",
        choices=("text", "syscall", "external"),
        default="text",
        help="what is changed: a byte of kernel text or a syscall-table entry, by a module inside "
        "the guest, or a byte written through the RAM file from outside (text)",
    )
    parser.add_argument(
        "--approve",
        choices=("snapshot", "package"),
        default="snapshot",
        help="what the guest is held against: a snapshot of itself, or its kernel's package alone; "
        "package needs --tamper external (snapshot)",
    )
    parser.add_argument(
        "--machine", choices=("q35", "pc"), default="q35", help="QEMU machine type (q35)"
    )
    parser.add_argument(
        "--memory", metavar="MIB", type=int, default=512, help="guest memory in MiB (512)"
    )
    parser.add_argument(
        "--accel", choices=("tcg", "kvm"), default="tcg", help="QEMU accelerator (tcg)"
    )
    parser.add_argument(
        "--guest",
        metavar="DIR",
        type=Path,
        default=Path("build/guest"),
        help="guest kernel and initramfs, made by `make setup` (build/guest)",
    )
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep the evidence here")
    add_json(parser)


def run(options: argparse.Namespace) -> ExitStatus:
    """Run the demonstration; exit status 0 only if all of it happened and was verified."""
    return run_demo(
        DemoOptions(
            source=options.source,
            action=Action(options.action),
            tamper=options.tamper,
            approve=options.approve,
            machine=Machine(options.machine),
            memory_mib=options.memory,
            accelerator=Accelerator(options.accel),
            guest_dir=options.guest,
            keep=options.keep,
            json=options.json,
        )
    )
