"""cffi builder of `pyscan.sources._xdma`; setup.py runs it from the top of the repository.

Like the core's (native/build_core.py): what Python may call stands between the two marks.
"""

from pathlib import Path

from cffi import FFI

HEADER = "native/xdma/ps_xdma.h"
SOURCE = "native/xdma/ps_xdma.c"
MARKS = ("/* --- cffi begin --- */", "/* --- cffi end --- */")


def declarations() -> str:
    """The part of the header that cffi reads."""
    begin, end = MARKS
    text = Path(HEADER).read_text(encoding="utf-8")
    return text.partition(begin)[2].partition(end)[0]


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "pyscan.sources._xdma",
    '#include "ps_xdma.h"',
    sources=[SOURCE],
    depends=[HEADER],
    include_dirs=["native/xdma"],
    extra_compile_args=["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"],
)
