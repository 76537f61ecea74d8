"""One worker per virtual machine: its commands run one after the other, each exactly once.

    look -> commit `started` -> converge -> commit `done` with the report -> acknowledge

A crash anywhere in between leaves a journal from which the next start finishes the same
way, and a message that the broker delivers again; both find what was done already.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from pyscan.agent.actions import (
    Observation,
    Outcome,
    Situation,
    VmState,
    observe,
    perform,
    wanted_containment,
)
from pyscan.agent.driver import Driver, Machine
from pyscan.agent.journal import CommandState, Entry, Journal
from pyscan.agent.reports import Reporter, StateBoard
from pyscan.errors import DriverError
from pyscan.outbox import transaction
from pyscan.protocol import SKEW_S, RejectReason
from pyscan.records import Command, ReportState

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """A journalled command that waits for its worker; `done` acknowledges its delivery."""

    command: Command
    done: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Desk:
    """What all workers share."""

    database: sqlite3.Connection
    journal: Journal
    reporter: Reporter
    board: StateBoard
    wake: Callable[[], None]  # the outbox has something new


class Worker:
    """Carries out the commands on one machine."""

    def __init__(self, vm: str, driver: Driver, desk: Desk, orders_max: int) -> None:
        self._vm = vm
        self._driver = driver
        self._desk = desk
        self._orders: asyncio.Queue[Order] = asyncio.Queue(orders_max)

    async def put(self, order: Order) -> None:
        """Queue an order; waits while the queue is full."""
        await self._orders.put(order)

    async def run(self, unfinished: list[Entry]) -> None:
        """Finish what a crash interrupted, then carry out orders, for ever."""
        async with self._observed() as (_, before):
            self._note(before.vm_state)
        for entry in unfinished:
            log.info("command resumed id=%s state=%s", entry.command.id, entry.state)
            await self._carry_out(entry.command)
        while True:
            order = await self._orders.get()
            await self._carry_out(order.command)
            order.done()

    async def _carry_out(self, command: Command) -> None:
        entry = self._desk.journal.find(command.id)
        if entry is not None and entry.report is not None:
            log.info("command redelivered id=%s", command.id)
            with transaction(self._desk.database):
                self._desk.reporter.repeat(command.id, entry.report)
            self._desk.wake()
            return
        started = entry is not None and entry.state is CommandState.STARTED
        # It was in time when it came, and then waited for the machine or for this program.
        if not started and time.time() > command.expires_s + SKEW_S:
            outcome = Outcome(
                VmState.UNKNOWN,
                "expired while it waited; issue it again",
                RejectReason.EXPIRED,
                self._desk.journal.containment(self._vm),
            )
            self._finish(command, ReportState.REJECTED, outcome)
            return
        async with self._observed() as (machine, before):
            if not started:
                self._start(command, before)
            situation = Situation(
                self._driver, machine, before, self._desk.journal.containment(self._vm)
            )
            outcome = await perform(command.action, situation, dry_run=_is_dry_run(command))
        state = ReportState.FAILED if outcome.reason else ReportState.SUCCEEDED
        self._finish(command, state, outcome)
        self._note(outcome.vm_state)

    @asynccontextmanager
    async def _observed(self) -> AsyncIterator[tuple[Machine | None, Observation]]:
        """The machine, if it answers, and what it looks like now."""
        journal = self._desk.journal
        async with AsyncExitStack() as stack:
            machine: Machine | None = None
            try:
                machine = await stack.enter_async_context(self._driver.attach())
            except DriverError as error:
                log.warning("machine unreachable vm=%s problem=%s", self._vm, error)
            known = journal.process(self._vm)
            before = await observe(self._driver, machine, known)
            if before.process is not None and before.process != known:
                with transaction(self._desk.database):
                    journal.set_process(self._vm, before.process)
            yield machine, before

    def _start(self, command: Command, before: Observation) -> None:
        journal, reporter = self._desk.journal, self._desk.reporter
        containment = journal.containment(self._vm)
        if not _is_dry_run(command):
            containment = wanted_containment(command.action, before, containment)
        with transaction(self._desk.database):
            journal.start(command, before, containment)
            reporter.post(reporter.sign(command, ReportState.STARTED))
        self._desk.wake()

    def _finish(self, command: Command, state: ReportState, outcome: Outcome) -> None:
        journal, reporter = self._desk.journal, self._desk.reporter
        signed = reporter.sign(command, state, outcome)
        with transaction(self._desk.database):
            journal.finish(command, signed.envelope)
            journal.set_containment(self._vm, outcome.containment)
            reporter.post(signed)
        self._desk.wake()

    def _note(self, state: VmState) -> None:
        contained = self._desk.journal.containment(self._vm) is not None
        self._desk.board.note(self._vm, state, contained=contained)


def _is_dry_run(command: Command) -> bool:
    # Anything that is not plainly false asks for caution.
    return command.arguments.get("dry_run", False) is not False
