"""Configuration space, functions and registers on a bus of paper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_bus import ECAM, MEMORY_BAR, FakeServer, serving

from pyscan.errors import SourceUnavailable, UsageError
from pyscan.sources.pci import (
    COMMAND_BUS_MASTER,
    COMMAND_MEMORY,
    EcamSpace,
    PciBus,
    PortSpace,
    Registers,
    Slot,
)
from pyscan.sources.qtest import QtestClient

MEMORY = Slot(0, 7, 0)


@contextmanager
def connected(server: FakeServer, path: Path) -> Iterator[QtestClient]:
    with (
        serving(path, lambda line: server.answer(line) + "\n"),
        QtestClient(path, timeout_s=20) as client,
    ):
        yield client


@pytest.fixture
def server(tmp_path: Path) -> FakeServer:
    return FakeServer(tmp_path)


@pytest.mark.parametrize("text", ["", "9.0", "00:9.0", "00:20.0", "00:09.8", "00:09.0 ", "0A:00.0"])
def test_what_is_no_slot(text: str) -> None:
    with pytest.raises(UsageError, match=r"write for example 00:09\.0"):
        Slot.parse(text)


def test_slots() -> None:
    assert Slot.parse("00:1f.7") == Slot(0, 31, 7)
    assert str(Slot(0, 31, 7)) == "00:1f.7"
    assert Slot(1, 2, 3).number == 0x0113


def test_the_window_is_where_the_host_bridge_says(server: FakeServer, tmp_path: Path) -> None:
    server.latch = 0x8000_F8E0  # of a guest that was about to read
    with connected(server, tmp_path / "q") as client:
        bus = PciBus(client)
        assert isinstance(bus.space, EcamSpace)
        assert bus.space.base == ECAM
        found = [(str(f.slot), f.vendor, f.device) for f in bus.functions()]
    assert found == [
        ("00:00.0", 0x8086, 0x29C0),
        ("00:07.0", 0x1AF4, 0x1110),
        ("00:09.0", 0x1B36, 0x0010),
    ]
    assert server.latch == 0x8000_F8E0


def test_a_window_with_fewer_buses_is_not_left(server: FakeServer, tmp_path: Path) -> None:
    with connected(server, tmp_path / "q") as client:
        space = EcamSpace(client, ECAM, 64)
        assert space.read(Slot(63, 31, 7), 0, 4) == 0xFFFF_FFFF
        before = len(server.stores)
        with pytest.raises(SourceUnavailable, match="no bus 0x40 of 64"):
            space.write(Slot(64, 0, 0), 4, 2, 6)
        assert len(server.stores) == before


@pytest.mark.parametrize("bridge", [0x1237_8086, 0x29C0_8086], ids=["pc", "q35-without-window"])
def test_ports_where_there_is_no_window(
    server: FakeServer, tmp_path: Path, bridge: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.functions[0] = bridge
    real = server.configuration
    monkeypatch.setattr(
        server, "configuration", lambda f, o: 0 if (f, o) == (0, 0x60) else real(f, o)
    )
    with connected(server, tmp_path / "q") as client:
        bus = PciBus(client)
        assert isinstance(bus.space, PortSpace)
        assert bus.find(0x1AF4, 0x1110, "memory") == MEMORY
        bus.set_command(MEMORY, COMMAND_MEMORY | COMMAND_BUS_MASTER)
        assert bus.space.read(MEMORY, 4, 2) == 6
        bus.clear_command(MEMORY, COMMAND_BUS_MASTER)
        assert bus.space.read(MEMORY, 4, 2) == 2


def test_a_guest_that_comes_between_finds_its_latch_again(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = server.answer
    reads = []

    def answer(line: str) -> str:
        text = real(line)
        if line.split()[:2] == ["inl", "0xcf8"]:
            reads.append(line)
            if len(reads) == 1:
                server.latch = 0x8000_1234  # by the guest, after we looked
        return text

    monkeypatch.setattr(server, "answer", answer)
    with connected(server, tmp_path / "q") as client:
        assert PortSpace(client).read(MEMORY, 0, 4) == 0x1110_1AF4
    assert server.latch == 0x8000_1234


@pytest.mark.parametrize("bridge", [0xFFFF_FFFF, 0, 0x1111_2222])
def test_another_machine(server: FakeServer, tmp_path: Path, bridge: int) -> None:
    server.functions[0] = bridge
    with (
        connected(server, tmp_path / "q") as client,
        pytest.raises(SourceUnavailable, match="neither that of q35 nor of pc"),
    ):
        PciBus(client)


def test_finding_a_function(server: FakeServer, tmp_path: Path) -> None:
    server.functions[10 << 3] = 0x1110_1AF4
    with connected(server, tmp_path / "q") as client:
        bus = PciBus(client)
        with pytest.raises(SourceUnavailable, match=r"found 00:07.0, 00:0a.0; name its slot"):
            bus.find(0x1AF4, 0x1110, "memory")
        with pytest.raises(SourceUnavailable, match="found none"):
            bus.find(0x1234, 0x11E8, "edu")
        assert bus.find(0x1AF4, 0x1110, "memory", Slot(0, 10, 0)) == Slot(0, 10, 0)
        with pytest.raises(SourceUnavailable, match=r"no memory \(1af4:1110\) at 00:09.0"):
            bus.find(0x1AF4, 0x1110, "memory", Slot(0, 9, 0))


def test_a_bus_full_of_functions_is_bounded(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        server, "configuration", lambda _f, o: {0: 0x29C0_8086, 0x60: ECAM | 1}.get(o, 0x80)
    )
    with connected(server, tmp_path / "q") as client:
        assert len(PciBus(client).functions()) == 256


@pytest.mark.parametrize("bar", [0, 0xC001, 0xC, 0xFFFF_FFFF], ids=["none", "io", "64", "gone"])
def test_a_function_without_an_address(
    server: FakeServer, tmp_path: Path, bar: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = server.configuration
    monkeypatch.setattr(server, "configuration", lambda f, o: bar if o == 0x18 else real(f, o))
    with (
        connected(server, tmp_path / "q") as client,
        pytest.raises(SourceUnavailable, match=r"no memory address|is gone"),
    ):
        PciBus(client).registers(MEMORY, 2, 4096)


def test_registers_end_where_they_end(server: FakeServer, tmp_path: Path) -> None:
    with connected(server, tmp_path / "q") as client:
        registers = PciBus(client).registers(MEMORY, 2, 4096)
        assert isinstance(registers, Registers)
        assert registers.address == MEMORY_BAR
        assert registers.load(4092, 4) == 0
        before = len(server.stores)
        for offset in (-4, 4093, 1 << 40):
            with pytest.raises(ValueError, match="outside of 0x1000"):
                registers.store((offset, 4, 0))
        assert len(server.stores) == before
