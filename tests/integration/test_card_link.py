"""The emulated link between a card and a server's bus: registers and nothing else cross it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import pytest
from bus_server import BusServer, bus_server

from pyscan.errors import LabError
from pyscan.lab.bus import ENGINE_SLOT
from pyscan.lab.link import CardLink
from pyscan.lab.process import RunDirectory
from pyscan.sources import link
from pyscan.sources.link import BusReply, BusRequest
from pyscan.sources.mailbox import FileMailbox
from pyscan.sources.pci import COMMAND_BUS_MASTER, PciBus, Slot
from pyscan.sources.qtest import QtestClient

ALL_ONES = (1 << 64) - 1

#: Registers of the controller (NVMe base specification 1.4, 3.1).
CAPABILITIES, VERSION, MASK_SET, MASK_CLEAR = 0x00, 0x08, 0x0C, 0x10
QUEUE_ADDRESS = 0x28


class Card:
    """A card's side of the mailbox."""

    def __init__(self, path: Path) -> None:
        path.touch()
        os.truncate(path, link.MAILBOX_BYTES)
        self.mailbox = FileMailbox(path, os.open(path, os.O_RDWR))
        self.sequence = 1000

    def ask(self, op: int, offset: int, width: int = 4, value: int = 0) -> BusReply:
        """One access, and its answer."""
        self.sequence += 1
        data = link.BUS_REQUEST.encode(BusRequest(self.sequence, op, width, offset, value))
        self.mailbox.write(link.BUS_REQUEST_AT + 4, data[4:])
        self.mailbox.write(link.BUS_REQUEST_AT, data[:4])
        deadline_s = monotonic() + 20
        while (reply := self.reply()).sequence != self.sequence:
            assert monotonic() < deadline_s
            sleep(1e-4)
        return reply

    def reply(self) -> BusReply:
        return link.BUS_REPLY.decode(self.mailbox.read(link.BUS_REPLY_AT, link.BUS_REPLY.size))

    def read(self, offset: int, width: int = 4) -> int:
        reply = self.ask(link.BUS_READ, offset, width)
        assert reply.up == 1
        return reply.value

    def wait_generation(self, generation: int) -> BusReply:
        """Ask until the link is up and of this generation."""
        deadline_s = monotonic() + 20
        while (reply := self.ask(link.BUS_READ, VERSION)).generation != generation or not reply.up:
            assert monotonic() < deadline_s
        return reply


@pytest.fixture
def server() -> Iterator[BusServer]:
    with RunDirectory() as run, bus_server(run) as server:
        yield server


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Card]:
    card = Card(tmp_path / "mailbox")
    yield card
    card.mailbox.close()


@pytest.fixture
def served(server: BusServer, card: Card, tmp_path: Path) -> Iterator[CardLink]:
    with CardLink(tmp_path / "mailbox", server.qtest_socket) as served:
        served.wait_up()
        yield served


def test_registers_are_read_and_written(card: Card, served: CardLink) -> None:
    assert card.read(VERSION) >> 16 == 1
    both = card.read(CAPABILITIES) | card.read(CAPABILITIES + 4) << 32
    assert card.read(CAPABILITIES, 8) == both != 0
    address = 0x1_2345_6000
    assert card.ask(link.BUS_WRITE, QUEUE_ADDRESS, 8, address).value == 0
    assert card.read(QUEUE_ADDRESS, 8) == address
    assert card.ask(link.BUS_WRITE, QUEUE_ADDRESS, 4, 0xFFFF_FFFF_0000_7000).up == 1
    assert card.read(QUEUE_ADDRESS, 8) == 0x1_0000_7000  # four bytes, whatever the value
    assert served.refused == 0


def test_the_card_learns_where_its_memory_is(
    card: Card, served: CardLink, server: BusServer
) -> None:
    reply = card.ask(link.BUS_READ, VERSION)
    assert (reply.up, reply.engine_memory, reply.generation) == (1, 0xE100_0000, 1)
    assert served.up


