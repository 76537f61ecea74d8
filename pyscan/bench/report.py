"""What a person reads of a document: tables in the terminal, one page of Markdown.

Ratios first. Every absolute figure stands beside the read limit of the same memory in the
same run, because without it a figure says more about a machine than about a program.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyscan.bench.contenders import LIMIT
from pyscan.bench.document import Document, Spread
from pyscan.bench.shapes import SHAPES
from pyscan.errors import FileFormatError

_OURS = ("nh4aes", "gf128aes", "sha256")
_TITLES = {shape.name: shape.title for shape in SHAPES}
_MET = {True: "yes", False: "NO", None: "-"}


@dataclass(frozen=True, slots=True)
class _Sheet:
    """One table; the first column is text, the others are figures unless `text` says so."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    text: frozenset[int] = frozenset({0})


def print_document(out: Console, document: Document) -> None:
    """All tables, for a terminal or plain."""
    for sheet in _sheets(document):
        out.print(Text(sheet.title, style="bold"), soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD if out.is_terminal else None, padding=(0, 2, 0, 0))
        for index, column in enumerate(sheet.columns):
            table.add_column(column, justify="left" if index in sheet.text else "right")
        for row in sheet.rows:
            table.add_row(*(_coloured(cell) for cell in row))
        out.print(table)
        out.print()


def save_markdown(document: Document, path: Path, plots: Sequence[Path]) -> None:
    """The page of figures; `plots` are shown in it. Raises FileFormatError."""
    parts = ["# Benchmarks", "", _INTRODUCTION, "", *_machine_lines(document), ""]
    for plot in plots:
        parts += [f"![{plot.stem}]({_relative(plot, path)})", ""]
    for sheet in _sheets(document):
        parts += [f"## {sheet.title}", "", *_markdown(sheet), ""]
    try:
        path.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    except OSError as error:
        raise FileFormatError(
            f"cannot write {path}: {error.strerror}; choose another file for --report"
        ) from error


_INTRODUCTION = """\
Made by `pyscan bench`; nothing here is typed in by hand. All contenders of a table ran in one
process over the same memory, in turn, on random content; a ratio is the median of ratios taken
round by round. Trust the ratios: absolute figures belong to this machine and stand beside what
the same memory gave when it was only read."""


def _machine_lines(document: Document) -> list[str]:
    machine = document.machine
    rows = [
        (
            "measured",
            f"{document.started}, {document.seconds:.0f} s, seed {document.seed}"
            + (", quick run" if document.quick else ""),
        ),
        ("processor", f"{machine.cpu}, {machine.cores} cores, {_size(machine.cache_bytes)} cache"),
        ("instruction sets", " ".join(machine.flags)),
        ("memory", f"{_size(machine.memory_bytes)}; transparent huge pages: {machine.huge_pages}"),
        (
            "kernel",
            f"{machine.kernel}, hypervisor: {machine.hypervisor or 'none'}, "
            f"governor: {machine.governor or 'none'}, load at the start {machine.load:g}",
        ),
        (
            "Python",
            f"{machine.python}; "
            + ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        ),
    ]
    if document.note:
        rows.append(("beside it", document.note))
    return ["| | |", "|---|---|", *(f"| {name} | {_escaped(text)} |" for name, text in rows)]


def _sheets(document: Document) -> Iterator[_Sheet]:
    yield _Sheet(
        "Must reach",
        ("figure", "wanted", "measured", "met"),
        [(goal.name, goal.wanted, goal.got, _MET[goal.met]) for goal in document.targets],
    )
    for shape, threads in dict.fromkeys((each.shape, each.threads) for each in document.results):
        yield _shape_sheet(document, shape, threads)
    if document.rates:
        yield _Sheet(
            "By the call",
            ("what", "contender", "a second", "least", "greatest"),
            [
                (each.name, each.contender, *(f"{value:,.0f}" for value in _three(each.per_s)))
                for each in document.rates
            ],
            frozenset({0, 1}),
        )
    yield from _other_sheets(document)


