"""deploy/: the broker's configuration as it is, in a broker; configurations and units as files."""

from __future__ import annotations

import asyncio
import configparser
import os
import re
import shlex
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pyscan import protocol
from pyscan.cli import _parser, main
from pyscan.config import load_agent, load_control, load_monitor, load_operator
from pyscan.lab.process import Child, RunDirectory
from pyscan.transport import Link, LinkSettings, LinkState, Publication, PublishRefusedError
from pyscan.trust import Role
from pyscan.trust.authority import Authority

DEPLOY = Path(__file__).parents[2] / "deploy"
PROGRAMS = ("monitor", "control", "agent")
DEADLINE_S = 15
ADDRESS = "127.0.0.1"
PEOPLE = {
    "card-1": Role.MONITOR,
    "control-1": Role.CONTROL,
    "host-1": Role.AGENT,
    "host-2": Role.AGENT,
    "ann": Role.OPERATOR,
    "bob": Role.OPERATOR,
}


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everybody's keys, and what the root publishes."""
    directory = tmp_path_factory.mktemp("issued")
    authority = Authority.create(directory / "root", "test")
    authority.issue_broker("broker", directory, [ADDRESS])
    for name, role in PEOPLE.items():
        authority.issue(role, name, directory)
    for name in ("ca.pem", "crl.pem", "root.pub", "trust.cose"):
        (directory / name).write_bytes(authority.path(name).read_bytes())
    return directory


# ------------------------------------------------------------------------------ broker


