"""The emulated PCI Express link between a card machine and a server (docs/spec/card-link.md, 7).

The card asks for reads and writes of its engine's registers through the mailbox; this thread
carries them out on the server's bus. It also plays the platform's firmware and driver: it
enables the card's functions. Pages, queues and lists never come through here.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep
from typing import Final, Self

from pyscan.errors import LabError, SourceUnavailable
from pyscan.lab.bus import ENGINE_SLOT, MEMORY_SLOT
from pyscan.sources.link import (
    BUS_BYTES,
    BUS_READ,
    BUS_REPLY,
    BUS_REPLY_AT,
    BUS_REQUEST,
    BUS_REQUEST_AT,
    BUS_WRITE,
    BusReply,
    BusRequest,
)
from pyscan.sources.mailbox import FileMailbox
from pyscan.sources.pci import COMMAND_BUS_MASTER, COMMAND_MEMORY, PciBus, Slot
from pyscan.sources.qtest import QtestClient

#: A link that is down is tried again this often.
RETRAIN_S: Final = 0.1

#: After an access the next one is near, and looked for often; later, processors have other work.
_HOT_S: Final = 0.005
_PAUSE_HOT_S: Final = 2e-5
_PAUSE_IDLE_S: Final = 1e-3

_COMMAND_AT: Final = 4  # command register in configuration space, PCI 3.0, 6.1
_ENABLED: Final = COMMAND_MEMORY | COMMAND_BUS_MASTER
_ALL_ONES: Final = (1 << 64) - 1  # what a bus without an answer reads as
_PAGE: Final = 4096


class CardLink:
    """Serves one card's mailbox from one server's bus; leaving the context ends it.

    `take_down` and `bring_back` are for tests: a cable that is pulled. The link also goes down
    by itself while the server is away, and comes back with it.
    """

    def __init__(self, mailbox: Path, qtest_socket: Path) -> None:
        """Start. Raises LabError when the mailbox cannot be opened."""
        self._qtest_socket = qtest_socket
        self._bus: _TrainedBus | None = None
        self._generation = 0
        self._retry_s = 0.0
        self._pulled = threading.Event()
        self._leave = threading.Event()
        self.served = 0  # accesses that reached the bus
        self.refused = 0  # accesses outside of the engine's registers
        try:
            fd = os.open(mailbox, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise LabError(f"{mailbox}: cannot open the mailbox: {error.strerror}") from error
        self._mailbox = FileMailbox(mailbox, fd)
        reply = BUS_REPLY.decode(self._mailbox.read(BUS_REPLY_AT, BUS_REPLY.size))
        self._answered = reply.sequence
        self._thread = threading.Thread(target=self._run, name="card-link", daemon=True)
        self._thread.start()

    @property
    def up(self) -> bool:
        """Whether accesses reach the bus now."""
        return self._bus is not None and not self._pulled.is_set()

    def wait_up(self, timeout_s: float = 10.0) -> None:
        """Wait until the link is up. Raises LabError."""
        deadline_s = monotonic() + timeout_s
        while not self.up:
            if monotonic() > deadline_s:
                raise LabError(f"the card's link is not up within {timeout_s:g} s")
            sleep(_PAUSE_IDLE_S)

    def take_down(self) -> None:
        """Pull the cable."""
        self._pulled.set()

    def bring_back(self) -> None:
        """Plug it in again; the card starts its engine anew."""
        self._pulled.clear()

    def close(self) -> None:
        """End the thread. Idempotent."""
        if self._leave.is_set():
            return
        self._leave.set()
        self._thread.join()
        self._drop()
        self._mailbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _run(self) -> None:
        busy_s = 0.0
        while not self._leave.is_set():
            self._train()
            request = BUS_REQUEST.decode(self._mailbox.read(BUS_REQUEST_AT, BUS_REQUEST.size))
            if request.sequence != self._answered:
                self._answer(request, self._serve(request))
                busy_s = monotonic()
            else:
                hot = monotonic() - busy_s < _HOT_S
                sleep(_PAUSE_HOT_S if hot else _PAUSE_IDLE_S)

    def _train(self) -> None:
        """Take a link that is down up again, now and then; drop one that was pulled."""
        if self._pulled.is_set():
            self._drop()
        elif self._bus is None and monotonic() >= self._retry_s:
            self._retry_s = monotonic() + RETRAIN_S
            try:
                self._bus = _TrainedBus(self._qtest_socket)
            except SourceUnavailable:
                return  # the server is away, or its firmware has not placed the functions yet
            self._generation += 1

    def _drop(self) -> None:
        bus, self._bus = self._bus, None
        if bus is not None:
            bus.close()

    def _serve(self, request: BusRequest) -> int:
        """The value that was read, or all ones; a link that is down is None afterwards."""
        if not _is_register(request):
            self.refused += 1
            return _ALL_ONES
        if self._bus is None:
            return _ALL_ONES
        try:
            value = self._bus.access(request)
        except SourceUnavailable:
            self._drop()
            return _ALL_ONES
        self.served += 1
        return value

    def _answer(self, request: BusRequest, value: int) -> None:
        bus = self._bus
        reply = BusReply(
            request.sequence,
            up=bus is not None,
            value=value,
            engine_memory=bus.memory if bus is not None else 0,
            generation=self._generation & 0xFFFF_FFFF,
        )
        data = BUS_REPLY.encode(reply)
        self._mailbox.write(BUS_REPLY_AT + 4, data[4:])
        self._mailbox.write(BUS_REPLY_AT, data[:4])  # the sequence number last
        self._answered = request.sequence


class _TrainedBus:
    """The server's bus with the card's functions enabled."""

    def __init__(self, qtest_socket: Path) -> None:
        """Connect and enable. Raises SourceUnavailable."""
        engine, memory = Slot.parse(ENGINE_SLOT), Slot.parse(MEMORY_SLOT)
        with ExitStack() as stack:
            client = QtestClient(qtest_socket)
            stack.callback(client.close)
            self._bus = PciBus(client)
            self._registers = self._bus.registers(engine, 0, BUS_BYTES)
            self.memory = self._bus.registers(memory, 2, _PAGE).address
            self._bus.set_command(engine, _ENABLED)
            self._bus.set_command(memory, COMMAND_MEMORY)
            self._engine = engine
            self._connection = stack.pop_all()

    def access(self, request: BusRequest) -> int:
        """Read or write a register. Raises SourceUnavailable."""
        if request.op == BUS_WRITE:
            value = request.value & ((1 << 8 * request.width) - 1)
            self._registers.store((request.offset, request.width, value))
            return 0
        value = self._registers.load(request.offset, request.width)
        # Nothing answers at the place of a function that was reset: it must be enabled anew.
        if value == 0:
            self._check()
        return value

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _check(self) -> None:
        """Raise SourceUnavailable unless the engine still is where it was, and enabled."""
        enabled = self._bus.space.read(self._engine, _COMMAND_AT, 2) & _ENABLED
        if enabled != _ENABLED or (
            self._bus.registers(self._engine, 0, BUS_BYTES).address != self._registers.address
        ):
            raise SourceUnavailable("the engine was reset; the link must be trained anew")


def _is_register(request: BusRequest) -> bool:
    """Whether a request is one that the link carries out."""
    return (
        request.op in {BUS_READ, BUS_WRITE}
        and request.width in {4, 8}
        and request.offset % request.width == 0
        and request.offset <= BUS_BYTES - request.width
    )
