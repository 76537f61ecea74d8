"""``card:`` - a monitoring card that reads the target's memory and digests it by itself.

What crosses the link are digests and statuses, and whole pages only where they are asked for:
page tables, and the pages behind a finding. docs/spec/card-link.md is the link.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import which
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.errors import SourceUnavailable, UsageError
from pyscan.records import MemoryMap, PageStatus
from pyscan.sources import link
from pyscan.sources.base import (
    Digested,
    Digesting,
    Frames,
    Pages,
    Source,
    Statuses,
    check_request,
    find_regions,
    poison,
)
from pyscan.sources.channel import Channel, Command, LinkLost
from pyscan.sources.layout import Layout
from pyscan.sources.link import KINDS, Completion, Op, Region
from pyscan.sources.machines import uri_layout
from pyscan.sources.mailbox import Mailbox, open_mailbox
from pyscan.sources.uri import SourceUri

#: Frames of one DIGEST: enough for the engine's largest gathers, few enough for several
#: commands of one sweep to be under way.
DIGEST_PAGES: Final = 2048

_EMULATOR: Final = "qemu-system-riscv64"

_LAST_STATUS: Final = max(PageStatus)


class CardSource(Source, Digesting):
    """A target behind a card. One caller at a time; others wait.

    A card that is lost gives LINK_DOWN, or TIMEOUT, and is spoken to again as soon as it is back.
    """

    def __init__(self, uri: str, mailbox: Mailbox, layout: Layout) -> None:
        """Begin a session with the card; takes the mailbox over.

        Raises SourceUnavailable, UsageError.
        """
        self._uri = uri
        self._mailbox = mailbox
        self._memory_map = layout.memory_map
        self._lock = Lock()
        self._closed = False
        try:
            self._channel = Channel(uri, mailbox, card_regions(uri, layout))
        except UsageError:
            mailbox.close()
            raise
        try:
            self._channel.ready()
        except SourceUnavailable:
            self.close()
            raise

    @property
    def uri(self) -> str:
        """The URI that names this source."""
        return self._uri

    def regions(self) -> MemoryMap:
        """The memory map. Raises SourceUnavailable when closed, and when the card is lost."""
        with self._lock:
            if self._closed:
                raise SourceUnavailable(f"{self._uri}: closed; open the source again")
            self._channel.ready()
        return self._memory_map

    def read(self, frames: Frames, buffer: Pages) -> Statuses:
        """See `Source.read`."""
        check_request(frames, buffer)
        return self._fetch(Op.READ, 0, frames, buffer)[0]

    def digest_pages(self, frames: Frames, digests: tuple[str, ...]) -> Digested:
        """See `Digesting.digest_pages`."""
        unknown = set(digests) - set(KINDS)
        if unknown or not digests:
            raise ValueError(f"digests: {digests}; known are {', '.join(KINDS)}")
        kinds = sum(KINDS[name].bit for name in set(digests))
        results = np.empty((len(frames), link.width(Op.DIGEST, kinds)), dtype=np.uint8)
        statuses, boot = self._fetch(Op.DIGEST, kinds, frames, results)
        at, columns = 0, {}
        for name, kind in KINDS.items():
            if name in digests:
                columns[name] = np.ascontiguousarray(results[:, at : at + kind.size])
                at += kind.size
        return Digested(statuses, tuple(columns[name] for name in digests), boot)

    def view(self) -> None:
        """None: the card has no memory of the target to show."""

    def close(self) -> None:
        """See `Source.close`. Ends the command that is under way."""
        self._channel.stop()
        with self._lock:
            if not self._closed:
                self._closed = True
                self._channel.close()

    def _fetch(
        self, op: Op, kinds: int, frames: Frames, results: NDArray[np.uint8]
    ) -> tuple[Statuses, int]:
        """One status per frame, and the start of the card that read them all.

        `results` has a row for each frame, POISON where its status is not OK.
        """
        statuses = np.full(len(frames), PageStatus.LINK_DOWN, dtype=np.uint8)
        listed = find_regions(self._memory_map, frames) >= 0
        rows = np.flatnonzero(listed)
        most = link.READ_MAX if op is Op.READ else DIGEST_PAGES
        parts = [rows[start : start + most] for start in range(0, len(rows), most)]
        commands = [_command(op, kinds, frames[part]) for part in parts]
        done = 0

        def take(number: int, completion: Completion, at: int) -> None:
            nonlocal done
            part = parts[number]
            statuses[part] = self._results(part, completion, at, results)
            done = number + 1

        with self._lock:
            if not self._closed:
                statuses[~listed] = PageStatus.HOLE
                try:
                    self._channel.run(commands, take)
                except LinkLost as lost:
                    for part in parts[done:]:
                        statuses[part] = lost.status
            boot = self._channel.boot
        poison(results, statuses)
        return statuses, boot

    def _results(
        self, part: NDArray[np.intp], completion: Completion, at: int, results: NDArray[np.uint8]
    ) -> Statuses:
        """Copy a command's results into rows `part` of `results`; gives the statuses.

        Raises SourceUnavailable when they cannot be those of the completion.
        """
        statuses = np.empty(len(part), dtype=np.uint8)
        self._mailbox.read_into(at + link.STATUSES_IN_SLOT, statuses)
        statuses[statuses > _LAST_STATUS] = PageStatus.LINK_DOWN
        if int((statuses == PageStatus.OK).sum()) != completion.ok:
            raise SourceUnavailable(
                f"{self._uri}: the card's statuses are not those of its answer; restart the card"
            )
        together = part[-1] - part[0] == len(part) - 1
        shape = (len(part), results.shape[1])
        target = results[part[0] : part[-1] + 1] if together else np.empty(shape, dtype=np.uint8)
        self._mailbox.read_into(at + link.RESULTS_IN_SLOT, target)
        if not together:
            results[part] = target
        return statuses


def open_card(uri: SourceUri) -> CardSource:
    """Open ``card:MAILBOX?machine=NAME&size=SIZE`` or ``card:MAILBOX?map=FILE``.

    Raises UsageError, FileFormatError, SourceUnavailable.
    """
    uri.allow("machine", "size", "map")
    layout = uri_layout(uri)
    return CardSource(uri.text, open_mailbox(Path(uri.path)), layout)


def probe_card() -> str:
    """Whether an emulated card could run here; a real one is known by its mailbox alone."""
    path = which(_EMULATOR)
    if path is None:
        return f"no {_EMULATOR} on PATH, so no emulated card; a real one is named by its BAR"
    return f"{path}, for an emulated card"


def card_regions(uri: str, layout: Layout) -> list[Region]:
    """The memory map as a card takes it: neighbours in memory and file are one region.

    Raises UsageError when that are still too many.
    """
    regions: list[Region] = []
    for segment in layout.segments:
        region, offset = segment.region, segment.offset
        last = regions[-1] if regions else Region(0, 0, 0)
        if last.length and (last.gpa + last.length, last.offset + last.length) == (
            region.gpa,
            offset,
        ):
            regions[-1] = replace(last, length=last.length + region.length)
        else:
            regions.append(Region(region.gpa, region.length, offset))
    if len(regions) > link.REGIONS_MAX:
        raise UsageError(f"{uri}: {len(regions)} separate regions; a card takes {link.REGIONS_MAX}")
    return regions


def _command(op: Op, kinds: int, frames: Frames) -> Command:
    """The command for these frames, which are at least one."""
    first = int(frames[0])
    if int(frames[-1]) - first == len(frames) - 1 and (np.diff(frames) == 1).all():
        return Command(op, len(frames), kinds, link.RANGE, first)
    return Command(op, len(frames), kinds, arguments=frames.astype("<u8").tobytes())
