"""``xdma:`` - an AMD/Xilinx XDMA card in this machine, by its driver's character devices.

The driver is XDMA/linux-kernel of dma_ip_drivers; file names below are its files. A page of
the target is read at its AXI address, so the card must map the target's memory into AXI (a
bridge slave). Never run on hardware: the tests read regular files, through a stand-in for
pread(2) that fails in every way in which the driver can.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np

from pyscan.errors import SourceUnavailable, UsageError
from pyscan.records import PAGE_SIZE, MemoryMap, PageStatus
from pyscan.sources._xdma import ffi, lib
from pyscan.sources.base import (
    NO_OFFSET,
    Frames,
    Offsets,
    Pages,
    Source,
    Statuses,
    check_request,
    poison,
)
from pyscan.sources.layout import ADDRESS_END, Layout
from pyscan.sources.machines import uri_layout
from pyscan.sources.uri import SourceUri, parse_size

#: Channels a direction (libxdma.h, XDMA_CHANNEL_NUM_MAX).
CHANNELS_MAX: Final = 4

#: A channel gets at least this many pages of a request: below, a second one does not pay.
SHARE_PAGES_MIN: Final = 16

#: After so many transfers of one share that timed out (10 s each by default), the rest of it
#: counts as timed out.
TIMEOUTS_MAX: Final = 4

#: How often, and how far apart, a busy channel is asked again.
BUSY_RETRIES: Final = 20
BUSY_PAUSE_S: Final = 0.005

#: Interrupt lines of the user's logic (libxdma.h, MAX_USER_IRQ).
EVENTS_MAX: Final = 16

#: _IOR('q', 6, int) (cdev_sgdma.h, IOCTL_XDMA_ALIGN_GET).
_ALIGN_GET: Final = 0x80047106

#: Identifier of the configuration block (libxdma.h, XDMA_OFS_CONFIG and CONFIG_BLOCK_ID); the
#: low half is the version.
_CONFIG_OFFSET: Final = 0x3000
_CONFIG_ID: Final = 0x1FC3

#: What a register reads when nobody answers on the link.
_ALL_ONES: Final = 0xFFFF_FFFF

#: A wait that ran out (libxdma.c, xdma_xfer_submit) returns -ERESTARTSYS; with no signal
#: pending, the kernel hands it to the program as it is (include/linux/errno.h).
_ERESTARTSYS: Final = 512

#: What an errno of a transfer says about a page; LINK_DOWN otherwise.
_STATUSES: Final = {
    errno.EIO: PageStatus.BLOCKED,  # the engine reports a bus error
    errno.ETIMEDOUT: PageStatus.TIMEOUT,
    errno.EINTR: PageStatus.TIMEOUT,
    _ERESTARTSYS: PageStatus.TIMEOUT,
    errno.ESTALE: PageStatus.TORN,  # ps_xdma.h: said to be complete, but not written
}

#: After these no other page can come. EBUSY: the device is off-line (libxdma.c), for longer
#: than the retries last.
_GONE: Final = {errno.EBUSY, errno.ENODEV, errno.ENXIO, errno.EBADF, errno.ESHUTDOWN}


class Register:
    """A 32-bit register behind the `_control` or `_user` node; shows whether the link is up."""

    def __init__(self, path: Path, offset: int, upper: int | None = None) -> None:
        """`upper` is what the upper half must read; None takes all but all ones.

        Raises SourceUnavailable when it cannot be opened.
        """
        self._offset = offset
        self._upper = upper
        self._lock = Lock()
        self._fd = _open(path)

    def alive(self) -> bool:
        """Whether it answers, as what it is."""
        with self._lock:
            if self._fd < 0:
                return False
            try:
                content = os.pread(self._fd, 4, self._offset)
            except OSError:
                return False
        value = int.from_bytes(content, "little")
        if len(content) != 4 or value == _ALL_ONES:
            return False
        return self._upper is None or value >> 16 == self._upper

    def close(self) -> None:
        """Release the descriptor; `alive` is false from now on. Idempotent."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Channel:
    """A card-to-host channel: one descriptor, and one thread that reads it."""

    def __init__(self, path: Path, call: Any = ffi.NULL) -> None:
        """`call` stands in for pread(2) (ps_xdma.h, ps_xdma_call).

        Raises SourceUnavailable, UsageError.
        """
        self._path = path
        with ExitStack() as stack:
            self._fd = _open(path)
            stack.callback(os.close, self._fd)
            _check_alignment(path, self._fd)
            native = lib.ps_xdma_new(self._fd, call)
            if native == ffi.NULL:
                raise SourceUnavailable(f"{path}: no memory for the channel's buffers")
            stack.callback(lib.ps_xdma_free, native)
            self._native = native
            self._call = call  # lives as long as what calls it
            self._result = ffi.new("ps_xdma_result *")
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=path.name)
            # First to go: the thread, which waits for what it has been given.
            stack.callback(self._thread.shutdown)
            self._resources = stack.pop_all()

    def submit(self, work: Callable[[Channel], None]) -> Future[None] | None:
        """Have the channel's thread call `work`; None when the channel is closed."""
        try:
            return self._thread.submit(work, self)
        except RuntimeError:  # the thread has been shut down
            return None

    def read(self, addresses: Offsets, pages: Pages, transfer_pages: int) -> tuple[int, int, int]:
        """See ps_xdma_read: pages done, pages of the transfer that failed, errno."""
        lib.ps_xdma_read(
            self._native,
            ffi.from_buffer("uint64_t[]", addresses),
            len(addresses),
            transfer_pages,
            ffi.from_buffer("uint8_t[]", pages, require_writable=True),
            self._result,
        )
        return self._result.done, self._result.asked, self._result.error

    def rest(self) -> None:
        """See ps_xdma_rest."""
        lib.ps_xdma_rest(self._native)

    def in_place(self) -> bool:
        """Whether the node is still there, and still the one that is open."""
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._fd))
        except OSError:
            return False

    def close(self) -> None:
        """Wait for the transfers that are under way; then release everything. Idempotent."""
        self._resources.close()


