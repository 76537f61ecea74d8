"""The arguments of a command, checked whole before anything is done."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from pyscan.records import Action, Command

#: The longest time after which a machine is released without another command.
TTL_S_MAX: Final = 30 * 24 * 3600
#: `network` of a sandbox: unplugged from all networks.
NO_NETWORK: Final = "none"
COMMIT: Final = "commit"
DISCARD: Final = "discard"

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: The arguments that each action has.
_NAMES: Final = {
    Action.FREEZE: {"dry_run", "ttl_s"},
    Action.SANDBOX: {"dry_run", "ttl_s", "network", "disk", "cpu_percent"},
    Action.RELEASE: {"dry_run", "disk"},
    Action.CAPTURE: {"dry_run", "memory", "screenshot"},
    Action.KILL: {"dry_run"},
    Action.QUERY: {"dry_run"},
}


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a command asks for beside its action."""

    dry_run: bool = False
    ttl_s: int | None = None  # released by itself after so long
    network: str = NO_NETWORK  # where a sandboxed machine is plugged into
    disk: bool = False  # sandbox: writes go to an overlay, slowly
    cpu_percent: int | None = None  # sandbox: of one processor each
    disk_choice: str = ""  # release: what becomes of the overlays
    memory: bool = True  # capture
    screenshot: bool = True  # capture


def read_arguments(command: Command) -> Arguments:
    """Take a command's arguments apart. Raises ValueError: what is wrong, in one line."""
    values = command.arguments
    unknown = set(values) - _NAMES[command.action]
    if unknown:
        raise ValueError(f"{command.action} has no argument {', '.join(sorted(unknown))}")
    releases = command.action is Action.RELEASE
    arguments = Arguments(
        dry_run=_flag(values, "dry_run", default=False),
        ttl_s=_number(values, "ttl_s", TTL_S_MAX),
        network=_network(values),
        disk=False if releases else _flag(values, "disk", default=False),
        cpu_percent=_number(values, "cpu_percent", 100),
        disk_choice=_choice(values) if releases else "",
        memory=_flag(values, "memory", default=True),
        screenshot=_flag(values, "screenshot", default=True),
    )
    if arguments.disk and arguments.ttl_s is not None:
        raise ValueError("disk and ttl_s exclude each other: somebody must choose what to keep")
    return arguments


_Values = dict[str, str | int | bool]


def _flag(values: _Values, name: str, *, default: bool) -> bool:
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is true or false, not {value!r}")  # noqa: TRY004
    return value


def _number(values: _Values, name: str, highest: int) -> int | None:
    if name not in values:
        return None
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
        raise ValueError(f"{name} is a number from 1 to {highest}, not {value!r}")
    return value


def _network(values: _Values) -> str:
    value = values.get("network", NO_NETWORK)
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"network is a name, not {value!r}")
    return value


def _choice(values: _Values) -> str:
    value = values.get("disk", "")
    if value not in {"", COMMIT, DISCARD}:
        raise ValueError(f"disk is {COMMIT} or {DISCARD}, not {value!r}")
    return str(value)
