"""Evidence as CloudEvents 1.0 in the JSON event format (cloudevents.io, spec and json-format).

`source` and `id` together name an event once and for all: a message by its topic and id, a
record by its log and number. So a receiver that reads the same evidence again sees what it
has already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime

from pyscan.evidence.events import Event, moment, plain


def cloudevents(events: Iterable[Event]) -> Iterator[dict[str, object]]:
    """One CloudEvent for each event; a message once, whoever quotes it.

    Messages that could not be verified are left out.
    """
    seen: set[tuple[object, object]] = set()
    for event in events:
        if not event.verified:
            continue
        document = _document(event)
        name = (document["source"], document["id"])
        if event.message is not None:
            if name in seen:
                continue
            seen.add(name)
        yield document


def rfc3339(time: datetime) -> str:
    """A time in UTC with microseconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _document(event: Event) -> dict[str, object]:
    if event.message is not None:
        source, identity = event.message.topic, event.message.id
    elif event.number is not None:
        source, identity = f"pyscan/v1/evidence/{event.writer}", str(event.number)
    else:
        source, identity = f"pyscan/v1/capture/{event.writer}", str(event.body["manifest"])
    document: dict[str, object] = {
        "specversion": "1.0",
        "type": f"pyscan.v1.{event.kind}",
        "source": source,
        "id": identity,
    }
    if time := moment(event.happened_ns):
        document["time"] = rfc3339(time)
    if subject := _subject(event):
        document["subject"] = subject
    return document | {
        "datacontenttype": "application/json",
        # Extension attributes: who recorded it, and who signed it if somebody did.
        "writer": event.writer,
        **({"signer": event.message.signer} if event.message else {}),
        "data": plain(event.body),
    }


def _subject(event: Event) -> str:
    """The machine that it is about."""
    for name in ("target", "vm"):
        value = event.body.get(name)
        if isinstance(value, str) and value:
            return value
    return ""
