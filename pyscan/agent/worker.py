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
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from pyscan.agent.actions import (
    Arguments,
    Means,
    Observation,
    Outcome,
    Situation,
    VmState,
    look_closer,
    observe,
    perform,
    read_arguments,
    wanted_containment,
)
from pyscan.agent.approvals import Approvals
from pyscan.agent.drivers.base import Driver, Machine
from pyscan.agent.journal import CommandState, Containment, Entry, Journal
from pyscan.agent.reports import Reporter, StateBoard
from pyscan.errors import DriverError
from pyscan.outbox import transaction
from pyscan.protocol import SKEW_S, RejectReason
from pyscan.records import Action, Command, ReportState
from pyscan.runtime import RateBound

log = logging.getLogger(__name__)

#: How long until a release whose time has come is tried again after it failed.
RETRY_S: Final = 10
#: Redeliveries that are answered: so many at once, so many per second. A broker can repeat an
#: old command for ever; control asks again at growing intervals.
REPEATS_BURST: Final = 32
REPEATS_PER_S: Final = 2.0


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
    approvals: Approvals
    reporter: Reporter
    board: StateBoard
    wake: Callable[[], None]  # the outbox has something new
    means: Means
    look_interval_s: float  # a machine that has nothing to do is looked at so often


class Worker:
    """Carries out the commands on one machine, and looks at it in between."""

    def __init__(self, vm: str, driver: Driver, desk: Desk, orders_max: int) -> None:
        self._vm = vm
        self._driver = driver
        self._desk = desk
        self._orders: asyncio.Queue[Order] = asyncio.Queue(orders_max)
        self._repeats = RateBound(REPEATS_BURST, REPEATS_PER_S)
        self._told = ""  # what was reported last about a release that is due
        self._problem = ""  # why it could not be reached when it was looked at last

    def redirect(self, driver: Driver) -> None:
        """The machine is reached another way from now on."""
        self._driver = driver

    async def put(self, order: Order) -> None:
        """Queue an order; waits while the queue is full."""
        await self._orders.put(order)

    async def run(self, unfinished: list[Entry]) -> None:
        """Finish what a crash interrupted, then carry out orders, for ever."""
        await self._look()
        for entry in unfinished:
            log.info("command resumed id=%s state=%s", entry.command.id, entry.state)
            await self._carry_out(entry.command)
        while True:
            await self._release_in_time()
            try:
                async with asyncio.timeout(self._pause_s()):
                    order = await self._orders.get()
            except TimeoutError:
                await self._look()
                continue
            await self._carry_out(order.command)
            order.done()

    def _pause_s(self) -> float:
        """Until the machine is looked at again, or must be released."""
        owed = self._desk.journal.containment(self._vm)
        if owed is None or owed.release_at_s is None:
            return self._desk.look_interval_s
        return min(self._desk.look_interval_s, max(0.0, owed.release_at_s - time.time()))

    async def _look(self) -> None:
        async with self._observed(with_links=False) as (_, before):
            self._note(before.vm_state)

    async def _release_in_time(self) -> None:
        """Release a machine whose time is over; told as a step of the command that set it."""
        journal, reporter = self._desk.journal, self._desk.reporter
        owed = journal.containment(self._vm)
        if owed is None or owed.release_at_s is None or time.time() < owed.release_at_s:
            return
        entry = journal.find(owed.command)
        async with self._observed() as (machine, before):
            situation = self._situation(entry.command if entry else None, machine, before)
            outcome = await perform(Action.RELEASE, situation)
        left: Containment | None = None
        if outcome.reason and before.vm_state is not VmState.GONE:
            # A choice is not ours to make; anything else may be better in a while.
            again = None if outcome.reason == "disk_choice" else int(time.time()) + RETRY_S
            left = replace(owed, release_at_s=again)
        told = f"{'not released' if outcome.reason else 'released'}: {outcome.detail}"
        with transaction(self._desk.database):
            journal.set_containment(self._vm, left)
            if entry is not None and told != self._told:
                step = replace(outcome, detail=f"time is over, {told}")
                reporter.post(reporter.sign(entry.command, ReportState.PROGRESS, step))
        self._told = told if left else ""
        self._desk.wake()
        self._note(outcome.vm_state)

    async def _carry_out(self, command: Command) -> None:
        entry = self._desk.journal.find(command.id)
        if entry is not None and entry.report is not None:
            if not self._repeats.allow():
                return
            log.info("command redelivered id=%s", command.id)
            with transaction(self._desk.database):
                self._desk.reporter.repeat(command.id, entry.report)
            self._desk.wake()
            return
        started = entry is not None and entry.state is CommandState.STARTED
        # It was in time when it came, and then waited for the machine or for this program.
        if not started and time.time() > command.expires_s + SKEW_S:
            self._reject(command, RejectReason.EXPIRED, "expired while it waited; issue it again")
            return
        if not started and self._desk.approvals.missing(command):
            return
        try:
            arguments = read_arguments(command)
        except ValueError as error:  # accepted by another version of this program
            self._reject(command, RejectReason.UNSUPPORTED_ACTION, str(error))
            return
        async with self._observed() as (machine, observed):
            before = observed
            if not started:
                before = await self._start(command, arguments, machine, before)
            situation = replace(
                self._situation(command, machine, before),
                arguments=arguments,
                step=partial(self._step, command),
            )
            outcome = await perform(command.action, situation)
        state = ReportState.FAILED if outcome.reason else ReportState.SUCCEEDED
        self._finish(command, state, outcome)
        self._note(outcome.vm_state)

    def _reject(self, command: Command, reason: RejectReason, detail: str) -> None:
        owed = self._desk.journal.containment(self._vm)
        self._finish(command, ReportState.REJECTED, Outcome(VmState.UNKNOWN, detail, reason, owed))

    def _situation(
        self, command: Command | None, machine: Machine | None, before: Observation
    ) -> Situation:
        return Situation(
            vm=self._vm,
            command=command,
            driver=self._driver,
            machine=machine,
            before=before,
            containment=self._desk.journal.containment(self._vm),
            means=self._desk.means,
        )

    @asynccontextmanager
    async def _observed(
        self, *, with_links: bool = True
    ) -> AsyncIterator[tuple[Machine | None, Observation]]:
        """The machine, if it answers, and what it looks like now."""
        journal = self._desk.journal
        async with AsyncExitStack() as stack:
            machine: Machine | None = None
            problem: DriverError | None = None
            try:
                machine = await stack.enter_async_context(self._driver.attach())
            except DriverError as error:
                problem = error
            self._tell(problem)
            known = journal.process(self._vm)
            before = await observe(self._driver, machine, known, problem, with_links=with_links)
            if before.process is not None and before.process != known:
                with transaction(self._desk.database):
                    journal.set_process(self._vm, before.process)
            yield machine, before

    def _tell(self, problem: DriverError | None) -> None:
        """Log that the machine cannot be reached: once, not at every look."""
        text = "" if problem is None else str(problem)
        if text and text != self._problem:
            log.warning("machine unreachable vm=%s problem=%s", self._vm, text)
        self._problem = text

    async def _start(
        self,
        command: Command,
        arguments: Arguments,
        machine: Machine | None,
        before: Observation,
    ) -> Observation:
        """Commit what is about to be taken; what was observed, in detail where it matters."""
        journal, reporter = self._desk.journal, self._desk.reporter
        containment = journal.containment(self._vm)
        if not arguments.dry_run:
            if command.action is Action.SANDBOX and machine is not None:
                before = await look_closer(machine, before)
            overlays = self._desk.means.overlays / command.id
            containment = wanted_containment(
                command.action, before, containment, arguments, overlays
            )
            if containment is not None and command.action in {Action.FREEZE, Action.SANDBOX}:
                containment = replace(containment, command=command.id)
        with transaction(self._desk.database):
            journal.start(command, before, containment)
            reporter.post(reporter.sign(command, ReportState.STARTED))
        self._desk.wake()
        return before

    def _step(self, command: Command, text: str) -> None:
        reporter = self._desk.reporter
        with transaction(self._desk.database):
            reporter.post(reporter.sign(command, ReportState.PROGRESS, step=text))
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
