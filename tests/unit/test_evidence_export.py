"""Evidence for people and other systems: the order of time, CloudEvents, OCSF, the commands."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cbor2
import pytest
from commands import Pyscan

from pyscan import protocol
from pyscan.cose import media_type, sign1
from pyscan.errors import EvidenceError
from pyscan.evidence import CaptureWriter, EvidenceLog, message_body
from pyscan.evidence.cloudevents import cloudevents
from pyscan.evidence.events import Event, moment, plain, read_events
from pyscan.evidence.ocsf import detection_findings
from pyscan.evidence.timeline import describe
from pyscan.ids import new_id
from pyscan.keys import KeyRing, SigningKey
from pyscan.records import (
    Action,
    Approval,
    Cause,
    Command,
    Finding,
    FindingKind,
    PageStatus,
    Report,
    ReportState,
    Verdict,
    VerdictState,
)

KEYS = {name: SigningKey.generate() for name in ("rack-1", "control", "host-7")}
OPERATOR = SigningKey.generate()
RING = KeyRing.of({name: key.public for name, key in {**KEYS, "olga": OPERATOR}.items()})
START_NS = 1_800_000_000_000_000_000
FINDING = Finding(
    id=new_id(),
    sweep=new_id(),
    kind=FindingKind.CODE,
    status=PageStatus.OK,
    address=0xFFFF_FFFF_8100_0010,
    frame=0x1000,
    place="kernel text +0x10",
    expected="90",
    actual="cc",
)
VERDICT = Verdict(
    id=new_id(),
    sweep=FINDING.sweep,
    monitor="rack-1",
    target="web-1",
    host="host-7",
    vm="vm-1",
    state=VerdictState.UNAPPROVED,
    reason="1 page is not as approved",
    decided_ns=START_NS,
    watched=100,
    ok=99,
    unreadable=0,
    findings=(FINDING,),
    findings_total=1,
)
APPROVED = replace(
    VERDICT,
    id=new_id(),
    state=VerdictState.APPROVED,
    reason="all pages are as approved",
    decided_ns=START_NS + 60_000_000_000,
    ok=100,
    findings=(),
    findings_total=0,
)
COMMAND = Command(
    id=new_id(),
    issuer="control",
    audience="host-7",
    sequence=1,
    issued_s=START_NS // 1_000_000_000 + 1,
    expires_s=START_NS // 1_000_000_000 + 60,
    action=Action.FREEZE,
    vm="vm-1",
    arguments={"ttl_s": 600},
    cause=Cause(incident=new_id(), finding=FINDING.id, verdict=VERDICT.id),
)
REPORT = Report(
    id=new_id(),
    command=COMMAND.id,
    host="host-7",
    vm="vm-1",
    action=Action.FREEZE,
    state=ReportState.SUCCEEDED,
    at_ns=START_NS + 2_000_000_000,
    detail="paused, links down: nic0",
    vm_state="paused",
)
APPROVAL = Approval(
    id=new_id(),
    command=COMMAND.id,
    digest="0" * 64,
    issuer="olga",
    audience="host-7",
    vm="vm-1",
    action=Action.FREEZE,
    issued_s=COMMAND.issued_s,
    expires_s=COMMAND.expires_s,
)


def quote(record: Verdict | Command | Approval | Report) -> tuple[str, dict[str, object]]:
    """The record of a signed message, as the programs write it."""
    match record:
        case Verdict():
            topic = protocol.verdict_topic(record.monitor, record.target)
            envelope = protocol.encode_verdict(record, KEYS[record.monitor])
            return "verdict", message_body(record.id, topic, envelope)
        case Command():
            topic = protocol.command_topic(record.audience, record.vm)
            envelope = protocol.encode_command(record, KEYS[record.issuer])
            return "command", message_body(record.id, topic, envelope)
        case Approval():
            topic = protocol.approval_topic(record.audience, record.vm)
            envelope = protocol.encode_approval(record, OPERATOR)
            return "approval", message_body(record.id, topic, envelope)
        case Report():
            topic = protocol.report_topic(record.host, record.command)
            envelope = protocol.encode_report(record, KEYS[record.host])
            return "report", message_body(record.id, topic, envelope)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The evidence of three programs about one incident, written as it happened."""
    directory = tmp_path / "site"
    logs = {name: EvidenceLog.open(directory / name, key, name) for name, key in KEYS.items()}
    page = logs["rack-1"].attach(bytes(4096))
    body = {"kind": "code", "place": FINDING.place, "address": FINDING.address, "page": page}
    logs["rack-1"].append("finding", body | {"expected": "90", "actual": "cc"})
    for record, *names in (
        (VERDICT, "rack-1", "control"),
        (COMMAND, "control", "host-7"),
        (APPROVAL, "host-7"),
        (REPORT, "host-7", "control"),
        (APPROVED, "rack-1", "control"),
    ):
        kind, quoted = quote(record)
        for name in names:
            logs[name].append(kind, quoted)
    rejected = {"topic": "pyscan/v1/\x1b[2J", "reason": "bad_signature", "envelope": b"\xff"}
    logs["host-7"].append("rejected", rejected)
    writer = CaptureWriter(directory / "captures" / COMMAND.id, {"vm": "vm-1"})
    writer.add_bytes("memory.elf", b"memory")
    writer.add_message("command", quote(COMMAND)[1])
    writer.finish(KEYS["host-7"], "host-7", logs["host-7"])
    for log in logs.values():
        log.close()
    return directory


