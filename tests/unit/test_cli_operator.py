"""The operator's commands as far as they need no broker: policies, incidents, refusals."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commands import Pyscan

from pyscan import protocol
from pyscan.config import load_control, load_policy
from pyscan.control.database import open_engine, sqlite_url
from pyscan.control.store import Store
from pyscan.errors import ConfigError
from pyscan.evidence import EvidenceLog, message_body
from pyscan.ids import new_id
from pyscan.keys import SigningKey
from pyscan.policy import Profile, Severity
from pyscan.records import (
    Action,
    Finding,
    FindingKind,
    Incident,
    IncidentState,
    PageStatus,
    Verdict,
    VerdictState,
)

MONITOR = SigningKey.generate()
POLICY = """
[policy]
enforce = true
sweeps = 2
protected = ["web-9"]

[[policy.rule]]
name = "bpf"
kinds = ["state"]
places = ["bpf*"]
answer = []

[[policy.rule]]
name = "code"
targets = ["web-*"]
tags = ["public"]
severity = "critical"
answer = ["capture", "freeze"]
climb_sweeps = 2
profile = "validate"

[[policy.rule]]
name = "lost"
state = "undecided"
answer = ["sandbox"]
sweeps = 5

[[policy.group]]
targets = ["web-*"]
tags = ["public"]
tenant = "acme"

[[policy.window]]
name = "night"
days = ["fri", "sat"]
begin = "23:00"
end = "01:30"
at_most = "capture"

[policy.limits]
actions_per_minute = 7
unapproved_percent_max = 12.5
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYSCAN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PYSCAN_TRACEBACK", raising=False)
    return tmp_path / "home"


@pytest.fixture
def pyscan(capsys: pytest.CaptureFixture[str]) -> Pyscan:
    return Pyscan(capsys)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """An operator's configuration; nobody listens at its broker's port."""
    SigningKey.generate().save(tmp_path / "ann.key")
    SigningKey.generate().public.save(tmp_path / "host-1.pub")
    path = tmp_path / "ann.toml"
    path.write_text(
        """
[identity]
name = "ann"
key = "ann.key"
[mqtt]
port = 1
[state]
directory = "control"
[trust]
agents.host-1 = "host-1.pub"
"""
    )
    return path


# --- policies -----------------------------------------------------------------------------


def test_a_policy_is_read_whole(policy: Path) -> None:
    read = load_policy(policy).policy()
    bpf, code, lost = read.rules
    assert (bpf.kinds, bpf.places, bpf.answer) == ({FindingKind.STATE}, ("bpf*",), ())
    assert (code.severity, code.profile) == (Severity.CRITICAL, Profile.VALIDATE)
    assert (code.targets, code.tags, code.climb_sweeps) == (("web-*",), {"public"}, 2)
    assert code.answer == (Action.CAPTURE, Action.FREEZE)
    assert (lost.state, lost.sweeps) == (VerdictState.UNDECIDED, 5)
    assert (read.tags("web-1"), read.tenant("web-1"), read.tenant("db-1")) == (
        {"public"},
        "acme",
        "",
    )
    [window] = read.windows
    assert (window.days, window.begin_minute, window.end_minute) == ({4, 5}, 1380, 90)
    assert (window.at_most, read.sweeps) == (Action.CAPTURE, 2)
    assert (read.limits.actions_per_minute, read.limits.unapproved_percent_max) == (7, 12.5)
    assert read.protected_vms == {"web-9"}


