"""The binding of AMD's XDMA driver alone, under ASan and UBSan, against a scripted card."""

import re
import subprocess
from pathlib import Path

SOURCES = sorted((Path(__file__).parents[2] / "native/xdma").glob("*.c"))
FLAGS = [
    *("-std=c11", "-pthread", "-g", "-O1"),
    *("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
]
TIMEOUT_S = 120


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_binding_passes_under_sanitizers(tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    run("gcc", *FLAGS, *SOURCES, "-o", driver)
    total = re.fullmatch(r"(\d+) passed, 0 failed\n", run(driver))
    assert total is not None
    assert int(total[1]) > 30


def test_nothing_but_pread_reads_the_card() -> None:
    """The driver's read_iter takes wrong offsets: no vectors and no asynchronous reads."""
    text = "".join(path.read_text() for path in SOURCES if path.name != "driver.c")
    calls = set(re.findall(r"\b(p?readv2?|io_\w+|aio_\w+|p?read|mmap)\(", text))
    assert calls == {"pread"}
