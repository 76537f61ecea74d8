"""What a person or a program sees of the records: tables for a terminal, JSON documents.

On a terminal the tables are coloured; anywhere else the same lines come out plain and
unwrapped. In JSON every number that is an address or a frame is a hex string.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pyscan.approved import LinuxApproved, Snapshot
from pyscan.records import Finding, VerdictState
from pyscan.scanner import KernelReport

PLAIN_WIDTH: Final = 200
STYLES: Final = {
    VerdictState.APPROVED: "bold green",
    VerdictState.UNAPPROVED: "bold red",
    VerdictState.UNDECIDED: "bold yellow",
}
#: What no DMA reader can see; said with every verdict.
NOT_JUDGED: Final = "registers, caches, writable data"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command line: rich would exit with status 1, which means unapproved."""
        raise  # noqa: PLE0704 - called while the BrokenPipeError is handled


def console(*, stderr: bool = False) -> Console:
    """A console that is plain and wide when it is not a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return _Console(file=stream, width=width, highlight=False)


def progress(out: Console) -> Progress:
    """A progress display that shows nothing when `out` is not a terminal."""
    return Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=32),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=out,
        transient=True,
        disable=not out.is_terminal,
    )


def print_json(document: object) -> None:
    """One JSON document on standard output."""
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_facts(
    out: Console, rows: Sequence[tuple[str, str | Text]] | Sequence[tuple[str, str]]
) -> None:
    """Name and value in two columns; a value may have several lines."""
    width = max((len(name) for name, _ in rows), default=0)
    if out.is_terminal:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            # A bare string would be read as markup, and names come from anywhere.
            table.add_row(Text(name), value if isinstance(value, Text) else Text(value))
        out.print(table)
        return
    for name, value in rows:
        for line in str(value).splitlines() or [""]:
            out.print(Text(f"{name:<{width}}  {line}"), soft_wrap=True)
            name = ""  # noqa: PLW2901 - only the first line carries the name


def fact_rows(document: Mapping[str, object]) -> list[tuple[str, str]]:
    """Rows for `print_facts` from a JSON document of at most two levels."""
    rows = []
    for name, value in document.items():
        if isinstance(value, Mapping):
            text = "  ".join(f"{key.replace('_', ' ')} {item}" for key, item in value.items())
        elif isinstance(value, list):
            text = "\n".join(
                "  ".join(map(str, item.values())) if isinstance(item, Mapping) else str(item)
                for item in value
            )
        else:
            text = str(value)
        rows.append((name.replace("_", " "), text))
    return rows


def verdict_text(state: VerdictState, reason: str) -> Text:
    """The verdict in its colour, followed by the reason."""
    return Text.assemble((str(state), STYLES[state]), f"  {reason}")


def finding_json(finding: Finding) -> dict[str, object]:
    """A finding as documented for `pyscan scan --json`."""
    return {
        "id": finding.id,
        "kind": str(finding.kind),
        "address": _hex(finding.address),
        "physical_frame": _hex(finding.frame),
        "place": finding.place,
        "expected": finding.expected,
        "actual": finding.actual,
        "status": finding.status.name.lower(),
    }


def print_findings(out: Console, findings: Iterable[Finding], total: int) -> None:
    """Every listed finding as a block, then how many are not listed."""
    listed = 0
    for finding in findings:
        listed += 1
        out.print()
        out.print(Text.assemble(("finding", "bold"), f"  {finding.kind}  {finding.place}"))
        print_facts(
            out,
            [
                ("  address", _hex(finding.address) or "-"),
                ("  frame", _hex(finding.frame) or "-"),
                ("  status", finding.status.name.lower()),
                ("  expected", finding.expected or "-"),
                ("  actual", finding.actual or "-"),
            ],
        )
    if total > listed:
        out.print(f"\n{total - listed} more findings are not listed")


def snapshot_json(snapshot: Snapshot, approver: str) -> dict[str, object]:
    """What an approved configuration of kind snapshot covers."""
    kernel = snapshot.kernel
    executable = int((snapshot.flags & 1).sum())
    return {
        "kind": "snapshot",
        "approver": approver,
        "created": time_text(snapshot.created_ns),
        "source": snapshot.source,
        "digest": "sha256",
        "pages": {
            "total": snapshot.pages,
            "executable": executable,
            "read_only": snapshot.pages - executable,
        },
        "kernel": {
            "virtual_base": _hex(kernel.virtual_base),
            "physical_base": _hex(kernel.physical_base),
            "paging_levels": kernel.paging_levels,
            "page_table_root": _hex(kernel.root_gpa),
        },
        "memory": [
            {"gpa": _hex(region.gpa), "length": _hex(region.length), "kind": str(region.kind)}
            for region in snapshot.memory_map
        ],
    }


def approved_text(approved: Snapshot | LinuxApproved) -> str:
    """Kind and content of an approved configuration, in brackets of a line."""
    if isinstance(approved, Snapshot):
        return f"snapshot of {time_text(approved.created_ns)}, {approved.pages} pages"
    return f"linux {approved.release}, {len(approved.modules)} modules"


def kernel_rows(report: KernelReport) -> list[tuple[str, str | Text]]:
    """The running kernel for a person: what it is, where, in what state, what was verified."""
    validation = report.validation
    kernel = validation.attached.kernel
    modules = ", ".join(each.module.name for each in validation.units.modules)
    after_init = validation.after_init
    verified = validation.text.bytes + validation.rodata.code.bytes
    verified += after_init.verified + after_init.typed
    rows: list[tuple[str, str | Text]] = [
        ("kernel", f"{report.approved.release}, {kernel.paging_levels} paging levels"),
        ("build", report.approved.banner),
        ("bases", f"virtual {kernel.virtual_base:#x}  physical {kernel.physical_base:#x}"),
        ("modules", f"{len(validation.units.modules)}: {modules or '-'}"),
        ("state", str(report.vector)),
        ("verified", f"{verified} bytes of text and read-only data"),
    ]
    rows += [("changed", str(change)) for change in report.reports]
    return rows


def kernel_not_judged(report: KernelReport) -> str:
    """What the verdict says nothing about, with its size."""
    validation = report.validation
    parts = [NOT_JUDGED]
    parts += [f"{size} bytes of {kind}" for kind, size in validation.unverified.items() if size]
    if validation.after_init.unverified:
        parts.append(f"{validation.after_init.unverified} bytes that the boot has set (pinned)")
    if validation.rodata.unknown_bytes:
        parts.append(f"{validation.rodata.unknown_bytes} bytes that refer to freed init sections")
    return ", ".join(parts)


def kernel_json(report: KernelReport) -> dict[str, object]:
    """`kernel` and `state` of `pyscan scan --json`."""
    validation = report.validation
    kernel = validation.attached.kernel
    return {
        "kernel": {
            "release": report.approved.release,
            "build": report.approved.banner,
            "virtual_base": _hex(kernel.virtual_base),
            "physical_base": _hex(kernel.physical_base),
            "paging_levels": kernel.paging_levels,
            "modules": [each.module.name for each in validation.units.modules],
            "unknown_modules": [module.name for module in validation.units.unknown],
        },
        "state": report.vector.to_json(),
        "state_changes": [str(change) for change in report.reports],
        "coverage_bytes": {
            "text": validation.text.bytes,
            "rodata": validation.rodata.code.bytes,
            "after_init_verified": validation.after_init.verified,
            "after_init_typed": validation.after_init.typed,
            "after_init_pinned": validation.after_init.unverified,
            "unknown": validation.rodata.unknown_bytes,
            **validation.unverified,
        },
        "validation_ms": validation.timings_ms,
    }


def time_text(time_ns: int) -> str:
    """ISO 8601, UTC, to the second."""
    try:
        moment = datetime.fromtimestamp(time_ns // 1_000_000_000, tz=UTC)
    except (OverflowError, ValueError, OSError):
        return f"{time_ns} ns"
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _hex(value: int | None) -> str | None:
    return None if value is None else f"{value:#x}"
