"""The card machine in the demonstration: started, and held to what is claimed of it."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from pyscan.errors import LabError
from pyscan.lab.card import CardMachine
from pyscan.lab.guest import Guest
from pyscan.lab.process import RunDirectory
from pyscan.sources.link import Engine, firmware_text


class CardSide:
    """A card machine on the guest's bus; leaving the context ends it."""

    def __init__(self, run: RunDirectory, guest: Guest) -> None:
        """Start it. Raises LabError."""
        if guest.bus is None:
            raise LabError("the guest has no bus for a card")
        self._ram = guest.ram_file
        self._opened_ram: bool | None = None
        with ExitStack() as stack:
            self._card = stack.enter_context(CardMachine(run, guest.bus))
            self._card.link.wait_up()
            self._contents = stack.pop_all()
        self._boot = self._card.page().boot
        self.source = self._card.uri(guest.options.machine, guest.options.memory_mib << 20)

    def describe(self) -> str:
        """One line for a person."""
        page = self._card.page()
        return (
            f"firmware {firmware_text(page.firmware)} on riscv64, link up; it reads by DMA over "
            "the guest's bus"
        )

    def look_at_monitor(self, pid: int) -> None:
        """See whether the running monitor has the guest's RAM open, or mapped."""
        self._opened_ram = str(self._ram) in _files_of(pid)

    def checks(self, pages_swept: int) -> dict[str, bool]:
        """What is claimed of the card, each seen from outside of the monitor."""
        page, link = self._card.page(), self._card.link
        return {
            "the card's engine is a bus master on the guest's bus": page.engine == Engine.DMA
            and link.served > 0
            and link.refused == 0,
            "the card read every page that was swept": page.pages >= pages_swept > 0,
            "the card was not restarted meanwhile": page.boot == self._boot,
            "the monitor had no access to the guest's RAM file": self._opened_ram is False,
        }

    def account(self) -> dict[str, Any]:
        """What the card has done, for the document."""
        page = self._card.page()
        return {
            "firmware": firmware_text(page.firmware),
            "engine": Engine(page.engine).name.lower(),
            "pages": page.pages,
            "unread": page.unread,
            "resets": page.resets,
            "bus_accesses": self._card.link.served,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._contents.close()


def _files_of(pid: int) -> set[str]:
    """Paths of the files that a process has open or mapped, proc(5)."""
    process = Path("/proc") / str(pid)
    files = set()
    for entry in (process / "fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            files.add(os.readlink(entry))
    for line in (process / "maps").read_text().splitlines():
        files.add(line.split(maxsplit=5)[-1])
    return files
