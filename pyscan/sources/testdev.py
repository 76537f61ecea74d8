"""pci-testdev: the card's host-visible function (docs/adr/pci-testdev.md).

It shows that a card is there, and its counter rings in both directions: either side counts
by a write, and the other one sees how often. It reads no memory.

Source: QEMU hw/misc/pci-testdev.c. BAR0 begins with struct PCITestDevHdr: test (1 byte),
width (1), 2 bytes, offset (4), data (4), count (4), name.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyscan.errors import SourceUnavailable
from pyscan.sources.pci import COMMAND_MEMORY, PciBus, Slot

#: Vendor and device.
TESTDEV_ID = (0x1B36, 0x0005)

_TEST, _OFFSET, _DATA, _COUNT = 0, 4, 8, 12
_REGISTER_BYTES = 4096
_MEMBAR = 2
_PROBE = 0x5C41_B0B5


@dataclass(frozen=True, slots=True)
class Presence:
    """Where the function sits, and its windows in bytes; 0 for one that it does not have."""

    slot: Slot
    register_bytes: int  # BAR0, memory
    port_bytes: int  # BAR1, I/O ports
    mailbox_bytes: int  # BAR2, membar=
    mailbox_backed: bool  # whether it keeps what is written


class CardFunction:
    """The function as the card itself uses it."""

    def __init__(self, bus: PciBus, slot: Slot | None = None) -> None:
        """Find it on the bus. Raises SourceUnavailable."""
        self._bus = bus
        self.slot = bus.find(*TESTDEV_ID, "pci-testdev", slot)
        bus.set_command(self.slot, COMMAND_MEMORY)
        self._registers = bus.registers(self.slot, 0, _REGISTER_BYTES)

    def presence(self) -> Presence:
        """Sizes of its windows; for a moment it answers to no address."""
        sizes = [self._bus.bar_bytes(self.slot, bar) for bar in range(_MEMBAR + 1)]
        backed = sizes[_MEMBAR] > 0 and self._keeps_writes()
        return Presence(self.slot, sizes[0], sizes[1], sizes[2], backed)

    def select(self) -> None:
        """Choose the first test: the counter begins at zero. Raises SourceUnavailable.

        Raises as well when the device offers no place to ring.
        """
        self._registers.store((_TEST, 1, 0))
        self._bell()

    def ring(self) -> None:
        """Count one. Raises SourceUnavailable."""
        offset, value = self._bell()
        self._registers.store((offset, 1, value))

    def count(self) -> int:
        """How often either side has rung since `select`. Raises SourceUnavailable."""
        # Byte by byte: the device answers no wider access to its header.
        return sum(self._registers.load(_COUNT + byte, 1) << 8 * byte for byte in range(4))

    def _bell(self) -> tuple[int, int]:
        """Where to write and what, as the device tells of the chosen test."""
        offset, value = (
            sum(self._registers.load(start + byte, 1) << 8 * byte for byte in range(4))
            for start in (_OFFSET, _DATA)
        )
        if not _COUNT + 4 <= offset < _REGISTER_BYTES:
            raise SourceUnavailable(
                f"pci-testdev at {self.slot} names no place to ring ({offset:#x}); check the device"
            )
        return offset, value & 0xFF

    def _keeps_writes(self) -> bool:
        """Whether the mailbox has storage: up to QEMU 10.0 it has none."""
        mailbox = self._bus.registers(self.slot, _MEMBAR, 8)
        found = mailbox.load(0, 4)
        mailbox.store((0, 4, found ^ _PROBE))
        kept = mailbox.load(0, 4) == found ^ _PROBE
        mailbox.store((0, 4, found))
        return kept
