"""Every way to read a target's memory, in turn in one run, on one stopped guest.

    python bench/sources.py [--quick] [--json FILE]

The guest, the card machine and the bus between them are real machines in QEMU, emulated on the
same processors that measure: the ratios say how much each way costs beside the mapped file,
not what hardware would do. A ratio is the median of ratios taken round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from rich.table import Table

from pyscan import render
from pyscan.digest import CopiedSweep, DigestKey, open_digester
from pyscan.lab.bus import CardBus
from pyscan.lab.card import CardMachine
from pyscan.lab.guest import Guest, GuestOptions
from pyscan.lab.process import RunDirectory
from pyscan.qmp import query
from pyscan.records import PAGE_SIZE, PageStatus
from pyscan.sources import Digesting, Frames, Source, build_uri, open_source
from pyscan.sources.card import card_regions
from pyscan.sources.channel import Channel, Command
from pyscan.sources.link import KINDS, Completion, Op
from pyscan.sources.machines import find_machine, machine_layout
from pyscan.sources.mailbox import open_mailbox

MEMORY_MIB: Final = 512
LAYOUT: Final = {"machine": "q35", "size": f"{MEMORY_MIB}M"}
#: Pages that are read: 64 MiB of what the guest has written, the kernel among them.
PAGES: Final = 16_384
EDU_PAGES: Final = 4  # two pages a second
TRIPS: Final = 200
IDLE_S: Final = 5.0
GUEST_DIR: Final = Path("build/guest")
TICKS_A_SECOND: Final = 100  # of /proc/PID/stat, proc(5), on every Linux


@dataclass(frozen=True, slots=True)
class Contender:
    """One way; `run` reads or digests `pages` pages and returns how many of them were read."""

    name: str
    what: str
    pages: int
    run: Callable[[], int]


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of a contender; MB/s, and the median of its ratios to the mapped file."""

    name: str
    what: str
    pages: int
    mb_per_s: float
    slowest: float
    fastest: float
    of_mapped_file: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """A figure that must be reached."""

    figure: str
    wanted: str
    measured: str
    met: bool


