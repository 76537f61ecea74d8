"""What all configuration files share: their common tables, and how they are read."""

from __future__ import annotations

import os
import sqlite3
import stat
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PosixPath
from typing import Annotated, TypeVar

import msgspec

from pyscan.config.problem import syntax_line, validation_problem
from pyscan.errors import ConfigError, FileFormatError, UsageError
from pyscan.evidence import EvidenceLog
from pyscan.keys import KeyRing, PublicKey, SigningKey, read_private
from pyscan.outbox import open_database
from pyscan.transport import LinkSettings
from pyscan.trust import Keeper, Role, SetFiles

CONFIG_BYTES_MAX = 1 << 20
PASSWORD_BYTES_MAX = 1024
#: One MQTT topic level without wildcards, readable in a log: letters, digits, . _ -
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
ConfigT = TypeVar("ConfigT", bound=msgspec.Struct)


class InputFile(PosixPath):
    """A path to a regular file that exists and is readable."""

    __slots__ = ()


class PrivateFile(PosixPath):
    """A path to a private key that only its owner may read."""

    __slots__ = ()


class Password(str):
    """The first line of a file that only its owner may read. Never shown."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Password(...)"


class OwnKey:
    """A loaded private key. (msgspec would take `SigningKey`, a dataclass, for a table.)"""

    __slots__ = ("value",)

    def __init__(self, value: SigningKey) -> None:
        self.value = value


class PinnedKey:
    """A loaded public key."""

    __slots__ = ("value",)

    def __init__(self, value: PublicKey) -> None:
        self.value = value


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all tables."""


class Identity(Table, frozen=True, kw_only=True):
    """Who this program is."""

    name: Name
    own_key: OwnKey = msgspec.field(name="key")

    @property
    def key(self) -> SigningKey:
        """The private key that signs what this program says."""
        return self.own_key.value


class Mqtt(Table, frozen=True, kw_only=True):
    """How to reach the broker."""

    host: Annotated[str, msgspec.Meta(min_length=1, max_length=253)] = "127.0.0.1"
    port: Port = 1883
    username: str | None = None
    password_file: Password | None = None
    ca: InputFile | None = None
    crl: InputFile | None = None  # of the authority in `ca`: brokers that are not trusted any more
    certificate: InputFile | None = None
    key: PrivateFile | None = None

    def __post_init__(self) -> None:
        if self.password_file is not None and self.username is None:
            raise ValueError("password_file needs a username")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key come together")
        if (self.certificate is not None or self.crl is not None) and self.ca is None:
            raise ValueError("a client certificate and crl need ca")


class State(Table, frozen=True, kw_only=True):
    """Where a program keeps what must survive it."""

    directory: Path

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.directory / "state.sqlite"

    @property
    def evidence(self) -> Path:
        """The directory of the evidence log."""
        return self.directory / "evidence"


class Trust(Table, frozen=True, kw_only=True):
    """Whose signatures count: pinned public keys, and a key set that an offline root signs."""

    monitors: dict[Name, PinnedKey] = {}
    controls: dict[Name, PinnedKey] = {}
    operators: dict[Name, PinnedKey] = {}
    agents: dict[Name, PinnedKey] = {}
    approvers: tuple[PinnedKey, ...] = ()
    root: PinnedKey | None = None
    key_set: Path | None = msgspec.field(name="set", default=None)

    def __post_init__(self) -> None:
        if (self.root is None) != (self.key_set is None):
            raise ValueError("root and set come together")
        try:
            for role, keys in self.pinned().items():
                KeyRing.of(keys, role)
        except UsageError as error:
            raise ValueError(str(error)) from error

    def pinned(self) -> dict[Role, dict[str, PublicKey]]:
        """The keys of this table by role and name."""
        approvers = {f"approver-{n}": key for n, key in enumerate(self.approvers, start=1)}
        tables = {
            Role.MONITOR: self.monitors,
            Role.CONTROL: self.controls,
            Role.OPERATOR: self.operators,
            Role.AGENT: self.agents,
            Role.APPROVER: approvers,
        }
        return {
            role: {name: key.value for name, key in keys.items()} for role, keys in tables.items()
        }

    def hears(self, *roles: Role) -> bool:
        """Whether anybody in one of these roles can be believed."""
        pinned = self.pinned()
        return self.key_set is not None or any(pinned[role] for role in roles)


