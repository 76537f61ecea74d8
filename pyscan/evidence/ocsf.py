"""Verdicts and what was done about them as OCSF Detection Findings (class 2004).

Open Cybersecurity Schema Framework 1.5.0, schema.ocsf.io. A target that is not approved any
more opens a finding (Create); each further verdict, command, approval and report about it is an
Update; the next approved verdict is the Close. All carry the id of the first verdict as
`finding_info.uid`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from pyscan import __version__
from pyscan.evidence.events import Event, plain
from pyscan.evidence.quotes import Quoted
from pyscan.records import VerdictState

SCHEMA_VERSION: Final = "1.5.0"
_CATEGORY: Final = 2
_CLASS: Final = 2004
_NS_PER_MS: Final = 1_000_000


class _Activity(IntEnum):
    """activity_id."""

    CREATE = 1
    UPDATE = 2
    CLOSE = 3


class _Severity(IntEnum):
    """severity_id; the others do not occur."""

    MEDIUM = 3
    CRITICAL = 5


#: status_id and its caption.
_STATUS: Final = {
    _Activity.CREATE: (1, "New"),
    _Activity.UPDATE: (2, "In Progress"),
    _Activity.CLOSE: (4, "Resolved"),
}
_TITLES: Final = {
    VerdictState.UNAPPROVED: "Kernel memory is not as it was approved",
    VerdictState.UNDECIDED: "Kernel memory cannot be judged",
}


@dataclass(slots=True)
class _Finding:
    """A finding in the course of its life."""

    uid: str
    created_ms: int
    resource: dict[str, object]
    state: VerdictState
    description: str = ""
    types: list[str] = field(default_factory=list)


def detection_findings(events: Iterable[Event]) -> Iterator[dict[str, object]]:
    """The Detection Findings that the events amount to; each message counts once.

    Approved verdicts that end nothing, records of other kinds, and messages that could not
    be verified have no place in this class.
    """
    translator = _Translator()
    seen: set[tuple[str, str]] = set()
    for event in events:
        if event.message is None or not event.verified:
            continue
        name = (event.kind, event.message.id)
        if name in seen:
            continue
        seen.add(name)
        document = translator.translate(event, event.message)
        if document is not None:
            yield document


class _Translator:
    def __init__(self) -> None:
        self._open: dict[str, _Finding] = {}  # by target
        self._by_verdict: dict[str, _Finding] = {}
        self._by_command: dict[str, _Finding] = {}

    def translate(self, event: Event, message: Quoted) -> dict[str, object] | None:
        if event.kind == "verdict":
            return self._verdict(event, message)
        if event.kind == "command":
            return self._command(event, message)
        if event.kind == "approval":
            return self._approval(event, message)
        return self._report(event, message)

    def _verdict(self, event: Event, message: Quoted) -> dict[str, object] | None:
        body = event.body
        target, reason = _text(body, "target"), _text(body, "reason")
        finding = self._open.get(target)
        if body.get("state") == VerdictState.APPROVED:
            if finding is None:
                return None
            del self._open[target]
            return _document(event, message, finding, _Activity.CLOSE, reason)
        activity = _Activity.UPDATE
        if finding is None:
            activity = _Activity.CREATE
            resource = _resource(target, _text(body, "vm"), _text(body, "host"))
            uid = _text(body, "id")
            finding = _Finding(uid, _ms(event), resource, VerdictState.UNDECIDED)
            self._open[target] = finding
        self._by_verdict[_text(body, "id")] = finding
        if body.get("state") == VerdictState.UNAPPROVED:
            finding.state = VerdictState.UNAPPROVED
        pages = [each for each in _list(body, "findings") if isinstance(each, Mapping)]
        finding.description = reason
        finding.types = sorted({_text(page, "kind") for page in pages} - {""})
        document = _document(event, message, finding, activity, reason)
        evidences = [
            {"uid": _text(page, "id"), "name": _text(page, "kind"), "data": plain(page)}
            for page in pages
        ]
        return document | ({"evidences": evidences} if evidences else {})

    def _command(self, event: Event, message: Quoted) -> dict[str, object] | None:
        why = event.body.get("why")
        finding = self._by_verdict.get(_text(why, "verdict")) if isinstance(why, Mapping) else None
        if finding is None:
            return None
        self._by_command[_text(event.body, "id")] = finding
        text = f"{_text(event.body, 'act')} ordered by {_text(event.body, 'iss')}"
        return _document(event, message, finding, _Activity.UPDATE, text)

    def _approval(self, event: Event, message: Quoted) -> dict[str, object] | None:
        finding = self._by_command.get(_text(event.body, "cmd"))
        if finding is None:
            return None
        text = f"{_text(event.body, 'act')} approved by {_text(event.body, 'iss')}"
        return _document(event, message, finding, _Activity.UPDATE, text)

    def _report(self, event: Event, message: Quoted) -> dict[str, object] | None:
        finding = self._by_command.get(_text(event.body, "cmd"))
        if finding is None:
            return None
        names = ("act", "state", "reason", "detail")
        action, state, reason, detail = (_text(event.body, name) for name in names)
        text = f"{action} {state}" + (f" ({reason})" if reason else "")
        text += f": {detail}" if detail else ""
        return _document(event, message, finding, _Activity.UPDATE, text)


def _document(
    event: Event, message: Quoted, finding: _Finding, activity: _Activity, text: str
) -> dict[str, object]:
    critical = finding.state is VerdictState.UNAPPROVED
    severity = _Severity.CRITICAL if critical else _Severity.MEDIUM
    status_id, status = _STATUS[activity]
    return {
        "activity_id": int(activity),
        "activity_name": activity.name.capitalize(),
        "category_uid": _CATEGORY,
        "category_name": "Findings",
        "class_uid": _CLASS,
        "class_name": "Detection Finding",
        "type_uid": _CLASS * 100 + activity,
        "type_name": f"Detection Finding: {activity.name.capitalize()}",
        "time": _ms(event),
        "severity_id": int(severity),
        "severity": severity.name.capitalize(),
        "status_id": status_id,
        "status": status,
        "is_alert": activity is _Activity.CREATE,
        "message": text,
        "metadata": {
            "version": SCHEMA_VERSION,
            "product": {"name": "pyscan", "vendor_name": "pyscan", "version": __version__},
            "uid": message.id,
            "correlation_uid": finding.uid,
            "log_name": message.topic,
            "log_provider": message.signer,
            "logged_time": event.time_ns // _NS_PER_MS,
        },
        "finding_info": {
            "uid": finding.uid,
            "title": _TITLES[finding.state],
            "desc": finding.description,
            "types": list(finding.types),
            "created_time": finding.created_ms,
            "modified_time": _ms(event),
        },
        "resources": [dict(finding.resource)],
        "unmapped": {event.kind: plain(event.body)},
    }


def _resource(target: str, vm: str, host: str) -> dict[str, object]:
    resource: dict[str, object] = {"name": target, "uid": vm or target}
    if vm:
        resource["type"] = "virtual machine"
    if host:
        resource["labels"] = [f"host:{host}"]
    return resource


def _ms(event: Event) -> int:
    return event.happened_ns // _NS_PER_MS


def _text(body: Mapping[str, object], name: str) -> str:
    """A text of a signed message; its signer is known, and may still send anything."""
    value = body.get(name)
    return value if isinstance(value, str) else ""


def _list(body: Mapping[str, object], name: str) -> list[object]:
    value = body.get(name)
    return value if isinstance(value, list) else []
