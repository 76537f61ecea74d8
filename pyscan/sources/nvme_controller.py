"""An NVMe controller driven from beside the server: registers, queues, identity.

The queues lie in the card's own memory, which the controller reaches over the bus as it
reaches the server's. Registers and doorbells are the only loads and stores.

Source: NVM Express Base Specification 1.4; clauses in brackets. QEMU hw/nvme/ctrl.c.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from pyscan.errors import SourceUnavailable, UsageError
from pyscan.records import PageStatus
from pyscan.sources.engine import CardMemory, EngineStopped
from pyscan.sources.pci import Registers

#: Vendor and device of QEMU's controller, and the BAR of its registers [3.1].
NVME_ID = (0x1B36, 0x0010)
REGISTER_BAR = 0
REGISTER_BYTES = 0x2000

#: Submission queue entry [4.2] and completion queue entry [4.6]. `pointer` is PRP1 and PRP2,
#: or one SGL descriptor [4.4].
ENTRY = np.dtype(
    [
        ("opcode", "u1"),
        ("flags", "u1"),
        ("id", "<u2"),
        ("namespace", "<u4"),
        ("reserved", "<u8", (2,)),
        ("pointer", "<u8", (2,)),
        ("dwords", "<u4", (6,)),  # 10 to 15
    ]
)
_COMPLETION = np.dtype(
    [("result", "<u4", (2,)), ("head", "<u2"), ("queue", "<u2"), ("id", "<u2"), ("status", "<u2")]
)

#: Status code type and status code, without phase, More and Do Not Retry [4.6.1].
STATUS_MASK = 0x7FF
TRANSFER_ERROR = 0x04

#: Places in the card's memory. The first page is the mark by which both sides know it.
_ADMIN_SQ, _ADMIN_CQ, _IDENTITY, _IO_CQ, _IO_SQ = 0x1000, 0x2000, 0x3000, 0x4000, 0x1_0000
LISTS = 0x2_0000  # from here on free for PRP lists
_ADMIN_ENTRIES = 32
_IO_ENTRIES_MAX = 1024

# Registers [3.1].
_CAP, _CC, _CSTS, _AQA, _ASQ, _ACQ, _DOORBELLS = 0x00, 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
_CC_ENABLED = 4 << 20 | 6 << 16 | 1  # entries of 2**4 and 2**6 bytes, pages of 4 KiB, enabled
_READY, _FATAL = 1 << 0, 1 << 1
_ALL_ONES = 0xFFFF_FFFF

# Admin commands [5].
_CREATE_SQ, _CREATE_CQ, _IDENTIFY = 0x01, 0x05, 0x06
_IDENTIFY_NAMESPACE, _IDENTIFY_CONTROLLER = 0, 1
NAMESPACE = 1

#: Completions taken at a time.
_TAKEN_MAX = 64


@dataclass(frozen=True, slots=True)
class Namespace:
    """The controller's disk."""

    blocks: int
    block_bytes: int


