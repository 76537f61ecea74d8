"""The card machine: a second QEMU that is the monitoring card, with firmware of its own.

    with Guest(GuestOptions(guest_dir, card=CardBus()), run) as guest:
        guest.wait_ready()
        with CardMachine(run, guest.bus, firmware) as card:
            source = open_source(card.uri("q35", guest.options.memory_mib << 20))

Its processor reads the server's memory only as its engine on the server's bus allows. What the
two machines share is what a card has on both sides: mailbox, landing memory, engine memory.
"""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

from pyscan.errors import LabError
from pyscan.lab.bus import ServerBus, comma_safe
from pyscan.lab.link import CardLink
from pyscan.lab.process import Child, RunDirectory
from pyscan.sources import build_uri
from pyscan.sources.link import CARD_MAGIC, MAILBOX_BYTES, CardPage
from pyscan.sources.mailbox import open_mailbox, read_card

#: Where the firmware's Makefile puts it.
FIRMWARE: Final = Path("build/firmware/firmware.elf")

START_TIMEOUT_S: Final = 20.0

#: Slots of the card's own bus (firmware/board/riscv-virt/board.c).
_MAILBOX, _LANDING, _ENGINE, _WINDOW = 2, 3, 4, 5


class CardMachine:
    """A running card; leaving the context ends it, and its link. Files lie in `run`."""

    def __init__(
        self,
        run: RunDirectory,
        bus: ServerBus,
        firmware: Path = FIRMWARE,
        *,
        window: Path | None = None,
    ) -> None:
        """Start the card on `bus`, and wait until it is up. Raises LabError.

        With `window`, the server's RAM file, the card reads through a window instead: past the
        server's bus and IOMMU.
        """
        if not firmware.is_file():
            raise LabError(f"there is no card firmware {firmware}: run `make setup`")
        self._firmware = firmware
        self._bus = bus
        self._window = window
        self.mailbox = run.ram_file("card.mailbox", MAILBOX_BYTES)
        self.log = run.path / "card.log"
        self._qemu_log = run.path / "card-qemu.log"
        self._child: Child | None = None
        with ExitStack() as stack:
            stack.callback(self.kill)
            # With a window the card asks for nothing.
            self.link = stack.enter_context(CardLink(self.mailbox, bus.qtest_socket))
            self.restart()
            self._contents = stack.pop_all()

    @property
    def pid(self) -> int:
        """QEMU's process number. Raises LabError when the card is off."""
        return self._running().pid

    def page(self) -> CardPage:
        """What the card says of itself."""
        mailbox = open_mailbox(self.mailbox, alone=False)
        try:
            return read_card(mailbox)
        finally:
            mailbox.close()

    def uri(self, machine: str, size: int) -> str:
        """The source that is a server of `size` bytes of RAM behind this card."""
        return build_uri("card", self.mailbox, machine=machine, size=str(size))

    def restart(self) -> None:
        """Power the card off and on; it comes back with a new key. Raises LabError."""
        self.kill()
        before = self.page().boot
        self._child = child = Child("card", self._command(), self._qemu_log)
        child.wait_until(lambda: self._is_up(before), START_TIMEOUT_S, "a card in its mailbox")

    def pause(self) -> None:
        """Let the card's processor stand still: a card that hangs."""
        self._running().signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._running().signal(signal.SIGCONT)

    def kill(self) -> None:
        """Power the card off. Idempotent."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.close()

    def close(self) -> None:
        """End card and link. Idempotent."""
        self._contents.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _running(self) -> Child:
        if self._child is None:
            raise LabError("the card is off; restart it")
        return self._child

    def _is_up(self, boot_before: int) -> bool:
        page = self.page()
        return page.magic == CARD_MAGIC and page.boot != boot_before

    def _command(self) -> list[str | Path]:
        command: list[str | Path] = [
            *("qemu-system-riscv64", "-M", "virt", "-accel", "tcg", "-bios", "none"),
            *("-kernel", self._firmware, "-m", "64M", "-display", "none", "-nodefaults"),
            *("-chardev", f"file,id=log,path={comma_safe(self.log)},append=on"),
            *("-serial", "chardev:log"),
            *_memory("mailbox", _MAILBOX, self.mailbox, MAILBOX_BYTES),
        ]
        if self._window is not None:
            size = self._window.stat().st_size
            return [*command, *_memory("window", _WINDOW, self._window, size, readonly=True)]
        engine, landing = self._bus.engine_memory, self._bus.landing
        return [
            *command,
            *_memory("landing", _LANDING, landing, landing.stat().st_size),
            *_memory("engine", _ENGINE, engine, engine.stat().st_size),
        ]


def _memory(name: str, slot: int, path: Path, size: int, *, readonly: bool = False) -> list[str]:
    """QEMU's options for memory in a BAR of the card's own bus."""
    access = "share=on,readonly=on" if readonly else "share=on"
    return [
        "-object",
        f"memory-backend-file,id={name},size={size},{access},mem-path={comma_safe(path)}",
        *("-device", f"ivshmem-plain,memdev={name},addr={slot}.0"),
    ]
