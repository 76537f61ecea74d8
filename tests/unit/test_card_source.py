"""The source `card:` against the firmware's core with faults, and against a hostile card."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from card_site import CardSite, card_site
from fake_card import PAGES, FakeCard, Tricks

from pyscan.errors import FileFormatError, SourceUnavailable, UsageError
from pyscan.records import PAGE_SIZE, POISON, MemoryRegion, PageStatus, RegionKind
from pyscan.sources import Digesting, Source, build_uri, channel, link, open_source
from pyscan.sources.card import CardSource, card_regions
from pyscan.sources.layout import Layout, Segment
from pyscan.sources.link import Op

MIB = 1 << 20
HIGH = (4 << 30) >> 12
OK, HOLE, BLOCKED = PageStatus.OK, PageStatus.HOLE, PageStatus.BLOCKED
LINK_DOWN, TIMEOUT, TORN = PageStatus.LINK_DOWN, PageStatus.TIMEOUT, PageStatus.TORN

#: RAM and ROM side by side, a hole, and RAM above 4 GiB.
LAYOUT = Layout.of(
    [
        Segment(MemoryRegion(0, 4 * MIB), 0),
        Segment(MemoryRegion(4 * MIB, 8 * PAGE_SIZE, RegionKind.ROM), 4 * MIB),
        Segment(MemoryRegion(HIGH << 12, 4 * MIB), 4 * MIB + 8 * PAGE_SIZE),
    ]
)
ALL = np.concatenate([np.arange(1032), HIGH + np.arange(1024)]).astype(np.uint64)


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CardSite]:
    """A simulated card over random memory; parameters are faults."""
    with card_site(tmp_path, LAYOUT, faults=getattr(request, "param", ())) as site:
        site.ram_path.write_bytes(np.random.default_rng(1).bytes(LAYOUT.file_bytes))
        yield site


def opened(site: CardSite | FakeCard) -> CardSource:
    source = open_source(site.uri)
    assert isinstance(source, CardSource)
    return source


def contents(site: CardSite, frames: np.ndarray) -> list[bytes]:
    data = site.ram_path.read_bytes()
    return [data[at : at + PAGE_SIZE] for at in LAYOUT.offsets(frames).tolist()]


def read(source: Source, frames: np.ndarray) -> tuple[list[int], np.ndarray]:
    pages = np.zeros((len(frames), PAGE_SIZE), dtype=np.uint8)
    statuses = source.read(frames, pages)
    assert (pages[statuses != OK] == POISON).all()
    return statuses.tolist(), pages


def statuses_of(source: CardSource, frames: np.ndarray = ALL) -> set[int]:
    made = source.digest_pages(frames, ("sha256", "nh4aes"))
    for digests in made.digests:
        assert (digests[made.statuses != OK] == POISON).all()
    return set(made.statuses.tolist())


def eventually(condition: Callable[[], bool]) -> None:
    """A signal or a thread needs a moment; what never comes fails the test."""
    deadline_s = monotonic() + 20
    while not condition():
        assert monotonic() < deadline_s


# --- a good card ----------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["dma", "window"])
def test_digests_are_those_of_the_pages(tmp_path: Path, engine: str) -> None:
    with card_site(tmp_path, LAYOUT, engine=engine) as site:
        site.ram_path.write_bytes(np.random.default_rng(1).bytes(LAYOUT.file_bytes))
        with opened(site) as source:
            assert isinstance(source, Digesting)
            exact = [hashlib.sha256(page).digest() for page in contents(site, ALL)]
            alone = source.digest_pages(ALL, ("sha256",))
            both = source.digest_pages(ALL, ("nh4aes", "sha256"))
            keyed = source.digest_pages(ALL, ("nh4aes",))
            for made in (alone, both, keyed):
                assert set(made.statuses.tolist()) == {OK}
                assert made.key == alone.key != 0
            assert [digest.tobytes() for digest in alone.digests[0]] == exact
            assert [digest.tobytes() for digest in both.digests[1]] == exact
            assert (both.digests[0] == keyed.digests[0]).all()
            assert len({digest.tobytes() for digest in keyed.digests[0]}) == len(ALL)


def test_frames_in_any_order_repeated_and_outside(site: CardSite) -> None:
    frames = np.array([HIGH + 3, 7, 7, 1040, 0, HIGH - 1, HIGH, 1 << 52, 1031], dtype=np.uint64)
    inside = LAYOUT.offsets(frames) != np.uint64((1 << 64) - 1)
    with opened(site) as source:
        before = site.page().pages
        statuses, pages = read(source, frames)
        made = source.digest_pages(frames, ("sha256",))
        after = site.page().pages
    assert statuses == made.statuses.tolist() == [OK if each else HOLE for each in inside]
    good = contents(site, frames[inside])
    assert [page.tobytes() for page in pages[inside]] == good
    expected = [hashlib.sha256(page).digest() for page in good]
    assert [digest.tobytes() for digest in made.digests[0][inside]] == expected
    assert after - before == 2 * int(inside.sum())  # holes never reach the card


def test_pages_come_whole_through_all_slots(site: CardSite) -> None:
    with opened(site) as source:
        statuses, pages = read(source, ALL)
        assert set(statuses) == {OK}
        assert [page.tobytes() for page in pages] == contents(site, ALL)
        assert read(source, ALL[:0])[0] == []
        assert source.view() is None
        assert source.regions() == LAYOUT.memory_map


def test_unknown_digests(site: CardSite) -> None:
    with opened(site) as source:
        for names in ((), ("gf128aes",), ("sha256", "md5")):
            with pytest.raises(ValueError, match="known are sha256, nh4aes"):
                source.digest_pages(ALL, names)


def test_a_card_that_is_started_anew_has_another_key(site: CardSite) -> None:
    with opened(site) as source:
        first = source.digest_pages(ALL, ("sha256", "nh4aes"))
        site.restart()
        second = source.digest_pages(ALL, ("sha256", "nh4aes"))
        assert set(second.statuses.tolist()) == {OK}
        assert second.key != first.key
        assert (second.digests[0] == first.digests[0]).all()
        assert not (second.digests[1] == first.digests[1]).all(axis=1).any()


def test_a_card_that_is_gone_and_comes_back(site: CardSite) -> None:
    with opened(site) as source:
        site.kill()
        for _ in range(3):
            assert statuses_of(source) == {LINK_DOWN}
            assert set(read(source, ALL[:5])[0]) == {LINK_DOWN}
            with pytest.raises(SourceUnavailable):
                source.regions()
        site.restart()
        assert statuses_of(source) == {OK}
        assert source.regions() == LAYOUT.memory_map


def test_a_card_that_hangs(site: CardSite) -> None:
    with opened(site) as source:
        site.hang()
        assert statuses_of(source) == {LINK_DOWN}
        assert statuses_of(source) == {LINK_DOWN}
        site.go_on()
        eventually(lambda: set(read(source, ALL[:1])[0]) == {OK})


def test_the_link_to_the_target_goes_and_returns(site: CardSite) -> None:
    with opened(site) as source:
        site.lose_link()
        eventually(lambda: statuses_of(source) == {LINK_DOWN})
        assert source.regions() == LAYOUT.memory_map  # the card itself is there
        site.return_link()
        eventually(lambda: statuses_of(source) == {OK})


@pytest.mark.parametrize(
    ("site", "wanted"),
    [
        (["lost-doorbell:1:1"], {OK, TIMEOUT}),
        (["late-completion:1:1"], {OK, TIMEOUT}),
        (["blocked:1:1000"], {BLOCKED}),
        (["stale-completion:1:1000"], {TORN}),
        (["half-page:1:1000"], {TORN}),
        (["link-down:1:100000"], {LINK_DOWN}),
        (["engine-reset:1:1"], {OK, LINK_DOWN, TIMEOUT, BLOCKED}),
        (["torn-submission:3"], {LINK_DOWN}),
        (["torn-completion:3:1"], {LINK_DOWN}),
        (["crash:1"], {LINK_DOWN}),
    ],
    indirect=["site"],
    ids=lambda value: value[0].split(":")[0] if isinstance(value, list) else None,
)
def test_faults(site: CardSite, wanted: set[int]) -> None:
    """No fault gives a page that is not as it was; what is OK is right."""
    exact = [hashlib.sha256(page).digest() for page in contents(site, ALL)]
    with opened(site) as source:
        source.regions()
        for _ in range(3):  # the third command in a session is the one that some wait for
            made = source.digest_pages(ALL[:1000], ("sha256",))
            found = set(made.statuses.tolist())
            assert found <= wanted | {OK}
            for row in np.flatnonzero(made.statuses == OK).tolist():
                assert made.digests[0][row].tobytes() == exact[row]
            assert (made.digests[0][made.statuses != OK] == POISON).all()
            if found != {OK}:
                return
    if wanted & {OK}:
        return  # the card has got over it by itself
    pytest.fail("the fault was never seen")


@pytest.mark.parametrize("site", [["refused-dma:0x5000:3"]], indirect=True)
def test_pages_that_the_bus_refuses_hide_no_others(site: CardSite) -> None:
    with opened(site) as source:
        made = source.digest_pages(ALL, ("sha256",))
        statuses, _ = read(source, ALL[:48])
    assert np.flatnonzero(made.statuses != OK).tolist() == [5, 6, 7]
    assert made.statuses[[5, 6, 7]].tolist() == statuses[5:8] == [BLOCKED] * 3
    assert statuses.count(OK) == 45


def test_one_host_at_a_time(site: CardSite) -> None:
    with opened(site) as source:
        with pytest.raises(SourceUnavailable, match="another program uses this card"):
            open_source(site.uri)
        assert statuses_of(source) == {OK}
    with opened(site) as source:
        assert statuses_of(source) == {OK}


def test_close_while_others_read(site: CardSite) -> None:
    source = opened(site)
    found: list[set[int]] = []
    started = threading.Event()

    def work() -> None:
        while LINK_DOWN not in (last := statuses_of(source)):
            found.append(last)
            started.set()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert started.wait(20)
    source.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert all(each == {OK} for each in found)
    source.close()
    assert set(read(source, ALL[:3])[0]) == {LINK_DOWN}
    with pytest.raises(SourceUnavailable, match="closed"):
        source.regions()


def test_a_mailbox_that_shrinks(site: CardSite) -> None:
    with opened(site) as source:
        assert statuses_of(source) == {OK}
        site.kill()
        os.truncate(site.mailbox, 4096)
        assert statuses_of(source) == {LINK_DOWN}
        with pytest.raises(SourceUnavailable, match="mailbox is lost"):
            source.regions()
    assert site.mailbox.stat().st_size == 4096


# --- wrong usage ----------------------------------------------------------------------


def test_neighbours_are_one_region_for_the_card() -> None:
    regions = card_regions("card:x", LAYOUT)
    assert [(region.gpa, region.length) for region in regions] == [
        (0, 4 * MIB + 8 * PAGE_SIZE),
        (HIGH << 12, 4 * MIB),
    ]
    many = Layout.of(Segment(MemoryRegion(2 * n * PAGE_SIZE, PAGE_SIZE), 0) for n in range(513))
    with pytest.raises(UsageError, match="513 separate regions"):
        card_regions("card:x", many)


def test_what_is_no_mailbox(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(bytes(4096))
    for path, error in (
        (tmp_path / "none", SourceUnavailable),
        (short, FileFormatError),
        (tmp_path, SourceUnavailable),
        (Path("/dev/null"), FileFormatError),
    ):
        with pytest.raises(error, match=str(path)) as caught:
            open_source(build_uri("card", path, machine="q35", size="16M"))
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="unknown parameter 'key'"):
        open_source("card:/x?machine=q35&size=16M&key=1")


def test_a_mailbox_without_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "SESSION_S", 0.05)
    path = tmp_path / "mailbox"
    path.touch()
    os.truncate(path, link.MAILBOX_BYTES)
    with pytest.raises(SourceUnavailable, match="there is no running card"):
        open_source(build_uri("card", path, machine="q35", size="16M"))


# --- a hostile card -------------------------------------------------------------------

FRAMES = np.arange(PAGES, dtype=np.uint64)


def all_but_ok(statuses: np.ndarray) -> np.ndarray:
    return statuses + 1


def on_pages(change: dict[str, Any]) -> Callable[[link.Completion], link.Completion]:
    """Change the completions of commands about pages."""

    def changed(completion: link.Completion) -> link.Completion:
        about_pages = completion.op in {Op.DIGEST, Op.READ}
        return replace(completion, **change) if about_pages else completion

    return changed


HOSTILE: dict[str, Tricks] = {
    "a stale sequence": Tricks(completion=on_pages({"sequence": 1})),
    "a sequence to come": Tricks(completion=on_pages({"sequence": 9})),
    "another operation": Tricks(completion=on_pages({"op": Op.NOP})),
    "another session": Tricks(completion=on_pages({"session": 5})),
    "another start": Tricks(completion=on_pages({"boot": 2})),
    "more pages": Tricks(completion=on_pages({"count": 4097})),
    "no pages": Tricks(completion=on_pages({"count": 0, "ok": 0})),
    "fewer are good": Tricks(completion=on_pages({"ok": 3})),
    "more are good": Tricks(completion=on_pages({"ok": 0xFFFF_FFFF})),
    "failed": Tricks(completion=on_pages({"result": link.Result.FAILED})),
    "a result that is none": Tricks(completion=on_pages({"result": 0xFFFF})),
    "a broken seal": Tricks(sealed=lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "random bytes": Tricks(sealed=lambda data: os.urandom(len(data))),
    "statuses that are none": Tricks(statuses=lambda statuses: statuses + 200),
    "completed beyond": Tricks(
        page=lambda page: replace(page, completed=page.completed + 5 * bool(page.completed > 1))
    ),
    "a fault": Tricks(page=lambda page: replace(page, state=2 if page.completed > 1 else 1)),
    "a state that is none": Tricks(page=lambda page: replace(page, state=7)),
    "a new start": Tricks(page=lambda page: replace(page, boot=1 + (page.completed > 1))),
    "the session is gone": Tricks(
        page=lambda page: replace(page, session=0 if page.completed > 1 else page.session)
    ),
    "the magic is gone": Tricks(
        page=lambda page: replace(page, magic=0 if page.completed > 1 else page.magic)
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_that_a_hostile_card_says_is_believed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "SESSION_S", 0.3)
    monkeypatch.setattr(channel, "COMMAND_S", 0.5)
    monkeypatch.setattr(channel, "RETRY_S", 0.01)
    with FakeCard(tmp_path) as card, opened(card) as source:
        assert set(source.digest_pages(FRAMES[:0], ("sha256",)).statuses.tolist()) == set()
        card.tricks = HOSTILE[name]
        for _ in range(3):
            assert statuses_of(source, FRAMES) == {LINK_DOWN}
            assert set(read(source, FRAMES[:100])[0]) == {LINK_DOWN}
        card.tricks = Tricks()
        eventually(lambda: statuses_of(source, FRAMES) == {OK})


@pytest.mark.parametrize("name", ["bad statuses among good ones", "every kind of status"])
def test_statuses_are_taken_page_by_page(name: str, tmp_path: Path) -> None:
    given = np.zeros(48, dtype=np.uint8)
    given[:8] = [0, 1, 2, 3, 4, 5, 6, 255] if name.startswith("every") else [0, 9, 0, 9, 0, 9, 0, 9]
    wanted = np.where(given > TORN, LINK_DOWN, given)
    with FakeCard(tmp_path) as card, opened(card) as source:
        card.tricks = Tricks(statuses=lambda _statuses: given)
        statuses, pages = read(source, FRAMES[:48])
        assert statuses == wanted.tolist()
        good = card.content(FRAMES[:48])
        assert (pages[given == OK] == good[given == OK]).all()


def test_a_card_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "COMMAND_S", 0.2)
    with FakeCard(tmp_path) as card, opened(card) as source:
        card.tricks = Tricks(answers=lambda command: command.op == Op.MAP)
        for _ in range(2):
            assert statuses_of(source, FRAMES) == {TIMEOUT}
        card.tricks = Tricks()
        assert statuses_of(source, FRAMES) == {OK}


def test_what_came_before_a_loss_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "COMMAND_S", 0.2)
    with FakeCard(tmp_path) as card, opened(card) as source:
        card.tricks = Tricks(answers=lambda command: command.first < 2048)
        made = source.digest_pages(FRAMES, ("sha256",))
        assert made.statuses.tolist() == [OK] * 2048 + [TIMEOUT] * 2048


def test_a_card_without_a_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "HEARTBEAT_S", 0.1)
    with FakeCard(tmp_path) as card, opened(card) as source:
        card.tricks = Tricks(answers=lambda _command: False, beats=False)
        assert statuses_of(source, FRAMES) == {LINK_DOWN}
        card.tricks = Tricks()
        eventually(lambda: statuses_of(source, FRAMES) == {OK})


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (lambda page: replace(page, version_min=2, version_max=3), "speaks versions 2 to 3"),
        (lambda page: replace(page, version_min=0, version_max=0), "speaks versions 0 to 0"),
        (lambda page: replace(page, session=0, refused=page.session), "refused a session"),
        (lambda page: replace(page, session=0), "took no session"),
    ],
    ids=["newer", "older", "refused", "deaf"],
)
def test_a_card_that_cannot_be_spoken_to(
    page: Callable[[link.CardPage], link.CardPage],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel, "SESSION_S", 0.2)
    with FakeCard(tmp_path, Tricks(page=page)) as card:
        with pytest.raises(SourceUnavailable, match=message) as caught:
            open_source(card.uri)
        assert "\n" not in str(caught.value)


def test_numbers_that_run_out_begin_a_new_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "SEQUENCE_MAX", 40)
    with FakeCard(tmp_path) as card, opened(card) as source:
        for _ in range(20):
            assert set(read(source, FRAMES[:480])[0]) == {OK}
        assert max(command.sequence for command in card.commands) < 40
        assert len({command.session for command in card.commands}) > 1