class Program(Table, frozen=True, kw_only=True):
    """The tables that all programs have."""

    identity: Identity
    mqtt: Mqtt
    state: State
    trust: Trust = Trust()

    @contextmanager
    def open_state(self) -> Iterator[tuple[sqlite3.Connection, EvidenceLog]]:
        """The database and the evidence log, made when they are not there; closed at the end.

        Raises UsageError, FileFormatError, EvidenceError.
        """
        self.state.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (
            closing(open_database(self.state.database)) as database,
            EvidenceLog.open(self.state.evidence, self.identity.key, self.identity.name) as log,
        ):
            yield database, log

    def keeper(self) -> Keeper:
        """Who is believed. Raises FileFormatError when the key set cannot be used."""
        trust, files = self.trust, None
        if trust.root is not None and trust.key_set is not None:
            files = SetFiles(trust.root.value, trust.key_set, self.state.directory / "trust.cose")
        return Keeper(trust.pinned(), files)

    def link_settings(self, program: str) -> LinkSettings:
        """How the transport reaches the broker; the session is named by program and name."""
        return LinkSettings(
            host=self.mqtt.host,
            port=self.mqtt.port,
            identity=f"pyscan-{program}-{self.identity.name}",
            username=self.mqtt.username,
            password=self.mqtt.password_file,
            ca=self.mqtt.ca,
            crl=self.mqtt.crl,
            certificate=self.mqtt.certificate,
            key=self.mqtt.key,
        )


def load_config(path: Path, kind: type[ConfigT]) -> ConfigT:
    """Read a configuration file as `kind`. Raises ConfigError."""
    text = _read_text(path)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(path, syntax_line(str(error), text), f"not TOML: {error}") from error
    base = path.absolute().parent
    _lists_for_single_files(document)

    def decode(wanted: type, value: object) -> object:
        if not isinstance(value, str) or not value:
            raise ValueError(f"Expected a path, got {value!r}")
        return _read_path(wanted, base / value)

    try:
        config = msgspec.convert(document, kind, dec_hook=decode)
    except msgspec.ValidationError as error:
        message, line = validation_problem(str(error), text)
        raise ConfigError(path, line, message) from error
    try:
        if isinstance(config, Program):
            config.keeper()
    except FileFormatError as error:
        message, line = validation_problem(f"[trust] set: {error}", text)
        raise ConfigError(path, line, message) from error
    return config


def _lists_for_single_files(document: dict[str, object]) -> None:
    """`approved = "F"` is short for `approved = ["F"]`."""
    targets = document.get("target")
    for target in targets if isinstance(targets, list) else ():
        if isinstance(target, dict) and isinstance(target.get("approved"), str):
            target["approved"] = [target["approved"]]


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_BYTES_MAX + 1)
        if len(data) > CONFIG_BYTES_MAX:
            raise ConfigError(path, None, f"larger than {CONFIG_BYTES_MAX} bytes")
        return data.decode("utf-8")
    except OSError as error:
        raise ConfigError(path, None, f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(path, line, "not UTF-8 text") from error


def _read_path(wanted: type, path: Path) -> object:
    """Turn a path into what the field wants. Raises ValueError."""
    try:
        if wanted is OwnKey:
            return OwnKey(SigningKey.load(path))
        if wanted is PinnedKey:
            return PinnedKey(PublicKey.load(path))
        if wanted is PrivateFile:
            read_private(path)
            return PrivateFile(path)
    except UsageError as error:
        raise ValueError(str(error)) from error
    if wanted is Password:
        return _read_password(path)
    if wanted is InputFile:
        if not path.is_file() or not os.access(path, os.R_OK):
            raise ValueError(f"{path}: no readable file")
        return InputFile(path)
    return path


def _read_password(path: Path) -> Password:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(PASSWORD_BYTES_MAX + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(f"{path}: others may reach this password; run: chmod 600 '{path}'")
    first_line = data.split(b"\n", 1)[0].rstrip(b"\r")
    if not first_line or len(data) > PASSWORD_BYTES_MAX or not first_line.isascii():
        raise ValueError(f"{path}: the first line must be the password, in ASCII")
    return Password(first_line.decode("ascii"))


def refuse_duplicates(what: str, values: list[str]) -> None:
    """Raise ValueError when a value stands more than once."""
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{what} {value!r} stands more than once")
