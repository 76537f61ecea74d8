"""What an operator's commands need: `operator.toml`, beside the operator's key.

[identity]                          as for the programs; agents pin this key
name = "ann"
key = "ann.key"

[mqtt]                              as for the programs
[trust]                             whose verdicts, commands and reports are believed

[state]                             of the control, for `pyscan incidents`:
directory = "/var/lib/pyscan/control"
[store]                             or the store that its workers share
url = "postgresql://ann@db/pyscan"
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pyscan.config.base import Program, State, load_config
from pyscan.config.control import StoreTable

CONTROL_STATE: Final = State(directory=Path("/var/lib/pyscan/control"))


class OperatorConfig(Program, frozen=True, kw_only=True):
    """A person's identity, and where the control remembers its incidents."""

    state: State = CONTROL_STATE
    store: StoreTable = StoreTable()


def load_operator(path: Path) -> OperatorConfig:
    """Read an operator's configuration. Raises ConfigError."""
    return load_config(path, OperatorConfig)
