"""``nvme-dma:`` - a stock NVMe controller as the card's bus master.

A *Write* command makes the controller gather pages of the server, listed in a PRP list, by
DMA and lay them into its disk, the landing file. So pages come over the server's own bus
and through its IOMMU, as they would to a card.

What is not believed without proof:

* A completion. The landing is filled with a secret word before; a page whose edges still
  hold it never came: TORN.
* The list. It lies in memory that the server can see, and is compared after: TORN.
* A page of zeros. QEMU reads zeros, without an error, where the bus refuses a gather
  (address_space_map). But it reports a refused descriptor list, so such a page is named as one:
  zeros are descriptors of no length, and the controller answers that the data is too
  short; a page out of its reach is a transfer error: BLOCKED.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from pyscan.errors import UsageError
from pyscan.records import PAGE_SHIFT, PAGE_SIZE, PageStatus
from pyscan.sources.base import Frames, Pages, Statuses
from pyscan.sources.engine import (
    BackingFile,
    CardMemory,
    Engine,
    EngineSource,
    EngineStopped,
    parse_slot,
)
from pyscan.sources.machines import uri_layout
from pyscan.sources.nvme_controller import (
    ENTRY,
    LISTS,
    NAMESPACE,
    NVME_ID,
    REGISTER_BAR,
    REGISTER_BYTES,
    TRANSFER_ERROR,
    Controller,
)
from pyscan.sources.pci import COMMAND_BUS_MASTER, COMMAND_MEMORY, PciBus, Slot
from pyscan.sources.qtest import QtestClient
from pyscan.sources.uri import SourceUri

#: Most pages in one command; QEMU takes at most 1024 pieces (IOV_MAX), and one page of list
#: holds 512. Most commands that gather at a time.
GATHER_PAGES_MAX = 512
_SLOTS_MAX = 8

#: How long a command, and the controller's start, may take.
_TIMEOUT_S = 2.0

_WRITE = 0x01  # NVM command set [6.15 of NVMe 1.4]

# An SGL Last Segment descriptor for one descriptor [4.4], and the flag that says SGL [4.2].
_LAST_SEGMENT = 0x3 << 60 | 16
_SGL = 1 << 6

# Generic command status [4.6.1.2.1]: aborted on request, or because its queue was deleted; block
# number out of range. And a range of status: media errors [4.6.1.2.3], here of the landing.
_ABORTED = frozenset({0x07, 0x08})
_OUT_OF_RANGE = 0x80
_MEDIA_ERRORS = range(0x280, 0x300)


@dataclass(slots=True)
class _Gather:
    """One command: pages `start` to `stop` of the request, into landing slot `slot`."""

    start: int
    stop: int
    slot: int
    listing: bytes
    entry: bytes = b""
    place: int = -1  # of the entry in the queue
    unproven: list[int] = field(default_factory=list)  # of the request's pages
    proving: int = 0  # proofs under way


class NvmeEngine(Engine):
    """A controller, its landing file, and what it takes to gather with it."""

    def __init__(self, controller: Controller, landing: BackingFile, stack: ExitStack) -> None:
        """Take over what `stack` closes, once a first command has shown that all fits together.

        Raises EngineStopped, SourceUnavailable, UsageError.
        """
        self.controller = controller
        self.landing = landing
        namespace = controller.namespace
        if namespace.blocks * namespace.block_bytes != landing.length:
            raise UsageError(
                f"{landing.path}: has {landing.length} bytes, the controller's disk "
                f"{namespace.blocks * namespace.block_bytes}; name the file behind the nvme device"
            )
        pages = landing.length // PAGE_SIZE
        lists = (controller.memory.file.length - LISTS) // PAGE_SIZE
        # Two at least, so that one is read while the controller fills the other.
        self.slot_pages = min(GATHER_PAGES_MAX, controller.transfer_pages_max, pages // 2)
        self.slots = min(_SLOTS_MAX, lists, pages // max(1, self.slot_pages))
        if self.slots < 2:
            raise UsageError(
                f"{landing.path}: with {controller.memory.file.path} holds no two commands; give "
                "the landing 8 KiB and the card's memory 256 KiB at least (better 4 MiB, 1 MiB)"
            )
        self.secret = int.from_bytes(os.urandom(8), "little") | 1
        self._blank = np.full(self.slot_pages * PAGE_SIZE // 8, self.secret, "<u8").tobytes()
        self._test()
        self._contents = stack.pop_all()

    def check(self) -> None:
        """See `Engine.check`."""
        self.controller.check()

    def read(self, frames: Frames, buffer: Pages, rows: NDArray[np.intp]) -> Statuses:
        """See `Engine.read`."""
        return _Request(self, frames, buffer, rows).run()

    def close(self) -> None:
        """Stop the controller, so that nothing lands any more, and close its files."""
        self._contents.close()

    def blank(self, slot: int, pages: int) -> None:
        """Fill the landing of a command with the secret word."""
        data = memoryview(self._blank)[: pages * PAGE_SIZE]
        self.landing.write(data, slot * self.slot_pages * PAGE_SIZE)

    def block(self, slot: int) -> int:
        """Number of the first block of a slot's landing."""
        return slot * self.slot_pages * PAGE_SIZE // self.controller.namespace.block_bytes

    def list_place(self, slot: int) -> int:
        """Where a slot's PRP list lies in the card's memory."""
        return LISTS + slot * PAGE_SIZE

    def _test(self) -> None:
        """Gather the marked page of the card's own memory."""
        memory = self.controller.memory
        page = np.zeros((1, PAGE_SIZE), dtype=np.uint8)
        frames = np.array([memory.address >> PAGE_SHIFT], dtype=np.uint64)
        (status,) = self.read(frames, page, np.zeros(1, dtype=np.intp))
        if status == PageStatus.BLOCKED:
            raise EngineStopped(PageStatus.BLOCKED, "the bus refuses the card its own memory")
        if status != PageStatus.OK or page.tobytes() != memory.file.read(PAGE_SIZE, 0):
            raise UsageError(
                f"{self.landing.path}: what the controller writes does not land there; name the "
                "file behind the nvme device"
            )


