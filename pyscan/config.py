"""Configuration files of the three programs: TOML, validated, errors with file and line.

Each program has one loader that returns frozen structs in which everything is usable:
paths are absolute (relative ones are taken from the configuration file's directory), keys
and passwords are loaded, names are safe as an MQTT topic level. Unknown keys are errors.

    [identity]                          all programs
    name = "host-1"                     topic level and MQTT client id; the agent's host name
    key = "host-1.key"                  Ed25519 private key, PEM, mode 0600

    [mqtt]                              all programs
    host = "127.0.0.1"                  port = 1883
    username = "host-1"                 password_file = "host-1.password" (mode 0600)
    ca, certificate, key                PEM files: TLS; a client certificate if both are given

    [state]                             all programs
    directory = "/var/lib/pyscan"       database and evidence; made when it is not there

    [trust]                             public keys by name and role; a role that the program
    monitors.mon-1 = "mon-1.pub"        does not hear may stay empty
    controls.ctl-1 = "ctl-1.pub"
    agents.host-1 = "host-1.pub"
    approvers = ["approver.pub"]

The remaining tables are described at the structs of their program.
"""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path, PosixPath
from typing import Annotated, TypeVar

import msgspec

from pyscan.digest import BACKENDS, DIGESTS, THREADS_MAX
from pyscan.errors import ConfigError, UsageError
from pyscan.evidence import EvidenceLog
from pyscan.keys import KeyRing, PublicKey, SigningKey
from pyscan.outbox import open_database
from pyscan.records import Action
from pyscan.transport import LinkSettings
from pyscan.validate.rules import (
    DEFAULT_OVERRIDES,
    PATTERN_CHARACTERS_MAX,
    Override,
    Rule,
    StateRules,
)
from pyscan.validate.vector import StateClass

CONFIG_BYTES_MAX = 1 << 20
PASSWORD_BYTES_MAX = 1024
RULES_MAX = 1000  # with the built-in ones no more than pyscan.validate.rules.OVERRIDES_MAX
#: One MQTT topic level without wildcards, readable in a log: letters, digits, . _ -
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
ConfigT = TypeVar("ConfigT", bound="_Program")


