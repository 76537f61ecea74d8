"""Contenders in C that are no part of the product: compiled here, for this machine only."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
from contextlib import redirect_stdout
from functools import cache
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any, Final

from cffi import FFI

_PAGES: Final = "const uint8_t *base, const uint64_t *offsets, size_t count, unsigned threads"

#: Reading kernels: the fastest one on a shape is its read limit.
READERS: Final = ("32x1", "32x4", "32x8", "64x1", "64x8")

_MEMORY: Final = "".join(f"uint64_t peer_read_{name}({_PAGES});\n" for name in READERS) + (
    f"void peer_copy({_PAGES}, uint8_t *copy);\n"
    f"size_t peer_compare({_PAGES}, const uint8_t *golden);\n"
)
_OPENSSL: Final = f"size_t peer_evp_sha256({_PAGES}, const uint8_t *expected);\n"


class Unavailable(Exception):
    """A contender that cannot run here; the text says why, in one line."""


@cache
def memory() -> Any:
    """Reading, copying, comparing. Raises Unavailable without a C compiler."""
    return _built("peers_memory", _MEMORY, ())


@cache
def openssl() -> Any:
    """SHA-256 by OpenSSL. Raises Unavailable without a compiler or libcrypto 3."""
    return _built("peers_openssl", _OPENSSL, ("-l:libcrypto.so.3",))


def _built(name: str, declarations: str, libraries: tuple[str, ...]) -> Any:
    """Compile and load `name`.c; returns the module with its `ffi` and `lib`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Unavailable("no C compiler")
    ffi = FFI()
    ffi.cdef(declarations)
    texts = [files(__package__).joinpath(each) for each in ("peers_threads.h", f"{name}.c")]
    ffi.set_source(f"_{name}", "".join(text.read_text(encoding="utf-8") for text in texts))
    with tempfile.TemporaryDirectory(prefix="pyscan-bench-") as directory:
        code, built = Path(directory, f"_{name}.c"), Path(directory, f"_{name}.so")
        with redirect_stdout(StringIO()):  # cffi prints what it does
            ffi.emit_c_code(str(code))
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC"]
        command += [f"-I{sysconfig.get_path('include')}", str(code), "-o", str(built), *libraries]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            why = [line for line in done.stderr.splitlines() if "error" in line or "cannot" in line]
            raise Unavailable(f"does not compile: {why[0].strip() if why else done.returncode}")
        spec = importlib.util.spec_from_file_location(f"_{name}", built)
        if spec is None or spec.loader is None:
            raise Unavailable("the compiled module cannot be loaded")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module
