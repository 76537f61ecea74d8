"""PCI as a card sees its server's bus: configuration space, functions, registers.

Two ways lead to configuration space: the memory window of PCI Express (ECAM), whose place
q35's host bridge tells, and the ports 0xcf8 and 0xcfc, which both machines have. A running
guest uses the ports, too, so an access puts the address back that it found latched there.

Sources: PCI Local Bus 3.0, 3.2.2.3.2 (ports), 6.1 and 6.2.5 (header, base addresses); PCI
Express 5.0, 7.2.2 (ECAM); QEMU hw/pci-host/q35.c, i440fx.c, hw/pci/pci_host.c.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol, Self

from pyscan.errors import SourceUnavailable, UsageError
from pyscan.sources import qtest
from pyscan.sources.qtest import QtestClient

#: Vendor and device of the two host bridges: 82G33 (q35) and 440FX (pc).
_Q35_BRIDGE = (0x8086, 0x29C0)
_I440FX_BRIDGE = (0x8086, 0x1237)

#: Offsets in a function's configuration space.
_COMMAND = 0x04
_HEADER_TYPE = 0x0E
_BAR0 = 0x10
_PCIEXBAR = 0x60  # of q35's host bridge: place of ECAM, enabled by bit 0

COMMAND_IO = 1 << 0  # answers to its ports
COMMAND_MEMORY = 1 << 1  # answers to its memory addresses
COMMAND_BUS_MASTER = 1 << 2  # may do DMA

_ADDRESS_PORT, _DATA_PORT = 0xCF8, 0xCFC
_PCIEXBAR_MASK = 0xF_FC00_0000  # address bits 35 to 26 (MCH_HOST_BRIDGE_PCIEXBAR_ADMSK)
_BUSES = {0: 256, 1: 128, 2: 64}  # PCIEXBAR's length field, bits 2 and 1
_SLOTS, _FUNCTIONS = 32, 8
_SLOT = re.compile(r"([0-9a-f]{2}):([01][0-9a-f])\.([0-7])", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """Where a function sits."""

    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The slot written as lspci does: 00:09.0. Raises UsageError."""
        match = _SLOT.fullmatch(text)
        if match is None:
            raise UsageError(f"slot {text!r} is not bus:device.function; write for example 00:09.0")
        return cls(*(int(part, 16) for part in match.groups()))

    def __str__(self) -> str:
        return f"{self.bus:02x}:{self.device:02x}.{self.function}"

    @property
    def number(self) -> int:
        """Bus, device and function as 16 bits."""
        return self.bus << 8 | self.device << 3 | self.function


class ConfigSpace(Protocol):
    """Access to the configuration space of every function; `width` is 1, 2 or 4 bytes."""

    def read(self, slot: Slot, offset: int, width: int) -> int:
        """Read; all ones where there is no function. Raises SourceUnavailable."""

    def write(self, slot: Slot, offset: int, width: int, value: int) -> None:
        """Write. Raises SourceUnavailable."""


class EcamSpace(ConfigSpace):
    """Configuration space in a memory window of `buses` MiB that begins at `base`."""

    def __init__(self, client: QtestClient, base: int, buses: int) -> None:
        self._client = client
        self.base = base
        self._buses = buses

    def read(self, slot: Slot, offset: int, width: int) -> int:
        """See `ConfigSpace.read`."""
        return self._client.load(self._address(slot, offset), width)

    def write(self, slot: Slot, offset: int, width: int, value: int) -> None:
        """See `ConfigSpace.write`."""
        self._client.store(self._address(slot, offset), width, value)

    def _address(self, slot: Slot, offset: int) -> int:
        if slot.bus >= self._buses:
            raise SourceUnavailable(
                f"{self._client.path}: no bus {slot.bus:#x} of {self._buses}; check the slot"
            )
        return self.base | slot.number << 12 | offset


