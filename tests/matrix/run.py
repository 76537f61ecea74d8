"""Boot the matrix, one configuration after the other, and examine each guest from outside.

    PYTHONPATH=tests .venv/bin/python -m matrix.run [--only NAME ...] [--json FILE] [--save DIR]

`examine(uri, boot)` gets the URI of the running guest's memory and returns what it found, as
columns of a row; an exception of pyscan's is a failed boot. With --save the guest is stopped
afterwards and its memory kept in DIR/NAME/ram.img, with what the guest says of itself beside.
The exit status is 1 when a boot failed.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Final, TypeVar

from rich.console import Console
from rich.table import Table

from matrix.attacks import ATTACKS, Attack, strike
from matrix.configurations import BOOTS, Boot
from matrix.scenario import enter
from pyscan.errors import LabError, PyscanError
from pyscan.kernel import find_kernel, watched_pages
from pyscan.lab.guest import Guest, GuestOptions
from pyscan.lab.process import RunDirectory, unwind_on
from pyscan.qmp import query
from pyscan.sources import build_uri, open_source

#: What a callable made of a guest: column -> content.
Row = Mapping[str, object]
Examine = Callable[[str, Boot], Row]
#: Looks at a guest, makes the attack, looks again.
Hunt = Callable[[Guest, Attack], Row]

Entry = TypeVar("Entry", Boot, Attack)

GUEST_DIR: Final = Path(__file__).parents[2] / "build/guest"
INITRD: Final = "initrd-matrix.gz"

#: The emulator, when other work runs on the machine.
READY_TIMEOUT_S: Final = 180.0

#: Columns of a table that goes to a file.
TABLE_WIDTH: Final = 160

#: What a guest says of itself, kept beside a saved image.
FACTS: Final = {
    "kernel_code": "grep 'Kernel code' /proc/iomem",
    "text": "grep -m 1 -E ' _text$' /proc/kallsyms",
    "command_line": "cat /proc/cmdline",
    "flags": "grep -m 1 ^flags /proc/cpuinfo",
    "vulnerabilities": "cd /sys/devices/system/cpu/vulnerabilities && grep . *",
    "modules": "cat /proc/modules",
    "probes": "cat /sys/kernel/debug/kprobes/list",
    "functions": "head -n 20 /sys/kernel/tracing/enabled_functions",
}


def count_pages(uri: str, boot: Boot) -> Row:
    """Find the kernel and count the pages to watch; stands in for a validator."""
    del boot
    with open_source(uri) as source:
        kernel = find_kernel(source)
        watched = watched_pages(source, kernel)
    return {"base": f"{kernel.virtual_base:#x}", "pages": len(watched.addresses)}


def run_boot(
    boot: Boot,
    examine: Examine,
    save: Path | None = None,
    attack: Attack | None = None,
    *,
    guest_dir: Path = GUEST_DIR,
    hunt: Hunt | None = None,
) -> Row:
    """Boot, enter the scenarios, attack, examine; returns the row. Raises pyscan's errors.

    `hunt` does the last two in one, where there is an attack and nothing is saved.
    """
    options = GuestOptions(
        guest_dir,
        machine=boot.machine,
        memory_mib=boot.memory_mib,
        cpus=boot.cpus,
        cpu_model=boot.cpu_model,
        append=boot.append,
        initrd=INITRD,
    )
    row: dict[str, object] = {"name": boot.name if attack is None else f"{boot.name}+{attack.name}"}
    with RunDirectory() as run, Guest(options, run) as guest:
        row["boot_s"] = round(guest.wait_ready(READY_TIMEOUT_S), 1)
        begin = monotonic()
        refused = enter(guest, boot.scenarios)
        if attack is not None and hunt is not None and save is None:
            row.update(hunt(guest, attack))
            return row
        if attack is not None:
            struck = strike(guest, attack)
            row["struck"] = f"{struck.address:#x} at {struck.physical:#x}"
        row["scenario_s"] = round(monotonic() - begin, 1)
        if refused:
            row["refused"] = " ".join(refused)
        if save is not None:
            save_guest(guest, save / str(row["name"]), row)
        begin = monotonic()
        row.update(examine(build_uri("qemu", guest.monitor_qmp), boot))
        row["examine_s"] = round(monotonic() - begin, 2)
    return row


def save_guest(guest: Guest, folder: Path, row: Row) -> None:
    """Stop the guest and keep its memory, and what it said before. Raises LabError."""
    facts = {name: guest.shell(f"{command}; true") for name, command in FACTS.items()}
    query(guest.lab_qmp, [("stop", None)])
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / "ram.img"
    copy = ("cp", "--sparse=always", guest.ram_file, image)
    if subprocess.run(copy, check=False).returncode:
        raise LabError(f"cannot copy the guest's memory to {image}: see the message above")
    options = guest.options
    size = f"{options.memory_mib}M"
    document = {
        "uri": build_uri("file", image, machine=str(options.machine), size=size),
        "machine": str(options.machine),
        "memory_mib": options.memory_mib,
        "cpu_model": options.cpu_model,
        "cpus": options.cpus,
        **row,
        **facts,
    }
    (folder / "guest.json").write_text(json.dumps(document, indent=2) + "\n")


def run_all(
    boots: Sequence[Boot],
    examine: Examine,
    jobs: int = 1,
    save: Path | None = None,
    attacks: Sequence[Attack | None] = (None,),
    *,
    hunt: Hunt | None = None,
) -> list[Row]:
    """Run every boot with every attack, `jobs` at a time; a failure becomes a row."""
    console = Console(stderr=True)

    def run_one(boot: Boot, attack: Attack | None) -> Row:
        try:
            row = run_boot(boot, examine, save, attack, hunt=hunt)
        except PyscanError as error:
            name = boot.name if attack is None else f"{boot.name}+{attack.name}"
            row = {"name": name, "failed": str(error)}
        console.print(" ".join(f"{key}={value}" for key, value in row.items()), markup=False)
        return row

    runs = [(boot, attack) for boot in boots for attack in attacks]
    if jobs == 1:  # in this thread, so that an interrupt ends the guest at once
        return [run_one(*run) for run in runs]
    pool = ThreadPoolExecutor(jobs)
    try:
        return list(pool.map(lambda run: run_one(*run), runs))
    finally:
        pool.shutdown(cancel_futures=True)


def print_table(rows: Sequence[Row]) -> None:
    """One line per boot with every column that some row has; below, what failed and why."""
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "failed"))
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    console.print(table)
    for row in rows:
        if "failed" in row:
            console.print(f"{row['name']} FAILED: {row['failed']}", markup=False, highlight=False)


def main(arguments: Sequence[str], examine: Examine = count_pages, hunt: Hunt | None = None) -> int:
    """Run what the arguments ask for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="matrix.run", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="these boots")
    parser.add_argument(
        "--attack",
        action="append",
        default=[],
        metavar="NAME",
        help='attack each guest so; "all" for all attacks, each on a guest of its own',
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--save", type=Path, metavar="DIR", help="keep the guests' memory there")
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="guests at a time")
    options = parser.parse_args(arguments)
    boots = choose(parser, BOOTS, options.only)
    attacks: Sequence[Attack | None] = (None,)
    if options.attack:
        attacks = choose(parser, ATTACKS, [] if options.attack == ["all"] else options.attack)
    with unwind_on(signal.SIGTERM):
        rows = run_all(boots, examine, options.jobs, options.save, attacks, hunt=hunt)
    print_table(rows)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return int(any("failed" in row for row in rows))


def choose(
    parser: argparse.ArgumentParser, table: Sequence[Entry], names: Sequence[str]
) -> tuple[Entry, ...]:
    """The entries of `table` with these names; all when there are none."""
    known = {entry.name: entry for entry in table}
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no {unknown[0]!r}; there are: {', '.join(known)}")
    return tuple(known[name] for name in names) if names else tuple(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
