"""A card that is a program: the firmware's core on this machine, over a target in a file.

    with card_site(directory, layout) as site, open_source(site.uri) as source:
        ...

It is up in a few milliseconds, and has every fault that `pyscan-card-sim --help` lists.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pyscan.lab.process import Child
from pyscan.sources import build_uri
from pyscan.sources.layout import Layout
from pyscan.sources.link import CARD_MAGIC, MAILBOX_BYTES, CardPage
from pyscan.sources.mailbox import open_mailbox, read_card

SIMULATOR = Path(__file__).parents[1] / "build/firmware/pyscan-card-sim"
START_S = 20


class CardSite:
    """One simulated card; files lie in `directory`."""

    def __init__(
        self, directory: Path, layout: Layout, ram: Path | None, engine: str, faults: Sequence[str]
    ) -> None:
        self.layout = layout
        self.ram_path = ram or directory / "card.ram"
        self.mailbox = directory / "card.mailbox"
        self.map_path = directory / "card.toml"
        self.log = directory / "card.log"
        self.faults = tuple(faults)
        self._engine = engine
        self._child: Child | None = None
        for path, length in ((self.ram_path, layout.file_bytes), (self.mailbox, MAILBOX_BYTES)):
            if not path.exists():
                path.touch()
                os.truncate(path, length)
        self.map_path.write_text(
            "".join(
                f"[[region]]\ngpa = {segment.region.gpa}\nlength = {segment.region.length}\n"
                f'offset = {segment.offset}\nkind = "{segment.region.kind}"\n'
                for segment in layout.segments
            )
        )

    @property
    def uri(self) -> str:
        return build_uri("card", self.mailbox, map=str(self.map_path))

    @property
    def child(self) -> Child:
        assert self._child is not None
        return self._child

    def page(self) -> CardPage:
        """What the card says of itself."""
        mailbox = open_mailbox(self.mailbox, alone=False)
        try:
            return read_card(mailbox)
        finally:
            mailbox.close()

    def restart(self) -> None:
        """Start the card (again); it comes back with a new key."""
        self.kill()
        before = self.page().boot
        command: list[str | Path] = [SIMULATOR, "--mailbox", self.mailbox, "--ram", self.ram_path]
        command += ["--engine", self._engine]
        if self._engine == "dma":
            for segment in self.layout.segments:
                region = segment.region
                command += ["--map", f"{region.gpa:#x}:{region.length:#x}:{segment.offset:#x}"]
        for fault in self.faults:
            command += ["--fault", fault]
        self._child = Child("card", [str(part) for part in command], self.log)
        self._child.wait_until(lambda: self._is_up(before), START_S, "a card in its mailbox")

    def kill(self) -> None:
        """Power off, at once."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.close()

    def lose_link(self) -> None:
        """The link between card and target goes down, soon."""
        self.child.signal(signal.SIGUSR1)

    def return_link(self) -> None:
        """It comes back, soon."""
        self.child.signal(signal.SIGUSR2)

    def hang(self) -> None:
        """The card stands still."""
        self.child.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.child.signal(signal.SIGCONT)

    def _is_up(self, boot_before: int) -> bool:
        page = self.page()
        return page.magic == CARD_MAGIC and page.boot != boot_before


@contextmanager
def card_site(
    directory: Path,
    layout: Layout,
    *,
    ram: Path | None = None,
    engine: str = "dma",
    faults: Sequence[str] = (),
) -> Iterator[CardSite]:
    """A running card over memory of `layout`, which is zero unless `ram` is its file.

    `engine` is "dma" or "window".
    """
    site = CardSite(directory, layout, ram, engine, faults)
    try:
        site.restart()
        yield site
    finally:
        site.kill()
