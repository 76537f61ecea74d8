"""`pyscan bench` as an operator runs it, on shapes that take a moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyscan.bench import load

CONTENDERS = ("nh4aes", "sha256", "numba-nh4aes", "read-limit", "memcmp", "hashlib-sha256")


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyscan", "bench", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_figures_are_written_read_back_and_made_into_a_page(tmp_path: Path) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.md"
    wanted = [argument for name in CONTENDERS for argument in ("--contender", name)]
    done = bench("--shape", "one-page", "--rounds", "2", "--json", figures, *wanted)
    assert (done.returncode, done.stderr) == (0, "")
    document = load(figures)
    assert [result.contender for result in document.results] == list(CONTENDERS)
    assert {result.shape for result in document.results} == {"one-page"}
    assert all(result.gb_per_s.min > 0 and result.rounds == 2 for result in document.results)
    assert all(result.limit is not None for result in document.results)
    assert document.machine.cores >= 1
    for contender in CONTENDERS:
        assert contender in done.stdout

    again = bench("--from", figures, "--report", page)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert document.machine.cpu in page.read_text()


def bench_without(package: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The same on a machine that does not have `package`."""
    program = (
        f"import sys; sys.modules[{package!r}] = None; "
        "from pyscan.cli import main; sys.exit(main(['bench', *sys.argv[1:]]))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_what_cannot_run_is_listed_with_the_reason(tmp_path: Path) -> None:
    """Without its packages, a contender is absent, not forgotten."""
    figures = tmp_path / "figures.json"
    wanted = ("--contender", "blake3", "--contender", "hashlib-sha256")
    done = bench_without(
        "blake3", "--shape", "one-page", "--rounds", "1", "--json", figures, *wanted
    )
    assert (done.returncode, done.stderr) == (0, "")
    (absent,) = load(figures).absent
    reason = "blake3 is not installed; install pyscan[bench]"
    assert (absent.contender, absent.reason) == ("blake3", reason)
    assert reason in done.stdout


def test_plots_say_what_they_need(tmp_path: Path) -> None:
    stored = Path(__file__).parents[1] / "unit/bench_small.json"
    done = bench_without("matplotlib", "--from", stored, "--plots", tmp_path)
    assert done.returncode == 2
    assert done.stderr == "pyscan: plots need matplotlib; install pyscan[bench]\n"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--shape", "round", "shape 'round' is unknown; use one of: contiguous-1GiB, "),
        ("--contender", "crc", "contender 'crc' is unknown; use one of: nh4aes, "),
        ("--rounds", "0", "argument --rounds: 0 is less than 1"),
        ("--trials", "-1", "argument --trials: -1 is less than 0"),
        ("--trials", "many", "argument --trials: invalid number value: 'many'"),
    ],
)
def test_wrong_options_are_wrong_usage(option: str, value: str, message: str) -> None:
    done = bench(option, value)
    assert done.returncode == 2
    assert message in done.stderr


def test_measuring_and_reading_at_once_is_wrong_usage(tmp_path: Path) -> None:
    done = bench("--from", tmp_path / "none.json", "--json", tmp_path / "new.json")
    assert done.returncode == 2
    assert done.stderr == (
        "pyscan: --from measures nothing, so --json has nothing to write; drop one\n"
    )
