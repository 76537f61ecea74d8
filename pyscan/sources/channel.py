"""The host's side of the link to a card: sessions and commands (docs/spec/card-link.md, 3 and 4).

Nothing that the card writes is believed before it was copied and checked: a card can be
hostile, hang, restart at any moment, and be read in the midst of a write.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Final

from pyscan.errors import SourceUnavailable
from pyscan.records import PageStatus
from pyscan.sources import link
from pyscan.sources.link import CardPage, CardState, Completion, Op, Region, Result
from pyscan.sources.mailbox import Mailbox, read_card

#: A card that does not take a session in this time is not there.
SESSION_S: Final = 1.0
#: Time limit of one command, from the moment that it is the oldest (4.5).
COMMAND_S: Final = 20.0
#: A heartbeat that rests for so long, and for so many looks at it, is a dead card's (3.5). The
#: looks are for this side: it may have been asleep itself.
HEARTBEAT_S: Final = 1.0
_LOOKS_MIN: Final = 50
#: What does not fit may be in the midst of being written for so long (4.4).
TORN_S: Final = 0.01
#: Pause before a card that failed without a restart is tried again.
RETRY_S: Final = 0.5
#: How often the host's own heartbeat rises.
BEAT_S: Final = 0.2

_PAUSE_MIN_S: Final = 2e-5
_PAUSE_MAX_S: Final = 1e-3
_HEARTBEAT_AT: Final = link.HOST_AT + link.HOST_PAGE.places()["heartbeat"][0]
_SESSION_AT: Final = link.HOST_AT + link.HOST_PAGE.places()["session"][0]
_SUBMITTED_AT: Final = link.HOST_AT + link.HOST_PAGE.places()["submitted"][0]


class LinkLost(SourceUnavailable):
    """The commands under way came to nothing; `status` is what becomes of their pages."""

    def __init__(self, status: PageStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Command:
    """What the card is asked for; `arguments` is what stands in the slot."""

    op: Op
    count: int = 0
    kinds: int = 0
    flags: int = 0
    first: int = 0
    arguments: bytes = b""


#: Called with the number of a command, its completion, and where its slot's data lies.
Take = Callable[[int, Completion, int], None]


class Channel:
    """A connection to a card, which ends and begins anew as cards come and go.

    For one caller at a time; `stop` may come from another thread. `regions` is the target's
    memory map, which the card is told in every session.
    """

    def __init__(self, name: str, mailbox: Mailbox, regions: Sequence[Region]) -> None:
        self._name = name
        self._mailbox = mailbox
        self._regions = tuple(regions)
        self._session = 0
        self._boot = 0
        self._submitted = 0
        self._failure: _Failure | None = None
        self._stopped = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="pyscan-card", daemon=True)
        self._heart.start()

    @property
    def boot(self) -> int:
        """Names the start of the card that was spoken to last, and so its key; 0 for none."""
        return self._boot

    def ready(self) -> None:
        """Make sure that there is a session. Raises LinkLost."""
        card = self._look()
        if self._session and self._serves(card):
            return
        failure, self._session = self._failure, 0
        if failure is not None and failure.lasts(card):
            raise LinkLost(failure.lost.status, str(failure.lost))
        try:
            self._begin()
        except LinkLost as lost:
            self._session = 0
            # As the card is now: one whose page moves later is alive again.
            self._failure = _Failure(lost, self._look(), monotonic() + RETRY_S)
            raise
        self._failure = None

    def run(self, commands: Sequence[Command], take: Take) -> None:
        """Carry out commands in order, as many at a time as there are slots.

        `take` gets every completion, whose result is OK, while its slot still holds the data.
        Raises LinkLost: what `take` has not got came to nothing, and the session is over.
        """
        if self._submitted + len(commands) >= link.SEQUENCE_MAX:
            self._session = 0
        self.ready()
        try:
            self._run(commands, take)
        except SourceUnavailable as error:
            self._session = 0
            if isinstance(error, LinkLost):
                raise
            raise LinkLost(PageStatus.LINK_DOWN, str(error)) from error

    def stop(self) -> None:
        """End the command under way with LinkLost, and everything that comes. Idempotent."""
        self._stopped.set()

    def close(self) -> None:
        """End the session and close the mailbox. After `stop`, and once nothing runs."""
        self._heart.join()
        with suppress(SourceUnavailable):
            self._write_u64(_SESSION_AT, 0)
        self._mailbox.close()

    # ---- sessions ----

    def _begin(self) -> None:
        """A new session, with the memory map in it. Raises LinkLost."""
        watch = _Watch()
        self._wait(watch, lambda card: card.magic == link.CARD_MAGIC, "there is no running card")
        card = self._look()
        if not card.version_min <= link.VERSION <= card.version_max:
            raise self._lost(
                f"the card speaks versions {card.version_min} to {card.version_max} of the link, "
                f"this program {link.VERSION}; update the older one"
            )
        session = secrets.randbits(64) | 1
        self._submitted = 0
        self._write_u64(_SUBMITTED_AT, 0)
        page = link.HostPage(link.HOST_MAGIC, link.VERSION, 0, 0, 0)
        self._write(link.HOST_AT, link.HOST_PAGE.encode(page)[:_HEARTBEAT_AT])
        self._write_u64(_SESSION_AT, session)
        card = self._wait(
            watch,
            lambda card: session in {card.session, card.refused},
            "the card took no session; check that it runs",
        )
        if card.refused == session:
            raise self._lost("the card refused a session; 'pyscan card log' says why")
        self._session, self._boot = session, card.boot
        arguments = b"".join(link.REGION.encode(region) for region in self._regions)
        told = Command(Op.MAP, len(self._regions), arguments=arguments)
        self._run([told], lambda _number, _completion, _at: None)

    def _wait(self, watch: _Watch, holds: Callable[[CardPage], bool], why: str) -> CardPage:
        """The card's page once `holds` is true of it. Raises LinkLost."""
        while not holds(card := self._look()):
            if watch.waited_s() > SESSION_S:
                raise self._lost(why)
            _pause(watch)
        return card

    def _serves(self, card: CardPage) -> bool:
        return (
            card.magic == link.CARD_MAGIC
            and card.boot == self._boot
            and card.session == self._session
            and card.state == CardState.READY
        )

    def _look(self) -> CardPage:
        """The card's page. Raises LinkLost."""
        if self._stopped.is_set():
            raise LinkLost(PageStatus.LINK_DOWN, f"{self._name}: closed; open the source again")
        try:
            return read_card(self._mailbox)
        except SourceUnavailable as error:
            raise LinkLost(PageStatus.LINK_DOWN, str(error)) from error

    # ---- commands ----

    def _run(self, commands: Sequence[Command], take: Take) -> None:
        first, sent = self._submitted + 1, 0
        watch = _Watch()
        for number, command in enumerate(commands):
            for each in commands[sent : number + link.SLOTS]:
                self._submit(each)
                sent += 1
            self._write_u64(_SUBMITTED_AT, self._submitted)
            completion = self._await(first + number, command, watch)
            take(number, completion, link.data_at(first + number))

    def _submit(self, command: Command) -> None:
        """Put a command into its slot."""
        self._submitted += 1
        sequence = self._submitted
        self._write(link.data_at(sequence), command.arguments)
        submission = link.Submission(
            sequence,
            command.op,
            command.flags,
            command.count,
            command.kinds,
            self._session,
            command.first,
        )
        at = link.SUBMISSIONS_AT + link.slot_of(sequence) * link.SUBMISSION.size
        self._write(at, link.SUBMISSION.encode(submission))

    def _await(self, sequence: int, command: Command, watch: _Watch) -> Completion:
        """The completion of the oldest command under way. Raises LinkLost."""
        watch.restart()
        while True:
            card = self._look()
            if not self._serves(card):
                raise self._lost("the card was restarted, or its session ended")
            if card.completed >= sequence:
                completion = self._completion(sequence, command)
                if completion is not None and card.completed <= self._submitted:
                    break
                if watch.misfits_s() > TORN_S:
                    raise self._lost(f"the card's answer to command {sequence} does not fit")
            elif watch.rests(card.heartbeat):
                raise self._lost(f"the card has no heartbeat any more (command {sequence})")
            if watch.waited_s() > COMMAND_S:
                raise self._lost(f"no answer to command {sequence} in time", PageStatus.TIMEOUT)
            _pause(watch)
        if completion.result != Result.OK:
            raise self._lost(
                f"the card could not carry out command {sequence}: "
                f"{_result_text(completion.result)}; 'pyscan card log' says why"
            )
        return completion

    def _completion(self, sequence: int, command: Command) -> Completion | None:
        """The completion in the slot of `sequence`; None while it is not that of the command."""
        at = link.COMPLETIONS_AT + link.slot_of(sequence) * link.COMPLETION.size
        found = link.COMPLETION.unseal(self._mailbox.read(at, link.COMPLETION.size))
        if found is None or (found.sequence, found.op, found.session, found.boot) != (
            sequence,
            command.op,
            self._session,
            self._boot,
        ):
            return None
        pages = command.count if command.op in {Op.DIGEST, Op.READ} else 0
        whole = found.count == pages and found.ok <= pages
        return found if whole or found.result != Result.OK else None

    def _lost(self, why: str, status: PageStatus = PageStatus.LINK_DOWN) -> LinkLost:
        return LinkLost(status, f"{self._name}: {why}")

    # ---- the host's page ----

    def _write(self, at: int, data: bytes) -> None:
        try:
            self._mailbox.write(at, data)
        except SourceUnavailable as error:
            raise LinkLost(PageStatus.LINK_DOWN, str(error)) from error

    def _write_u64(self, at: int, value: int) -> None:
        """Eight aligned bytes, which the kernel copies as a whole; those behind it are zero."""
        self._write(at, value.to_bytes(8, "little"))

    def _beat(self) -> None:
        """Raise the host's heartbeat (3.5) until the channel stops."""
        beats = 0
        while not self._stopped.wait(BEAT_S):
            beats = (beats + 1) & 0xFFFF_FFFF
            with suppress(SourceUnavailable):
                self._mailbox.write(_HEARTBEAT_AT, beats.to_bytes(4, "little"))


