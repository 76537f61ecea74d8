"""A server's bus as the qtest socket shows it, with an NVMe controller that obeys the test."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAGE = 4096
ECAM = 0xB000_0000
MEMORY_BAR, ENGINE_BAR = 0xE100_0000, 0xE200_0000
MEMORY_BYTES = 256 << 10
RAM_PAGES = 64
#: Room for two commands of eight pages.
LANDING_PAGES = 16
TRANSFER_ERROR, SGL_TOO_SHORT = 0x04, 0x0F


class Refused(Exception):
    """The bus or an IOMMU refuses an access."""


@dataclass
class Command:
    """One I/O command: what it names, and the pages that it gathers (none for an SGL)."""

    id: int
    sgl: bool
    frames: list[int]
    block: int


class FakeServer:
    """Answers qtest commands about a q35 with ivshmem at 00:07.0 and nvme at 00:09.0.

    Reads of `refused` frames by DMA fail as QEMU's do: zeros in a gather, an error for a list.
    Frames in `failing` fail the whole command. `fate` may give a command another status, or
    None: it is never completed.
    """

    def __init__(self, folder: Path) -> None:
        self.memory, self.landing = folder / "card", folder / "landing"
        self.memory.write_bytes(bytes(MEMORY_BYTES))
        self.landing.write_bytes(bytes(LANDING_PAGES * PAGE))
        self.ram = np.frombuffer(np.random.default_rng(7).bytes(RAM_PAGES * PAGE), "u1").copy()
        self.ram = self.ram.reshape(-1, PAGE)
        self.functions = {0: 0x29C0_8086, 7 << 3: 0x1110_1AF4, 9 << 3: 0x0010_1B36}
        self.commands: list[Command] = []
        self.refused: set[int] = set()
        self.failing: set[int] = set()
        self.fate: Callable[[Command], int | None] = lambda _command: 0
        self.after: Callable[[Command], None] = lambda _command: None
        self.lands = True
        self.queues_reachable = True
        self.gone = False  # all ones from every register
        self.blocks = LANDING_PAGES * 8
        self.sgl = True
        self.latch = 0
        self.stores: list[tuple[int, int]] = []
        self.resets = 0
        self._registers: dict[int, int] = {}
        self._bars = {(7 << 3, 0x18): MEMORY_BAR, (9 << 3, 0x10): ENGINE_BAR}
        self._command_register: dict[int, int] = {}
        self._queues: dict[int, Queue] = {}

    # The lines of the protocol.

    def answer(self, line: str) -> str:
        word, *values = line.split()
        numbers = [int(value, 0) for value in values]
        if word in {"outl", "inl", "inb", "inw", "outw"}:
            return self._port(word, numbers)
        if word.startswith("write"):
            self._store(numbers[0], numbers[1])
            return "OK"
        width = {"b": 1, "w": 2, "l": 4, "q": 8}[word[4]]
        return f"OK {self._load(numbers[0]) & (1 << 8 * width) - 1:#x}"

    def _port(self, word: str, numbers: list[int]) -> str:
        if word == "outl" and numbers[0] == 0xCF8:
            self.latch = numbers[1]
            return "OK"
        if word == "inl" and numbers[0] == 0xCF8:
            return f"OK {self.latch:#x}"
        if word == "inb":
            return "OK 0x0"
        function, offset = self.latch >> 8 & 0xFFFF, (self.latch & 0xFC) + numbers[0] % 4
        if word.startswith("out"):
            self.configure(function, offset, numbers[1])
            return "OK"
        return f"OK {self.configuration(function, offset):#x}"

    def configuration(self, function: int, offset: int) -> int:
        if function not in self.functions:
            return 0xFFFF_FFFF
        if offset == 0x60 and function == 0:
            return ECAM | 1
        if offset == 0:
            return self.functions[function]
        if offset == 4:
            return self._command_register.get(function, 0)
        return self._bars.get((function, offset), 0)

    def configure(self, function: int, offset: int, value: int) -> None:
        if offset == 4:
            self._command_register[function] = value

    def _load(self, address: int) -> int:
        if ECAM <= address < ECAM + (256 << 20):
            return self.configuration(address - ECAM >> 12, address & 0xFFF)
        if self.gone:
            return 0xFFFF_FFFF_FFFF_FFFF
        if MEMORY_BAR <= address < MEMORY_BAR + MEMORY_BYTES:
            return int.from_bytes(self.dma_read(address, 8), "little")
        offset = address - ENGINE_BAR
        if offset == 0:  # CAP: 64 entries, NVM commands
            return 1 << 37 | 63
        return self._registers.get(offset, 0)

    def _store(self, address: int, value: int) -> None:
        self.stores.append((address, value))
        if ECAM <= address < ECAM + (256 << 20):
            self.configure(address - ECAM >> 12, address & 0xFFF, value)
            return
        if self.gone:
            return
        offset = address - ENGINE_BAR
        self._registers[offset] = value
        if offset == 0x14:
            self.resets += not value & 1
            self._registers[0x1C] = value & 1
            if value & 1:
                asq, acq = self._registers[0x28], self._registers[0x30]
                self._queues = {0: Queue(asq, acq, (self._registers[0x24] & 0xFFF) + 1)}
        elif offset >= 0x1000 and offset % 8 == 0:
            self._ring((offset - 0x1000) // 8, value)

    # The controller.

    def dma_read(self, address: int, length: int) -> bytes:
        if MEMORY_BAR <= address < MEMORY_BAR + MEMORY_BYTES:
            with self.memory.open("rb") as file:
                file.seek(address - MEMORY_BAR)
                data = file.read(length)
            if len(data) < length:
                raise Refused
            return data
        frame, start = divmod(address, PAGE)
        if frame in self.refused or frame >= RAM_PAGES:
            raise Refused
        return self.ram[frame, start : start + length].tobytes()

    def dma_write(self, address: int, data: bytes) -> None:
        with self.memory.open("r+b") as file:
            file.seek(address - MEMORY_BAR)
            file.write(data)

    def _ring(self, number: int, tail: int) -> None:
        queue = self._queues.get(number)
        while queue is not None and queue.head != tail:
            try:
                entry = self._fetch(queue)
            except Refused:
                self._registers[0x1C] = 2
                return
            queue.head = (queue.head + 1) % queue.entries
            status = self._io(entry) if number else self._admin(entry)
            if status is not None:
                self.complete(number, struct.unpack_from("<H", entry, 2)[0], status)

    def _fetch(self, queue: Queue) -> bytes:
        if not self.queues_reachable:
            raise Refused
        return self.dma_read(queue.submission + 64 * queue.head, 64)

    def complete(self, number: int, command: int, status: int) -> None:
        """Write a completion, asked for or not."""
        queue = self._queues[number]
        entry = struct.pack("<IIHHHH", 0, 0, queue.head, number, command, status << 1 | queue.phase)
        self.dma_write(queue.completion + 16 * queue.tail, entry)
        queue.tail = (queue.tail + 1) % queue.entries
        queue.phase ^= queue.tail == 0

    def _admin(self, entry: bytes) -> int:
        pointer, size, more = struct.unpack_from("<Q8xII", entry, 24)
        if entry[0] == 6:
            data = bytearray(PAGE)
            if size == 1:
                data[536] = self.sgl
            else:
                struct.pack_into("<Q", data, 0, self.blocks)
                data[130] = 9
            self.dma_write(pointer, data)
        elif entry[0] == 5:
            self._queues[1] = Queue(0, pointer, (size >> 16) + 1)
        elif entry[0] == 1:
            self._queues[more >> 16].submission = pointer
        return 0

    def _io(self, entry: bytes) -> int | None:
        first, second, block = struct.unpack_from("<QQQ", entry, 24)
        pages = (struct.unpack_from("<H", entry, 48)[0] + 8) // 8
        command = Command(struct.unpack_from("<H", entry, 2)[0], bool(entry[1] & 0x40), [], block)
        self.commands.append(command)
        if command.sgl:
            command.frames = [first // PAGE]
            try:
                self.dma_read(first, 16)
            except Refused:
                return TRANSFER_ERROR
            return SGL_TOO_SHORT
        addresses = [first]
        if pages == 2:
            addresses.append(second)
        elif pages > 2:
            addresses += struct.unpack(f"<{pages - 1}Q", self.dma_read(second, 8 * pages - 8))
        command.frames = [address // PAGE for address in addresses]
        status = self.fate(command)
        if self.failing & set(command.frames):
            status = TRANSFER_ERROR
        if status == 0 and self.lands:
            self._land(addresses, block)
        self.after(command)
        return status

    def _land(self, addresses: list[int], block: int) -> None:
        with self.landing.open("r+b") as file:
            file.seek(block * 512)
            for address in addresses:
                try:
                    file.write(self.dma_read(address, PAGE))
                except Refused:
                    file.write(bytes(PAGE))


@dataclass
class Queue:
    """What the controller knows of a pair of queues."""

    submission: int
    completion: int
    entries: int
    head: int = 0
    tail: int = 0
    phase: int = 1


@contextmanager
def serving(path: Path, answer: Callable[[str], str]) -> Iterator[None]:
    """Answer the lines of one client after the other, each by what `answer` says.

    An answer that is empty is not given; one without an end of line is sent as it is.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=_serve, args=(listener, answer), daemon=True)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=20)
            path.unlink()
        assert not thread.is_alive()


def _serve(listener: socket.socket, answer: Callable[[str], str]) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        with client, client.makefile("r") as lines:
            try:
                for line in lines:
                    client.sendall(answer(line).encode())
            except (OSError, EOFError):
                continue


@contextmanager
def fake_server(folder: Path) -> Iterator[tuple[FakeServer, str]]:
    """A fake server and the URI of its memory."""
    server = FakeServer(folder)
    path = folder / "qtest"
    (folder / "map.toml").write_text(
        f"[[region]]\ngpa = 0\nlength = {RAM_PAGES * PAGE}\noffset = 0\n"
    )
    uri = f"nvme-dma:{path}?memory={server.memory}&landing={server.landing}&map={folder}/map.toml"
    with serving(path, lambda line: server.answer(line) + "\n"):
        yield server, uri