class _Request:
    """One read: commands are given, completed, split and proven until every page has a status."""

    def __init__(
        self, engine: NvmeEngine, frames: Frames, buffer: Pages, rows: NDArray[np.intp]
    ) -> None:
        self._engine = engine
        self._controller = engine.controller
        self._queue = engine.controller.queue
        self._addresses = frames << np.uint64(PAGE_SHIFT)
        self._buffer = buffer
        self._words = buffer.view("<u8")
        self._rows = rows
        self._statuses = np.full(len(frames), PageStatus.BLOCKED, dtype=np.uint8)
        step = engine.slot_pages
        self._todo = deque(
            (start, min(start + step, len(frames))) for start in range(0, len(frames), step)
        )
        self._free = list(range(engine.slots))
        self._gathers: dict[int, _Gather] = {}  # by command id
        self._proofs: dict[int, tuple[_Gather, int]] = {}  # and page
        self._proving: deque[_Gather] = deque()  # with pages that no proof is under way for
        self._deadline_s = 0.0

    def run(self) -> Statuses:
        """Status of every page. Raises EngineStopped, SourceUnavailable."""
        self._deadline_s = monotonic() + _TIMEOUT_S
        while self._todo or self._gathers or self._proofs or self._proving:
            self._give()
            for number, status in self._controller.wait(self._queue, self._deadline_s):
                self._take(number, status)
            if monotonic() > self._deadline_s:
                raise EngineStopped(PageStatus.TIMEOUT, "the controller completes other commands")
        return self._statuses

    def _give(self) -> None:
        """Give the controller as many commands as there is room for."""
        room = self._queue.entries - 1 - len(self._gathers) - len(self._proofs)
        count = min(room, len(self._free), len(self._todo))
        if count:
            self._gather(count)
            room -= count
        while self._proving and room:
            room -= self._prove(self._proving[0], room)
            if not self._proving[0].unproven:
                self._proving.popleft()

    def _gather(self, count: int) -> None:
        """Give `count` commands that gather."""
        entries = np.zeros(count, dtype=ENTRY)
        gathers = [self._prepare(entries[index : index + 1]) for index in range(count)]
        places = self._queue.submit(entries)
        for gather, entry, place in zip(gathers, entries, places, strict=True):
            gather.entry, gather.place = entry.tobytes(), place

    def _prepare(self, entry: NDArray[np.void]) -> _Gather:
        """Fill one entry, its list and its landing for what is next to do."""
        start, stop = self._todo.popleft()
        slot = self._free.pop()
        pages = stop - start
        self._engine.blank(slot, pages)
        entry["opcode"], entry["id"], entry["namespace"] = _WRITE, self._unused_id(), NAMESPACE
        entry["pointer"][0, 0] = self._addresses[start]
        listing = b""
        if pages == 2:
            entry["pointer"][0, 1] = self._addresses[start + 1]
        elif pages > 2:
            listing = self._addresses[start + 1 : stop].astype("<u8").tobytes()
            place = self._engine.list_place(slot)
            self._controller.memory.file.write(listing, place)
            entry["pointer"][0, 1] = self._controller.memory.address + place
        blocks = pages * PAGE_SIZE // self._controller.namespace.block_bytes
        entry["dwords"][0, :3] = self._engine.block(slot), 0, blocks - 1
        gather = _Gather(start, stop, slot, listing)
        self._gathers[int(entry["id"][0])] = gather
        return gather

    def _take(self, number: int, status: int) -> None:
        """One completion. What nobody waits for is not believed, and is no progress."""
        if number in self._gathers:
            self._land(self._gathers.pop(number), status)
        elif number in self._proofs:
            self._judge(*self._proofs.pop(number), status)
        else:
            return
        self._deadline_s = monotonic() + _TIMEOUT_S

    def _land(self, gather: _Gather, status: int) -> None:
        """A gather has ended: take its pages, or find the one that made it fail."""
        start, stop = gather.start, gather.stop
        pages = slice(start, stop)
        if status == 0:
            self._copy(gather)
            self._examine(gather)
        elif _is_about_pages(status) and stop - start > 1:
            middle = (start + stop) // 2
            self._todo.extendleft([(middle, stop), (start, middle)])
        else:
            self._statuses[pages] = _page_status(status)
        if gather.unproven:
            self._proving.append(gather)
        else:
            self._free.append(gather.slot)

    def _copy(self, gather: _Gather) -> None:
        """Copy what landed into the caller's buffer."""
        views = [
            self._buffer[first : last + 1].data
            for first, last in _runs(self._rows[gather.start : gather.stop])
        ]
        offset = gather.slot * self._engine.slot_pages * PAGE_SIZE
        self._engine.landing.read_into(views, offset)

    def _examine(self, gather: _Gather) -> None:
        """Decide what landed: OK, TORN, or zeros that are still to be proven."""
        pages = slice(gather.start, gather.stop)
        if not self._is_as_given(gather):
            self._statuses[pages] = PageStatus.TORN
            return
        rows = self._rows[pages]
        first, second = self._words[rows, 0], self._words[rows, 1]
        last = self._words[rows, -1]
        secret = np.uint64(self._engine.secret)
        torn = (first == secret) | (last == secret)
        zeros = (first == 0) & (second == 0) & (last == 0)
        self._statuses[pages] = np.where(torn, PageStatus.TORN, PageStatus.OK)
        unproven = np.flatnonzero(zeros) + gather.start
        self._statuses[unproven] = PageStatus.BLOCKED
        gather.unproven = unproven.tolist()

    def _is_as_given(self, gather: _Gather) -> bool:
        """Whether the command and its list still stand as they were given."""
        if self._queue.entry(gather.place) != gather.entry:
            return False
        listing = self._controller.memory.file.read(
            len(gather.listing), self._engine.list_place(gather.slot)
        )
        return listing == gather.listing

    def _prove(self, gather: _Gather, room: int) -> int:
        """Name up to `room` pages of a gather as descriptor lists; returns how many."""
        pages = gather.unproven[:room]
        del gather.unproven[:room]
        entries = np.zeros(len(pages), dtype=ENTRY)
        entries["opcode"], entries["flags"], entries["namespace"] = _WRITE, _SGL, NAMESPACE
        entries["pointer"][:, 0] = self._addresses[pages]
        entries["pointer"][:, 1] = _LAST_SEGMENT
        # Should a page hold a descriptor by now, one block of its own slot is written.
        entries["dwords"][:, 0] = self._engine.block(gather.slot)
        for index, page in enumerate(pages):
            number = self._unused_id()
            entries["id"][index] = number
            self._proofs[number] = (gather, page)
        gather.proving += len(pages)
        self._queue.submit(entries)
        return len(pages)

    def _judge(self, gather: _Gather, page: int, status: int) -> None:
        """The controller has read a page as a descriptor list, or could not."""
        if status in _ABORTED:
            self._statuses[page] = PageStatus.TIMEOUT
        elif status != TRANSFER_ERROR:
            self._statuses[page] = PageStatus.OK
        gather.proving -= 1
        if not gather.proving and not gather.unproven:
            self._free.append(gather.slot)

    def _unused_id(self) -> int:
        while (number := self._controller.next_id()) in self._gathers or number in self._proofs:
            pass  # ends: there are fewer entries in the queue than ids
        return number


