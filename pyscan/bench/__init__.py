"""Benchmarks: our digests beside everything else that could be used, in one run.

    document = run_bench(BenchOptions(quick=True), print)

`pyscan bench` is the command; docs/benchmarks.md is made from a document. What needs an
extra (``pyscan[bench]``) is listed as absent where it is not installed.
"""

from pyscan.bench.document import Document, load, save
from pyscan.bench.plots import require_plots, save_plots
from pyscan.bench.report import print_document, save_markdown
from pyscan.bench.run import BenchOptions, run_bench
from pyscan.bench.shapes import SHAPES

__all__ = [
    "SHAPES",
    "BenchOptions",
    "Document",
    "load",
    "print_document",
    "require_plots",
    "run_bench",
    "save",
    "save_markdown",
    "save_plots",
]