@pytest.fixture
def port(issued: Path, run_directory: RunDirectory) -> Iterator[int]:
    """The port of a mosquitto that runs with deploy/mosquitto."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        number = int(probe.getsockname()[1])
    text = (DEPLOY / "mosquitto/mosquitto.conf").read_text()
    for old, new in (
        ("listener 8883\n", f"listener {number} {ADDRESS}\n"),
        ("/etc/mosquitto/pyscan/acl", str(DEPLOY / "mosquitto/acl")),
        ("/etc/mosquitto/pyscan/", f"{issued}/"),
        ("/var/lib/mosquitto/", f"{run_directory.path}/"),
        ("log_dest syslog", "log_dest stderr"),
    ):
        assert old in text
        text = text.replace(old, new)
    if os.geteuid() == 0:
        text += "user root\n"
    configuration = run_directory.path / "mosquitto.conf"
    configuration.write_text(text)
    log = run_directory.path / "mosquitto.log"
    with Child("broker", ["mosquitto", "-c", configuration], log) as broker:
        broker.wait_until(lambda: _answers(number), DEADLINE_S, f"port {number}")
        yield number
        assert broker.exit_status is None
        warnings = [line for line in log.read_text().splitlines() if "Warning" in line]
        assert [line for line in warnings if "run as root" not in line] == []


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((ADDRESS, port)) == 0


@asynccontextmanager
async def linked(issued: Path, port: int, name: str, *filters: str) -> AsyncIterator[Link]:
    settings = LinkSettings(
        ADDRESS,
        port,
        f"test-{name}",
        ca=issued / "ca.pem",
        crl=issued / "crl.pem",
        certificate=issued / f"{name}.pem" if name else None,
        key=issued / f"{name}.tls.key" if name else None,
    )
    link = Link(settings, filters)
    task = asyncio.create_task(link.run())
    try:
        async with asyncio.timeout(DEADLINE_S):
            while link.state is not LinkState.ONLINE and not link.problem:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        yield link
    finally:
        task.cancel()
        await asyncio.wait({task})


async def may(link: Link, topic: str) -> bool:
    """Whether the broker takes a message for a topic."""
    try:
        await link.publish(Publication(topic, b"x"))
    except PublishRefusedError:
        return False
    return True


#: Who may publish what: one topic of each kind, of one's own and of another's.
TOPICS = {
    "command": protocol.command_topic("host-1", "web-1"),
    "approval": protocol.approval_topic("host-1", "web-1"),
    "report": protocol.report_topic("host-1", "01J00000000000000000000000"),
    "state": protocol.state_topic("host-1", "web-1"),
    "host status": protocol.host_status_topic("host-1"),
    "verdict": protocol.verdict_topic("card-1", "web-1"),
    "sweep": protocol.sweep_topic("card-1"),
    "monitor status": protocol.monitor_status_topic("card-1"),
    "foreign": "pyscan/v1/something",
    "system": "$SYS/broker/uptime",
}
MAY_WRITE = {
    "card-1": {"verdict", "sweep", "monitor status"},
    "control-1": {"command"},
    "host-1": {"report", "state", "host status"},
    "host-2": set(),
    "ann": {"command", "approval"},
    "bob": {"command", "approval"},
}


async def test_everybody_may_write_what_their_role_needs(issued: Path, port: int) -> None:
    found = {}
    for name in PEOPLE:
        async with linked(issued, port, name) as link:
            assert link.problem == ""
            found[name] = {kind for kind, topic in TOPICS.items() if await may(link, topic)}
    assert found == MAY_WRITE


async def test_everybody_hears_what_their_role_needs(issued: Path, port: int) -> None:
    expected = {
        "card-1": set(),
        "control-1": {"report", "verdict"},
        "host-1": {"command", "approval"},
        "host-2": set(),
        "ann": set(TOPICS) - {"foreign", "system"},
    }
    heard = {}
    for name in expected:
        async with linked(issued, port, name, "pyscan/#") as listener:
            for writer, kinds in MAY_WRITE.items():
                if writer == name:
                    continue
                async with linked(issued, port, writer) as link:
                    for kind in kinds:
                        await link.publish(Publication(TOPICS[kind], b"x"))
            heard[name] = await _all_heard(listener)
    own = {"ann": {"command", "approval"}}
    for name, kinds in expected.items():
        assert heard[name] | own.get(name, set()) == kinds | own.get(name, set()), name


async def _all_heard(link: Link) -> set[str]:
    """What has arrived; messages come in order, so a moment of silence is the end."""
    names = {topic: kind for kind, topic in TOPICS.items()}
    heard = set()
    messages = link.messages
    while True:
        try:
            async with asyncio.timeout(1):
                message = await anext(messages)
        except TimeoutError:
            return heard
        message.acknowledge()
        heard.add(names[message.topic])


async def test_nobody_gets_in_without_a_certificate(issued: Path, port: int) -> None:
    async with linked(issued, port, "") as link:
        assert link.state is not LinkState.ONLINE


# ---------------------------------------------------------------------- configurations


def test_configurations_load(issued: Path, tmp_path: Path) -> None:
    """As they are, beside the files that `pyscan keys` makes."""
    for file in issued.iterdir():
        if file.is_file():
            target = tmp_path / file.name
            target.write_bytes(file.read_bytes())
            target.chmod(file.stat().st_mode & 0o777)
    (tmp_path / "debian.approved").write_bytes(b"not looked into by the loader")
    for name in (*PROGRAMS, "operator"):
        (tmp_path / f"{name}.toml").write_text((DEPLOY / f"config/{name}.toml").read_text())
    load_monitor(tmp_path / "monitor.toml")
    assert not load_control(tmp_path / "control.toml").policy.enforce
    load_agent(tmp_path / "agent.toml")
    load_operator(tmp_path / "operator.toml")
    for name in ("control", "agent"):
        assert main([name, "--config", str(tmp_path / f"{name}.toml"), "--check-config"]) == 0


# ------------------------------------------------------------------------------- units

#: All directives that a unit may have: systemd.unit(5), systemd.service(5), systemd.exec(5),
#: systemd.kill(5), systemd.resource-control(5).
DIRECTIVES = {
    "Unit": {"Description", "Documentation", "Wants", "After"},
    "Install": {"WantedBy"},
    "Service": {
        *("Type", "ExecStart", "ExecReload", "KillSignal", "TimeoutStopSec", "Restart"),
        *("RestartSec", "RestartPreventExitStatus", "StateDirectory", "StateDirectoryMode"),
        *("User", "Group", "SupplementaryGroups", "CapabilityBoundingSet"),
        *("AmbientCapabilities", "PrivateDevices", "RestrictAddressFamilies", "ProtectProc"),
        *("ProcSubset", "PrivateUsers", "ProtectControlGroups", "UMask", "NoNewPrivileges"),
        *("LockPersonality", "ProtectClock", "ProtectHostname", "ProtectKernelLogs"),
        *("ProtectKernelModules", "ProtectKernelTunables", "ProtectHome", "ProtectSystem"),
        *("PrivateTmp", "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID"),
        *("RemoveIPC", "SystemCallArchitectures", "SystemCallFilter", "SystemCallErrorNumber"),
        *("LimitCORE", "ReadWritePaths", "OOMScoreAdjust"),
    },
}
#: What all three have.
HARDENED = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "ProtectKernelModules": "yes",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "SystemCallArchitectures": "native",
    "SystemCallFilter": "@system-service",
    "UMask": "0077",
    "LimitCORE": "0",
}


def unit(program: str) -> configparser.ConfigParser:
    """A unit file; a directive that stands twice is an error."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / f"systemd/pyscan-{program}.service").read_text())
    return parser


@pytest.mark.parametrize("program", PROGRAMS)
def test_units_are_hardened_and_start_what_there_is(program: str) -> None:
    parsed = unit(program)
    assert set(parsed.sections()) == set(DIRECTIVES)
    for section, known in DIRECTIVES.items():
        assert set(parsed[section]) <= known
    service = parsed["Service"]
    assert {key: service.get(key) for key in HARDENED} == HARDENED
    command = shlex.split(service["ExecStart"])
    assert command[0] == "/opt/pyscan/bin/pyscan"
    options = _parser().parse_args(command[1:])
    assert str(options.config) == f"/etc/pyscan/{program}.toml"
    assert service["RestartPreventExitStatus"] == "2"
    if program == "agent":
        assert service["CapabilityBoundingSet"]
    else:
        assert service["User"] not in {"root", ""}
        assert service["CapabilityBoundingSet"] == ""


@pytest.mark.parametrize("program", PROGRAMS)
def test_units_may_write_where_the_configurations_say(program: str) -> None:
    allowed = [f"/var/lib/{name}" for name in unit(program)["Service"]["StateDirectory"].split()]
    written = re.findall(r'"(/var/lib/[^"]*)"', (DEPLOY / f"config/{program}.toml").read_text())
    assert written
    assert set(written) <= set(allowed)
