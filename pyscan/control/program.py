"""`pyscan control`: answers verdicts by policy, with signed commands to the agents.

A command is published until the broker has it, and again, the same bytes, at growing
intervals until its agent has answered: a broker that is killed may lose what it has
confirmed, or the agent's session. The agent knows the command by its id.

A command that expires without a final report, or fails for a reason that may pass, is
followed by a *new* command (fresh id, sequence and signature) while its incident is open.
That cannot double an effect: the old one is refused by its `exp` by then, and actions name
a state.

Nothing that must survive is kept here: the store has it. Several workers of one group share
the load and the store; each follows up on its own commands, and on those of a worker that
is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from pyscan import protocol, runtime
from pyscan.config import ControlConfig, load_control
from pyscan.control.clerk import Clerk, Heard, Office
from pyscan.control.database import open_engine, sqlite_url
from pyscan.control.store import Note, Store, Unanswered, Waiting
from pyscan.control.waiting import WaitingMessages
from pyscan.errors import Rejected, StoreUnavailable, TransportError
from pyscan.evidence import EvidenceLog
from pyscan.keys import KeyRing
from pyscan.protocol import Topic, TopicKind
from pyscan.records import Cause, Report, Verdict
from pyscan.transport import RECEIVE_MAX, Link, LinkState, Message, Publication
from pyscan.trust import Role

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

NAME: Final = "control"
#: How often unanswered commands are looked at.
REVIEW_INTERVAL_S: Final = 0.5
#: How often this worker shows that it lives, and old verdicts are forgotten.
BEAT_INTERVAL_S: Final = 2.5
#: Pause before a command without a final report is published again; it doubles each time.
REPEAT_FIRST_S: Final = 1.0
#: Pause before a store that is away is asked again.
STORE_RETRY_S: Final = 1.0
REJECTIONS_BURST: Final = 32
REJECTIONS_PER_S: Final = 2.0


def run_program(path: Path, check_only: bool) -> int:
    """Run the control until a signal; returns its exit status."""
    return runtime.run_program(NAME, path, load_control, run, check_only=check_only)


async def run(config: ControlConfig) -> None:
    """Answer verdicts until cancelled."""
    config.state.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    identity = config.identity
    with (
        ThreadPoolExecutor(1, thread_name_prefix="store") as thread,
        EvidenceLog.open(config.state.evidence, identity.key, identity.name) as evidence,
    ):
        await _Control(config, evidence, thread).run()


class _Control:
    """Verdicts in, commands out, reports in."""

    def __init__(
        self, config: ControlConfig, evidence: EvidenceLog, thread: ThreadPoolExecutor
    ) -> None:
        self._config = config
        self._name = config.identity.name
        self._policy = config.policy.policy()
        self._keeper = config.keeper()
        self._evidence = evidence
        self._thread = thread
        self._waiting = WaitingMessages()
        self._rejections = runtime.RateBound(REJECTIONS_BURST, REJECTIONS_PER_S)
        self._repeats: dict[str, tuple[float, float]] = {}  # command -> when next, pause after
        self._hopeless: set[str] = set()
        self._inbox: asyncio.Queue[Message] = asyncio.Queue(RECEIVE_MAX)
        share = f"$share/{config.group}/" if config.group else ""
        self._link = Link(
            config.link_settings(NAME),
            [
                share + protocol.subscription(TopicKind.VERDICT),
                share + protocol.subscription(TopicKind.REPORT),
            ],
        )

    async def run(self) -> None:
        """All stages; ends only by cancellation or an error."""
        url = self._config.store.url or sqlite_url(self._config.state.database)
        self._store = Store(await self._call(lambda: open_engine(url)))
        office = Office(
            self._name, self._config.identity.key, self._policy, self._config.command_lifetime_s
        )
        self._clerk = Clerk(office, self._store, self._evidence)
        try:
            await self._load_waiting()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keeper.watch(), name="keys")
                group.create_task(self._link.run(), name="link")
                group.create_task(self._link.pump(self._waiting), name="pump")
                group.create_task(self._receive(), name="intake")
                group.create_task(self._work(), name="work")
                group.create_task(self._review(), name="review")
                runtime.note_state(NAME, runtime.ProgramState.RUNNING)
                self._log_policy()
        finally:
            self._thread.submit(self._leave).result()

    def _log_policy(self) -> None:
        log.info(
            "policy enforce=%s unapproved=%s undecided=%s protected=%d rules=%d",
            self._policy.enforce,
            self._policy.unapproved,
            self._policy.undecided or "alarm",
            len(self._policy.protected_vms),
            len(self._policy.rules),
        )

    def _leave(self) -> None:
        """Let the store know what was sent, if it is there."""
        with contextlib.suppress(StoreUnavailable), self._store.transaction() as books:
            books.sent(self._waiting.sent_numbers())
        self._store.close()

    async def _call(self, call: Callable[[], ResultT]) -> ResultT:
        """Run a blocking call in the store's thread. Cancelled, it first waits for its end."""
        task = asyncio.wrap_future(self._thread.submit(call))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait({task})
            raise

    async def _load_waiting(self) -> None:
        def load() -> list[Waiting]:
            with self._store.transaction() as books:
                return books.waiting(self._name)

        self._publish(await self._call(load))

    def _publish(self, messages: list[Waiting]) -> None:
        if messages:
            self._waiting.add(messages)
            self._link.wake()

    # ----------------------------------------------------------------------------- intake

    async def _receive(self) -> None:
        async for message in self._link.messages:
            await self._inbox.put(message)

    async def _work(self) -> None:
        """Take messages as many at a time as there are, for ever."""
        while True:
            batch = [await self._inbox.get()]
            while len(batch) < RECEIVE_MAX and not self._inbox.empty():
                batch.append(self._inbox.get_nowait())
            while self._waiting.full:
                log.error("verdicts wait: the outbox is full; bring the broker back")
                await asyncio.sleep(STORE_RETRY_S)
            self._publish(await self._taken(batch))
            for message in batch:
                message.acknowledge()

    async def _taken(self, batch: list[Message]) -> list[Waiting]:
        """Take a batch, however long the store is away."""
        rings = {
            TopicKind.VERDICT: self._keeper.ring(Role.MONITOR),
            TopicKind.REPORT: self._keeper.ring(Role.AGENT),
        }
        heard = await self._call(lambda: self._verified(batch, rings))
        lost = False
        while True:
            try:
                messages = await self._call(lambda: self._clerk.take(heard))
                if lost:  # the commit may have succeeded with its answer lost
                    await self._load_waiting()
            except StoreUnavailable as error:
                lost = True
                log.warning("store away problem=%s", error)
                await asyncio.sleep(STORE_RETRY_S)
            else:
                return messages

    def _verified(self, batch: list[Message], rings: Mapping[TopicKind, KeyRing]) -> list[Heard]:
        heard = []
        for message in batch:
            try:
                heard.append(_verify(message, rings))
            except Rejected as rejected:
                self._reject(rejected, message)
        return heard

    def _reject(self, rejected: Rejected, message: Message) -> None:
        if not self._rejections.allow():
            return
        log.warning(
            "message rejected topic=%s problem=%s not_recorded_before=%d",
            message.topic,
            rejected,
            self._rejections.held_back,
        )
        self._evidence.append(
            "rejected",
            {
                "topic": message.topic,
                "reason": str(rejected.reason),
                "envelope": message.payload[: protocol.VERDICT_BYTES_MAX],
            },
        )

    # ------------------------------------------------------------------------- follow-up

    async def _review(self) -> None:
        """Follow up on commands that were not answered, for ever."""
        beat_at = float("-inf")
        while True:
            now = time.monotonic()
            beat = now >= beat_at + BEAT_INTERVAL_S
            if beat:
                beat_at = now
            try:
                await self._review_once(beat=beat)
            except StoreUnavailable as error:
                log.warning("store away problem=%s", error)
            await asyncio.sleep(REVIEW_INTERVAL_S)

    async def _review_once(self, *, beat: bool) -> None:
        sent = self._waiting.sent_numbers()
        adopted, unanswered_now = await self._call(lambda: self._look(sent, beat=beat))
        self._waiting.forget_sent(sent)
        if adopted:
            log.warning("work of a worker that is gone taken over")
            await self._load_waiting()
        waiting = {unanswered.command_id for unanswered in unanswered_now}
        self._repeats = {key: due for key, due in self._repeats.items() if key in waiting}
        self._hopeless &= waiting
        for unanswered in unanswered_now:
            if unanswered.hopeless:
                self._note_hopeless(unanswered)
            elif self._may_retry(unanswered):
                await self._retry(unanswered)
            else:
                await self._repeat(unanswered)

    def _look(self, sent: list[int], *, beat: bool) -> tuple[bool, list[Unanswered]]:
        adopted = False
        with self._store.transaction() as books:
            books.sent(sent)
            if beat:
                adopted = books.beat(self._name, time.time_ns())
                books.forget_verdicts(time.time_ns())
            notes: list[Note] = books.take_notes()
            self._clerk.take_notes(notes)
            return adopted, books.unanswered(self._name)

    async def _repeat(self, unanswered: Unanswered) -> None:
        """Publish the same command again when its answer is overdue."""
        command_id, now = unanswered.command_id, time.monotonic()
        if (
            unanswered.final
            or time.time() >= unanswered.expires_s
            or not self._may_send(command_id)
        ):
            return
        if command_id not in self._repeats:
            self._repeats[command_id] = (now + REPEAT_FIRST_S, REPEAT_FIRST_S)
            return
        due, pause_s = self._repeats[command_id]
        if now < due:
            return
        self._repeats[command_id] = (now + 2 * pause_s, 2 * pause_s)
        incident = unanswered.incident
        topic = protocol.command_topic(incident.host, incident.vm)
        log.info("command repeated id=%s host=%s vm=%s", command_id, incident.host, incident.vm)
        envelope = await self._call(lambda: self._envelope(command_id))
        with contextlib.suppress(TransportError):
            await self._link.publish(Publication(topic, envelope))

    def _envelope(self, command_id: str) -> bytes:
        with self._store.transaction() as books:
            return books.envelope(command_id)

    def _may_send(self, command_id: str) -> bool:
        """Whether the broker is there and has taken the command before."""
        return self._link.state is LinkState.ONLINE and not self._waiting.holds(command_id)

    def _may_retry(self, unanswered: Unanswered) -> bool:
        """Not before the last attempt is void and has left: no pile of commands behind a broker."""
        return (
            self._policy.enforce
            and time.time() > unanswered.due_s
            and self._may_send(unanswered.command_id)
        )

    async def _retry(self, unanswered: Unanswered) -> None:
        incident = unanswered.incident
        cause = Cause(incident.id, unanswered.finding, unanswered.verdict)
        attempt = unanswered.attempt + 1
        self._publish(await self._call(lambda: self._clerk.retry(incident, cause, attempt)))

    def _note_hopeless(self, unanswered: Unanswered) -> None:
        if unanswered.command_id in self._hopeless:
            return
        self._hopeless.add(unanswered.command_id)
        log.error(
            "incident needs a person id=%s target=%s command=%s state=%s reason=%s",
            unanswered.incident.id,
            unanswered.incident.target,
            unanswered.command_id,
            unanswered.state,
            unanswered.reason,
        )


def _verify(message: Message, rings: Mapping[TopicKind, KeyRing]) -> Heard:
    """A verdict or a report. Raises Rejected."""
    topic, envelope = message.topic, message.payload
    content: Verdict | Report
    if Topic.parse(topic).kind is TopicKind.VERDICT:
        ring = rings[TopicKind.VERDICT]
        content = protocol.decode_verdict(envelope, ring, topic=topic, now_ns=time.time_ns())
    else:
        content = protocol.decode_report(envelope, rings[TopicKind.REPORT], topic=topic)
    return Heard(content, topic, envelope)
