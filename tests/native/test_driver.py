"""The native core alone, under ASan and UBSan, in every form that this CPU has."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "tests" / "vectors" / "sha256-pages.json"
BUILD_TIMEOUT_S = 120
RUN_TIMEOUT_S = 120

WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def test_native_driver_passes_under_sanitizers(tmp_path: Path) -> None:
    driver = tmp_path / "native driver"
    sources = sorted(str(path) for path in (ROOT / "native").glob("*.c"))
    flags = ["-std=c11", "-g", "-O1", "-pthread", *WARNINGS, *SANITIZERS]
    built = subprocess.run(
        ["gcc", *flags, *sources, "-o", str(driver)],
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert built.returncode == 0, built.stderr

    run = subprocess.run(
        [str(driver), str(VECTORS)],
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
    )
    output = run.stdout + run.stderr
    assert run.returncode == 0, output
    total = re.fullmatch(r"(\d+) passed, 0 failed", run.stdout.splitlines()[-1])
    assert total is not None, output
    assert int(total[1]) > 100, output