@dataclass(frozen=True, slots=True)
class _Share:
    """The part of a request that one channel reads. Statuses come in as HOLE or LINK_DOWN."""

    addresses: Offsets
    pages: Pages
    statuses: Statuses
    alive: Callable[[], bool]

    def read(self, channel: Channel) -> None:
        """Read what can be read.

        A transfer that fails is read again page by page, so that one bad page does not hide
        its neighbours; when the link is down, or nothing but timeouts comes, the rest is
        given up.
        """
        position = alone_end = timeouts = busy = 0
        while position < len(self.addresses):
            alone = position < alone_end
            end = alone_end if alone else len(self.addresses)
            done, asked, error = channel.read(
                self.addresses[position:end],
                self.pages[position:end],
                1 if alone else lib.PS_XDMA_TRANSFER_PAGES,
            )
            good = self.statuses[position : position + done]
            good[good != PageStatus.HOLE] = PageStatus.OK
            position += done
            if not asked:
                continue
            if error == errno.EBUSY and busy < BUSY_RETRIES:
                busy += 1
                time.sleep(BUSY_PAUSE_S)
                continue
            if error in _GONE or not self.alive():
                return
            status = _STATUSES.get(error, PageStatus.LINK_DOWN)
            if status is PageStatus.TIMEOUT:
                channel.rest()
                timeouts += 1
                if timeouts == TIMEOUTS_MAX:
                    rest = self.statuses[position:]
                    rest[rest == PageStatus.LINK_DOWN] = PageStatus.TIMEOUT
                    return
            if asked > 1:
                alone_end = position + asked
            else:
                self.statuses[position] = status
                position += 1


class XdmaSource(Source):
    """The memory that a card's C2H channels reach."""

    def __init__(
        self,
        uri: str,
        device: Path,
        layout: Layout,
        *,
        channels: int = 1,
        user_register: int | None = None,
        call: Any = ffi.NULL,
    ) -> None:
        """Open `channels` nodes of `device`: /dev/xdma0 has /dev/xdma0_c2h_0 and so on.

        `layout` holds AXI addresses for offsets. The link is watched at the identifier behind
        `_control`, if there is such a node, and at byte `user_register` of `_user`. `call`:
        see Channel. Raises SourceUnavailable, UsageError.
        """
        self._uri = uri
        self._layout = layout
        self._turn = count()
        with ExitStack() as stack:
            self._registers = [
                stack.enter_context(closing(register))
                for register in _registers(device, user_register)
            ]
            self._channels = [
                stack.enter_context(closing(Channel(_node(device, f"c2h_{number}"), call)))
                for number in range(channels)
            ]
            if not self._alive():
                raise SourceUnavailable(
                    f"{device}: the card does not answer (its registers read all ones, or are "
                    "not those of XDMA); check its power and link, then rescan the bus"
                )
            self._resources = stack.pop_all()
        self._closed = False

    @property
    def uri(self) -> str:
        """The URI that names this source."""
        return self._uri

    def regions(self) -> MemoryMap:
        """The memory map.

        Raises SourceUnavailable when closed, when the nodes are gone or others by now, and
        when the card does not answer.
        """
        if self._closed or not self._channels[0].in_place() or not self._alive():
            raise SourceUnavailable(
                f"{self._uri}: the card is gone (link down, driver reloaded, or source closed); "
                "open the source again"
            )
        return self._layout.memory_map

    def read(self, frames: Frames, buffer: Pages) -> Statuses:
        """See `Source.read`."""
        check_request(frames, buffer)
        statuses = np.full(len(frames), PageStatus.LINK_DOWN, dtype=np.uint8)
        if not self._closed:
            addresses = self._layout.offsets(frames)
            statuses[addresses == NO_OFFSET] = PageStatus.HOLE
            if self._alive():
                self._read(addresses, buffer, statuses)
        poison(buffer, statuses)
        return statuses

    def _read(self, addresses: Offsets, buffer: Pages, statuses: Statuses) -> None:
        jobs = []
        turn = next(self._turn)
        for number, part in enumerate(_parts(len(addresses), len(self._channels))):
            share = _Share(addresses[part], buffer[part], statuses[part], self._alive)
            channel = self._channels[(turn + number) % len(self._channels)]
            jobs.append(channel.submit(share.read))
        running = [job for job in jobs if job is not None]
        wait(running)  # all of them, before an error lets the buffer go
        for job in running:
            job.result()

    def _alive(self) -> bool:
        return all(register.alive() for register in self._registers)

    def view(self) -> None:
        """None: the memory is behind a link."""

    def close(self) -> None:
        """See `Source.close`. Waits for transfers that are under way."""
        self._closed = True
        self._resources.close()


