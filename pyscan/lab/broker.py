"""A private MQTT 5 broker: mosquitto on loopback, with credentials made for this run.

    identities = {"card-1": Role.MONITOR, "host-1": Role.AGENT}
    with RunDirectory() as run, Broker(run, identities) as broker:
        connect(ADDRESS, broker.port, "card-1", broker.password_file("card-1").read_text())

With `tls=True` there are no passwords: an authority of its own issues a certificate to each
identity and to the broker, the broker asks everybody for one, and its common name is the
user name. `authority.revoke` and a restart of the broker keep an identity out.

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
from pathlib import Path
from typing import Final, Self

from pyscan.errors import LabError
from pyscan.lab.process import Child, RunDirectory
from pyscan.protocol import TopicKind, subscription
from pyscan.trust import Role
from pyscan.trust.authority import Authority

__all__ = ["ADDRESS", "Broker", "Role"]

ADDRESS: Final = "127.0.0.1"

_START_TIMEOUT_S = 10.0
_QUEUED_MAX = 100_000

#: Another program may take the free port between our asking for it and mosquitto's listening.
_PORT_ATTEMPTS_MAX = 5


#: Role -> (kinds it writes, kinds it reads). Monitors and agents only under their own name.
_ACCESS: Mapping[Role, tuple[frozenset[TopicKind], frozenset[TopicKind]]] = {
    Role.MONITOR: (
        frozenset({TopicKind.VERDICT, TopicKind.SWEEP, TopicKind.MONITOR_STATUS}),
        frozenset(),
    ),
    Role.CONTROL: (
        frozenset({TopicKind.COMMAND, TopicKind.APPROVAL}),
        frozenset(TopicKind) - {TopicKind.COMMAND, TopicKind.APPROVAL},
    ),
    Role.AGENT: (
        frozenset({TopicKind.REPORT, TopicKind.STATE, TopicKind.HOST_STATUS}),
        frozenset({TopicKind.COMMAND, TopicKind.APPROVAL}),
    ),
    Role.OPERATOR: (
        frozenset({TopicKind.COMMAND, TopicKind.APPROVAL}),
        frozenset(TopicKind) - {TopicKind.COMMAND, TopicKind.APPROVAL},
    ),
    Role.APPROVER: (frozenset(), frozenset()),
    Role.OBSERVER: (frozenset(), frozenset(TopicKind)),
}


class Broker:
    """A running mosquitto; leaving the context ends it. Files lie in `run`."""

    def __init__(
        self,
        run: RunDirectory,
        identities: Mapping[str, Role],
        *,
        tls: bool = False,
        saving: bool = True,
    ) -> None:
        """Start a broker for `identities` (user name -> role). Raises LabError.

        `saving` after every change is what lets sessions survive SIGKILL; a fleet's broker has
        no time for it.
        """
        self._saving = saving
        self._directory = run.path / "broker"
        self._directory.mkdir(mode=0o700)
        self._log = self._directory / "mosquitto.log"
        self._identities = dict(identities)
        self._child: Child | None = None
        self.port = 0
        self._authority: Authority | None = None
        if tls:
            self._issue_certificates()
        else:
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
    def pid(self) -> int:
        """Its process number. Raises LabError when it does not run."""
        if self._child is None:
            raise LabError("the broker does not run")
        return self._child.pid

    @property
    def authority(self) -> Authority:
        """What issued the certificates. Raises LabError without TLS."""
        if self._authority is None:
            raise LabError("the broker was started without TLS")
        return self._authority

    def certificate(self, identity: str) -> Path:
        """The certificate of an identity."""
        return self._directory / f"{identity}.pem"

    def certificate_key(self, identity: str) -> Path:
        """The private key of its certificate."""
        return self._directory / f"{identity}.tls.key"

    def mqtt_table(self, identity: str) -> str:
        """The [mqtt] of a program's configuration."""
        lines = ["[mqtt]", f'host = "{ADDRESS}"', f"port = {self.port}"]
        if self._authority is None:
            lines += [
                f'username = "{identity}"',
                f'password_file = "{self.password_file(identity)}"',
            ]
        else:
            lines += [
                f'ca = "{self._authority.path("ca.pem")}"',
                f'crl = "{self._authority.path("crl.pem")}"',
                f'certificate = "{self.certificate(identity)}"',
                f'key = "{self.certificate_key(identity)}"',
            ]
        return "\n".join(lines) + "\n"

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

    def _issue_certificates(self) -> None:
        self._authority = Authority.create(self._directory / "root", "laboratory")
        self._authority.issue_broker("broker", self._directory, [ADDRESS])
        for name, role in self._identities.items():
            self._authority.issue(role, name, self._directory)

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
        # Autosave after every change: only so do sessions and messages survive SIGKILL. Over
        # 1,000 messages that wait for one client, mosquitto drops them unless told otherwise.
        saving = "autosave_interval 1\nautosave_on_changes true\n" if self._saving else ""
        return f"""{user}listener {self.port} {ADDRESS}
{self._access()}acl_file {self._directory}/acl
persistence true
persistence_location {self._directory}/
{saving}max_queued_messages {_QUEUED_MAX}
set_tcp_nodelay true
log_dest stderr
"""

    def _access(self) -> str:
        """How clients prove who they are."""
        if self._authority is None:
            return f"allow_anonymous false\npassword_file {self._directory}/passwords\n"
        return f"""cafile {self._authority.path("ca.pem")}
crlfile {self._authority.path("crl.pem")}
certfile {self.certificate("broker")}
keyfile {self.certificate_key("broker")}
tls_version tlsv1.3
require_certificate true
use_identity_as_username true
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
