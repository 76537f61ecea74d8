"""One line for a person about each event."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from pyscan.evidence.events import Event, plain

Body = Mapping[str, object]


def describe(event: Event) -> str:
    """What happened. The text comes from anywhere: make it fit for a terminal."""
    if event.message is not None and not event.verified:
        message = event.message
        return f"{message.id} on {message.topic}: not verified, its signer's key is not at hand"
    describe_body = _KINDS.get(event.kind, _other)
    return describe_body(event.body)


def _get(body: Body, *names: str) -> list[str]:
    """The values that are there, as texts."""
    values = (plain(body.get(name), name) for name in names)
    return ["" if value is None else str(value) for value in values]


def _verdict(body: Body) -> str:
    target, state, ok, watched, reason = _get(body, "target", "state", "ok", "watched", "reason")
    return f"{target} {state}, {ok} of {watched} pages ok: {reason}"


def _command(body: Body) -> str:
    action, vm, host, issuer = _get(body, "act", "vm", "aud", "iss")
    arguments = body.get("args")
    rest = f" {_pairs(arguments)}" if isinstance(arguments, Mapping) and arguments else ""
    return f"{action} {vm} on {host}, ordered by {issuer}{rest}"


def _approval(body: Body) -> str:
    action, vm, host, issuer, command = _get(body, "act", "vm", "aud", "iss", "cmd")
    return f"{action} {vm} on {host}, approved by {issuer}, command {command}"


def _report(body: Body) -> str:
    action, vm, state, reason, detail, vm_state = _get(
        body, "act", "vm", "state", "reason", "detail", "vm_state"
    )
    text = f"{action} {vm} {state}"
    text += f" ({reason})" if reason else ""
    text += f": {detail}" if detail else ""
    return text + (f"; machine {vm_state}" if vm_state else "")


def _finding(body: Body) -> str:
    kind, place, address, frame, expected, actual = _get(
        body, "kind", "place", "address", "frame", "expected", "actual"
    )
    text = f"{kind} {place}"
    text += f" at {address}" if address else ""
    text += f" in frame {frame}" if frame else ""
    return text + (f": {actual} instead of {expected}" if expected or actual else "")


def _incident(body: Body) -> str:
    target, state, incident, detail = _get(body, "target", "state", "id", "detail")
    return f"{target} {state}, incident {incident}" + (f": {detail}" if detail else "")


def _capture(body: Body) -> str:
    directory, files, size, manifest = _get(body, "directory", "files", "bytes", "manifest")
    facts = body.get("facts")
    rest = f" {_pairs(facts)}" if isinstance(facts, Mapping) else ""
    return f"{directory}: {files} files, {size} bytes, manifest {manifest[:16]}{rest}"


def _rejected(body: Body) -> str:
    reason, topic = _get(body, "reason", "topic")
    return f"{reason}, on {topic}"


def _opened(_body: Body) -> str:
    return "the program started to record"


def _closed(_body: Body) -> str:
    return "the program ended well"


def _recovered(body: Body) -> str:
    (size,) = _get(body, "bytes")
    return f"the program before had not ended well; {size} bytes of a record were cut off"


def _other(body: Body) -> str:
    return _pairs(body)


def _pairs(body: Body) -> str:
    return " ".join(f"{name}={plain(value, str(name))}" for name, value in body.items())


_KINDS: Final[dict[str, Callable[[Body], str]]] = {
    "verdict": _verdict,
    "command": _command,
    "approval": _approval,
    "report": _report,
    "finding": _finding,
    "incident": _incident,
    "capture": _capture,
    "rejected": _rejected,
    "opened": _opened,
    "closed": _closed,
    "recovered": _recovered,
}