# ------------------------------------------------------------------------------ order of time


def test_events_come_in_the_order_of_time(site: Path) -> None:
    events = list(read_events(site, RING))
    assert [event.time_ns for event in events] == sorted(event.time_ns for event in events)
    told = [
        (event.writer, event.kind) for event in events if event.kind not in ("opened", "closed")
    ]
    assert told == [
        ("rack-1", "finding"),
        ("rack-1", "verdict"),
        ("control", "verdict"),
        ("control", "command"),
        ("host-7", "command"),
        ("host-7", "approval"),
        ("host-7", "report"),
        ("control", "report"),
        ("rack-1", "verdict"),
        ("control", "verdict"),
        ("host-7", "rejected"),
        ("host-7", "capture"),
    ]
    assert all(event.verified for event in events)
    # Without pinned keys those beside the logs are taken; olga keeps no log.
    alone = list(read_events(site))
    assert [event.kind for event in alone if not event.verified] == ["approval"]
    assert len(alone) == len(events)


def test_a_log_that_is_still_written_is_shown_but_does_not_verify(tmp_path: Path) -> None:
    log = EvidenceLog.open(tmp_path, KEYS["control"], "control")
    log.append("note", {"text": "one"})
    assert [event.kind for event in read_events(tmp_path)] == ["opened", "note"]
    log.append("note", {"text": "two"})
    assert [event.kind for event in read_events(tmp_path)] == ["opened", "note", "note"]
    log.close()


def test_a_capture_alone_tells_its_story(site: Path) -> None:
    events = list(read_events(site / "captures", RING))
    assert [(event.kind, event.number) for event in events] == [
        ("command", None),
        ("capture", None),
    ]
    assert events[0].body["act"] == "freeze"
    assert len(list(cloudevents(events))) == 2
    (event, _) = read_events(site / "captures")
    assert not event.verified


def test_nothing_is_given_before_everything_was_checked(site: Path) -> None:
    log = site / "rack-1" / "log.cborseq"
    data = bytearray(log.read_bytes())
    data[-1] ^= 1
    log.write_bytes(data)
    events = read_events(site, RING)
    with pytest.raises(EvidenceError, match="rack-1"):
        next(events)
    with pytest.raises(EvidenceError, match="not pinned"):
        next(read_events(site / "control", KeyRing.of({"x": KEYS["rack-1"].public})))
    with pytest.raises(EvidenceError, match="cannot be read"):
        next(read_events(site / "missing"))