class InputFile(PosixPath):
    """A path to a regular file that exists and is readable."""

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


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all tables."""


class Identity(_Table, frozen=True, kw_only=True):
    """Who this program is."""

    name: Name
    own_key: OwnKey = msgspec.field(name="key")

    @property
    def key(self) -> SigningKey:
        """The private key that signs what this program says."""
        return self.own_key.value


class Mqtt(_Table, frozen=True, kw_only=True):
    """How to reach the broker."""

    host: Annotated[str, msgspec.Meta(min_length=1, max_length=253)] = "127.0.0.1"
    port: Port = 1883
    username: str | None = None
    password_file: Password | None = None
    ca: InputFile | None = None
    certificate: InputFile | None = None
    key: InputFile | None = None

    def __post_init__(self) -> None:
        if self.password_file is not None and self.username is None:
            raise ValueError("password_file needs a username")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key come together")
        if self.certificate is not None and self.ca is None:
            raise ValueError("a client certificate needs ca")


class State(_Table, frozen=True, kw_only=True):
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


class Trust(_Table, frozen=True, kw_only=True):
    """The pinned public keys of the other programs."""

    monitors: dict[Name, PinnedKey] = {}
    controls: dict[Name, PinnedKey] = {}
    agents: dict[Name, PinnedKey] = {}
    approvers: tuple[PinnedKey, ...] = ()

    def __post_init__(self) -> None:
        try:
            self.monitor_ring()
            self.control_ring()
            self.agent_ring()
            self.approver_ring()
        except UsageError as error:
            raise ValueError(str(error)) from error

    def monitor_ring(self) -> KeyRing:
        """Keys that may sign verdicts."""
        return _ring(self.monitors, "monitor")

    def control_ring(self) -> KeyRing:
        """Keys that may sign commands."""
        return _ring(self.controls, "control")

    def agent_ring(self) -> KeyRing:
        """Keys that may sign reports."""
        return _ring(self.agents, "agent")

    def approver_ring(self) -> KeyRing:
        """Keys that may sign approved configurations."""
        named = {f"approver-{n}": key for n, key in enumerate(self.approvers, start=1)}
        return _ring(named, "approver")


def _ring(keys: Mapping[str, PinnedKey], role: str) -> KeyRing:
    return KeyRing.of({name: key.value for name, key in keys.items()}, role)


class _Program(_Table, frozen=True, kw_only=True):
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

    def link_settings(self, program: str) -> LinkSettings:
        """How the transport reaches the broker; the session is named by program and name."""
        return LinkSettings(
            host=self.mqtt.host,
            port=self.mqtt.port,
            identity=f"pyscan-{program}-{self.identity.name}",
            username=self.mqtt.username,
            password=self.mqtt.password_file,
            ca=self.mqtt.ca,
            certificate=self.mqtt.certificate,
            key=self.mqtt.key,
        )


class SweepTable(_Table, frozen=True, kw_only=True):
    """How a monitor sweeps."""

    interval_ms: Annotated[int, msgspec.Meta(ge=1, le=3_600_000)] = 1000
    rereads: Annotated[int, msgspec.Meta(ge=0, le=16)] = 2  # of a page, before it is a finding
    backend: str = "native"  # what computes digests: native or numba
    digest: str = "nh4aes"  # of pages that were validated; a name of pyscan.digest.DIGESTS
    threads: Annotated[int, msgspec.Meta(ge=1, le=THREADS_MAX)] = 1  # that share a sweep
    audit_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 1.0  # by SHA-256, every sweep
    heartbeat_ms: Annotated[int, msgspec.Meta(ge=100, le=3_600_000)] = 5000

    def __post_init__(self) -> None:
        for key, value, known in (
            ("backend", self.backend, BACKENDS),
            ("digest", self.digest, tuple(DIGESTS)),
        ):
            if value not in known:
                raise ValueError(f"[sweep] {key} {value!r} is unknown; use {' or '.join(known)}")


_DEFAULT_RULES = StateRules()


class StateRule(_Table, frozen=True, kw_only=True):
    """A rule for names, a `[[kernel_state.rule]]`; the first that matches is taken."""

    kind: StateClass = msgspec.field(name="class")  # as the keys of the table, with hyphens
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=PATTERN_CHARACTERS_MAX)]  # pattern
    rule: Rule

    def __post_init__(self) -> None:
        if self.kind is StateClass.UNKNOWN_MODULE:
            raise ValueError("an unknown module is always a finding; approve its package instead")


class KernelStateTable(_Table, frozen=True, kw_only=True):
    """What may become of a kernel's state: a rule for each class, see `StateRules`.

    Each is "pin", "allow", "report" or "forbid". For kernels that are approved by package.
    """

    features: Rule = _DEFAULT_RULES.features
    static_key: Rule = _DEFAULT_RULES.static_key
    static_call: Rule = _DEFAULT_RULES.static_call
    ftrace: Rule = _DEFAULT_RULES.ftrace
    kprobe: Rule = _DEFAULT_RULES.kprobe
    module: Rule = _DEFAULT_RULES.module
    bpf: Rule = _DEFAULT_RULES.bpf
    rule: Annotated[tuple[StateRule, ...], msgspec.Meta(max_length=RULES_MAX)] = ()

    def rules(self) -> StateRules:
        """The rules that a scanner takes; the built-in ones for names come last."""
        own = tuple(Override(rule.kind, rule.name, rule.rule) for rule in self.rule)
        return StateRules(
            features=self.features,
            static_key=self.static_key,
            static_call=self.static_call,
            ftrace=self.ftrace,
            kprobe=self.kprobe,
            module=self.module,
            bpf=self.bpf,
            overrides=own + DEFAULT_OVERRIDES,
        )


class Target(_Table, frozen=True, kw_only=True):
    """One watched machine, a `[[target]]`."""

    name: Name
    host: Name  # host name of the agent that answers for it
    vm: Name  # as in the agent's [[vm]] id
    source: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]  # URI
    #: One file, or several of kind linux: the one that fits the running kernel is used.
    approved: Annotated[tuple[InputFile, ...], msgspec.Meta(min_length=1, max_length=16)]


class MonitorConfig(_Program, frozen=True, kw_only=True):
    """`pyscan monitor`: the common tables, [sweep], [kernel_state] and at least one [[target]]."""

    sweep: SweepTable = SweepTable()
    kernel_state: KernelStateTable = KernelStateTable()
    target: Annotated[tuple[Target, ...], msgspec.Meta(min_length=1, max_length=1024)]

    def __post_init__(self) -> None:
        _refuse_duplicates("target name", [target.name for target in self.target])
        if not self.trust.approvers:
            raise ValueError("[trust] approvers is empty: no approved configuration can be trusted")


class PolicyTable(_Table, frozen=True, kw_only=True):
    """What control does about a verdict."""

    enforce: bool = False  # false: incidents are recorded, no command leaves
    unapproved: Action = Action.FREEZE
    undecided: Action | None = None  # None: an alarm, never an action
    protected: tuple[Name, ...] = ()  # VMs that are never acted on

    def __post_init__(self) -> None:
        for action in (self.unapproved, self.undecided):
            if action in {Action.RELEASE, Action.QUERY}:
                raise ValueError(f"{action} is no answer to a verdict; use freeze or kill")


class ControlConfig(_Program, frozen=True, kw_only=True):
    """`pyscan control`: the common tables and [policy]."""

    policy: PolicyTable = PolicyTable()
    command_lifetime_s: Annotated[int, msgspec.Meta(ge=5, le=3600)] = 30

    def __post_init__(self) -> None:
        if not self.trust.monitors:
            raise ValueError("[trust] monitors is empty: no verdict can be trusted")
        if self.policy.enforce and not self.trust.agents:
            raise ValueError("[trust] agents is empty: no report can be trusted")


class Vm(_Table, frozen=True, kw_only=True):
    """One virtual machine of an agent's host, a `[[vm]]`."""

    id: Name
    qmp: Path  # socket of its own: QEMU serves one client per socket
    pidfile: Path | None = None  # else the process behind the socket is the machine


