"""`pyscan approve linux` and `diff`: configurations that are compiled from kernel packages."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress, TaskID

from pyscan import render
from pyscan.approved import LinuxApproved, load_approved, save_linux
from pyscan.approved.difference import Contents, compare_linux, contents_of
from pyscan.cli.base import add_command, add_json, add_trust, approvers, own_key
from pyscan.errors import ExitStatus, UsageError
from pyscan.keys import KeyRing, SigningKey

if TYPE_CHECKING:
    from pyscan.cli.base import Commands


def add(group: Commands) -> None:
    """Declare the commands inside `pyscan approve`."""
    linux = add_command(
        group,
        "linux",
        run_linux,
        "compile a kernel's packages: fits every boot of that kernel, on every machine",
        "pyscan approve linux linux-image-6.1.0-56-cloud-amd64_6.1.192-2_amd64.deb "
        "--out cloud.approved",
    )
    linux.add_argument(
        "package",
        metavar="PACKAGE",
        type=Path,
        nargs="+",
        help="a .deb, or a directory that one was unpacked into: one with the kernel, and more "
        "with modules for it",
    )
    linux.add_argument("--out", metavar="FILE", type=Path, required=True, help="file to write")
    linux.add_argument(
        "--sign", metavar="KEY", type=Path, help="private key to sign with (default: your own)"
    )
    diff = add_command(
        group,
        "diff",
        run_diff,
        "tell what two approved configurations of kind linux allow differently",
        "pyscan approve diff old.approved new.approved",
    )
    diff.add_argument("first", metavar="A", type=Path, help="approved configuration")
    diff.add_argument("second", metavar="B", type=Path, help="another one")
    add_trust(diff, "an approver (default: your own)")
    add_json(diff)


def run_linux(options: argparse.Namespace) -> ExitStatus:
    """Compile, sign, write, and read again what was written."""
    # Slow to load, and no other command needs them.
    from pyscan.compile import compile_packages  # noqa: PLC0415
    from pyscan.package.deb import open_package  # noqa: PLC0415

    out = render.console()
    started = time.perf_counter()
    key = SigningKey.load(options.sign) if options.sign else own_key()
    with render.progress(out) as bar:
        steps = _Steps(bar)
        packages = [open_package(path) for path in options.package]
        approved = compile_packages(packages, steps)
        steps("write", 0, 1)
        size = save_linux(approved, options.out, key)
        steps("write", 1, 1)
        # What is told is what the file holds, and that it can be read is checked by it.
        written, _ = load_linux(options.out, KeyRing.of({"own": key.public}))
        contents = contents_of(written, lambda done, total: steps("check", done, total))
    seconds = time.perf_counter() - started
    rows = [
        ("approved", f"{options.out} ({size} bytes, signed by key {key.key_id.hex()})"),
        *render.fact_rows(_summary(written, contents)),
        ("seconds", f"{seconds:.1f}"),
    ]
    render.print_facts(out, rows)
    return ExitStatus.APPROVED


def run_diff(options: argparse.Namespace) -> ExitStatus:
    """Compare; exit status 0 when both allow the same, else 1."""
    ring = approvers(options.trust)
    first, _ = load_linux(options.first, ring)
    second, _ = load_linux(options.second, ring)
    difference = compare_linux(first, second)
    if options.json:
        render.print_json(
            {
                "equal": difference.equal,
                "fields": {
                    name: {"first": mine, "second": other}
                    for name, (mine, other) in difference.fields.items()
                },
                "modules_added": difference.added,
                "modules_removed": difference.removed,
                "changed": {unit.name: unit.parts for unit in difference.changed},
            }
        )
    else:
        rows = [(name, f"- {mine}\n+ {other}") for name, (mine, other) in difference.fields.items()]
        rows += [("added", "\n".join(difference.added))] if difference.added else []
        rows += [("removed", "\n".join(difference.removed))] if difference.removed else []
        rows += [(unit.name, "\n".join(unit.parts)) for unit in difference.changed]
        render.print_facts(render.console(), rows or [("equal", "both allow the same")])
    return ExitStatus.APPROVED if difference.equal else ExitStatus.UNAPPROVED


def load_linux(path: Path, ring: KeyRing) -> tuple[LinuxApproved, str]:
    """As `load_approved`, where only kind linux will do. Raises UsageError for other kinds."""
    approved, approver = load_approved(path, ring)
    if not isinstance(approved, LinuxApproved):
        raise UsageError(
            f"{path}: an approved configuration of kind snapshot, which fits one boot; "
            "give one that `pyscan approve linux` made"
        )
    return approved, approver


def show_json(approved: LinuxApproved, approver: str) -> dict[str, object]:
    """What an approved configuration covers, for `pyscan approve show`; checks every unit."""
    contents = contents_of(approved)
    return {
        "kind": "linux",
        "approver": approver,
        **_summary(approved, contents),
        "anchors": [
            {"name": anchor.name, "offset": f"{anchor.offset:#x}", "bytes": len(anchor.data)}
            for anchor in approved.anchors
        ],
        "types": len(approved.offsets),
        "modules": sorted(approved.modules),
    }


def _summary(approved: LinuxApproved, contents: Contents) -> dict[str, object]:
    return {
        "release": approved.release,
        "banner": approved.banner,
        "series": approved.series,
        "provenance": [
            {
                "package": package.package,
                "version": package.version,
                "architecture": package.architecture,
                "sha256": package.sha256,
            }
            for package in approved.provenance
        ],
        "units": contents.units,
        "protected_bytes": {
            "total": sum(contents.protected_bytes.values()),
            **contents.protected_bytes,
        },
        "patch_sites": {"total": sum(contents.patch_sites.values()), **contents.patch_sites},
        "symbols": contents.symbols,
        "exports": contents.exports,
        "relocations": contents.relocations,
    }


class _Steps:
    """Shows each step as a bar of its own, from when it is first heard of."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, step: str, done: int, total: int) -> None:
        if step not in self._tasks:
            self._tasks[step] = self._bar.add_task(step, total=None)
        self._bar.update(self._tasks[step], completed=done, total=total)