def test_values_are_fit_for_json() -> None:
    value = {
        "frame": 16,
        "address": [1 << 63],
        "n": 1 << 53,
        "m": -(1 << 60),
        "b": b"\x01",
        "t": True,
    }
    assert plain(value) == {
        "frame": "0x10",
        "address": ["0x8000000000000000"],
        "n": "0x20000000000000",
        "m": "-0x1000000000000000",
        "b": "01",
        "t": True,
    }


def test_times_that_no_calendar_has() -> None:
    assert moment(START_NS + 1_234_567) == datetime.fromisoformat("2027-01-15T08:00:00.001234Z")
    for time_ns in (1 << 64, -(1 << 63), 1 << 63):
        event = Event(time_ns, "control", 0, "note", {})
        (document,) = cloudevents([event])
        assert "time" not in document or check_cloudevent(document)
    assert moment(1 << 90) is None


# -------------------------------------------------------------------------------- CloudEvents

#: cloudevents.io, spec 1.0.2: required attributes, and the names an attribute may have.
CLOUDEVENT_REQUIRED = ("specversion", "id", "type", "source")
CLOUDEVENT_NAME = re.compile(r"[a-z0-9]{1,20}")
CLOUDEVENT_CONTEXT = {"datacontenttype", "dataschema", "subject", "time"}


def check_cloudevent(document: Mapping[str, Any]) -> bool:
    """Against the JSON event format 1.0.2: what has to be there and of which type."""
    for name in CLOUDEVENT_REQUIRED:
        assert isinstance(document[name], str), name
        assert document[name], name
    assert document["specversion"] == "1.0"
    assert urlsplit(document["source"]).path == document["source"]
    assert not re.search(r"[^A-Za-z0-9._~/-]", document["source"])
    if "time" in document:
        assert datetime.fromisoformat(document["time"]).tzinfo is not None
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", document["time"])
    assert document["datacontenttype"] == "application/json"
    assert ("data" in document) != ("data_base64" in document)
    for name, value in document.items():
        if name in {*CLOUDEVENT_REQUIRED, "data"}:
            continue
        assert CLOUDEVENT_NAME.fullmatch(name), name
        assert name in CLOUDEVENT_CONTEXT or name in {"writer", "signer"}, name
        assert isinstance(value, str), name
        assert value, name
    assert json.loads(json.dumps(document)) == document
    return True


def test_cloudevents(site: Path) -> None:
    documents = list(cloudevents(read_events(site, RING)))
    assert all(map(check_cloudevent, documents))
    names = [(document["source"], document["id"]) for document in documents]
    assert len(names) == len(set(names))
    by_type: dict[str, list[Mapping[str, Any]]] = {}
    for document in documents:
        by_type.setdefault(str(document["type"]), []).append(document)
    assert {name: len(found) for name, found in by_type.items()} == {
        "pyscan.v1.opened": 3,
        "pyscan.v1.finding": 1,
        "pyscan.v1.verdict": 2,
        "pyscan.v1.command": 1,
        "pyscan.v1.approval": 1,
        "pyscan.v1.report": 1,
        "pyscan.v1.rejected": 1,
        "pyscan.v1.capture": 1,
        "pyscan.v1.closed": 3,
    }
    verdict = by_type["pyscan.v1.verdict"][0]
    assert verdict["id"] == VERDICT.id
    assert verdict["source"] == "pyscan/v1/monitors/rack-1/verdict/web-1"
    assert (verdict["subject"], verdict["signer"]) == ("web-1", "rack-1")
    assert verdict["time"] == "2027-01-15T08:00:00.000000Z"
    assert verdict["data"]["findings"][0]["frame"] == "0x1000"
    assert by_type["pyscan.v1.command"][0]["data"]["args"] == {"ttl_s": 600}
    assert documents == list(cloudevents(read_events(site, RING)))  # the same names again


# --------------------------------------------------------------------------------------- OCSF

