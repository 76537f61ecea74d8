"""What an agent says: signed reports through the outbox, states as retained messages."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pyscan import __version__, protocol
from pyscan.agent.actions import Outcome, VmState
from pyscan.errors import TransportError
from pyscan.evidence import EvidenceLog, message_body
from pyscan.ids import new_id
from pyscan.keys import SigningKey
from pyscan.outbox import Outbox
from pyscan.records import Command, Report, ReportState
from pyscan.transport import Link, Publication

log = logging.getLogger(__name__)

STATE_CONTENT: Final = "application/json"


@dataclass(frozen=True, slots=True)
class SignedReport:
    """A report and its bytes."""

    report: Report
    envelope: bytes


class Reporter:
    """Signs reports, puts them on record and queues them."""

    def __init__(self, host: str, key: SigningKey, outbox: Outbox, evidence: EvidenceLog) -> None:
        self._host = host
        self._key = key
        self._outbox = outbox
        self._evidence = evidence

    def sign(
        self, command: Command, state: ReportState, outcome: Outcome | None = None
    ) -> SignedReport:
        """A report about one step of `command`."""
        report = Report(
            id=new_id(),
            command=command.id,
            host=self._host,
            vm=command.vm,
            action=command.action,
            state=state,
            at_ns=time.time_ns(),
            reason=outcome.reason if outcome else "",
            detail=outcome.detail if outcome else "",
            vm_state=outcome.vm_state if outcome else "",
        )
        return SignedReport(report, protocol.encode_report(report, self._key))

    def post(self, signed: SignedReport) -> None:
        """Record and queue a report, inside the transaction that it tells of.

        Evidence comes first: what leaves is on record, whatever happens in between.
        """
        report = signed.report
        topic = protocol.report_topic(self._host, report.command)
        self._evidence.append("report", message_body(report.id, topic, signed.envelope))
        self.repeat(report.command, signed.envelope)
        log.info(
            "report state=%s command=%s action=%s vm=%s reason=%s detail=%s",
            report.state,
            report.command,
            report.action,
            report.vm,
            report.reason or "-",
            report.detail or "-",
        )

    def repeat(self, command_id: str, envelope: bytes) -> None:
        """Queue a report that is on record already, inside a transaction.

        A full outbox costs the report, never the action: the journal has the final report
        and gives it to whoever delivers the command again.
        """
        topic = protocol.report_topic(self._host, command_id)
        correlation = command_id.encode("ascii")
        try:
            self._outbox.put(topic, envelope, message_id=new_id(), correlation=correlation)
        except TransportError as error:
            log.warning("report not queued command=%s problem=%s", command_id, error)


class StateBoard:
    """The retained messages: the host's status and the state of each machine.

    They inform; nobody acts on them, so they are not signed. The latest of each is what
    counts: it is published when it changes, and everything again on every connection.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._states: dict[str, bytes] = {}
        self._unpublished: dict[str, None] = {}
        self._changed = asyncio.Event()

    def note(self, vm: str, state: VmState, *, contained: bool) -> None:
        """Set the state of a machine."""
        self._states[vm] = _json(vm=vm, state=state.value, contained=contained)
        self._unpublished[vm] = None
        self._changed.set()

    def greeting(self) -> Iterator[Publication]:
        """Everything, for a new connection."""
        yield self._status("online")
        self._unpublished.clear()
        for vm in tuple(self._states):
            yield self._publication(vm)

    def will(self) -> Publication:
        """What is published when the agent is gone."""
        return self._status("offline")

    async def publish(self, link: Link) -> None:
        """Publish what changes, for ever."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            # A connection that comes up now publishes everything by its greeting.
            await link.wait_online()
            while self._unpublished:
                vm, _ = self._unpublished.popitem()
                try:
                    await link.publish(self._publication(vm))
                except TransportError as error:
                    log.warning("state not published vm=%s problem=%s", vm, error)

    def _publication(self, vm: str) -> Publication:
        topic = protocol.state_topic(self._host, vm)
        return Publication(topic, self._states[vm], retain=True, content_type=STATE_CONTENT)

    def _status(self, status: str) -> Publication:
        topic = protocol.host_status_topic(self._host)
        payload = _json(host=self._host, status=status, version=__version__)
        return Publication(topic, payload, retain=True, content_type=STATE_CONTENT)


def _json(**values: object) -> bytes:
    return json.dumps({"v": 1, **values, "at_ns": time.time_ns()}).encode()
