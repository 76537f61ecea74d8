"""Plots of a document, as PNG and SVG."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from pyscan.bench.contenders import LIMIT
from pyscan.bench.detection import theory
from pyscan.bench.document import Document, Result
from pyscan.bench.shapes import FIRST
from pyscan.errors import FileFormatError, UsageError

_FORMATS: Final = ("svg", "png")
_OURS: Final = "#1f6f8b"
_OTHERS: Final = "#b8b8b8"
_LIMIT: Final = "#d1495b"
_OUR_NAMES: Final = frozenset({"nh4aes", "gf128aes", "sha256", "numba-nh4aes"})


def require_plots() -> None:
    """Raise UsageError when plots cannot be drawn here, before minutes are spent on figures."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib; install pyscan[bench]")


def save_plots(document: Document, directory: Path) -> list[Path]:
    """Write every plot that the document has figures for; returns the SVG files.

    Raises UsageError without matplotlib, FileFormatError when a file cannot be written.
    """
    require_plots()
    import matplotlib  # noqa: PLC0415 (an extra, slow to load)
    from matplotlib.figure import Figure  # noqa: PLC0415

    made = []
    # The same document gives the same files: no random ids, no dates. Text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "pyscan", "svg.fonttype": "none"}):
        for name, draw in _plots(document):
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            draw(figure.subplots())
            made.append(_save(figure, directory, name))
    return made


def _save(figure: Any, directory: Path, name: str) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for kind in _FORMATS:
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(directory / f"{name}.{kind}", dpi=100, metadata=metadata)
    except OSError as error:
        raise FileFormatError(
            f"cannot write plots to {directory}: {error.strerror}; choose another --plots"
        ) from error
    return directory / f"{name}.{_FORMATS[0]}"


def _plots(document: Document) -> Iterator[tuple[str, Callable[[Any], None]]]:
    if any(each.shape == FIRST for each in document.results):
        yield "throughput", lambda axes: _throughput(document, axes)
    if any(each.name == "size" for each in document.series):
        yield "scaling", lambda axes: _scaling(document, axes)
    if document.latency:
        yield "latency", lambda axes: _latency(document, axes)
    if document.detection:
        yield "detection", lambda axes: _detection(document, axes)


def _throughput(document: Document, axes: Any) -> None:
    """Share of the read limit, one thread."""
    results = [
        each
        for each in document.results
        if (each.shape, each.threads) == (FIRST, 1) and each.limit and each.contender != LIMIT
    ]
    results.sort(key=_share)
    names = [each.contender for each in results]
    colours = [_OURS if each.contender in _OUR_NAMES else _OTHERS for each in results]
    bars = axes.barh(names, [100 * _share(each) for each in results], color=colours)
    axes.bar_label(bars, [f"{each.gb_per_s.median:.1f} GB/s" for each in results], padding=3)
    axes.axvline(100, color=_LIMIT)
    limit = document.result(FIRST, LIMIT, 1)
    title = "what memory gives" + (f", {limit.gb_per_s.median:.1f} GB/s" if limit else "")
    axes.annotate(title, (100, 0), xytext=(-4, 0), textcoords="offset points",
                  ha="right", color=_LIMIT)  # fmt: skip
    axes.set_xlim(0, 115)
    axes.set_xlabel("% of the read limit, 1 GiB, one thread")
    axes.spines[["top", "right"]].set_visible(False)


def _share(result: Result) -> float:
    return result.limit.median if result.limit else 0.0


def _scaling(document: Document, axes: Any) -> None:
    """Cost against watched size, with the fitted lines."""
    for each in document.series:
        if each.name != "size":
            continue
        xs = [point.x for point in each.points]
        line = axes.loglog(xs, [each.ms_per_unit * x + each.ms_at_zero for x in xs], lw=1)[0]
        axes.loglog(
            xs,
            [point.ms.median for point in each.points],
            "o",
            color=line.get_color(),
            label=f"{each.contender}, {each.threads} threads, R² {each.r_squared:.5f}",
        )
    axes.set_xlabel("watched MiB")
    axes.set_ylabel("ms a sweep")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)


def _latency(document: Document, axes: Any) -> None:
    """Distribution of the times from tampering."""
    for each in document.latency:
        count = len(each.ms)
        shares = [100 * (rank + 1) / count for rank in range(count)]
        axes.step(each.ms, shares, where="post", label=f"{each.name}, {count} trials")
    interval_ms = document.latency[0].interval_ms
    axes.set_xlabel(f"ms after the tampering (a sweep every {interval_ms:g} ms)")
    axes.set_ylabel("% of trials")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)


def _detection(document: Document, axes: Any) -> None:
    """Probability of detection, measured and by theory."""
    (detection,) = document.detection
    lives = detection.lives
    xs = [life.lives_ms for life in lives]
    dense = [max(xs) * step / 200 for step in range(201)]
    curve = [theory(x, detection.interval_ms, detection.sweep_ms) for x in dense]
    axes.plot(dense, [100 * found for found, _ in curve], color=_OURS, lw=1)
    axes.plot(dense, [100 * seen for _, seen in curve], color=_LIMIT, lw=1)
    found = [100 * life.found / life.trials for life in lives]
    seen = [100 * life.seen / life.trials for life in lives]
    axes.plot(xs, found, "o", color=_OURS, label="found (line: theory)")
    axes.plot(xs, seen, "o", color=_LIMIT, label="at least seen (line: theory)")
    axes.set_xlabel(
        f"ms that a modification lives (sweeps of {detection.sweep_ms:.1f} ms "
        f"every {detection.interval_ms:.1f} ms)"
    )
    axes.set_ylabel("% detected")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