def _shape_sheet(document: Document, shape: str, threads: int) -> _Sheet:
    results = [each for each in document.results if (each.shape, each.threads) == (shape, threads)]
    ratios = {
        (each.contender, each.against): each.value.median
        for each in document.ratios
        if (each.shape, each.threads) == (shape, threads)
    }
    ours = [name for name in _OURS if any(each.contender == name for each in results)]
    limit = next((each.gb_per_s.median for each in results if each.contender == LIMIT), None)
    rows = []
    for each in sorted(results, key=lambda each: -each.gb_per_s.median):
        of_limit = f"{100 * each.limit.median:.1f} %" if each.limit else "-"
        times = [_times(ratios.get((name, each.contender))) for name in ours]
        rows.append(
            (
                each.contender,
                of_limit,
                *times,
                f"{each.gb_per_s.median:.2f}",
                f"{each.gb_per_s.min:.2f}-{each.gb_per_s.max:.2f}",
                f"{limit:.2f}" if limit else "-",
                _milliseconds(each.ms.median),
                each.form,
            )
        )
    columns = ("contender", "of read limit", *(f"{name} is" for name in ours))
    columns += ("GB/s", "range", "limit GB/s", "ms a sweep", "form")
    plural = "s" if threads > 1 else ""
    rounds = results[0].rounds
    title = f"{shape}, {threads} thread{plural}: {_TITLES.get(shape, '')} ({rounds} rounds)"
    return _Sheet(title, columns, rows, frozenset({0, len(columns) - 1}))


def _other_sheets(document: Document) -> Iterator[_Sheet]:
    if document.series:
        yield _Sheet(
            "Cost against size: a straight line",
            ("series", "contender", "threads", "from", "to", "ms a unit", "ms at 0", "R2",
             "off the line at most"),
            [
                (
                    f"{each.name}, {each.unit}",
                    each.contender,
                    str(each.threads),
                    f"{each.points[0].x:g}",
                    f"{each.points[-1].x:g}",
                    f"{each.ms_per_unit:.4f}",
                    f"{each.ms_at_zero:.3f}",
                    f"{each.r_squared:.6f}",
                    f"{100 * each.residual_max:.1f} %",
                )
                for each in document.series
            ],
            frozenset({0, 1}),
        )  # fmt: skip
    if document.latency:
        shares = (0.5, 0.9, 0.99)
        yield _Sheet(
            "End to end, on a real guest (ms)",
            ("what", "trials", "sweep interval", "least", "median", "90 %", "99 %", "greatest"),
            [
                (
                    each.name,
                    str(len(each.ms)),
                    f"{each.interval_ms:g}",
                    *(f"{ms:.1f}" for ms in (each.ms[0], *map(each.quantile, shares), each.ms[-1])),
                )
                for each in document.latency
            ],
        )
    for detection in document.detection:
        yield _Sheet(
            f"Detection of a modification that goes away: sweeps of {detection.sweep_ms:.1f} ms "
            f"every {detection.interval_ms:.1f} ms",
            ("lives ms", "trials", "found", "theory", "seen", "theory"),
            [
                (
                    f"{life.lives_ms:.2f}",
                    str(life.trials),
                    *(f"{100 * share:.0f} %" for share in (
                        life.found / life.trials, life.found_theory,
                        life.seen / life.trials, life.seen_theory)),
                )
                for life in detection.lives
            ],
            frozenset(),
        )  # fmt: skip
    if document.absent:
        yield _Sheet(
            "Not measured here",
            ("shape", "contender", "reason"),
            [(each.shape, each.contender or "all", each.reason) for each in document.absent],
            frozenset({0, 1, 2}),
        )


def _coloured(cell: str) -> Text:
    return Text(cell, style={"yes": "green", "NO": "bold red"}.get(cell, ""))


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.5f}"


def _three(value: Spread) -> tuple[float, float, float]:
    return value.median, value.min, value.max


def _size(size_bytes: int) -> str:
    if size_bytes >= 1 << 30:
        return f"{size_bytes / (1 << 30):.1f} GiB"
    return f"{size_bytes >> 20} MiB"


def _markdown(sheet: _Sheet) -> list[str]:
    marks = ["---" if index in sheet.text else "---:" for index in range(len(sheet.columns))]
    return [
        "| " + " | ".join(cells) + " |"
        for cells in (
            sheet.columns,
            marks,
            *([_escaped(cell) for cell in row] for row in sheet.rows),
        )
    ]


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


def _relative(path: Path, page: Path) -> str:
    """`path` as a link in `page`."""
    return Path(os.path.relpath(path, page.parent)).as_posix()
