"""What an agent says: signed reports through the outbox, states as retained messages."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
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
#: Pause between two publications of the counters of rejections.
COUNTERS_PAUSE_S: Final = 0.25


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
        self,
        command: Command,
        state: ReportState,
        outcome: Outcome | None = None,
        *,
        step: str = "",
    ) -> SignedReport:
        """A report about how far `command` is; `step` is the detail of one without outcome."""
        report = Report(
            id=new_id(),
            command=command.id,
            host=self._host,
            vm=command.vm,
            action=command.action,
            state=state,
            at_ns=time.time_ns(),
            reason=outcome.reason if outcome else "",
            detail=outcome.detail if outcome else step,
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
        self._states: dict[str, tuple[VmState, bool]] = {}
        self._payloads: dict[str, bytes] = {}
        self._unpublished: dict[str, None] = {}
        self._changed = asyncio.Event()
        self._rejected: Counter[str] = Counter()
        self._rejected_changed = asyncio.Event()

    def note(self, vm: str, state: VmState, *, contained: bool) -> None:
        """Set the state of a machine."""
        if self._states.get(vm) == (state, contained):
            return
        log.info("machine vm=%s state=%s contained=%s", vm, state.value, contained)
        self._states[vm] = (state, contained)
        self._set(vm, _json(vm=vm, state=state.value, contained=contained))

    def count_rejection(self, reason: str) -> None:
        """One more message was refused for this reason."""
        self._rejected[reason] += 1
        self._rejected_changed.set()

    def forget(self, vm: str) -> None:
        """Take a machine's retained state away: it is no longer this host's."""
        self._states.pop(vm, None)
        self._set(vm, b"")

    def _set(self, vm: str, payload: bytes) -> None:
        self._payloads[vm] = payload
        self._unpublished[vm] = None
        self._changed.set()

    def greeting(self) -> Iterator[Publication]:
        """Everything, for a new connection."""
        yield self._status("online")
        self._unpublished.clear()
        for vm in tuple(self._payloads):
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
                    self._drop_forgotten(vm)
                except TransportError as error:
                    log.warning("state not published vm=%s problem=%s", vm, error)

    async def publish_counters(self, link: Link) -> None:
        """Publish how much was rejected, now and then, for ever."""
        while True:
            await self._rejected_changed.wait()
            self._rejected_changed.clear()
            await link.wait_online()
            # A connection that was lost meanwhile brings everything with its greeting.
            with suppress(TransportError):
                await link.publish(self._status("online"))
            await asyncio.sleep(COUNTERS_PAUSE_S)

    def _drop_forgotten(self, vm: str) -> None:
        if vm not in self._states:
            self._payloads.pop(vm, None)

    def _publication(self, vm: str) -> Publication:
        topic = protocol.state_topic(self._host, vm)
        payload = self._payloads.get(vm, b"")
        return Publication(topic, payload, retain=True, content_type=STATE_CONTENT)

    def _status(self, status: str) -> Publication:
        topic = protocol.host_status_topic(self._host)
        payload = _json(
            host=self._host, status=status, version=__version__, rejected=dict(self._rejected)
        )
        return Publication(topic, payload, retain=True, content_type=STATE_CONTENT)


def _json(**values: object) -> bytes:
    return json.dumps({"v": 1, **values, "at_ns": time.time_ns()}).encode()