class _Watch:
    """How long a card has been waited for, and for how long its heart has rested."""

    def __init__(self) -> None:
        self._heartbeat = -1
        self._looks = 0
        self._moved_s = monotonic()
        self.restart()

    def restart(self) -> None:
        """The next command is waited for."""
        self._since_s = monotonic()
        self._odd_s: float | None = None

    def waited_s(self) -> float:
        """Seconds since the restart."""
        return monotonic() - self._since_s

    def misfits_s(self) -> float:
        """Seconds since something did not fit for the first time."""
        now = monotonic()
        if self._odd_s is None:
            self._odd_s = now
        return now - self._odd_s

    def rests(self, heartbeat: int) -> bool:
        """Whether the heartbeat has rested for too long."""
        self._odd_s = None
        if heartbeat != self._heartbeat:
            self._heartbeat, self._looks, self._moved_s = heartbeat, 0, monotonic()
        self._looks += 1
        return self._looks > _LOOKS_MIN and monotonic() - self._moved_s > HEARTBEAT_S


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why there is no session, and the card's page at that moment."""

    lost: LinkLost
    card: CardPage
    until_s: float

    def lasts(self, card: CardPage) -> bool:
        """Whether the card rests as it was, or was tried a moment ago."""
        if (card.magic, card.boot) != (self.card.magic, self.card.boot):
            return False
        return card.heartbeat == self.card.heartbeat or monotonic() < self.until_s


def _pause(watch: _Watch) -> None:
    """Short while an answer is near, longer when it is not: processors have other work."""
    sleep(min(_PAUSE_MAX_S, max(_PAUSE_MIN_S, watch.waited_s() / 8)))


def _result_text(result: int) -> str:
    known = {each.value: each.name.lower() for each in Result}
    return known.get(result, f"unknown result {result}")
