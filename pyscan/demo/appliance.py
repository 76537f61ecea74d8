"""An appliance for one guest: keys, configuration files, and the three programs as processes.

Everything is written as an operator would write it, and every program is started by its
command line, so the demonstration runs what a real installation runs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from pyscan.demo.observer import Rings
from pyscan.keys import KeyRing, PublicKey, SigningKey
from pyscan.lab.broker import Broker, Role
from pyscan.lab.process import Child
from pyscan.records import Action

MONITOR: Final = "card-1"
CONTROL: Final = "control-1"
HOST: Final = "host-1"
OBSERVER: Final = "observer"
TARGET: Final = "guest"
IDENTITIES: Final = {
    MONITOR: Role.MONITOR,
    CONTROL: Role.CONTROL,
    HOST: Role.AGENT,
    OBSERVER: Role.OBSERVER,
}
#: Sweeps begin this often; a sweep of one guest takes a few milliseconds.
INTERVAL_MS: Final = 50
HEARTBEAT_MS: Final = 250
#: Start of a program: the interpreter and its libraries on a busy machine.
START_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the appliance is connected to."""

    source: str
    agent_qmp: Path
    pid_file: Path
    action: Action
    interval_ms: int = INTERVAL_MS


class Appliance:
    """Monitor, control and agent for one guest; leaving the context ends them."""

    def __init__(self, directory: Path, broker: Broker, wiring: Wiring) -> None:
        self._directory = directory
        self._broker = broker
        self._wiring = wiring
        self._children: dict[str, Child] = {}
        self.approved = directory / "guest.approved"
        self._keys = {}
        for name in (*IDENTITIES, "approver"):
            key = SigningKey.generate()
            key.save(directory / f"{name}.key")
            key.public.save(directory / f"{name}.pub")
            self._keys[name] = key.public
        for program, text in self._configurations().items():
            (directory / f"{program}.toml").write_text(text)

    def rings(self) -> Rings:
        """The public keys of the three programs."""
        return Rings(
            KeyRing.of({MONITOR: self._keys[MONITOR]}, "monitor"),
            KeyRing.of({CONTROL: self._keys[CONTROL]}, "control"),
            KeyRing.of({HOST: self._keys[HOST]}, "agent"),
        )

    def writers(self) -> dict[str, PublicKey]:
        """Who writes evidence, and with which key."""
        return {name: self._keys[name] for name in (MONITOR, CONTROL, HOST)}

    def enrol(self) -> list[str]:
        """Make the approved configuration with `pyscan approve snapshot`; returns its output."""
        return self._approve("snapshot", self._wiring.source)

    def compile(self, package: Path) -> list[str]:
        """Make it with `pyscan approve linux`, without a look at the guest; returns its output."""
        return self._approve("linux", str(package))

    def _approve(self, kind: str, what: str) -> list[str]:
        arguments = ["approve", kind, what, "--out", str(self.approved)]
        arguments += ["--sign", str(self._directory / "approver.key")]
        with self._start("approve", arguments) as child:
            status = child.wait(START_TIMEOUT_S)
            if status:
                raise child.failure(f"ended with status {status}")
            return child.log.read_text().splitlines()

    def start(self) -> None:
        """Start the three programs; they find each other through the broker."""
        for program in ("control", "agent", "monitor"):
            self.start_program(program)

    def start_program(self, program: str) -> None:
        """Start one program, or start it again after it was killed."""
        config = self._directory / f"{program}.toml"
        self._children[program] = self._start(program, [program, "--config", str(config)])

    def pid(self, program: str) -> int:
        """Process number of a running program."""
        return self._children[program].pid

    def kill(self, program: str) -> None:
        """SIGKILL one program: it gets no chance to clean up."""
        self._children.pop(program).kill()

    def wait_logged(self, program: str, text: str, timeout_s: float) -> None:
        """Wait until a program's log contains `text`. Raises LabError."""
        child = self._children[program]
        child.wait_until(lambda: text in child.log.read_text(), timeout_s, f"{text!r} in its log")

    def check_alive(self) -> None:
        """Raises LabError when a program has ended by itself."""
        for child in self._children.values():
            if child.exit_status is not None:
                raise child.failure(f"ended with status {child.exit_status}")

    def stop(self) -> None:
        """SIGTERM to all; raises LabError unless every program stops cleanly (status 0)."""
        children, self._children = self._children, {}
        statuses = [(child, child.stop()) for child in reversed(children.values())]
        for child, status in statuses:
            if status:
                raise child.failure(f"did not stop cleanly, status {status}")

    def evidence(self) -> dict[str, Path]:
        """Program -> directory of its evidence log."""
        return {
            program: self._directory / program / "evidence"
            for program in ("monitor", "control", "agent")
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for child in self._children.values():
            child.stop()

    def _start(self, name: str, arguments: Sequence[str]) -> Child:
        return Child(
            name,
            [sys.executable, "-m", "pyscan", *arguments],
            log=self._directory / f"{name}.log",
            environment=dict(os.environ),
        )

    def _configurations(self) -> dict[str, str]:
        wiring = self._wiring
        return {
            "monitor": self._common("monitor", MONITOR)
            + f"""
[trust]
approvers = ["approver.pub"]

[sweep]
interval_ms = {wiring.interval_ms}
heartbeat_ms = {HEARTBEAT_MS}

[[target]]
name = "{TARGET}"
host = "{HOST}"
vm = "{TARGET}"
source = {_text(wiring.source)}
approved = "{self.approved.name}"
""",
            "control": self._common("control", CONTROL)
            + f"""
[trust]
monitors.{MONITOR} = "{MONITOR}.pub"
agents.{HOST} = "{HOST}.pub"

[policy]
enforce = true
unapproved = "{wiring.action}"
""",
            "agent": self._common("agent", HOST)
            + f"""
[trust]
controls.{CONTROL} = "{CONTROL}.pub"

[[vm]]
id = "{TARGET}"
qmp = {_text(str(wiring.agent_qmp))}
pidfile = {_text(str(wiring.pid_file))}
""",
        }

    def _common(self, program: str, name: str) -> str:
        return f"""# {program} of the demonstration
[identity]
name = "{name}"
key = "{name}.key"

[mqtt]
host = "127.0.0.1"
port = {self._broker.port}
username = "{name}"
password_file = {_text(str(self._broker.password_file(name)))}

[state]
directory = "{program}"
"""


def _text(value: str) -> str:
    """A TOML basic string; JSON's escapes are a subset of TOML's."""
    return json.dumps(value)
