"""The card's firmware on the machine it is for: it starts, refuses to start, and resets itself."""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyscan.lab.process import Child, RunDirectory

ROOT = Path(__file__).parents[2]
START_S = 20
MIB = 1 << 20

#: Slot of the card's bus -> bytes of memory: a card that reads by DMA.
CARD = {2: 8 * MIB, 3: 4 * MIB, 4: MIB}

#: Offsets in the mailbox, docs/spec/card-link.md, 2 and 3.
CARD_AT, BOOT_AT, ENGINE_AT = 0x1000, 0x1010, 0x1034

MAGIC = b"PSCARD01"


@pytest.fixture(scope="module")
def elf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("firmware")
    command = ["make", "-C", str(ROOT / "firmware"), f"OUT={out}", "firmware.elf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return out / "firmware.elf"


class Card:
    def __init__(self, run: RunDirectory, memories: dict[int, int]) -> None:
        self.files = {slot: run.ram_file(f"slot{slot}", size) for slot, size in memories.items()}
        self.log = run.path / "card.log"
        self.gdb = run.path / "gdb"
        self.child: Child

    def read(self, at: int, size: int) -> bytes:
        with self.files[2].open("rb") as mailbox:
            mailbox.seek(at)
            return mailbox.read(size)

    def boot(self) -> int:
        """Names this start of the card; 0 while it is not up."""
        if self.read(CARD_AT, 8) != MAGIC:
            return 0
        return int.from_bytes(self.read(BOOT_AT, 8), "little")

    def said(self, text: str) -> bool:
        return self.log.is_file() and text in self.log.read_text()

    def wait(self, text: str) -> None:
        self.child.wait_until(lambda: self.said(text), START_S, f"the log line {text!r}")


@contextmanager
def card(elf: Path, memories: dict[int, int], *options: str) -> Iterator[Card]:
    with RunDirectory() as run:
        made = Card(run, memories)
        command: list[str | Path] = [
            *("qemu-system-riscv64", "-M", "virt", "-accel", "tcg", "-bios", "none", "-m", "64M"),
            *("-display", "none", "-nodefaults", "-kernel", elf, "-serial", f"file:{made.log}"),
            *("-chardev", f"socket,id=gdb,path={made.gdb},server=on,wait=off"),
            *("-gdb", "chardev:gdb", *options),
        ]
        for slot, path in made.files.items():
            size = memories[slot]
            memory = f"memory-backend-file,id=m{slot},size={size},share=on,mem-path={path}"
            command += [
                *("-object", memory),
                *("-device", f"ivshmem-plain,memdev=m{slot},addr={slot}.0"),
            ]
        with Child("card", command, run.path / "qemu.log") as made.child:
            yield made


class Debugger:
    """As much of GDB's remote protocol as it takes to derail a card that has not started."""

    def __init__(self, at: Card) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(START_S)
        at.child.wait_until(lambda: self._connects(at.gdb), START_S, "its debugger's socket")
        self._left = b""
        self.ask("qSupported:xmlRegisters=riscv")
        self.ask("qXfer:features:read:target.xml:0,ffb")  # before that, it writes no register

    def _connects(self, path: Path) -> bool:
        try:
            self._socket.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def send(self, text: str) -> None:
        self._socket.sendall(b"$%s#%02x" % (text.encode(), sum(text.encode()) % 256))

    def packet(self) -> str:
        while b"#" not in self._left or len(self._left) < self._left.index(b"#") + 3:
            self._left += self._socket.recv(65536)
        whole, _, rest = self._left.partition(b"#")
        self._left = rest[2:]
        self._socket.sendall(b"+")
        return whole.partition(b"$")[2].decode()

    def ask(self, text: str) -> str:
        self.send(text)
        return self.packet()

    def run_to(self, place: int) -> None:
        assert self.ask(f"Z0,{place:x},4") == "OK"
        assert self.ask("c").startswith("T05")
        assert self.ask(f"z0,{place:x},4") == "OK"

    def go_on_at(self, place: int) -> None:
        assert self.ask("P20=" + struct.pack("<Q", place).hex()) == "OK"  # the program counter
        self.send("c")

    def close(self) -> None:
        self._socket.close()


def symbols(elf: Path) -> dict[str, int]:
    listing = subprocess.run(
        ["riscv64-unknown-elf-nm", str(elf)], capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[2]: int(line.split()[0], 16) for line in listing.splitlines()}


@pytest.mark.parametrize(("memories", "engine"), [(CARD, 1), ({2: 8 * MIB, 5: 64 * MIB}, 2)])
def test_starts(elf: Path, memories: dict[int, int], engine: int) -> None:
    boots = set()
    for _ in range(2):
        with card(elf, memories) as started:
            started.child.wait_until(lambda: started.boot() != 0, START_S, "a card")
            assert int.from_bytes(started.read(ENGINE_AT, 4), "little") == engine
            boots.add(started.boot())
    assert len(boots) == 2  # the key, too, is of the seed


@pytest.mark.parametrize(
    ("memories", "line"),
    [
        ({}, "slot 2 has no mailbox of 8 MiB"),
        ({**CARD, 2: 4 * MIB}, "slot 2 has no mailbox of 8 MiB"),
        ({2: 8 * MIB}, "neither engine memory in slot 4 nor a window in slot 5"),
        ({2: 8 * MIB, 4: MIB}, "slot 3 has no landing memory"),
        ({**CARD, 4: 4096}, "engine memory in slot 4 is too small"),
    ],
)
def test_refuses_to_start(elf: Path, memories: dict[int, int], line: str) -> None:
    with card(elf, memories) as refused:
        refused.wait(line)
        assert 2 not in memories or refused.boot() == 0


def test_refuses_another_device(elf: Path) -> None:
    with card(elf, {2: 8 * MIB}, "-device", "pci-testdev,addr=4.0") as refused:
        refused.wait("no ivshmem-plain")


@pytest.mark.parametrize(
    ("to", "line"),
    [
        ("park", "reset by the watchdog: no turn of the loop for 2 s; it was at 0x8"),
        (None, "reset after a fault of the firmware, at 0x8"),
    ],
)
def test_resets_itself(elf: Path, to: str | None, line: str) -> None:
    """A loop that stands still, and an instruction where there is no memory."""
    places = symbols(elf)
    with card(elf, CARD, "-S") as hung:
        debugger = Debugger(hung)
        debugger.run_to(places["ps_card_turn"])
        boot = hung.boot()
        debugger.go_on_at(places[to] if to else 8)
        hung.wait(line)
        hung.child.wait_until(lambda: hung.boot() not in {0, boot}, START_S, "another start")
        assert hung.boot() != boot != 0
        debugger.close()
