"""The card's firmware on this machine: its own tests under sanitizers, and the simulator."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from vectors import make as vectors

from pyscan.lab.process import Child, RunDirectory

ROOT = Path(__file__).parents[2]
FIRMWARE = ROOT / "firmware"
TIMEOUT_S = 300
START_S = 20

#: Every kind of fault that the simulator knows, as in firmware/sim/faults.c.
FAULTS = {
    "lost-doorbell",
    "late-completion",
    "refused-dma",
    "blocked",
    "stale-completion",
    "half-page",
    "link-down",
    "link-down-ms",
    "engine-reset",
    "torn-submission",
    "torn-completion",
    "hang",
    "crash",
}

#: What the compiler may call without a library, as in tests/native/test_driver.py.
COMPILER_CALLS = {"memcpy", "memmove", "memset", "memcmp"}
FREESTANDING = [
    "ps_aes_portable.c",
    "ps_digest_nh4aes_portable.c",
    "ps_digest_sha256_portable.c",
    "ps_key_expand.c",
    "ps_keyed.c",
    "ps_shake.c",
]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def make(out: Path, target: str) -> str:
    done = run("make", "--no-print-directory", "-C", FIRMWARE, f"OUT={out}", target)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module builds."""
    return tmp_path_factory.mktemp("firmware")


@pytest.fixture(scope="module")
def simulator(out: Path) -> Path:
    make(out, "sim")
    return out / "pyscan-card-sim"


def test_the_core_passes_its_tests_under_sanitizers(out: Path) -> None:
    output = make(out, "check")
    passed = re.search(r"^firmware: (\d+) checks passed$", output, re.MULTILINE)
    assert passed is not None, output
    assert int(passed[1]) > 4_000, output
    for digest in ("sha256", "nh4aes"):
        assert f"vectors: {len(vectors.VECTORS)} of {digest}" in output
    table = {re.split(r"[ :]", line)[0] for line in output.splitlines()}
    assert table >= FAULTS, output


def test_the_core_needs_no_library(tmp_path: Path) -> None:
    together = tmp_path / "core.o"
    sources = [*sorted((FIRMWARE / "core").glob("*.c"))]
    sources += [ROOT / "native" / name for name in FREESTANDING]
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-fno-pie"]
    flags += ["-ffreestanding", "-nostdlib", "-r"]
    includes = [f"-I{FIRMWARE}", f"-I{ROOT / 'native'}"]
    built = run("gcc", *flags, *includes, *sources, "-o", together)
    assert built.returncode == 0, built.stderr
    undefined = run("nm", "--undefined-only", "--format=just-symbols", together).stdout.split()
    assert set(undefined) <= COMPILER_CALLS
    writable = run("nm", "--defined-only", together).stdout
    assert not re.findall(r" [bBdDC] (\w+)", writable)  # no globals


def test_layout_has_a_line_for_every_field_and_constant(out: Path) -> None:
    header = (FIRMWARE / "ps_link.h").read_text()
    fields = 0
    lines = make(out, "layout").splitlines()
    names = {line.split()[0] for line in lines}
    for body, structure in re.findall(r"typedef struct \{(.*?)\} (\w+);", header, re.DOTALL):
        for field in re.findall(r"^\s+uint\d+_t (\w+)(?:\[\d+\])?;", body, re.MULTILINE):
            assert f"{structure}.{field}" in names
            fields += 1
    constants = set(re.findall(r"\b(PS_LINK_\w+)(?: = [\d0x<]| UINT64_C)", header))
    assert constants <= names
    assert len(lines) == fields + len(constants)


# ---- the simulator ----


def test_simulator_serves_a_mailbox_until_it_is_told_to_end(
    simulator: Path, run_directory: RunDirectory
) -> None:
    ram = run_directory.path / "ram"
    ram.write_bytes(bytes(16 * 4096))
    mailbox = run_directory.ram_file("mailbox", 8 << 20)
    log = run_directory.path / "log"
    with Child("card", [simulator, "--mailbox", mailbox, "--ram", ram], log) as card:
        with mailbox.open("rb") as file:
            card.wait_until(
                lambda: os.pread(file.fileno(), 8, 0x1000) == b"PSCARD01", START_S, "its magic"
            )
        card.signal(signal.SIGUSR1)
        card.signal(signal.SIGUSR2)
        assert card.exit_status is None
        assert card.stop() == 0
    assert "card: up: dma" in log.read_text()


def test_simulator_says_what_it_knows(simulator: Path) -> None:
    done = run(simulator, "--help")
    assert done.returncode == 0
    assert set(re.findall(r"^    ([a-z-]+) +\S", done.stdout, re.MULTILINE)) == FAULTS


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["--ram", "/dev/null"],
        ["--mailbox", "m", "--ram", "r", "--fault", "no-such-fault"],
        ["--mailbox", "m", "--ram", "r", "--fault", "hang:"],
        ["--mailbox", "m", "--ram", "r", "--fault", "hang:1:2:3"],
        ["--mailbox", "m", "--ram", "r", "--fault", "hang:-1"],
        ["--mailbox", "m", "--ram", "r", "--map", "0:4096"],
        ["--mailbox", "m", "--ram", "r", "--map", "0:4095:0"],
        ["--mailbox", "m", "--ram", "r", "--engine", "edu"],
        ["--mailbox", "m", "--ram", "r", "more"],
        ["--mailbox", "m", "--ram", "r", "--unknown"],
    ],
)
def test_simulator_refuses_wrong_options(simulator: Path, wrong: list[str]) -> None:
    assert run(simulator, *wrong).returncode == 2


def test_simulator_refuses_wrong_files(simulator: Path, tmp_path: Path) -> None:
    ram, mailbox = tmp_path / "ram", tmp_path / "mailbox"
    wanted = [simulator, "--mailbox", mailbox, "--ram", ram]
    missing = run(*wanted)
    assert missing.returncode == 3
    assert str(ram) in missing.stderr
    ram.write_bytes(bytes(4096))
    mailbox.write_bytes(bytes(4096))
    short = run(*wanted)
    assert short.returncode == 3
    assert str(mailbox) in short.stderr