class PortSpace(ConfigSpace):
    """Configuration space behind the ports 0xcf8 and 0xcfc: its first 256 bytes."""

    def __init__(self, client: QtestClient) -> None:
        self._client = client

    def read(self, slot: Slot, offset: int, width: int) -> int:
        """See `ConfigSpace.read`."""
        return self._access(slot, offset, qtest.port_in(_DATA_PORT + offset % 4, width))

    def write(self, slot: Slot, offset: int, width: int, value: int) -> None:
        """See `ConfigSpace.write`."""
        self._access(slot, offset, qtest.port_out(_DATA_PORT + offset % 4, width, value))

    def _access(self, slot: Slot, offset: int, command: str) -> int:
        (latched,) = self._client.transact([qtest.port_in(_ADDRESS_PORT, 4)])
        address = 1 << 31 | slot.number << 8 | offset & 0xFC
        # No processor comes in while these four run, but one may have before they began.
        found, _, value, _ = self._client.transact(
            [
                qtest.port_in(_ADDRESS_PORT, 4),
                qtest.port_out(_ADDRESS_PORT, 4, address),
                command,
                qtest.port_out(_ADDRESS_PORT, 4, latched),
            ]
        )
        if found != latched:
            self._client.transact([qtest.port_out(_ADDRESS_PORT, 4, found)])
        return value


@dataclass(frozen=True, slots=True)
class Function:
    """A function on the bus."""

    slot: Slot
    vendor: int
    device: int


class Registers:
    """A function's memory addresses behind one BAR: loads and stores inside `length` bytes."""

    def __init__(self, client: QtestClient, address: int, length: int) -> None:
        self._client = client
        self.address = address
        self._length = length

    def load(self, offset: int, width: int) -> int:
        """Read `width` bytes at `offset`. Raises SourceUnavailable."""
        return self._client.load(self._place(offset, width), width)

    def store(self, *stores: tuple[int, int, int]) -> None:
        """Write, in one transaction, (offset, width, value) each. Raises SourceUnavailable."""
        self._client.transact(
            [
                qtest.store(self._place(offset, width), width, value)
                for offset, width, value in stores
            ]
        )

    def _place(self, offset: int, width: int) -> int:
        if not 0 <= offset <= self._length - width:
            raise ValueError(f"offset {offset:#x} is outside of {self._length:#x} bytes")
        return self.address + offset