@pytest.mark.parametrize(
    ("op", "offset", "width"),
    [
        (link.BUS_READ, link.BUS_BYTES, 4),
        (link.BUS_READ, link.BUS_BYTES - 4, 8),
        (link.BUS_WRITE, (1 << 64) - 4, 4),
        (link.BUS_WRITE, 0x1000_0000, 8),
        (link.BUS_READ, 2, 4),
        (link.BUS_READ, 4, 8),
        (link.BUS_READ, 0, 1),
        (link.BUS_READ, 0, 0),
        (link.BUS_READ, 0, 0xFFFF),
        (0, 0, 4),
        (3, 0, 4),
    ],
)
def test_what_is_no_register_never_reaches_the_bus(
    op: int, offset: int, width: int, card: Card, served: CardLink
) -> None:
    before = served.served
    reply = card.ask(op, offset, width, 1)
    assert (reply.up, reply.value) == (1, ALL_ONES)
    assert (served.served, served.refused) == (before, 1)


def test_a_cable_that_is_pulled(card: Card, served: CardLink) -> None:
    assert card.ask(link.BUS_READ, VERSION).generation == 1
    served.take_down()
    deadline_s = monotonic() + 20
    while (reply := card.ask(link.BUS_READ, VERSION)).up:
        assert monotonic() < deadline_s
    assert (reply.value, reply.engine_memory) == (ALL_ONES, 0)
    assert not served.up
    served.bring_back()
    assert card.wait_generation(2).value >> 16 == 1


def test_a_server_that_goes_and_returns(card: Card, served: CardLink, server: BusServer) -> None:
    card.ask(link.BUS_WRITE, QUEUE_ADDRESS, 8, 0x7000)
    server.kill()
    reply = card.ask(link.BUS_READ, VERSION)
    assert (reply.up, reply.value) == (0, ALL_ONES)
    # The server's firmware has the socket to itself until it has placed the functions.
    served.take_down()
    server.restart()
    served.bring_back()
    card.wait_generation(2)
    assert card.read(QUEUE_ADDRESS, 8) == 0  # another machine


def test_an_engine_that_was_reset_is_enabled_anew(
    card: Card, served: CardLink, server: BusServer
) -> None:
    served.take_down()
    while card.ask(link.BUS_READ, VERSION).up:
        pass
    with QtestClient(server.qtest_socket) as client:
        PciBus(client).clear_command(Slot.parse(ENGINE_SLOT), COMMAND_BUS_MASTER)
    served.bring_back()
    card.wait_generation(2)
    served.close()
    with QtestClient(server.qtest_socket) as client:
        command = PciBus(client).space.read(Slot.parse(ENGINE_SLOT), 4, 2)
    assert command & COMMAND_BUS_MASTER


def test_a_link_that_starts_late_answers_what_waits(
    server: BusServer, card: Card, tmp_path: Path
) -> None:
    request = BusRequest(77, link.BUS_READ, 4, VERSION, 0)
    card.mailbox.write(link.BUS_REQUEST_AT, link.BUS_REQUEST.encode(request))
    with CardLink(tmp_path / "mailbox", server.qtest_socket):
        deadline_s = monotonic() + 20
        while card.reply().sequence != 77:
            assert monotonic() < deadline_s
            sleep(1e-3)
    card.sequence = 77
    with CardLink(tmp_path / "mailbox", server.qtest_socket) as again:
        again.wait_up()
        assert again.served == 0  # not twice
        assert replace(card.ask(link.BUS_READ, VERSION), value=0).up == 1


def test_without_a_server_there_is_no_link(card: Card, tmp_path: Path) -> None:
    with CardLink(tmp_path / "mailbox", tmp_path / "nobody") as lonely:
        reply = card.ask(link.BUS_READ, VERSION)
        assert (reply.up, reply.value) == (0, ALL_ONES)
        with pytest.raises(LabError, match="not up within"):
            lonely.wait_up(0.05)
    with pytest.raises(LabError, match="cannot open the mailbox"):
        CardLink(tmp_path / "none", tmp_path / "nobody")
