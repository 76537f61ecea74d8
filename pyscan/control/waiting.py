"""The messages that this worker still has to publish, for `Link.pump`.

They are in the store since the transaction that they tell of; here is a copy, so that the
event loop never waits for a database. What was sent is taken out of the store a little
later: after a crash in between, the same bytes leave once more.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice

from pyscan.control.store import Waiting
from pyscan.outbox import Outgoing

#: A broker that is away must not fill the store: no more verdicts are taken then.
MESSAGES_MAX = 10_000
PENDING_MAX = 64


class WaitingMessages:
    """A copy of this worker's outbox, in its order. For the event loop's thread only."""

    def __init__(self) -> None:
        self._waiting: dict[int, Waiting] = {}
        self._sent: set[int] = set()

    @property
    def full(self) -> bool:
        """Whether more may not be put."""
        return len(self._waiting) >= MESSAGES_MAX

    def add(self, messages: Iterable[Waiting]) -> None:
        """Take what was committed; what is here already, or was sent, changes nothing."""
        for message in messages:
            if message.number not in self._sent:
                self._waiting.setdefault(message.number, message)

    def holds(self, message_id: str) -> bool:
        """Whether a message still waits."""
        return any(message.message_id == message_id for message in self._waiting.values())

    def pending(self) -> list[Outgoing]:
        """The oldest waiting messages."""
        now_s = int(time.time())
        return [
            Outgoing(
                number=message.number,
                message_id=message.message_id,
                topic=message.topic,
                payload=message.payload,
                retain=False,
                expiry_s=max(1, message.expires_s - now_s),
                correlation=message.message_id.encode("ascii"),
            )
            for message in islice(self._waiting.values(), PENDING_MAX)
        ]

    def sent(self, number: int) -> None:
        """The broker has the message."""
        if self._waiting.pop(number, None) is not None:
            self._sent.add(number)

    def sent_numbers(self) -> list[int]:
        """What the store does not know yet to be sent."""
        return sorted(self._sent)

    def forget_sent(self, numbers: Iterable[int]) -> None:
        """The store knows."""
        self._sent.difference_update(numbers)