def open_nvme_dma(uri: SourceUri) -> EngineSource:
    """Open ``nvme-dma:QTEST-SOCKET?memory=FILE&landing=FILE`` with machine and size, or map.

    Raises UsageError, ConfigError, SourceUnavailable.
    """
    uri.allow("memory", "landing", "machine", "size", "map", "device", "card")
    uri.require("memory", "landing")
    device, card = parse_slot(uri, "device"), parse_slot(uri, "card")
    layout = uri_layout(uri)

    def connect() -> NvmeEngine:
        return _connect(uri, device, card)

    return EngineSource(uri.text, layout, connect)


def _connect(uri: SourceUri, device: Slot | None, card: Slot | None) -> NvmeEngine:
    """Find controller, memory and landing, and start. Raises as `NvmeEngine` and `Controller`."""
    with ExitStack() as stack:
        client = stack.enter_context(QtestClient(Path(uri.path)))
        bus = PciBus(client)
        slot = bus.find(*NVME_ID, "nvme controller", device)
        bus.set_command(slot, COMMAND_MEMORY | COMMAND_BUS_MASTER)
        memory = CardMemory.open(client, bus, Path(uri.parameters["memory"]), card, stack)
        landing = BackingFile(Path(uri.parameters["landing"]), "landing")
        stack.callback(landing.close)
        if memory.file.length < LISTS + 2 * PAGE_SIZE:
            raise UsageError(
                f"{memory.file.path}: {memory.file.length} bytes are too few for the queues; give "
                "the card's memory 256 KiB at least"
            )
        registers = bus.registers(slot, REGISTER_BAR, REGISTER_BYTES)
        controller = Controller(memory, registers, _TIMEOUT_S)
        stack.callback(controller.close)
        return NvmeEngine(controller, landing, stack)


def _runs(rows: NDArray[np.intp]) -> Iterator[tuple[int, int]]:
    """First and last of the rows that follow each other; rows ascend."""
    breaks = np.flatnonzero(np.diff(rows) != 1)
    starts = np.concatenate(([0], breaks + 1))
    ends = np.concatenate((breaks, [len(rows) - 1]))
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield int(rows[start]), int(rows[end])


def _is_about_pages(status: int) -> bool:
    """Whether other pages may fare better: not when the landing or the queue is at fault."""
    return status not in _ABORTED and status != _OUT_OF_RANGE and status not in _MEDIA_ERRORS


def _page_status(status: int) -> PageStatus:
    """What a failed command says of its pages."""
    if status in _ABORTED:
        return PageStatus.TIMEOUT
    if status == _OUT_OF_RANGE or status in _MEDIA_ERRORS:
        return PageStatus.LINK_DOWN
    return PageStatus.BLOCKED
