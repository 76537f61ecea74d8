"""`pyscan agent`: the machines of its host, and what it refuses to do to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from pyscan.config.base import Name, Program, Table, load_config, refuse_duplicates


class Vm(Table, frozen=True, kw_only=True):
    """One virtual machine of an agent's host, a `[[vm]]`."""

    id: Name
    qmp: Path  # socket of its own: QEMU serves one client per socket
    pidfile: Path | None = None  # else the process behind the socket is the machine


class Limits(Table, frozen=True, kw_only=True):
    """What an agent refuses even when the order is genuine."""

    kills_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 10
    protected: tuple[Name, ...] = ()  # VMs on which only query is allowed


class AgentConfig(Program, frozen=True, kw_only=True):
    """`pyscan agent`: the common tables, [limits] and at least one [[vm]]."""

    vm: Annotated[tuple[Vm, ...], msgspec.Meta(min_length=1, max_length=1024)]
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        refuse_duplicates("vm id", [vm.id for vm in self.vm])
        refuse_duplicates("vm qmp", [str(vm.qmp) for vm in self.vm])
        if not self.trust.controls:
            raise ValueError("[trust] controls is empty: no command can be trusted")
        unknown = set(self.limits.protected) - {vm.id for vm in self.vm}
        if unknown:
            raise ValueError(f"[limits] protected names no [[vm]]: {', '.join(sorted(unknown))}")


def load_agent(path: Path) -> AgentConfig:
    """Read an agent's configuration. Raises ConfigError."""
    return load_config(path, AgentConfig)