class Queue:
    """A submission queue and its completion queue, of the same number and length."""

    def __init__(
        self, memory: CardMemory, registers: Registers, number: int, entries: int, stride: int
    ) -> None:
        self.number = number
        self.entries = entries
        self._file = memory.file
        self._registers = registers
        self.submission, self.completion = (_IO_SQ, _IO_CQ) if number else (_ADMIN_SQ, _ADMIN_CQ)
        self._doorbell = _DOORBELLS + 2 * number * stride
        self._stride = stride
        self._tail = 0
        self._head = 0
        self._phase = 1  # the memory was zeroed, so that nothing in it looks complete [4.6]

    def submit(self, entries: NDArray[np.void]) -> list[int]:
        """Put entries in the queue, and ring once; the place of each.

        The caller sees to it that they fit. Raises EngineStopped, SourceUnavailable.
        """
        places = [(self._tail + index) % self.entries for index in range(len(entries))]
        first = min(len(entries), self.entries - self._tail)
        self._file.write(entries[:first].tobytes(), self.submission + self._tail * ENTRY.itemsize)
        if first < len(entries):
            self._file.write(entries[first:].tobytes(), self.submission)
        self._tail = (self._tail + len(entries)) % self.entries
        self._registers.store(
            (self._doorbell, 4, self._tail), (self._doorbell + self._stride, 4, self._head)
        )
        return places

    def entry(self, place: int) -> bytes:
        """What stands in the submission queue at `place` now. Raises EngineStopped."""
        return self._file.read(ENTRY.itemsize, self.submission + place * ENTRY.itemsize)

    def take(self) -> list[tuple[int, int]]:
        """Id and status of the commands completed since the last call. Raises EngineStopped."""
        count = self._complete(1) and self._complete(min(_TAKEN_MAX, self.entries - self._head))
        if not count:
            return []
        # Again: an entry that was being written when its phase was seen is whole now.
        found = self._peek(count)
        self._head += count
        if self._head == self.entries:
            self._head = 0
            self._phase ^= 1
        statuses = found["status"] >> 1 & STATUS_MASK
        return list(zip(found["id"].tolist(), statuses.tolist(), strict=True))

    def _complete(self, limit: int) -> int:
        """How many of the next `limit` entries are complete."""
        waiting = np.flatnonzero((self._peek(limit)["status"] & 1) != self._phase)
        return int(waiting[0]) if len(waiting) else limit

    def _peek(self, count: int) -> NDArray[np.void]:
        size = _COMPLETION.itemsize
        data = self._file.read(count * size, self.completion + self._head * size)
        return np.frombuffer(data, dtype=_COMPLETION)


