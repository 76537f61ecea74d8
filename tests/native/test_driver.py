"""The native core alone: under ASan and UBSan, on an emulated CPU, and without a library.

Every digest in every form that this CPU has, and the choice of forms for every subset of its
features. AArch64 is only emulated (qemu-user): that shows the bytes, not the speed, and
nothing about real silicon.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
from vectors import make

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "native"
VECTORS = [str(make.path_of(digest)) for digest in make.DIGESTS]
BUILD_TIMEOUT_S = 240
RUN_TIMEOUT_S = 240

WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

#: What firmware is built of. The compiler may still call these four (GCC manual, "Language
#: Standards Supported by GCC"), which every board support package has.
FREESTANDING = [
    "ps_aes_portable.c",
    "ps_digest_nh4aes_portable.c",
    "ps_digest_sha256_portable.c",
    "ps_key_expand.c",
    "ps_keyed.c",
    "ps_shake.c",
]
COMPILER_CALLS = {"memcpy", "memmove", "memset", "memcmp"}


def build(compiler: str, output: Path, *flags: str) -> None:
    sources = sorted(str(path) for path in NATIVE.glob("*.c"))
    run([compiler, "-std=c11", "-pthread", *WARNINGS, *flags, *sources, "-o", str(output)])


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def passed(output: str) -> int:
    total = re.fullmatch(r"(\d+) passed, 0 failed", output.splitlines()[-1])
    assert total is not None, output
    return int(total[1])


def test_native_driver_passes_under_sanitizers(tmp_path: Path) -> None:
    driver = tmp_path / "native driver"
    build("gcc", driver, "-g", "-O1", *SANITIZERS)
    output = run(
        [str(driver), *VECTORS],
        ASAN_OPTIONS="detect_leaks=1",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    assert passed(output) > 10_000, output
    assert "key memory: " in output


def test_native_driver_passes_on_an_emulated_aarch64(tmp_path: Path) -> None:
    driver = tmp_path / "driver-aarch64"
    build("aarch64-linux-gnu-gcc", driver, "-O2", "-static")
    output = run(["qemu-aarch64-static", str(driver), "--emulated", *VECTORS])
    assert passed(output) > 5_000, output
    assert "shapes nh4aes/neon on 3: " in output


@pytest.mark.parametrize("compiler", ["gcc", "aarch64-linux-gnu-gcc"])
def test_the_portable_core_needs_no_library(compiler: str, tmp_path: Path) -> None:
    together = tmp_path / "core.o"
    sources = [str(NATIVE / name) for name in FREESTANDING]
    flags = ["-std=c11", "-O2", *WARNINGS, "-ffreestanding", "-nostdlib", "-r"]
    run([compiler, *flags, *sources, "-o", str(together)])
    undefined = run(["nm", "--undefined-only", "--format=just-symbols", str(together)]).split()
    assert set(undefined) <= COMPILER_CALLS