def main() -> int:
    """Measure, print, and write what was asked for; 0 whatever the figures are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures here")
    options = parser.parse_args()
    rounds = 3 if options.quick else 9
    with ExitStack() as stack:
        run = stack.enter_context(RunDirectory())
        guest = stack.enter_context(
            Guest(GuestOptions(GUEST_DIR, memory_mib=MEMORY_MIB, card=CardBus(edu=True)), run)
        )
        guest.wait_ready()
        query(guest.lab_qmp, [("stop", None)], 5.0)
        mapped = stack.enter_context(open_source(build_uri("file", guest.ram_file, **LAYOUT)))
        written, empty = _sort_out(mapped)
        times = _measure(_contenders(guest, mapped, written, empty), rounds)
        with _card(guest) as card:
            chain_equal = _chain_equals_native(mapped, card, written)
            trips_ms, local_mb = _round_trips(card), _local_rate(card, rounds)
            chain = _times(
                _card_contender("card chain, nh4aes", card, written, ("nh4aes",)), rounds
            )
            idle = _idle_percent(card.pid)
    rows = _rows(times)
    by_name = {row.name: row for row in rows}
    chain_mb = statistics.median(_mb_per_s(PAGES, seconds) for seconds in chain)
    gather, read_mb = by_name["nvme-dma"], by_name["file, pread"].mb_per_s
    wanted = [
        _at_least("nvme-dma, 512 pages a command", gather.mb_per_s, 1000, "MB/s"),
        _at_least("nvme-dma / copy from the mapping", 100 * gather.of_mapped_file, 33.3, "%"),
        _at_least("nvme-dma / file: as a source", 100 * gather.mb_per_s / read_mb, 33.3, "%"),
        _at_least("card chain / its own digest rate", 100 * chain_mb / local_mb, 30, "%"),
        _at_most("round trip of a command, median", statistics.median(trips_ms), 2, "ms"),
        _at_most("idle card, share of a core", idle, 10, "%"),
        Wanted("card's digests equal to native ones", f"{PAGES}", f"{chain_equal}",
               chain_equal == PAGES),
    ]  # fmt: skip
    document = {
        "pages": PAGES,
        "sources": [asdict(row) for row in rows],
        "card": {"local_mb_per_s": local_mb, "chain_mb_per_s": chain_mb, "idle_percent": idle,
                 "round_trip_ms": {"median": statistics.median(trips_ms), "max": max(trips_ms)}},
        "wanted": [asdict(each) for each in wanted],
    }  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    _print(rows, wanted)
    return 0


def _sort_out(mapped: Source) -> tuple[Frames, Frames]:
    """PAGES frames with something in both halves, and PAGES frames of zeros."""
    frames = np.arange(0x100, MEMORY_MIB << 8, dtype=np.uint64)
    pages = np.empty((len(frames), PAGE_SIZE), dtype=np.uint8)
    mapped.read(frames, pages)
    halves = pages.reshape(len(frames), 2, PAGE_SIZE // 2).any(axis=2)
    written, empty = frames[halves.all(axis=1)], frames[~halves.any(axis=1)]
    if min(len(written), len(empty)) < PAGES:
        raise SystemExit(f"the guest has written {len(written)} pages; {PAGES} are needed")
    return written[:PAGES], empty[:PAGES]


def _contenders(
    guest: Guest, mapped: Source, written: Frames, empty: Frames
) -> Iterator[Contender]:
    """All ways to the stopped guest, one after the other; each is closed before the next."""
    assert guest.bus is not None
    yield _view_contender(mapped, written)
    yield _read_contender("file, pread", mapped, written, "one read of all pages")
    with open_source(guest.bus.nvme_uri(**LAYOUT)) as engine:
        yield _read_contender("nvme-dma", engine, written, "512 pages a command")
        for pages, frames in ((128, written), (16, written), (1, written[:1024])):
            what = f"{pages} pages a request, one request at a time"
            yield _read_contender(f"nvme-dma, {pages}", engine, frames, what, pages)
        what = "512 pages a command, each zero page proven"
        yield _read_contender("nvme-dma, zeros", engine, empty, what)
        yield _digest_contender(engine, written)
    with _card(guest) as card:
        yield _card_contender("card chain, nh4aes", card, written, ("nh4aes",))
        yield _card_contender("card chain, sha256", card, written, ("sha256",))
        with open_source(card.uri("q35", MEMORY_MIB << 20)) as source:
            what = "48 pages a command, as evidence"
            yield _read_contender("card chain, pages", source, written[:2048], what)
    with _card(guest, window=guest.ram_file) as card:
        yield _card_contender("card window, nh4aes", card, written, ("nh4aes",))
    with open_source(build_uri("leechcore", f"file://{guest.ram_file}", **LAYOUT)) as source:
        yield _read_contender("leechcore", source, written, "its file device")
    # Its transfers take the guest's own time.
    query(guest.lab_qmp, [("cont", None)], 5.0)
    with open_source(guest.bus.edu_uri(**LAYOUT)) as source:
        what = "2 transfers a page, guest running"
        yield _read_contender("edu", source, written[:EDU_PAGES], what)
    query(guest.lab_qmp, [("stop", None)], 5.0)


def _view_contender(source: Source, frames: Frames) -> Contender:
    view = source.view()
    assert view is not None
    digester = open_digester("native")
    pages = np.empty((len(frames), PAGE_SIZE), dtype=np.uint8)
    offsets = view.offsets(frames)

    def run() -> int:
        return int((digester.copy_view(view.data, offsets, pages) == PageStatus.OK).sum())

    return Contender("mapped file", "copied from the mapping, guarded", len(frames), run)


def _read_contender(
    name: str, source: Source, frames: Frames, what: str, at_once: int = PAGES
) -> Contender:
    pages = np.empty((len(frames), PAGE_SIZE), dtype=np.uint8)

    def run() -> int:
        return sum(
            int((source.read(frames[at : at + at_once], pages[at : at + at_once]) == 0).sum())
            for at in range(0, len(frames), at_once)
        )

    return Contender(name, what, len(frames), run)


def _digest_contender(source: Source, frames: Frames) -> Contender:
    digester = open_digester("native", "nh4aes", DigestKey.generate("nh4aes"))
    expected = np.zeros((len(frames), digester.digest_bytes), dtype=np.uint8)
    sweep = CopiedSweep(digester, source.read, 2048)

    def run() -> int:
        found = sweep.compare(frames, expected)
        return found.ok + found.mismatched

    return Contender("nvme-dma + nh4aes", "as a sweep does it", len(frames), run)


def _card_contender(
    name: str, card: CardMachine, frames: Frames, digests: tuple[str, ...]
) -> Contender:
    def run() -> int:
        with open_source(card.uri("q35", MEMORY_MIB << 20)) as source:
            assert isinstance(source, Digesting)
            return int((source.digest_pages(frames, digests).statuses == PageStatus.OK).sum())

    return Contender(name, "read and digested by the card", len(frames), run)


@contextmanager
def _card(guest: Guest, window: Path | None = None) -> Iterator[CardMachine]:
    assert guest.bus is not None
    with RunDirectory() as run, CardMachine(run, guest.bus, window=window) as card:
        yield card


def _times(contender: Contender, rounds: int) -> list[float]:
    """Seconds of each round; the first, which warms up, is not counted."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        read = contender.run()
        times.append(time.perf_counter() - began)
        if read != contender.pages:
            raise SystemExit(f"{contender.name}: {read} of {contender.pages} pages were read")
    return times[1:]