class PciBus:
    """The root bus of a q35 or pc machine."""

    def __init__(self, client: QtestClient) -> None:
        """Find the way to configuration space. Raises SourceUnavailable."""
        self._client = client
        ports = PortSpace(client)
        bridge = Slot(0, 0, 0)
        identity = _identity(ports, bridge)
        self.space: ConfigSpace = ports
        if identity == _Q35_BRIDGE:
            register = ports.read(bridge, _PCIEXBAR, 4) | ports.read(bridge, _PCIEXBAR + 4, 4) << 32
            buses = _BUSES.get(register >> 1 & 3)
            if register & 1 and buses is not None:
                self.space = EcamSpace(client, register & _PCIEXBAR_MASK, buses)
        elif identity != _I440FX_BRIDGE:
            raise SourceUnavailable(
                f"{client.path}: host bridge {identity[0]:04x}:{identity[1]:04x} is neither that "
                "of q35 nor of pc; start QEMU with one of these machines"
            )

    def functions(self) -> list[Function]:
        """The functions on the root bus, by slot. Raises SourceUnavailable."""
        found = []
        for device in range(_SLOTS):
            for function in range(_FUNCTIONS):
                slot = Slot(0, device, function)
                vendor, identity = _identity(self.space, slot)
                if vendor not in {0, 0xFFFF}:
                    found.append(Function(slot, vendor, identity))
                if function == 0 and (
                    vendor in {0, 0xFFFF} or not self.space.read(slot, _HEADER_TYPE, 1) & 0x80
                ):
                    break  # without function 0 there are no others (PCI 3.0, 3.2.2.3.4)
        return found

    def find(self, vendor: int, device: int, what: str, slot: Slot | None = None) -> Slot:
        """The slot of the one function with these ids, at `slot` when that is given.

        `what` names it in errors. Raises SourceUnavailable.
        """
        if slot is not None:
            if _identity(self.space, slot) != (vendor, device):
                raise SourceUnavailable(
                    f"{self._client.path}: no {what} ({vendor:04x}:{device:04x}) at {slot}; check "
                    "the slot with lspci in the guest"
                )
            return slot
        found = [
            function.slot
            for function in self.functions()
            if (function.vendor, function.device) == (vendor, device)
        ]
        if len(found) != 1:
            places = ", ".join(map(str, found)) or "none"
            raise SourceUnavailable(
                f"{self._client.path}: one {what} ({vendor:04x}:{device:04x}) is needed on the "
                f"bus, found {places}; name its slot"
            )
        return found[0]

    def registers(self, slot: Slot, bar: int, length: int) -> Registers:
        """The first `length` bytes behind a memory BAR, which has at least as many.

        Its address is the one that firmware or the guest gave it. Raises SourceUnavailable
        when there is none.
        """
        address = self._bar(slot, bar)
        if address & 1 or not address & ~0xF:
            raise SourceUnavailable(
                f"{self._client.path}: BAR {bar} of {slot} has no memory address; let the "
                "machine's firmware run first"
            )
        return Registers(self._client, address & ~0xF, length)

    def bar_bytes(self, slot: Slot, bar: int) -> int:
        """Size of a BAR; 0 when there is none. Raises SourceUnavailable.

        The size shows in the address bits that cannot be set (PCI 3.0, 6.2.5.1). Meanwhile the
        function answers to no address: only for one that nobody uses.
        """
        old = self._bar(slot, bar)
        command = self.space.read(slot, _COMMAND, 2)
        self.space.write(slot, _COMMAND, 2, command & ~(COMMAND_IO | COMMAND_MEMORY))
        try:
            self._set_bar(slot, bar, old, 0xFFFF_FFFF_FFFF_FFFF)
            mask = self._bar(slot, bar)
            self._set_bar(slot, bar, old, old)
        finally:
            self.space.write(slot, _COMMAND, 2, command)
        mask &= ~0x3 if old & 1 else ~0xF
        return mask & -mask  # the lowest bit that can be set

    def set_command(self, slot: Slot, bits: int) -> None:
        """Set bits of the command register. Raises SourceUnavailable."""
        self.space.write(slot, _COMMAND, 2, self.space.read(slot, _COMMAND, 2) | bits)

    def clear_command(self, slot: Slot, bits: int) -> None:
        """Clear bits of the command register. Raises SourceUnavailable."""
        self.space.write(slot, _COMMAND, 2, self.space.read(slot, _COMMAND, 2) & ~bits)

    def _bar(self, slot: Slot, bar: int) -> int:
        """Address and type bits of a BAR; all of them zero when there is none."""
        offset = _BAR0 + 4 * bar
        low = self.space.read(slot, offset, 4)
        if low == 0xFFFF_FFFF:
            raise SourceUnavailable(
                f"{self._client.path}: the function at {slot} is gone; open the source again"
            )
        return low | self.space.read(slot, offset + 4, 4) << 32 if _is_wide(low) else low

    def _set_bar(self, slot: Slot, bar: int, kind: int, value: int) -> None:
        """Write a BAR whose type bits are those of `kind`."""
        offset = _BAR0 + 4 * bar
        self.space.write(slot, offset, 4, value & 0xFFFF_FFFF)
        if _is_wide(kind):
            self.space.write(slot, offset + 4, 4, value >> 32)


def _is_wide(low: int) -> bool:
    """Whether a BAR is memory with 64 address bits (PCI 3.0, 6.2.5.1)."""
    return low & 0x7 == 0x4


def _identity(space: ConfigSpace, slot: Slot) -> tuple[int, int]:
    """Vendor and device; all ones where there is no function."""
    value = space.read(slot, 0, 4)
    return value & 0xFFFF, value >> 16
