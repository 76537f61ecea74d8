"""docs/runbook.md: every command in it exists and parses, every file it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pyscan.cli import _parser
from pyscan.records import Action, VerdictState

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/runbook.md").read_text()
BLOCKS = re.findall(r"^ *```\n(.*?)^ *```$", TEXT, re.MULTILINE | re.DOTALL)
LINES = [line.strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if re.match(r"(\S*/)?pyscan ", line)]
#: `pyscan vm list` within a sentence: a command without its arguments.
MENTIONED = sorted(set(re.findall(r"`pyscan ([a-z -]+)`", TEXT)))


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 40
    assert MENTIONED
    assert TEXT.count("```") == 2 * len(BLOCKS)
    everywhere = re.findall(r"^ *(pyscan .*)$", TEXT, re.MULTILINE)
    assert set(everywhere) <= set(COMMANDS)  # none stands outside of the blocks


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_commands_parse(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    assert callable(_parser().parse_args(words).command)


@pytest.mark.parametrize("words", MENTIONED)
def test_mentioned_commands_exist(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = [word for word in words.split() if not word.startswith("-")]
    with pytest.raises(SystemExit) as ended:
        _parser().parse_args([*path, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: pyscan {' '.join(path)} " in shown
    for option in (word for word in words.split() if word.startswith("--")):
        assert option in shown


@pytest.mark.parametrize("bad", ["pyscan vm thaw host-1/web-1", "pyscan vm freeze --ttl"])
def test_a_command_that_does_not_exist_is_found(
    bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(shlex.split(bad)[1:])
    assert "error" in capsys.readouterr().err


def test_files_exist() -> None:
    named = set(re.findall(r"\b(?:deploy|docs)/[\w./-]*\w", TEXT))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert [name for name in links if not (ROOT / "docs" / name).exists()] == []


def test_every_verdict_and_action_is_explained() -> None:
    for state in VerdictState:
        assert f"`{state}`" in TEXT
    for action in Action:
        assert f"pyscan vm {action} " in TEXT
