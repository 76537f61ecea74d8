"""A card in Python that can be as hostile as it likes; the firmware's own is tests/card_site.py."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import sleep

import numpy as np

from pyscan.digest import DigestKey, open_digester
from pyscan.records import PAGE_SIZE, PageStatus
from pyscan.sources import build_uri, link
from pyscan.sources.link import CardPage, Completion, Op, Submission
from pyscan.sources.mailbox import FileMailbox

PAGES = 4096  # of the target, q35, all of them readable


def same(value):  # type: ignore[no-untyped-def]
    return value


@dataclass
class Tricks:
    """How this card deviates from one that is good."""

    page: Callable[[CardPage], CardPage] = same
    completion: Callable[[Completion], Completion] = same
    sealed: Callable[[bytes], bytes] = same
    statuses: Callable[[np.ndarray], np.ndarray] = same
    answers: Callable[[Submission], bool] = lambda _command: True
    beats: bool = True


@dataclass
class FakeCard:
    """Serves a mailbox in a thread of its own, one command after the other."""

    directory: Path
    tricks: Tricks = field(default_factory=Tricks)

    def __post_init__(self) -> None:
        self.mailbox = self.directory / "mailbox"
        self.mailbox.touch()
        os.truncate(self.mailbox, link.MAILBOX_BYTES)
        self.uri = build_uri("card", self.mailbox, machine="q35", size=str(PAGES * PAGE_SIZE))
        self.commands: list[Submission] = []
        self._io = FileMailbox(self.mailbox, os.open(self.mailbox, os.O_RDWR))
        self._page = CardPage(
            *(0, link.VERSION, link.VERSION, 1, 0, 0, 0, 0, link.CardState.READY),
            *(link.Engine.DMA, 0, 1 << 16, 0, 0, 0, 0),
        )
        self._key = DigestKey.generate("nh4aes")
        self._exact = open_digester()
        self._keyed = open_digester("native", "nh4aes", self._key)
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> FakeCard:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._leave.set()
        self._thread.join()
        self._io.close()
        self._key.close()

    @staticmethod
    def content(frames: np.ndarray) -> np.ndarray:
        """What the pages in `frames` hold: their number, again and again."""
        words = np.repeat(frames.astype("<u8"), PAGE_SIZE // 8)
        return words.view(np.uint8).reshape(len(frames), PAGE_SIZE)

    def _run(self) -> None:
        while not self._leave.is_set():
            host = link.HOST_PAGE.decode(self._io.read(link.HOST_AT, link.HOST_PAGE.size))
            if host.session != self._page.session:
                self._page = replace(self._page, session=host.session, completed=0)
            elif host.submitted > self._page.completed and host.session:
                self._serve(self._page.completed + 1)
            if self.tricks.beats:
                self._page = replace(self._page, heartbeat=self._page.heartbeat + 1)
            self._show(self._page)
            sleep(1e-4)

    def _show(self, page: CardPage) -> None:
        page = self.tricks.page(replace(page, magic=link.CARD_MAGIC))
        self._io.write(link.CARD_AT, link.CARD_PAGE.encode(page))

    def _serve(self, sequence: int) -> None:
        at = link.SUBMISSIONS_AT + link.slot_of(sequence) * link.SUBMISSION.size
        command = link.SUBMISSION.unseal(self._io.read(at, link.SUBMISSION.size))
        assert command is not None
        if not self.tricks.answers(command):
            return
        self.commands.append(command)
        ok = self._results(command) if command.op in {Op.DIGEST, Op.READ} else 0
        completion = Completion(
            sequence,
            command.op,
            link.Result.OK,
            command.count if command.op in {Op.DIGEST, Op.READ} else 0,
            ok,
            command.session,
            self._page.boot,
            *(0, 0),
        )
        data = self.tricks.sealed(link.COMPLETION.encode(self.tricks.completion(completion)))
        at = link.COMPLETIONS_AT + link.slot_of(sequence) * link.COMPLETION.size
        self._io.write(at, data)
        self._page = replace(self._page, completed=sequence)

    def _results(self, command: Submission) -> int:
        """Carry out a command; returns how many pages it tells as read."""
        at = link.data_at(command.sequence)
        if command.flags & link.RANGE:
            frames = command.first + np.arange(command.count, dtype=np.uint64)
        else:
            frames = np.frombuffer(self._io.read(at, 8 * command.count), dtype="<u8")
        pages = self.content(frames)
        parts = [pages]
        if command.op == Op.DIGEST:
            parts = []
            if command.kinds & link.KINDS["sha256"].bit:
                parts.append(self._exact.hash_pages(pages)[0])
            if command.kinds & link.KINDS["nh4aes"].bit:
                parts.append(self._keyed.hash_pages(pages, frames=frames.copy())[0])
        statuses = self.tricks.statuses(np.zeros(command.count, dtype=np.uint8))
        self._io.write(at + link.STATUSES_IN_SLOT, statuses.tobytes())
        self._io.write(at + link.RESULTS_IN_SLOT, np.concatenate(parts, axis=1).tobytes())
        return int((statuses == PageStatus.OK).sum())