class Controller:
    """A controller with one pair of I/O queues; made, it is ready for commands."""

    def __init__(self, memory: CardMemory, registers: Registers, timeout_s: float) -> None:
        """Reset and enable the controller.

        Raises EngineStopped (BLOCKED when it cannot reach its queues), SourceUnavailable,
        UsageError.
        """
        self.memory = memory
        self._registers = registers
        self._timeout_s = timeout_s
        # Ids go on where nobody expects it: an answer to an earlier owner matches none.
        self._next_id = int.from_bytes(os.urandom(2), "little")
        capabilities = registers.load(_CAP, 8)
        if capabilities == 0xFFFF_FFFF_FFFF_FFFF:
            raise EngineStopped(PageStatus.LINK_DOWN, "the controller is gone from the bus")
        if capabilities >> 48 & 0xF or not capabilities >> 37 & 1:
            raise UsageError(
                f"the controller (CAP {capabilities:#x}) has no 4 KiB pages or no NVM commands; "
                "name QEMU's nvme device"
            )
        self._stride = 4 << (capabilities >> 32 & 0xF)
        entries = min(_IO_ENTRIES_MAX, (capabilities & 0xFFFF) + 1)
        if _DOORBELLS + 4 * self._stride > REGISTER_BYTES or entries < _TAKEN_MAX:
            raise UsageError(f"the controller (CAP {capabilities:#x}) is none that can be driven")
        self._enable()
        self.transfer_pages_max = self._identify_controller()
        self.namespace = self._identify_namespace()
        self.queue = self._create_queue(entries)

    def next_id(self) -> int:
        """An id for a command; the same comes again after 65,535 others."""
        self._next_id = (self._next_id + 1) % 0xFFFF  # 0xffff names no command [4.6.1.2]
        return self._next_id

    def check(self) -> None:
        """Raise EngineStopped unless the controller is up. Raises SourceUnavailable."""
        status = self._registers.load(_CSTS, 4)
        if status == _ALL_ONES:
            raise EngineStopped(PageStatus.LINK_DOWN, "the controller is gone from the bus")
        if status & _FATAL:
            raise EngineStopped(
                PageStatus.BLOCKED,
                "the controller cannot reach its queues: an IOMMU or the bus refuses it",
            )
        if not status & _READY:
            raise EngineStopped(PageStatus.LINK_DOWN, "the server has reset the controller")

    def wait(self, queue: Queue, deadline_s: float) -> list[tuple[int, int]]:
        """Id and status of completed commands, at least one.

        Raises EngineStopped, SourceUnavailable.
        """
        while not (completed := queue.take()):
            self.check()  # over the socket: also gives way to QEMU
            if monotonic() > deadline_s:
                raise EngineStopped(PageStatus.TIMEOUT, "the controller does not complete commands")
        return completed

    def close(self) -> None:
        """Disable the controller: it moves nothing more."""
        with suppress(SourceUnavailable):
            self._registers.store((_CC, 4, 0))

    def _enable(self) -> None:
        self._registers.store((_CC, 4, 0))
        self._wait_ready(0)
        self.memory.file.write(bytes(LISTS - _ADMIN_SQ), _ADMIN_SQ)
        self._admin = Queue(self.memory, self._registers, 0, _ADMIN_ENTRIES, self._stride)
        last = _ADMIN_ENTRIES - 1
        self._registers.store(
            (_AQA, 4, last << 16 | last),
            (_ASQ, 8, self.memory.address + _ADMIN_SQ),
            (_ACQ, 8, self.memory.address + _ADMIN_CQ),
            (_CC, 4, _CC_ENABLED),
        )
        self._wait_ready(_READY)

    def _wait_ready(self, wanted: int) -> None:
        deadline_s = monotonic() + self._timeout_s
        while True:
            status = self._registers.load(_CSTS, 4)
            if status == _ALL_ONES:
                raise EngineStopped(PageStatus.LINK_DOWN, "the controller is gone from the bus")
            if wanted and status & _FATAL:
                raise EngineStopped(PageStatus.BLOCKED, "the controller does not start")
            if status & _READY == wanted:
                return
            if monotonic() > deadline_s:
                raise EngineStopped(PageStatus.TIMEOUT, "the controller does not become ready")

    def _identify_controller(self) -> int:
        """Most pages in one command [5.15.2.2]."""
        data = self._identify(0, _IDENTIFY_CONTROLLER)
        if not data[536] & 0x3:
            raise UsageError(
                "the controller takes no SGL, by which refused pages are found; name QEMU's nvme "
                "device"
            )
        return 1 << data[77] if data[77] else 1 << 16

    def _identify_namespace(self) -> Namespace:
        """Size of the disk [5.15.2.1]."""
        data = self._identify(NAMESPACE, _IDENTIFY_NAMESPACE)
        form = 128 + 4 * (data[26] & 0xF)
        metadata = int.from_bytes(data[form : form + 2], "little")
        shift = data[form + 2]
        if metadata or not 9 <= shift <= 12:
            raise UsageError(
                f"the controller's disk has blocks of 2**{shift} bytes with {metadata} bytes of "
                "metadata; give the nvme device a plain raw file"
            )
        return Namespace(int.from_bytes(data[:8], "little"), 1 << shift)

    def _identify(self, namespace: int, what: int) -> bytes:
        self._command(_IDENTIFY, _IDENTITY, (what, 0), namespace)
        return self.memory.file.read(4096, _IDENTITY)

    def _create_queue(self, entries: int) -> Queue:
        """Make the pair of I/O queues [5.3, 5.4]; contiguous, without interrupts."""
        queue = Queue(self.memory, self._registers, 1, entries, self._stride)
        size = (entries - 1) << 16 | queue.number
        self._command(_CREATE_CQ, queue.completion, (size, 1))
        self._command(_CREATE_SQ, queue.submission, (size, queue.number << 16 | 1))
        return queue

    def _command(
        self, opcode: int, place: int, dwords: tuple[int, int], namespace: int = 0
    ) -> None:
        """Run one admin command; its data, or queue, lies at `place` in the card's memory."""
        entry = np.zeros(1, dtype=ENTRY)
        entry["opcode"], entry["id"], entry["namespace"] = opcode, self.next_id(), namespace
        entry["pointer"][0, 0] = self.memory.address + place
        entry["dwords"][0, :2] = dwords
        self._admin.submit(entry)
        deadline_s = monotonic() + self._timeout_s
        while monotonic() <= deadline_s:
            for number, status in self.wait(self._admin, deadline_s):
                if number != entry["id"][0]:
                    continue  # nobody asked for it
                if status:
                    raise EngineStopped(
                        PageStatus.BLOCKED if status == TRANSFER_ERROR else PageStatus.LINK_DOWN,
                        f"the controller refused admin command {opcode:#x}: status {status:#x}",
                    )
                return
        raise EngineStopped(PageStatus.TIMEOUT, "the controller does not complete commands")
