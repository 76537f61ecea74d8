"""Where in a TOML text a problem is: msgspec tells the path, a person wants the line."""

from __future__ import annotations

import re
from collections.abc import Mapping

_AT_LINE = re.compile(r"\(at line (\d+), column \d+\)")
_AT_PATH = re.compile(r" - at (?:`key` in )?`\$(?P<path>[^`]*)`$")
#: Checks across tables begin their message with the key that is at fault.
_AT_KEY = re.compile(r"^\[(?P<table>\w+)\] (?P<key>\w+)")
_UNKNOWN_FIELD = re.compile(r"unknown field `(?P<field>[^`]*)`")
_STEP = re.compile(r"\.(?P<key>[^.\[\]]+)|\[(?P<index>\d+)\]|\[\.\.\.\]")
_KEY_PART = r"""(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')"""
_KEY = rf"{_KEY_PART}(?:\s*\.\s*{_KEY_PART})*"
_HEADER = re.compile(rf"^\s*(?P<open>\[\[?)\s*(?P<key>{_KEY})\s*\]")
_ASSIGNMENT = re.compile(rf"^\s*(?P<key>{_KEY})\s*=")

Steps = tuple[str | int, ...]


def syntax_line(message: str, text: str) -> int:
    """The line that tomllib's message names; the last one when it names none."""
    found = _AT_LINE.search(message)
    return int(found[1]) if found else max(1, text.rstrip("\n").count("\n") + 1)


def validation_problem(message: str, text: str) -> tuple[str, int | None]:
    """Message without msgspec's path, with a readable one, and the line it belongs to."""
    where = _AT_PATH.search(message)
    steps: Steps = ()
    if where:
        message = message[: where.start()]
        for step in _STEP.finditer(where["path"]):
            if step["key"] is not None:
                steps += (step["key"],)
            elif step["index"] is not None:
                steps += (int(step["index"]),)
    readable = ".".join(str(step) for step in steps)
    if named := _AT_KEY.match(message):
        steps, readable = (named["table"], named["key"]), ""
    unknown = _UNKNOWN_FIELD.search(message)
    if unknown:
        steps += (unknown["field"],)
    lines = _lines_of_keys(text)
    while steps and steps not in lines:
        steps = steps[:-1]
    return (f"{readable}: {message}" if readable else message), lines.get(steps)


def _lines_of_keys(text: str) -> Mapping[Steps, int]:
    """The first line of every table and key of a valid TOML text.

    It reads headers and assignments at the start of lines. Text inside a multi-line string
    that looks like one can mislead the line of an error, never what is loaded.
    """
    lines: dict[Steps, int] = {}
    counts: dict[Steps, int] = {}
    table: Steps = ()
    for number, line in enumerate(text.splitlines(), start=1):
        header = _HEADER.match(line)
        if header:
            table = _indexed(_parts(header["key"]), counts)
            if header["open"] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table += (counts[table],)
            steps = table
        elif assignment := _ASSIGNMENT.match(line):
            steps = table + _parts(assignment["key"])
        else:
            continue
        for end in range(1, len(steps) + 1):
            lines.setdefault(steps[:end], number)
    return lines


def _parts(key: str) -> Steps:
    return tuple(part.strip("\"'") for part in re.findall(_KEY_PART, key))


def _indexed(key: Steps, counts: Mapping[Steps, int]) -> Steps:
    """Insert the current index behind every part (but the last) that names an array of tables."""
    steps: Steps = ()
    for part in key[:-1]:
        steps += (part,)
        if steps in counts:
            steps += (counts[steps],)
    return (*steps, key[-1])