def test_a_policy_that_says_nothing_observes(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("[policy]\n")
    assert not load_policy(path).policy().enforce


@pytest.mark.parametrize(
    ("good", "bad", "where", "message"),
    [
        ('["capture", "freeze"]', '["freeze", "capture"]', "[[policy.rule]]", "climbs"),
        ('["sandbox"]', '["query"]', "[[policy.rule]]", "climbs"),
        ('["sandbox"]', '["explode"]', "answer", "explode"),
        ('"undecided"', '"approved"', "[[policy.rule]]", "needs no answer"),
        ('name = "lost"', 'name = "bpf"', "[policy]", "more than once"),
        ('"23:00"', '"24:00"', "begin", "regex"),
        ('["fri", "sat"]', '["fri", "someday"]', "days", "someday"),
        ('at_most = "capture"', 'at_most = "release"', "[[policy.window]]", "no answer"),
        ("12.5", "101", "unapproved_percent_max", "<= 100"),
        ("climb_sweeps = 2", "climb_sweeps = 0", "climb_sweeps", ">= 1"),
        ('["web-*"]', "[]", "targets", "length >= 1"),
        ("sweeps = 2\n", "sweep = 2\n", "sweep", "unknown field"),
    ],
)
def test_what_is_wrong_with_a_policy(
    policy: Path, good: str, bad: str, where: str, message: str
) -> None:
    assert good in POLICY
    policy.write_text(POLICY.replace(good, bad, 1))
    with pytest.raises(ConfigError, match=message) as caught:
        load_policy(policy)
    assert caught.value.line is not None
    assert policy.read_text().splitlines()[caught.value.line - 1].startswith(where)


def test_a_wrong_policy_is_one_line(pyscan: Pyscan, policy: Path) -> None:
    policy.write_text(POLICY.replace("sandbox", "explode"))
    done = pyscan("policy", "check", policy)
    assert done.status == 2
    assert f"{policy}:" in done.error


def test_a_policy_is_shown(pyscan: Pyscan, policy: Path) -> None:
    document = pyscan("policy", "check", policy, "--json").json()
    assert document["mode"] == "enforce"
    assert [rule["name"] for rule in document["rules"]] == ["bpf", "code", "lost"]
    assert document["rules"][1]["answer"] == "capture then freeze"
    plain = pyscan("policy", "check", policy)
    assert plain.facts["mode"] == "enforce"
    assert "validate" in plain.out
    assert pyscan("policy", "check", policy.with_name("none")).status == 2


def test_a_group_of_workers_needs_a_server(tmp_path: Path, config: Path) -> None:
    SigningKey.generate().public.save(tmp_path / "mon.pub")
    control = tmp_path / "control.toml"
    text = config.read_text().replace("[trust]", '[trust]\nmonitors.mon-1 = "mon.pub"')
    control.write_text(f'group = "control"\n{text}')
    with pytest.raises(ConfigError, match="share a store"):
        load_control(control)
    control.write_text(f'group = "control"\n{text}\n[store]\nurl = "postgresql://a@b/c"\n')
    assert load_control(control).group == "control"
    control.write_text(f'{text}\n[store]\nurl = "mysql://a@b/c"\n')
    with pytest.raises(ConfigError, match="begins with postgresql://"):
        load_control(control)


# --- simulation ---------------------------------------------------------------------------


def verdict(second: int, kind: FindingKind = FindingKind.CODE, target: str = "web-1") -> Verdict:
    sweep = new_id()
    finding = Finding(new_id(), sweep, kind, PageStatus.OK, place="bpf_prog")
    return Verdict(
        id=new_id(),
        sweep=sweep,
        monitor="mon-1",
        target=target,
        host="host-1",
        vm=target,
        state=VerdictState.UNAPPROVED,
        reason="1 page is not as approved",
        decided_ns=time.time_ns() - (100 - second) * 10**9,
        watched=10,
        ok=9,
        unreadable=0,
        findings=(finding,),
        findings_total=1,
    )


VERDICTS = [verdict(1), verdict(3), verdict(2), verdict(4, FindingKind.STATE)]


def event(content: Verdict, **changes: Any) -> bytes:
    return msgspec.json.encode(
        {"event": "verdict", "verified": True, "message": content, "at": "", **changes}
    )


def test_recorded_lines_are_replayed(pyscan: Pyscan, policy: Path, tmp_path: Path) -> None:
    forged = event(verdict(5), verified=False)
    other = json.dumps({"event": "state", "message": {"vm": "x"}, "verified": False}).encode()
    lines = [*map(event, VERDICTS), event(VERDICTS[0]), forged, other]
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    document = pyscan("policy", "simulate", policy, path, "--json").json()
    assert (document["verdicts"], document["incidents"]) == (4, 1)
    assert document["actions"] == {"freeze": 1}
    assert [step["action"] for step in document["steps"]] == [None, "freeze", None, None]
    assert document["steps"][0]["verdict"] == VERDICTS[0].id
    assert document["steps"][1]["validated"] == "rule code would capture"
    policy.write_text(POLICY.replace("enforce = true", ""))
    assert pyscan("policy", "simulate", policy, path, "--json").json()["actions"] == {}
    enforced = pyscan("policy", "simulate", policy, path, "--json", "--enforce").json()
    assert enforced["actions"] == {"freeze": 1}
    plain = pyscan("policy", "simulate", policy, path)
    assert "observing only; enforcing would freeze VM web-1" in plain.out


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    """What a monitor recorded, and a control that heard it."""
    for name, key in (("mon-1", MONITOR), ("ctl-1", SigningKey.generate())):
        with EvidenceLog.open(tmp_path / "evidence" / name, key, name) as log:
            for each in VERDICTS:
                topic = protocol.verdict_topic("mon-1", each.target)
                envelope = protocol.encode_verdict(each, MONITOR)
                log.append("verdict", message_body(each.id, topic, envelope))
    return tmp_path / "evidence"


def test_evidence_is_replayed(pyscan: Pyscan, policy: Path, evidence: Path, tmp_path: Path) -> None:
    for arguments in ((evidence,), (evidence / "mon-1",)):
        document = pyscan("policy", "simulate", policy, *arguments, "--json").json()
        assert (document["verdicts"], document["actions"]) == (4, {"freeze": 1})
    # A control's log alone has no monitor's key.
    done = pyscan("policy", "simulate", policy, evidence / "ctl-1", "--json")
    assert done.json()["verdicts"] == 0
    assert "4 verdicts left out" in done.err
    MONITOR.public.save(tmp_path / "mon-1.pub")
    trust = ("--trust", tmp_path / "mon-1.pub")
    done = pyscan("policy", "simulate", policy, evidence / "ctl-1", "--json", *trust)
    assert done.json()["verdicts"] == 4


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b'{"event": 3}', b"\xff\xfe", b'{"event": "verdict", "verified": true}',
     b"[" * 100_000, b" " * 300_000],
    ids=["cut", "list", "number", "bytes", "no verdict", "deep", "long"],
)  # fmt: skip
def test_lines_that_are_none(pyscan: Pyscan, policy: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(event(VERDICTS[0]) + b"\n" + content + b"\n")
    done = pyscan("policy", "simulate", policy, path)
    assert done.status == 2
    assert f"{path}:2:" in done.error


def test_nothing_to_replay(pyscan: Pyscan, policy: Path, tmp_path: Path) -> None:
    assert "no evidence" in pyscan("policy", "simulate", policy, tmp_path).error
    assert "cannot be read" in pyscan("policy", "simulate", policy, tmp_path / "none").error


# --- machines and incidents ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("freeze", "web-1"), "not HOST/VM"),
        (("freeze", "host-1/web+"), "not HOST/VM"),
        (("freeze", "host-1/web-1/x"), "not HOST/VM"),
        (("release", "host-1/web-1", "--disk", "burn"), "invalid choice"),
        (("freeze", "host-1/web-1", "--valid", "0"), "1 to 600"),
        (("freeze", "host-1/web-1", "--valid", "601"), "1 to 600"),
        (("approve", "host-1/web-1", "kill", "x", "y"), "as the other person"),
    ],
)
def test_orders_that_are_refused(
    pyscan: Pyscan, config: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = pyscan("vm", *arguments, "--config", config)
    assert done.status == 2
    assert message in done.err


def test_no_configuration(pyscan: Pyscan, home: Path) -> None:
    for command in (("vm", "list"), ("incidents",), ("events",)):
        done = pyscan(*command)
        assert done.status == 2
        assert str(home / "operator.toml") in done.error


def test_a_broker_that_is_not_there(
    pyscan: Pyscan, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyscan.cli.operator.CONNECT_TIMEOUT_S", 0.5)
    done = pyscan("vm", "freeze", "host-1/web-1", "--config", config, "--json")
    assert done.status == 4
    assert "is the broker running" in done.error


@pytest.fixture
def incident(tmp_path: Path) -> Iterator[Incident]:
    """An incident in the store of a control that is not running; its target is no machine."""
    (tmp_path / "control").mkdir()
    store = Store(open_engine(sqlite_url(tmp_path / "control" / "state.sqlite")))
    state = IncidentState.OPEN
    incident = Incident(new_id(), new_id(), "bare-1", "", "", state, time.time_ns())
    with store.transaction() as books:
        books.put_incident(incident, "1 page is not as approved")
    yield incident
    store.close()


def test_an_incident_that_is_no_machine(pyscan: Pyscan, config: Path, incident: Incident) -> None:
    at = ("--config", config)
    assert "bare-1  1 page is not as approved" in pyscan("incidents", *at).out
    assert pyscan("incidents", *at, "show", incident.id).facts["target"] == "bare-1"
    done = pyscan("incidents", "release", incident.id, *at)
    assert done.status == 2
    assert "--by-hand" in done.error
    done = pyscan("incidents", "release", incident.id, "--by-hand", "replaced", "--json", *at)
    assert done.json()["state"] == "released"
    assert pyscan("incidents", *at).out == "no incidents\n"
    listed = pyscan("incidents", "--all", "--json", *at).json()["incidents"]
    assert [each["id"] for each in listed] == [incident.id]
    assert pyscan("incidents", "resume", "--because", "x", *at).out.strip().endswith("not open")


def test_an_unknown_incident(pyscan: Pyscan, config: Path, incident: Incident) -> None:
    del incident
    for command in (("show", "x"), ("release", new_id())):
        assert "no incident" in pyscan("incidents", *command, "--config", config).error


def test_no_store(pyscan: Pyscan, config: Path) -> None:
    assert "no such file" in pyscan("incidents", "--config", config).error