def open_xdma(uri: SourceUri) -> XdmaSource:
    """Open ``xdma:DEVICE?map=FILE`` or ``xdma:DEVICE?machine=NAME&size=SIZE&base=AXI``.

    Offsets in the map file are AXI addresses; with machine=, guest-physical address 0 lies at
    AXI address base. Raises UsageError, SourceUnavailable.
    """
    uri.allow("channels", "map", "machine", "size", "base", "user")
    channels = _number(uri, "channels", 1)
    if not 1 <= channels <= CHANNELS_MAX:
        raise UsageError(f"{uri.text}: channels must be 1 to {CHANNELS_MAX}")
    base = _number(uri, "base", 0)
    if base and "map" in uri.parameters:
        raise UsageError(f"{uri.text}: base= goes with machine=; a map file has the addresses")
    layout = uri_layout(uri)
    if "map" not in uri.parameters:
        layout = layout.linear(base)
    if base % PAGE_SIZE or layout.file_bytes > ADDRESS_END:
        raise UsageError(f"{uri.text}: base must be a multiple of 4096, its end below 2**52")
    user = _number(uri, "user", 0) if "user" in uri.parameters else None
    if user is not None and user % 4:
        raise UsageError(f"{uri.text}: user={user:#x} is no register; give a multiple of 4")
    return XdmaSource(uri.text, Path(uri.path), layout, channels=channels, user_register=user)


def wait_event(device: Path, number: int, timeout_s: float) -> int:
    """Interrupts of user line `number` that came since the last call; 0 when none does in time.

    Raises SourceUnavailable when the node cannot be read, ValueError for a wrong number.
    """
    if not 0 <= number < EVENTS_MAX:
        raise ValueError(f"event {number} is not in 0 to {EVENTS_MAX - 1}")
    path = _node(device, f"events_{number}")
    fd = _open(path)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            return 0
        # Exactly four bytes, or the driver refuses (cdev_events.c).
        content = os.read(fd, 4)
    except OSError as error:
        raise SourceUnavailable(f"{path}: cannot read events: {error.strerror}") from error
    finally:
        os.close(fd)
    if len(content) != 4:
        raise SourceUnavailable(f"{path}: cannot read events: {len(content)} bytes of 4")
    return int.from_bytes(content, "little")


def probe_xdma() -> str:
    """The cards whose nodes are there."""
    try:
        nodes = sorted(Path("/dev").glob("xdma*_c2h_*"))
    except OSError as error:
        return f"/dev cannot be listed: {error.strerror}"
    cards = sorted({str(node).partition("_c2h_")[0] for node in nodes})
    if not cards:
        return "no /dev/xdma*: no card, or AMD's driver (dma_ip_drivers) is not loaded"
    return f"{', '.join(cards[:4])} ({len(nodes)} channels)"


def _number(uri: SourceUri, name: str, default: int) -> int:
    text = uri.parameters.get(name)
    return default if text is None else parse_size(text)


def _node(device: Path, kind: str) -> Path:
    return device.with_name(f"{device.name}_{kind}")


def _registers(device: Path, user_register: int | None) -> Iterator[Register]:
    control = _node(device, "control")
    if control.exists():
        yield Register(control, _CONFIG_OFFSET, _CONFIG_ID)
    if user_register is not None:
        yield Register(_node(device, "user"), user_register)


def _parts(pages: int, channels: int) -> Iterator[slice]:
    """Split a request among the channels: neighbours stay together."""
    used = max(1, min(channels, pages // SHARE_PAGES_MIN))
    for number in range(used):
        yield slice(pages * number // used, pages * (number + 1) // used)


def _open(path: Path) -> int:
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISCHR(mode) or stat.S_ISREG(mode)):
            raise UsageError(f"{path}: not a device node of the XDMA driver")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceUnavailable(
            f"{path}: cannot be opened: {error.strerror}; check the path, that AMD's XDMA driver "
            "is loaded, and that the card has so many channels"
        ) from error


def _check_alignment(path: Path, fd: int) -> None:
    """See that transfers of whole pages into whole pages are aligned enough."""
    try:
        answer = fcntl.ioctl(fd, _ALIGN_GET, bytes(4))
    except OSError as error:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return  # an image in place of a card
        raise SourceUnavailable(
            f"{path}: does not say its alignment ({error.strerror}); not an XDMA channel"
        ) from error
    alignment = int.from_bytes(answer, "little")
    if not alignment or PAGE_SIZE % alignment:
        raise SourceUnavailable(
            f"{path}: wants transfers aligned to {alignment} bytes; pages of {PAGE_SIZE} are not"
        )
