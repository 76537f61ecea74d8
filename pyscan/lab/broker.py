"""A private MQTT 5 broker: mosquitto on loopback, with credentials made for this run.

    identities = {"card-1": Role.MONITOR, "host-1": Role.AGENT}
    with RunDirectory() as run, Broker(run, identities) as broker:
        connect(ADDRESS, broker.port, "card-1", broker.password_file("card-1").read_text())

Each identity may do on the broker what its role needs and nothing else. That is a second
fence: messages are signed, and whoever receives one trusts its signature, not the broker.
Configuration: mosquitto.conf(5), mosquitto_passwd(1).
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Self

from pyscan.errors import LabError
from pyscan.lab.process import Child, RunDirectory
from pyscan.protocol import TopicKind, subscription

ADDRESS = "127.0.0.1"

_START_TIMEOUT_S = 10.0

#: Another program may take the free port between our asking for it and mosquitto's listening.
_PORT_ATTEMPTS_MAX = 5


class Role(StrEnum):
    """What an identity does, and so which topics it may use."""

    MONITOR = "monitor"
    CONTROL = "control"
    AGENT = "agent"
    OBSERVER = "observer"  # reads everything, writes nothing


#: Role -> (kinds it writes, kinds it reads). Monitors and agents only under their own name.
_ACCESS: Mapping[Role, tuple[frozenset[TopicKind], frozenset[TopicKind]]] = {
    Role.MONITOR: (
        frozenset({TopicKind.VERDICT, TopicKind.SWEEP, TopicKind.MONITOR_STATUS}),
        frozenset(),
    ),
    Role.CONTROL: (
        frozenset({TopicKind.COMMAND}),
        frozenset(TopicKind) - {TopicKind.COMMAND},
    ),
    Role.AGENT: (
        frozenset({TopicKind.REPORT, TopicKind.STATE, TopicKind.HOST_STATUS}),
        frozenset({TopicKind.COMMAND}),
    ),
    Role.OBSERVER: (frozenset(), frozenset(TopicKind)),
}


class Broker:
    """A running mosquitto; leaving the context ends it. Files lie in `run`."""

    def __init__(self, run: RunDirectory, identities: Mapping[str, Role]) -> None:
        """Start a broker for `identities` (user name -> role). Raises LabError."""
        self._directory = run.path / "broker"
        self._directory.mkdir(mode=0o700)
        self._log = self._directory / "mosquitto.log"
        self._identities = dict(identities)
        self._child: Child | None = None
        self.port = 0
        self._write_passwords()
        self._write(
            self._directory / "acl",
            "".join(_acl(name, role) for name, role in self._identities.items()),
        )
        self._start_on_free_port()

    def password_file(self, identity: str) -> Path:
        """File that holds the password of an identity, and nothing else."""
        return self._directory / f"{identity}.password"

    @property
    def database(self) -> Path:
        """Where mosquitto saves sessions and messages; replaced as a whole at each save."""
        return self._directory / "mosquitto.db"

    def start(self) -> None:
        """Start again on the same port, with what was stored. Raises LabError."""
        self._child = Child(
            "broker", ["mosquitto", "-c", self._directory / "mosquitto.conf"], self._log
        )
        try:
            self._child.wait_until(self._answers, _START_TIMEOUT_S, f"port {self.port}")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it in order. Idempotent."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def kill(self) -> None:
        """End it as a crash would: SIGKILL.

        mosquitto acknowledges a message first and saves it right after, so only what is in
        `database` is sure to survive.
        """
        if self._child is not None:
            self._child.kill()
            self.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def _start_on_free_port(self) -> None:
        for attempt in range(1, _PORT_ATTEMPTS_MAX + 1):
            self.port = _free_port()
            self._write(self._directory / "mosquitto.conf", self._configuration())
            try:
                self.start()
            except LabError:
                if attempt == _PORT_ATTEMPTS_MAX:
                    raise
            else:
                return

    def _answers(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((ADDRESS, self.port)) == 0

    def _write_passwords(self) -> None:
        """Make a password for each identity; mosquitto gets a file of their hashes."""
        lines = []
        for identity in self._identities:
            password = secrets.token_urlsafe(24)
            self._write(self.password_file(identity), password)
            lines.append(f"{identity}:{password}\n")
        hashes = self._directory / "passwords"
        self._write(hashes, "".join(lines))
        # Reads the file, not the command line: nothing shows in a list of processes.
        try:
            subprocess.run(["mosquitto_passwd", "-U", hashes], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise LabError(f"mosquitto_passwd failed ({error}): run `make setup`") from error

    def _configuration(self) -> str:
        # Started as root, mosquitto would become a user who cannot enter the private
        # directory, and changing the user would also clear the parent-death signal.
        user = "user root\n" if os.geteuid() == 0 else ""
        # Autosave after every change: only so do sessions and messages survive SIGKILL.
        return f"""{user}listener {self.port} {ADDRESS}
allow_anonymous false
password_file {self._directory}/passwords
acl_file {self._directory}/acl
persistence true
persistence_location {self._directory}/
autosave_interval 1
autosave_on_changes true
set_tcp_nodelay true
log_dest stderr
"""

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.touch(mode=0o600)
        path.write_text(text)


def _acl(identity: str, role: Role) -> str:
    """The access list of one identity, mosquitto.conf(5) `acl_file`."""
    own_only = role in {Role.MONITOR, Role.AGENT}
    owner = identity if own_only else "+"
    writes, reads = _ACCESS[role]
    lines = [f"user {identity}"]
    lines += [f"topic write {subscription(kind, owner)}" for kind in sorted(writes)]
    lines += [f"topic read {subscription(kind, owner)}" for kind in sorted(reads)]
    return "\n".join(lines) + "\n"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])