#: schema.ocsf.io/1.5.0: required attributes of the class and of the objects in it, and the
#: constraints "at least one of" of objects that have any.
OCSF_REQUIRED = {
    "detection_finding": {
        "activity_id": int,
        "category_uid": int,
        "class_uid": int,
        "finding_info": dict,
        "metadata": dict,
        "severity_id": int,
        "time": int,
        "type_uid": int,
    },
    "metadata": {"product": dict, "version": str},
    "finding_info": {"uid": str},
}
#: Attributes of 1.5.0 that are used here, so that a misspelt one does not go unseen.
OCSF_OPTIONAL = {
    "detection_finding": {
        *("activity_name", "category_name", "class_name", "type_name", "severity", "status"),
        *("status_id", "is_alert", "message", "resources", "evidences", "unmapped"),
    },
    "metadata": {
        *("uid", "correlation_uid", "log_name", "log_provider", "logged_time"),
    },
    "finding_info": {"title", "desc", "types", "created_time", "modified_time"},
    "product": {"name", "vendor_name", "version"},
    "resource_details": {"uid", "name", "type", "labels"},
    "evidences": {"uid", "name", "data"},
}
OCSF_ONE_OF = {
    "product": {"name", "uid"},
    "resource_details": {"name", "uid"},
    "evidences": {"data", "device", "file", "process", "user"},
}


def check_object(kind: str, document: Mapping[str, Any]) -> None:
    required = OCSF_REQUIRED.get(kind, {})
    for name, expected in required.items():
        assert type(document[name]) is expected, (kind, name)
    assert set(document) <= set(required) | OCSF_OPTIONAL.get(kind, set()), kind
    if kind in OCSF_ONE_OF:
        assert set(document) & OCSF_ONE_OF[kind], kind


def check_detection_finding(document: Mapping[str, Any]) -> None:
    check_object("detection_finding", document)
    check_object("metadata", document["metadata"])
    check_object("product", document["metadata"]["product"])
    check_object("finding_info", document["finding_info"])
    for resource in document["resources"]:
        check_object("resource_details", resource)
    for evidence in document.get("evidences", []):
        check_object("evidences", evidence)
    assert (document["category_uid"], document["class_uid"]) == (2, 2004)
    assert document["activity_id"] in (1, 2, 3)
    assert document["type_uid"] == 200400 + document["activity_id"]
    assert document["severity_id"] in (0, 1, 2, 3, 4, 5, 6, 99)
    assert document["status_id"] in (0, 1, 2, 3, 4, 5, 6, 99)
    assert document["metadata"]["version"] == "1.5.0"
    # Milliseconds since 1970: a year of four digits, 20 something.
    assert 946_684_800_000 < document["time"] < 4_102_444_800_000
    assert json.loads(json.dumps(document)) == document


def test_an_incident_is_one_finding_with_a_life(site: Path) -> None:
    documents: list[Any] = list(detection_findings(read_events(site, RING)))
    for document in documents:
        check_detection_finding(document)
    assert [(each["activity_name"], each["status"], each["message"]) for each in documents] == [
        ("Create", "New", "1 page is not as approved"),
        ("Update", "In Progress", "freeze ordered by control"),
        ("Update", "In Progress", "freeze approved by olga"),
        ("Update", "In Progress", "freeze succeeded: paused, links down: nic0"),
        ("Close", "Resolved", "all pages are as approved"),
    ]
    assert {each["finding_info"]["uid"] for each in documents} == {VERDICT.id}
    assert [each["metadata"]["uid"] for each in documents] == [
        VERDICT.id,
        COMMAND.id,
        APPROVAL.id,
        REPORT.id,
        APPROVED.id,
    ]
    first = documents[0]
    assert (first["severity"], first["is_alert"], first["time"]) == (
        "Critical",
        True,
        START_NS // 1_000_000,
    )
    assert first["finding_info"]["types"] == ["code"]
    assert first["resources"] == [
        {"name": "web-1", "uid": "vm-1", "type": "virtual machine", "labels": ["host:host-7"]}
    ]
    (evidence,) = first["evidences"]
    assert evidence["data"]["address"] == "0xffffffff81000010"
    assert not any(each["is_alert"] for each in documents[1:])