class Limits(_Table, frozen=True, kw_only=True):
    """What an agent refuses even when the order is genuine."""

    kills_per_minute: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 10
    protected: tuple[Name, ...] = ()  # VMs on which only query is allowed


class AgentConfig(_Program, frozen=True, kw_only=True):
    """`pyscan agent`: the common tables, [limits] and at least one [[vm]]."""

    vm: Annotated[tuple[Vm, ...], msgspec.Meta(min_length=1, max_length=1024)]
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        _refuse_duplicates("vm id", [vm.id for vm in self.vm])
        _refuse_duplicates("vm qmp", [str(vm.qmp) for vm in self.vm])
        if not self.trust.controls:
            raise ValueError("[trust] controls is empty: no command can be trusted")
        unknown = set(self.limits.protected) - {vm.id for vm in self.vm}
        if unknown:
            raise ValueError(f"[limits] protected names no [[vm]]: {', '.join(sorted(unknown))}")


def load_monitor(path: Path) -> MonitorConfig:
    """Read a monitor's configuration. Raises ConfigError."""
    return _load(path, MonitorConfig)


def load_control(path: Path) -> ControlConfig:
    """Read a control's configuration. Raises ConfigError."""
    return _load(path, ControlConfig)


def load_agent(path: Path) -> AgentConfig:
    """Read an agent's configuration. Raises ConfigError."""
    return _load(path, AgentConfig)


def _load(path: Path, kind: type[ConfigT]) -> ConfigT:
    text = _read_text(path)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(path, _syntax_line(str(error), text), f"not TOML: {error}") from error
    base = path.absolute().parent
    _lists_for_single_files(document)

    def decode(wanted: type, value: object) -> object:
        if not isinstance(value, str) or not value:
            raise ValueError(f"Expected a path, got {value!r}")
        return _read_path(wanted, base / value)

    try:
        return msgspec.convert(document, kind, dec_hook=decode)
    except msgspec.ValidationError as error:
        message, line = _validation_problem(str(error), text)
        raise ConfigError(path, line, message) from error


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


def _refuse_duplicates(what: str, values: list[str]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{what} {value!r} stands more than once")


# --- the line of a problem -------------------------------------------------------------

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


def _syntax_line(message: str, text: str) -> int:
    found = _AT_LINE.search(message)
    return int(found[1]) if found else max(1, text.rstrip("\n").count("\n") + 1)


def _validation_problem(message: str, text: str) -> tuple[str, int | None]:
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
