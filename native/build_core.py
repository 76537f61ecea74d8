"""cffi builder of `pyscan.digest._core`; setup.py runs it from the top of the repository.

What Python may call is the part of pyscan.h between the two cffi marks. Paths are relative
to the repository, as setuptools wants them, so its own path may hold spaces.
"""

from pathlib import Path

from cffi import FFI

HEADER = "native/pyscan.h"
MARKS = ("/* --- cffi begin --- */", "/* --- cffi end --- */")

#: Files that hold test code; everything else is the core.
TESTS = {"main.c"}
SOURCES = sorted(
    path.as_posix()
    for path in Path("native").glob("*.c")
    if path.name not in TESTS and not path.name.startswith("driver_")
)


def declarations() -> str:
    """The part of the public header that cffi reads."""
    begin, end = MARKS
    text = Path(HEADER).read_text(encoding="utf-8")
    return text.partition(begin)[2].partition(end)[0]


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "pyscan.digest._core",
    '#include "pyscan.h"',
    sources=SOURCES,
    depends=[HEADER, "native/ps_internal.h"],
    include_dirs=["native"],
    # The hot loops choose their instruction set per function: no -march here, so one build
    # runs on every machine.
    extra_compile_args=["-std=c11", "-O3", "-Wall", "-Wextra", "-Werror"],
)