def _events(*verdicts: Verdict) -> Iterator[Event]:
    """As a verified log of a monitor gives them."""
    for number, verdict in enumerate(verdicts):
        payload = cbor2.loads(cbor2.loads(quote(verdict)[1]["envelope"]).value[2])
        (event,) = _quoted_event("verdict", payload, verdict.id, number)
        yield event


def _quoted_event(kind: str, payload: object, identity: str, number: int) -> Iterator[Event]:
    from pyscan.evidence.quotes import Quoted

    message = Quoted(kind, identity, "topic", b"", "rack-1", b"key", payload)  # type: ignore[arg-type]
    yield Event(START_NS, "rack-1", number, kind, payload, message)  # type: ignore[arg-type]


def test_findings_open_grow_and_close(tmp_path: Path) -> None:
    undecided = replace(
        VERDICT, id=new_id(), state=VerdictState.UNDECIDED, ok=0, unreadable=100, findings=()
    )
    undecided = replace(undecided, findings_total=0)
    worse = replace(VERDICT, id=new_id())
    other = replace(VERDICT, id=new_id(), target="web-2", vm="", host="")
    again = replace(VERDICT, id=new_id())
    documents: list[Any] = list(
        detection_findings(
            _events(APPROVED, undecided, worse, other, replace(APPROVED, id=new_id()), again)
        )
    )
    for document in documents:
        check_detection_finding(document)
    assert [
        (each["activity_id"], each["severity_id"], each["finding_info"]["uid"])
        for each in documents
    ] == [
        (1, 3, undecided.id),
        (2, 5, undecided.id),
        (1, 5, other.id),
        (3, 5, undecided.id),
        (1, 5, again.id),
    ]
    assert documents[2]["resources"] == [{"name": "web-2", "uid": "web-2"}]


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"id": 1, "target": [], "state": {}, "findings": 3, "reason": None, "at": "x"},
        {"target": "t", "state": "unapproved", "findings": [1, {"id": b"", "kind": 7}], "at": -1},
        {"why": 1, "cmd": [], "act": b"\xff"},
        {"state": "approved", "target": "t", "at": 1 << 200},
    ],
)
@pytest.mark.parametrize("kind", ["verdict", "command", "approval", "report"])
def test_a_signer_can_send_nonsense(payload: dict[str, object], kind: str) -> None:
    events = list(_quoted_event(kind, payload, new_id(), 0))
    for document in (*detection_findings(events), *cloudevents(events)):
        json.dumps(document)
    for event in events:
        assert isinstance(describe(event), str)


def test_messages_of_unknown_signers_are_not_exported(site: Path) -> None:
    events = list(read_events(site / "control"))
    assert [event.kind for event in events if not event.verified] == [
        "verdict",
        "report",
        "verdict",
    ]
    assert list(detection_findings(events)) == []
    kinds = [document["type"] for document in cloudevents(events)]
    assert kinds == ["pyscan.v1.opened", "pyscan.v1.command", "pyscan.v1.closed"]


def test_a_verified_message_that_repeats_counts_once(site: Path) -> None:
    events = list(read_events(site, RING))
    assert len(list(detection_findings([*events, *events]))) == 5


# ------------------------------------------------------------------------------------ commands


@pytest.fixture
def pyscan(capsys: pytest.CaptureFixture[str]) -> Pyscan:
    return Pyscan(capsys)


@pytest.fixture
def trust(tmp_path: Path) -> list[object]:
    arguments: list[object] = []
    for name, key in {**KEYS, "olga": OPERATOR}.items():
        key.public.save(tmp_path / f"{name}.pub")
        arguments += ["--trust", tmp_path / f"{name}.pub"]
    return arguments


