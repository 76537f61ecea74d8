"""Commands, reports and verdicts: what is accepted, and one test per way to be refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyscan import protocol
from pyscan.cose import decode_cbor, encode_cbor, sign1, verify1
from pyscan.errors import InternalError, Rejected
from pyscan.keys import KeyRing, SigningKey
from pyscan.protocol import RejectReason, Topic, TopicKind
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

NOW_S = 1_800_000_000
NOW_NS = NOW_S * 1_000_000_000
IDS = [f"01ARZ3NDEKTSV4RRFFQ69G5FA{last}" for last in "0123456789"]
KEY, OTHER_KEY, STRANGER = (SigningKey.generate() for _ in range(3))
RING = KeyRing.of({"alpha": KEY.public, "beta": OTHER_KEY.public}, "test")

COMMAND = Command(
    id=IDS[0],
    issuer="alpha",
    audience="host-7",
    sequence=412,
    issued_s=NOW_S,
    expires_s=NOW_S + 30,
    action=Action.FREEZE,
    vm="6f1c4a5e-2f0b-4f37-9f1b-2a2f4a1b7c11",
    arguments={"dry_run": True, "reason": "drill", "limit": -3},
    cause=Cause(IDS[1], IDS[2], IDS[3]),
)
REPORT = Report(
    id=IDS[4],
    command=IDS[0],
    host="alpha",
    vm="vm-1",
    action=Action.KILL,
    state=ReportState.FAILED,
    at_ns=NOW_NS,
    reason="timeout",
    detail="no answer within 5 s",
    vm_state="unknown",
)
FINDING = Finding(
    id=IDS[5],
    sweep=IDS[6],
    kind=FindingKind.DIGEST,
    status=PageStatus.OK,
    address=0xFFFF_FFFF_8100_0000,
    frame=0x1234,
    place="kernel text +0x5000",
    expected="ab" * 32,
    actual="cd" * 32,
)
VERDICT = Verdict(
    id=IDS[7],
    sweep=IDS[6],
    monitor="alpha",
    target="web-1",
    host="host-7",
    vm="vm-1",
    state=VerdictState.UNAPPROVED,
    reason="1 of 9 pages is not as approved",
    decided_ns=NOW_NS,
    watched=9,
    ok=7,
    unreadable=1,
    findings=(FINDING, replace(FINDING, kind=FindingKind.UNREADABLE, address=None, frame=None)),
    findings_total=2,
)


class Memory:
    """A replay guard that knows what it is told."""

    def __init__(self, *ids: str, highest: int = -1) -> None:
        self.ids = set(ids)
        self.highest = highest

    def seen(self, command_id: str) -> bool:
        return command_id in self.ids

    def highest_sequence(self, issuer: str, vm: str) -> int:
        return self.highest


def _command(data: bytes, **changes: Any) -> Command:
    arguments = {
        "topic": protocol.command_topic(COMMAND.audience, COMMAND.vm),
        "audience": COMMAND.audience,
        "now_s": NOW_S + 1,
        "replay": Memory(),
    } | changes
    return protocol.decode_command(data, RING, **arguments)


def _report(data: bytes, topic: str = "") -> Report:
    topic = topic or protocol.report_topic(REPORT.host, REPORT.command)
    return protocol.decode_report(data, RING, topic=topic)


def _verdict(data: bytes, topic: str = "", now_ns: int = NOW_NS) -> Verdict:
    topic = topic or protocol.verdict_topic(VERDICT.monitor, VERDICT.target)
    return protocol.decode_verdict(data, RING, topic=topic, now_ns=now_ns)


def _refused(call: Callable[[], object]) -> Rejected:
    with pytest.raises(Rejected) as refused:
        call()
    assert isinstance(refused.value.reason, RejectReason)
    assert "\n" not in str(refused.value)
    return refused.value


# -------------------------------------------------------------------------------- accepted


def test_what_is_sent_arrives() -> None:
    assert _command(protocol.encode_command(COMMAND, KEY)) == COMMAND
    assert _report(protocol.encode_report(REPORT, KEY)) == REPORT
    assert _verdict(protocol.encode_verdict(VERDICT, KEY)) == VERDICT


def test_the_sizes_that_the_specification_names() -> None:
    assert len(protocol.encode_command(COMMAND, KEY)) < 500
    assert len(protocol.encode_report(REPORT, KEY)) < 500


def test_the_fullest_messages_fit() -> None:
    wide = "\U0001f512"  # four bytes in UTF-8
    finding = replace(FINDING, place=wide * 500, expected=wide * 500, actual=wide * 500)
    verdict = replace(VERDICT, reason=wide * 5000, findings=(finding,) * 100, findings_total=2**53)
    arrived = _verdict(protocol.encode_verdict(verdict, KEY))
    assert len(arrived.findings) == protocol.FINDINGS_MAX
    assert arrived.findings_total == 2**53
    assert arrived.reason == wide * protocol.LINE_CHARACTERS_MAX
    report = replace(REPORT, detail=wide * 5000, reason="r" * 64, vm_state="s" * 64)
    assert _report(protocol.encode_report(report, KEY)).reason == report.reason
    arguments: dict[str, str | int | bool] = {f"{n:064}": wide * 256 for n in range(8)}
    command = replace(COMMAND, arguments=arguments)
    assert _command(protocol.encode_command(command, KEY)) == command


def test_a_findings_count_never_falls_below_the_findings() -> None:
    verdict = replace(VERDICT, findings=(FINDING,) * 40, findings_total=0)
    assert _verdict(protocol.encode_verdict(verdict, KEY)).findings_total == 40


def test_free_text_is_made_showable() -> None:
    hostile = "a\x1b[2Jb\nc\u202ed\udcffe\u2028f"
    report = replace(REPORT, detail=hostile)
    assert _report(protocol.encode_report(report, KEY)).detail == "a?[2Jb?c?d?e?f"
    assert protocol.one_line("abc", 2) == "ab"


def test_an_approved_verdict_arrives() -> None:
    verdict = replace(
        VERDICT, state=VerdictState.APPROVED, ok=9, unreadable=0, findings=(), findings_total=0
    )
    assert _verdict(protocol.encode_verdict(verdict, KEY)) == verdict


@pytest.mark.parametrize(
    "change",
    [
        {"ok": 8},
        {"ok": 0, "watched": 0},
        {"unreadable": 1},
        {"findings_total": 1},
        {"findings": (FINDING,)},
    ],
)
def test_an_approved_verdict_must_add_up(change: dict[str, Any]) -> None:
    approved = replace(
        VERDICT, state=VerdictState.APPROVED, ok=9, unreadable=0, findings=(), findings_total=0
    )
    data = protocol.encode_verdict(replace(approved, **change), KEY)
    assert _refused(lambda: _verdict(data)).reason == RejectReason.MALFORMED


# ------------------------------------------------------------------- refused commands, in order


@pytest.mark.parametrize(
    ("change", "decode", "reason"),
    [
        ({"issuer": "beta"}, {}, RejectReason.WRONG_ISSUER),
        ({}, {"audience": "host-8"}, RejectReason.WRONG_AUDIENCE),
        ({"expires_s": NOW_S}, {}, RejectReason.LIFETIME),
        ({"expires_s": NOW_S - 1}, {}, RejectReason.LIFETIME),
        ({"expires_s": NOW_S + 601}, {}, RejectReason.LIFETIME),
        ({}, {"now_s": NOW_S - 31}, RejectReason.NOT_YET_VALID),
        ({}, {"now_s": NOW_S + 61}, RejectReason.EXPIRED),
        ({}, {"replay": Memory(COMMAND.id)}, RejectReason.DUPLICATE),
        ({}, {"replay": Memory(COMMAND.id, highest=412)}, RejectReason.DUPLICATE),
        ({}, {"replay": Memory(highest=412)}, RejectReason.REPLAYED),
        ({}, {"replay": Memory(highest=413)}, RejectReason.REPLAYED),
        # The first check that fails gives the reason.
        (
            {"issuer": "beta"},
            {"audience": "host-8", "now_s": NOW_S + 61, "replay": Memory(COMMAND.id)},
            RejectReason.WRONG_ISSUER,
        ),
        (
            {},
            {"audience": "host-8", "now_s": NOW_S + 61, "replay": Memory(COMMAND.id)},
            RejectReason.WRONG_AUDIENCE,
        ),
        ({}, {"now_s": NOW_S + 61, "replay": Memory(COMMAND.id)}, RejectReason.EXPIRED),
    ],
)
def test_an_authentic_command_is_refused_with_the_command(
    change: dict[str, Any], decode: dict[str, Any], reason: RejectReason
) -> None:
    command = replace(COMMAND, **change)
    refused = _refused(lambda: _command(protocol.encode_command(command, KEY), **decode))
    assert refused.reason == reason
    assert refused.command == command


@pytest.mark.parametrize(
    "decode",
    [
        {"now_s": NOW_S - 30},
        {"now_s": NOW_S + 60},
        {"replay": Memory(IDS[9], highest=411)},
    ],
)
def test_the_last_acceptable_moment(decode: dict[str, Any]) -> None:
    assert _command(protocol.encode_command(COMMAND, KEY), **decode) == COMMAND


def test_a_command_moved_to_another_topic_is_refused() -> None:
    data = protocol.encode_command(COMMAND, KEY)
    for topic in (
        protocol.command_topic(COMMAND.audience, "another-vm"),
        protocol.command_topic("host-8", COMMAND.vm),
    ):
        refused = _refused(lambda topic=topic: _command(data, topic=topic))
        assert refused.reason == RejectReason.BAD_SIGNATURE
        assert refused.command is None
    for topic in (protocol.state_topic("host-7", COMMAND.vm), "pyscan/v1/hosts/host-7/cmd/+", "x"):
        refused = _refused(lambda topic=topic: _command(data, topic=topic))
        assert refused.reason == RejectReason.WRONG_TOPIC


def test_a_command_signed_for_the_topic_of_another_vm_is_refused() -> None:
    # A key holder's mistake, not an attack: topic and payload disagree under one signature.
    payload = verify1(
        protocol.encode_command(COMMAND, KEY),
        RING,
        protocol.CONTENT_COMMAND,
        protocol.command_topic(COMMAND.audience, COMMAND.vm).encode(),
        10_000,
    ).payload
    topic = protocol.command_topic(COMMAND.audience, "another-vm")
    data = sign1(payload, KEY, protocol.CONTENT_COMMAND, topic.encode())
    assert _refused(lambda: _command(data, topic=topic)).reason == RejectReason.WRONG_TOPIC


def test_a_stranger_cannot_command() -> None:
    refused = _refused(lambda: _command(protocol.encode_command(COMMAND, STRANGER)))
    assert refused.reason == RejectReason.UNKNOWN_KEY
    assert refused.command is None


def test_a_message_of_one_type_is_none_of_another() -> None:
    topic = protocol.command_topic(COMMAND.audience, COMMAND.vm)
    payload = b"\xa0"
    data = sign1(payload, KEY, protocol.CONTENT_VERDICT, topic.encode())
    assert _refused(lambda: _command(data)).reason == RejectReason.WRONG_CONTENT_TYPE


@pytest.mark.parametrize("decode", [_command, _report, _verdict])
def test_an_oversized_message_is_refused_unread(decode: Callable[[bytes], object]) -> None:
    assert _refused(lambda: decode(bytes(70_000))).reason == RejectReason.TOO_LARGE


# ----------------------------------------------------------------------- malformed payloads

CASES: dict[str, tuple[bytes, str, str, Callable[[bytes], object]]] = {
    "command": (
        protocol.encode_command(COMMAND, KEY),
        protocol.command_topic(COMMAND.audience, COMMAND.vm),
        protocol.CONTENT_COMMAND,
        _command,
    ),
    "report": (
        protocol.encode_report(REPORT, KEY),
        protocol.report_topic(REPORT.host, REPORT.command),
        protocol.CONTENT_REPORT,
        _report,
    ),
    "verdict": (
        protocol.encode_verdict(VERDICT, KEY),
        protocol.verdict_topic(VERDICT.monitor, VERDICT.target),
        protocol.CONTENT_VERDICT,
        _verdict,
    ),
}


def _payload(name: str) -> dict[str, Any]:
    data, topic, content, _ = CASES[name]
    payload = decode_cbor(verify1(data, RING, content, topic.encode(), 70_000).payload, 70_000)
    assert isinstance(payload, dict)
    return payload


def _resigned(name: str, payload: object) -> Callable[[], object]:
    _, topic, content, decode = CASES[name]
    data = sign1(encode_cbor(payload), KEY, content, topic.encode())
    return lambda: decode(data)


@pytest.mark.parametrize("name", CASES)
def test_payloads_have_exactly_the_specified_keys(name: str) -> None:
    payload = _payload(name)
    _resigned(name, payload)()  # the base case is good
    for key in payload:
        without = {other: value for other, value in payload.items() if other != key}
        assert _refused(_resigned(name, without)).reason == RejectReason.MALFORMED
    assert _refused(_resigned(name, payload | {"x": 1})).reason == RejectReason.MALFORMED
    assert _refused(_resigned(name, payload | {1: 1})).reason == RejectReason.MALFORMED
    for other in ([], None, 1, "text", b"", [payload], {}):
        assert _refused(_resigned(name, other)).reason == RejectReason.MALFORMED


WRONG: list[object] = [
    None,
    True,
    -1,
    2**63,
    b"bytes",
    "",
    "lower",
    "a/b",
    "+",
    "x" * 600,
    "line\nbreak",
    [],
    [1],
    {},
    {"x": "y"},
]
#: What of WRONG is a good value of a field after all.
RIGHT: dict[str, list[object]] = {
    "vm": ["lower"],
    "aud": ["lower"],
    "iss": ["lower"],
    "args": [{}, {"x": "y"}],
    "reason": ["", "lower", "a/b", "+"],
    "detail": ["", "lower", "a/b", "+"],
    "vm_state": ["", "lower"],
    "host": ["", "lower"],
    "target": ["lower"],
    "findings": [[]],
}
RIGHT_BY_TYPE: dict[tuple[str, str], list[object]] = {
    ("report", "reason"): ["", "lower"],
    ("verdict", "vm"): ["", "lower"],
}


@pytest.mark.parametrize(("name", "field"), [(n, f) for n in CASES for f in _payload(n)])
def test_every_field_refuses_the_wrong_type_and_size(name: str, field: str) -> None:
    payload = _payload(name)
    right = RIGHT_BY_TYPE.get((name, field), RIGHT.get(field, []))
    for value in WRONG:
        if any(type(value) is type(good) and value == good for good in right):
            continue
        refused = _refused(_resigned(name, payload | {field: value}))
        expected = {RejectReason.MALFORMED}
        if field == "v" and type(value) is int:
            expected = {RejectReason.UNSUPPORTED_VERSION}
        assert refused.reason in expected, value


@pytest.mark.parametrize(
    "change",
    [
        {"args": {f"k{n}": 1 for n in range(9)}},
        {"args": {"": 1}},
        {"args": {"k": None}},
        {"args": {"k": [1]}},
        {"args": {"k": "x" * 257}},
        {"args": {"k": 2**60}},
        {"args": {1: 1}},
        {"why": {"incident": "", "finding": ""}},
        {"why": {"incident": "", "finding": "", "verdict": "x"}},
        {"why": {"incident": "", "finding": "", "verdict": "", "more": ""}},
        {"act": "reboot"},
        {"vm": "x" * 65},
        {"id": IDS[0].lower()},
        {"id": IDS[0] + "\n"},
    ],
)
def test_inside_a_command(change: dict[str, Any]) -> None:
    refused = _refused(_resigned("command", _payload("command") | change))
    assert refused.reason == RejectReason.MALFORMED


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"status": 99},
        {"status": True},
        {"address": -1},
        {"address": "0x1"},
        {"place": "x" * 129},
        {"place": "\x1b"},
        {"id": ""},
        {"more": 1},
    ],
)
def test_inside_a_finding(change: dict[str, Any]) -> None:
    payload = _payload("verdict")
    payload["findings"][0] |= change
    assert _refused(_resigned("verdict", payload)).reason == RejectReason.MALFORMED


def test_a_verdict_has_a_bounded_number_of_findings() -> None:
    payload = _payload("verdict")
    payload["findings"] = [payload["findings"][0]] * (protocol.FINDINGS_MAX + 1)
    assert _refused(_resigned("verdict", payload)).reason == RejectReason.MALFORMED


def test_a_verdict_counts_at_least_the_findings_that_it_lists() -> None:
    payload = _payload("verdict")
    payload["total"] = len(payload["findings"]) - 1
    assert _refused(_resigned("verdict", payload)).reason == RejectReason.MALFORMED


# --------------------------------------------------------------- refused reports and verdicts


def test_a_report_is_by_the_host_of_its_topic() -> None:
    for host, key, reason in (
        ("alpha", OTHER_KEY, RejectReason.WRONG_ISSUER),
        ("alpha", STRANGER, RejectReason.UNKNOWN_KEY),
    ):
        data = protocol.encode_report(replace(REPORT, host=host), key)
        assert _refused(lambda data=data: _report(data)).reason == reason
    payload = _payload("report")
    topic = protocol.report_topic("beta", REPORT.command)
    data = sign1(encode_cbor(payload), KEY, protocol.CONTENT_REPORT, topic.encode())
    assert _refused(lambda: _report(data, topic)).reason == RejectReason.WRONG_TOPIC
    topic = protocol.report_topic("alpha", IDS[9])
    data = sign1(encode_cbor(payload), KEY, protocol.CONTENT_REPORT, topic.encode())
    assert _refused(lambda: _report(data, topic)).reason == RejectReason.WRONG_TOPIC
    data = protocol.encode_report(REPORT, KEY)
    assert _refused(lambda: _report(data, topic)).reason == RejectReason.BAD_SIGNATURE


def test_a_verdict_is_by_the_monitor_of_its_topic() -> None:
    data = protocol.encode_verdict(VERDICT, OTHER_KEY)
    assert _refused(lambda: _verdict(data)).reason == RejectReason.WRONG_ISSUER
    payload = encode_cbor(_payload("verdict"))
    for topic in (
        protocol.verdict_topic("beta", VERDICT.target),
        protocol.verdict_topic("alpha", "web-2"),
    ):
        data = sign1(payload, KEY, protocol.CONTENT_VERDICT, topic.encode())
        refused = _refused(lambda data=data, topic=topic: _verdict(data, topic))
        assert refused.reason == RejectReason.WRONG_TOPIC


@pytest.mark.parametrize(
    ("age_s", "reason"),
    [
        (-31, RejectReason.NOT_YET_VALID),
        (-30, None),
        (3600, None),
        (3601, RejectReason.STALE),
    ],
)
def test_a_verdict_has_an_age(age_s: int, reason: RejectReason | None) -> None:
    data = protocol.encode_verdict(VERDICT, KEY)
    now_ns = NOW_NS + age_s * 1_000_000_000
    if reason is None:
        assert _verdict(data, now_ns=now_ns) == VERDICT
    else:
        assert _refused(lambda: _verdict(data, now_ns=now_ns)).reason == reason


# ------------------------------------------------------------------------------ hostile bytes


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_no_changed_byte_is_accepted(name: str, data: st.DataObject) -> None:
    good, _, _, decode = CASES[name]
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    if bytes(changed) != good:
        assert _refused(lambda: decode(bytes(changed))).command is None


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_no_cut_or_longer_message_is_accepted(name: str, data: st.DataObject) -> None:
    good, _, _, decode = CASES[name]
    end = data.draw(st.integers(0, len(good) - 1))
    more = data.draw(st.binary(min_size=1, max_size=5))
    _refused(lambda: decode(good[:end]))
    _refused(lambda: decode(good + more))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.text(st.characters(codec="ascii")),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["v", "id", "a"]), inner),
        max_leaves=8,
    )
)
def test_no_foreign_payload_is_accepted_even_when_signed(payload: object) -> None:
    for name in CASES:
        _refused(_resigned(name, payload))


# ------------------------------------------------------------------------------- our mistakes


@pytest.mark.parametrize(
    "change",
    [
        {"id": "not-an-id"},
        {"audience": "a/b"},
        {"vm": ""},
        {"vm": "+"},
        {"sequence": -1},
        {"arguments": {"k": "x" * 300}},
        {"arguments": {"k": "\ud800"}},
    ],
)
def test_a_command_that_breaks_the_format_is_not_signed(change: dict[str, Any]) -> None:
    with pytest.raises(InternalError):
        protocol.encode_command(replace(COMMAND, **change), KEY)


# ------------------------------------------------------------------------------------- topics


@pytest.mark.parametrize(
    ("text", "topic"),
    [
        ("pyscan/v1/hosts/h1/cmd/vm", Topic(TopicKind.COMMAND, "h1", "vm")),
        ("pyscan/v1/hosts/h1/report/c", Topic(TopicKind.REPORT, "h1", "c")),
        ("pyscan/v1/hosts/h1/state/vm", Topic(TopicKind.STATE, "h1", "vm")),
        ("pyscan/v1/hosts/h1/status", Topic(TopicKind.HOST_STATUS, "h1")),
        ("pyscan/v1/monitors/m1/verdict/t", Topic(TopicKind.VERDICT, "m1", "t")),
        ("pyscan/v1/monitors/m1/sweep", Topic(TopicKind.SWEEP, "m1")),
        ("pyscan/v1/monitors/m1/status", Topic(TopicKind.MONITOR_STATUS, "m1")),
    ],
)
def test_topics_there_and_back(text: str, topic: Topic) -> None:
    assert Topic.parse(text) == topic
    assert str(topic) == text


def test_topic_builders() -> None:
    assert protocol.host_status_topic("h") == "pyscan/v1/hosts/h/status"
    assert protocol.sweep_topic("m") == "pyscan/v1/monitors/m/sweep"
    assert protocol.monitor_status_topic("m") == "pyscan/v1/monitors/m/status"
    assert protocol.state_topic("h", "v") == "pyscan/v1/hosts/h/state/v"
    assert protocol.subscription(TopicKind.COMMAND, "h") == "pyscan/v1/hosts/h/cmd/+"
    assert protocol.subscription(TopicKind.VERDICT) == "pyscan/v1/monitors/+/verdict/+"
    assert protocol.subscription(TopicKind.HOST_STATUS) == "pyscan/v1/hosts/+/status"
    with pytest.raises(InternalError):
        protocol.subscription(TopicKind.COMMAND, "#")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pyscan/v1",
        "pyscan/v1/",
        "pyscan/v2/hosts/h1/cmd/vm",
        "/pyscan/v1/hosts/h1/cmd/vm",
        "pyscan/v1/hosts/h1/cmd",
        "pyscan/v1/hosts/h1/cmd/",
        "pyscan/v1/hosts//cmd/vm",
        "pyscan/v1/hosts/h1/cmd/vm/more",
        "pyscan/v1/hosts/h1/status/vm",
        "pyscan/v1/hosts/h1/verdict/vm",
        "pyscan/v1/monitors/h1/cmd/vm",
        "pyscan/v1/hosts/+/cmd/vm",
        "pyscan/v1/hosts/h1/cmd/#",
        "pyscan/v1/hosts/h 1/cmd/vm",
        "pyscan/v1/hosts/h1/cmd/vm\n",
        "pyscan/v1/hosts/h\u00e9/cmd/vm",
        "pyscan/v1/hosts/" + "h" * 65 + "/cmd/vm",
        "hosts/h1/cmd/vm",
    ],
)
def test_other_topics_are_refused(text: str) -> None:
    assert _refused(lambda: Topic.parse(text)).reason == RejectReason.WRONG_TOPIC


@given(st.text(max_size=80))
def test_names_that_cannot_be_in_a_topic_never_get_into_one(name: str) -> None:
    try:
        text = protocol.command_topic(name, name)
    except InternalError:
        return
    assert Topic.parse(text) == Topic(TopicKind.COMMAND, name, name)


def test_every_reason_is_in_the_specification() -> None:
    specification = Path(__file__).parents[2].joinpath("docs/spec/wire.md").read_text()
    for reason in RejectReason:
        assert f"| `{reason}` |" in specification


# ------------------------------------------------------------------------ approvals [3.5]

ENVELOPE = protocol.encode_command(COMMAND, KEY)
APPROVAL = Approval(
    id=IDS[9],
    command=COMMAND.id,
    digest=protocol.command_digest(ENVELOPE),
    issuer="beta",
    audience=COMMAND.audience,
    vm=COMMAND.vm,
    action=COMMAND.action,
    issued_s=NOW_S,
    expires_s=NOW_S + 60,
)


def _approval(data: bytes, topic: str = "", audience: str = COMMAND.audience) -> Approval:
    topic = topic or protocol.approval_topic(COMMAND.audience, COMMAND.vm)
    return protocol.decode_approval(data, RING, topic=topic, audience=audience, now_s=NOW_S + 1)


def test_approval_survives_its_bytes() -> None:
    approval = _approval(protocol.encode_approval(APPROVAL, OTHER_KEY))
    assert approval == APPROVAL
    protocol.check_approval(approval, COMMAND, ENVELOPE)


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({}, STRANGER, RejectReason.UNKNOWN_KEY),
        ({}, KEY, RejectReason.WRONG_ISSUER),
        ({"expires_s": NOW_S - 30, "issued_s": NOW_S - 60}, OTHER_KEY, RejectReason.EXPIRED),
        ({"expires_s": NOW_S + 601}, OTHER_KEY, RejectReason.LIFETIME),
        ({"issued_s": NOW_S + 40}, OTHER_KEY, RejectReason.NOT_YET_VALID),
        ({"vm": "other"}, OTHER_KEY, RejectReason.BAD_SIGNATURE),
        ({"audience": "other"}, OTHER_KEY, RejectReason.BAD_SIGNATURE),
    ],
)
def test_refused_approval(changes: dict[str, Any], key: SigningKey, reason: RejectReason) -> None:
    with pytest.raises(Rejected) as refused:
        _approval(protocol.encode_approval(replace(APPROVAL, **changes), key))
    assert refused.value.reason == reason


def test_an_approval_of_another_host_is_refused() -> None:
    with pytest.raises(Rejected) as refused:
        _approval(protocol.encode_approval(APPROVAL, OTHER_KEY), audience="host-8")
    assert refused.value.reason == RejectReason.WRONG_AUDIENCE


def test_a_command_is_no_approval_and_an_approval_no_command() -> None:
    """Each is refused on the other's topic, whatever it says."""
    topic = protocol.command_topic(COMMAND.audience, COMMAND.vm)
    with pytest.raises(Rejected) as refused:
        _command(protocol.encode_approval(APPROVAL, OTHER_KEY), topic=topic)
    assert refused.value.reason == RejectReason.WRONG_CONTENT_TYPE
    with pytest.raises(Rejected) as refused:
        _approval(ENVELOPE)
    assert refused.value.reason == RejectReason.WRONG_CONTENT_TYPE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"issuer": "alpha"}, RejectReason.SAME_SIGNER),
        ({"digest": "0" * 64}, RejectReason.OTHER_COMMAND),
        ({"command": IDS[8]}, RejectReason.OTHER_COMMAND),
        ({"action": Action.QUERY}, RejectReason.OTHER_COMMAND),
        ({"vm": "other"}, RejectReason.OTHER_COMMAND),
    ],
)
def test_what_does_not_approve_a_command(changes: dict[str, Any], reason: RejectReason) -> None:
    with pytest.raises(Rejected) as refused:
        protocol.check_approval(replace(APPROVAL, **changes), COMMAND, ENVELOPE)
    assert refused.value.reason == reason
