"""``edu:`` - QEMU's educational device as a bus master, for conformance.

It is slow (a transfer takes 100 ms of the machine's time) and reports no error, but it does
DMA only with bus mastering on and only where an IOMMU lets it. A page goes in two halves
from the server's memory into the device's buffer, and from there into the card's own memory.

A refused transfer to memory changes nothing, and a refused transfer into the buffer leaves
zeros there. So the card's memory is filled with a secret word before, and a page with a half
of zeros counts as refused: this device cannot tell the two apart.

Source: QEMU hw/misc/edu.c and docs/specs/edu.rst.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from pyscan.records import PAGE_SHIFT, PAGE_SIZE, PageStatus
from pyscan.sources.base import Frames, Pages, Statuses
from pyscan.sources.engine import (
    CardMemory,
    Engine,
    EngineSource,
    EngineStopped,
    parse_slot,
)
from pyscan.sources.machines import uri_layout
from pyscan.sources.pci import COMMAND_BUS_MASTER, COMMAND_MEMORY, PciBus, Registers, Slot
from pyscan.sources.qtest import QtestClient
from pyscan.sources.uri import SourceUri

#: Vendor and device.
EDU_ID = (0x1234, 0x11E8)

_REGISTER_BYTES = 1 << 20
_IDENTITY, _SOURCE, _DESTINATION, _COUNT, _COMMAND = 0x00, 0x80, 0x88, 0x90, 0x98
_RUN, _TO_MEMORY = 1 << 0, 1 << 1
_BUFFER = 0x4_0000

#: A transfer of the whole buffer of 4096 bytes ends QEMU 7.2 (edu_check_range).
_TRANSFER_BYTES = 2048

#: A page of the card's memory that no other engine uses at the same time.
_LANDING = 0x1000

_TIMEOUT_S = 2.0
_POLL_S = 0.005


class EduEngine(Engine):
    """The device, and the card's memory that it writes to."""

    def __init__(self, memory: CardMemory, registers: Registers, stack: ExitStack) -> None:
        """Take over what `stack` closes. Raises EngineStopped, SourceUnavailable."""
        self._memory = memory
        self._registers = registers
        self._secret = os.urandom(8)
        self.check()
        self._contents = stack.pop_all()

    def check(self) -> None:
        """See `Engine.check`."""
        if self._registers.load(_IDENTITY, 4) & 0xFF != 0xED:
            raise EngineStopped(PageStatus.LINK_DOWN, "the edu device is gone from the bus")

    def read(self, frames: Frames, buffer: Pages, rows: NDArray[np.intp]) -> Statuses:
        """See `Engine.read`."""
        statuses = np.full(len(frames), PageStatus.BLOCKED, dtype=np.uint8)
        for index, (frame, row) in enumerate(zip(frames.tolist(), rows.tolist(), strict=True)):
            statuses[index] = self._read_page(frame << PAGE_SHIFT, buffer[row])
        return statuses

    def close(self) -> None:
        """Close connection and files."""
        self._contents.close()

    def _read_page(self, address: int, page: NDArray[np.uint8]) -> PageStatus:
        file = self._memory.file
        file.write(self._secret * (PAGE_SIZE // 8), _LANDING)
        for half in range(0, PAGE_SIZE, _TRANSFER_BYTES):
            self._transfer(address + half, _BUFFER, 0)
            self._transfer(_BUFFER, self._memory.address + _LANDING + half, _TO_MEMORY)
        file.read_into([page.data], _LANDING)
        halves = page.reshape(-1, _TRANSFER_BYTES)
        secret = np.frombuffer(self._secret, dtype=np.uint8)
        if any((half[-8:] == secret).all() or not half.any() for half in halves):
            return PageStatus.BLOCKED
        return PageStatus.OK

    def _transfer(self, source: int, destination: int, direction: int) -> None:
        self._registers.store(
            (_SOURCE, 8, source),
            (_DESTINATION, 8, destination),
            (_COUNT, 8, _TRANSFER_BYTES),
            (_COMMAND, 8, _RUN | direction),
        )
        deadline_s = monotonic() + _TIMEOUT_S
        while (command := self._registers.load(_COMMAND, 8)) & _RUN:
            if command >> 32:
                raise EngineStopped(PageStatus.LINK_DOWN, "the edu device is gone from the bus")
            if monotonic() > deadline_s:
                raise EngineStopped(PageStatus.TIMEOUT, "the edu device does not finish")
            time.sleep(_POLL_S)


def open_edu(uri: SourceUri) -> EngineSource:
    """Open ``edu:QTEST-SOCKET?memory=FILE`` with machine and size, or map.

    Raises UsageError, ConfigError, SourceUnavailable.
    """
    uri.allow("memory", "machine", "size", "map", "device", "card")
    uri.require("memory")
    device, card = parse_slot(uri, "device"), parse_slot(uri, "card")
    layout = uri_layout(uri)

    def connect() -> EduEngine:
        return _connect(uri, device, card)

    return EngineSource(uri.text, layout, connect)


def _connect(uri: SourceUri, device: Slot | None, card: Slot | None) -> EduEngine:
    with ExitStack() as stack:
        client = stack.enter_context(QtestClient(Path(uri.path)))
        bus = PciBus(client)
        slot = bus.find(*EDU_ID, "edu device", device)
        bus.set_command(slot, COMMAND_MEMORY | COMMAND_BUS_MASTER)
        memory = CardMemory.open(client, bus, Path(uri.parameters["memory"]), card, stack)
        return EduEngine(memory, bus.registers(slot, 0, _REGISTER_BYTES), stack)