def test_show(site: Path, pyscan: Pyscan, trust: list[object]) -> None:
    output = pyscan("evidence", "show", site, *trust)
    assert (output.status, output.err) == (0, "")
    lines = output.out.splitlines()
    assert all(
        re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  \S+ +\S+ +\S", line) for line in lines
    )
    text = output.out
    assert "web-1 unapproved, 99 of 100 pages ok: 1 page is not as approved" in text
    assert "code kernel text +0x10 at 0xffffffff81000010: cc instead of 90" in text
    assert "freeze vm-1 on host-7, ordered by control ttl_s=600" in text
    assert f"freeze vm-1 on host-7, approved by olga, command {COMMAND.id}" in text
    assert "freeze vm-1 succeeded: paused, links down: nic0; machine paused" in text
    assert f"{COMMAND.id}: 3 files" in text
    assert "\x1b" not in text
    assert "bad_signature, on pyscan/v1/?[2J" in text
    alone = pyscan("evidence", "show", site / "control").out
    assert alone.count("not verified, its signer's key is not at hand") == 3


def test_export(site: Path, pyscan: Pyscan, trust: list[object]) -> None:
    output = pyscan("evidence", "export", site, "--format", "ocsf", *trust)
    assert (output.status, output.err) == (0, "")
    documents = [json.loads(line) for line in output.out.splitlines()]
    assert [document["activity_id"] for document in documents] == [1, 2, 2, 2, 3]
    for document in documents:
        check_detection_finding(document)
    output = pyscan("evidence", "export", site, "--format", "cloudevents")
    assert output.status == 0
    assert "messages left out: 1," in output.err
    assert all(check_cloudevent(json.loads(line)) for line in output.out.splitlines())
    output = pyscan("evidence", "export", site / "control", "--format", "ocsf")
    assert (output.status, output.out) == (0, "")
    assert "messages left out: 3," in output.err
    assert pyscan("evidence", "export", site, "--format", "syslog").status == 2


def test_verify_names_captures(site: Path, pyscan: Pyscan, trust: list[object]) -> None:
    output = pyscan("evidence", "verify", site, *trust)
    assert output.status == 0
    assert f"captures/{COMMAND.id}" in output.out
    document = pyscan("evidence", "verify", site, *trust, "--json").json()
    assert [capture["files"] for capture in document["captures"]] == [3]
    memory = site / "captures" / COMMAND.id / "memory.elf"
    memory.chmod(0o600)
    os.truncate(memory, 3)
    broken = pyscan("evidence", "verify", site, *trust)
    assert (broken.status, broken.out) == (2, "")
    assert "memory.elf: cut off: it has 3 bytes, the manifest says 6" in broken.err
    alone = pyscan("evidence", "verify", site / "control", *trust)
    assert "captures" not in alone.facts


def test_what_is_broken_is_neither_shown_nor_exported(site: Path, pyscan: Pyscan) -> None:
    log = site / "host-7" / "log.cborseq"
    log.write_bytes(log.read_bytes()[:-200] + bytes(200))
    for command in (
        ("show",),
        ("export", "--format", "ocsf"),
        ("export", "--format", "cloudevents"),
    ):
        name, *options = command
        output = pyscan("evidence", name, site, *options)
        assert (output.status, output.out) == (2, "")
        assert "host-7" in output.err


def test_a_signed_message_of_another_form(tmp_path: Path) -> None:
    """Only the id is wanted of a payload here; what else is in it is its reader's business."""
    topic = protocol.verdict_topic("rack-1", "web-1")
    envelope = sign1(
        cbor2.dumps({"id": VERDICT.id}), KEYS["rack-1"], media_type("verdict"), topic.encode()
    )
    with EvidenceLog.open(tmp_path, KEYS["rack-1"], "rack-1") as log:
        log.append("verdict", message_body(VERDICT.id, topic, envelope))
    events = list(read_events(tmp_path))
    assert [event.body for event in events if event.kind == "verdict"] == [{"id": VERDICT.id}]
    assert len(list(cloudevents(events))) == 3
