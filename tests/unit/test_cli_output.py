"""Where the output of a command goes: terminals, pipes, full disks; and how it ends early."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pyscan import cli, render


@pytest.mark.parametrize("value", ["/tmp/[bold]x[/bold]", "[/wrong]", "[link=http://example.org]x"])
def test_names_are_no_markup_on_a_terminal(value: str) -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=100, color_system=None)
    render.print_facts(terminal, [("file", value), (value, "name")])
    assert stream.getvalue().count(value) == 2


def pyscan_process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyscan", *map(str, arguments)]
    return subprocess.run(command, text=True, check=False, stderr=subprocess.PIPE, **options)


def test_a_reader_that_has_gone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        for arguments in (("sources", "--json"), ("sources",)):
            done = pyscan_process(*arguments, stdout=writer)
            assert (done.returncode, done.stderr) == (4, "")
    finally:
        os.close(writer)


def test_a_full_disk() -> None:
    with Path("/dev/full").open("w") as full:
        done = pyscan_process("sources", "--json", stdout=full)
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert "No space left" in line


def test_file_names_of_any_bytes(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/k\xff\n.key"
    command = [sys.executable, "-m", "pyscan", "keys", "create", path]
    done = subprocess.run(command, check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"k\\udcff" in done.stdout


def test_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.evidence, "verify_directory", interrupt)
    assert cli.main(["evidence", "verify", str(tmp_path)]) == 130
    assert capsys.readouterr() == ("", "pyscan: interrupted\n")


def test_a_defect_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.delenv("PYSCAN_TRACEBACK", raising=False)
    monkeypatch.setattr(cli.evidence, "verify_directory", fail)
    assert cli.main(["evidence", "verify", str(tmp_path)]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "internal error: ZeroDivisionError" in line
    monkeypatch.setenv("PYSCAN_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["evidence", "verify", str(tmp_path)])