def _measure(
    contenders: Iterator[Contender], rounds: int
) -> list[tuple[Contender, list[float], list[float]]]:
    """Each contender's seconds, and those of the mapped file right before each of its rounds."""
    mapped = next(contenders)
    results = [(mapped, *2 * [_times(mapped, rounds)])]
    for contender in contenders:
        own, beside = [], []
        few = min(rounds, 3) if contender.name == "edu" else rounds
        _times(contender, 1)
        for _ in range(few):
            beside += _times(mapped, 1)
            began = time.perf_counter()
            contender.run()
            own.append(time.perf_counter() - began)
        results.append((contender, own, beside))
    return results


def _rows(results: list[tuple[Contender, list[float], list[float]]]) -> list[Row]:
    rows = []
    for contender, own, beside in results:
        rates = [_mb_per_s(contender.pages, seconds) for seconds in own]
        ratios = [
            rate / _mb_per_s(PAGES, seconds) for rate, seconds in zip(rates, beside, strict=True)
        ]
        rows.append(
            Row(contender.name, contender.what, contender.pages, statistics.median(rates),
                min(rates), max(rates), statistics.median(ratios))
        )  # fmt: skip
    return rows


def _mb_per_s(pages: int, seconds: float) -> float:
    return pages * PAGE_SIZE / seconds / 1e6


def _chain_equals_native(mapped: Source, card: CardMachine, frames: Frames) -> int:
    """Pages whose SHA-256 by the card is that of the core over the mapped file."""
    view = mapped.view()
    assert view is not None
    native = open_digester("native").hash_view(view.data, view.offsets(frames))[0]
    with open_source(card.uri("q35", MEMORY_MIB << 20)) as there:
        assert isinstance(there, Digesting)
        made = there.digest_pages(frames, ("sha256",))
    same = (made.digests[0] == native).all(axis=1) & (made.statuses == PageStatus.OK)
    return int(same.sum())


def _channel(card: CardMachine) -> Channel:
    layout = machine_layout(find_machine("q35"), MEMORY_MIB << 20)
    return Channel("bench", open_mailbox(card.mailbox), card_regions("bench", layout))


def _round_trips(card: CardMachine) -> list[float]:
    """Milliseconds of commands that do nothing, each given when the last is done."""
    channel = _channel(card)
    channel.ready()
    trips = []
    for _ in range(TRIPS):
        began = time.perf_counter()
        channel.run([Command(Op.NOP)], lambda _number, _completion, _at: None)
        trips.append(1e3 * (time.perf_counter() - began))
    channel.stop()
    channel.close()
    return trips


def _local_rate(card: CardMachine, rounds: int) -> float:
    """MB/s at which the card digests memory of its own, by its own clock; the median."""
    channel, rates = _channel(card), []

    def take(_number: int, completion: Completion, _at: int) -> None:
        rates.append(_mb_per_s(PAGES, completion.elapsed_us / 1e6))

    for _ in range(rounds):
        channel.run([Command(Op.LOCAL, PAGES, KINDS["nh4aes"].bit)], take)
    channel.stop()
    channel.close()
    return statistics.median(rates)


def _idle_percent(pid: int) -> float:
    """Share of a core that the card's machine takes while nobody asks it for anything."""
    time.sleep(0.5)
    before = _cpu_ticks(pid)
    time.sleep(IDLE_S)
    return 100 * (_cpu_ticks(pid) - before) / TICKS_A_SECOND / IDLE_S


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _at_least(figure: str, measured: float, least: float, unit: str) -> Wanted:
    return Wanted(figure, f">= {least:g} {unit}", f"{measured:.4g} {unit}", measured >= least)


def _at_most(figure: str, measured: float, most: float, unit: str) -> Wanted:
    return Wanted(figure, f"<= {most:g} {unit}", f"{measured:.4g} {unit}", measured <= most)


def _print(rows: list[Row], wanted: list[Wanted]) -> None:
    out = render.console()
    grid = Table(title="Must reach", title_justify="left", box=None)
    for heading in ("figure", "wanted", "measured", "met"):
        grid.add_column(heading, justify="left" if heading == "figure" else "right")
    for each in wanted:
        grid.add_row(each.figure, each.wanted, each.measured, "yes" if each.met else "NO")
    out.print(grid)
    grid = Table(title="\nSources, one stopped guest", title_justify="left", box=None)
    for heading in ("source", "MB/s", "range", "of mapped file", "pages", "how"):
        grid.add_column(heading, justify="left" if heading in ("source", "how") else "right")
    for row in rows:
        grid.add_row(row.name, f"{row.mb_per_s:,.4g}", f"{row.slowest:,.4g}-{row.fastest:,.4g}",
                     f"{100 * row.of_mapped_file:.3g} %", f"{row.pages:,}", row.what)  # fmt: skip
    out.print(grid)


if __name__ == "__main__":
    raise SystemExit(main())
