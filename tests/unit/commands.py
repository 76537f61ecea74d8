"""Runs commands of pyscan in this process."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from pyscan import cli


class Output:
    """What one command wrote and returned."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err
        assert "Traceback" not in out + err
        assert "internal error" not in err

    @property
    def facts(self) -> dict[str, str]:
        rows = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in self.out.splitlines()]
        return {row[0]: row[1] for row in rows if len(row) == 2}

    @property
    def error(self) -> str:
        """The one line of an error."""
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("pyscan: ")
        return line

    def json(self) -> Any:
        return json.loads(self.out)


class Pyscan:
    """Runs one command at each call."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *arguments: object) -> Output:
        self._capture.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        return Output(status, *self._capture.readouterr())
