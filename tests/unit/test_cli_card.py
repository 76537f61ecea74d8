"""`pyscan card`: how a card is, whatever its page says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest
from card_site import CardSite, card_site
from commands import Pyscan

from pyscan.records import MemoryRegion
from pyscan.sources import link, open_source
from pyscan.sources.layout import Layout, Segment
from pyscan.sources.link import CARD_PAGE

LAYOUT = Layout.of([Segment(MemoryRegion(0, 1 << 20), 0)])


@pytest.fixture
def pyscan(capsys: pytest.CaptureFixture[str]) -> Pyscan:
    return Pyscan(capsys)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[CardSite]:
    with card_site(tmp_path, LAYOUT) as site:
        yield site


def test_status_of_a_living_card(pyscan: Pyscan, site: CardSite) -> None:
    output = pyscan("card", "status", site.mailbox)
    assert (output.status, output.err) == (0, "")
    assert output.facts["card"] == "alive"
    assert output.facts["state"] == "ready"
    assert output.facts["session"] == "none"
    assert output.facts["engine"].startswith("DMA")
    with open_source(site.uri):  # looking does not disturb the host program
        document = pyscan("card", "status", site.mailbox, "--json").json()
    assert document["alive"] is True
    assert document["boot"] == f"{site.page().boot:#018x}"
    assert document["session"] != "none"
    assert document["commands"] == 1  # the memory map


def test_status_of_a_card_that_is_off(pyscan: Pyscan, site: CardSite) -> None:
    site.kill()
    output = pyscan("card", "status", site.mailbox, "--json")
    assert (output.status, output.json()["alive"]) == (3, False)
    assert "no heartbeat" in output.json()["card"]


def test_an_empty_mailbox_and_none_at_all(pyscan: Pyscan, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    os.truncate(empty, link.MAILBOX_BYTES)
    for command in ("status", "log"):
        output = pyscan("card", command, empty)
        assert (output.status, "no card is up" in output.error) == (3, True)
        output = pyscan("card", command, tmp_path / "none")
        assert (output.status, "cannot open the card's mailbox" in output.error) == (3, True)
        output = pyscan("card", command, os.devnull)
        assert (output.status, "not a card's mailbox" in output.error) == (2, True)


def test_a_page_full_of_nonsense(pyscan: Pyscan, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    page = bytearray(b"\xff" * CARD_PAGE.size)
    page[:8] = link.CARD_MAGIC.to_bytes(8, "little")
    content = bytearray(link.MAILBOX_BYTES)
    content[link.CARD_AT : link.CARD_AT + len(page)] = page
    log = b"\x1b[2J\xff\n" * 1000
    content[link.LOG_AT : link.LOG_AT + len(log)] = log
    hostile.write_bytes(content)
    output = pyscan("card", "status", hostile)
    assert output.status == 3
    assert output.facts["state"] == output.facts["engine"] == f"unknown ({0xFFFFFFFF})"
    output = pyscan("card", "log", hostile)
    assert output.status == 0
    assert "\x1b" not in output.out
    assert r"\x1b[2J\xff" in output.out
    assert len(output.out) <= 4 * link.LOG_BYTES


def test_the_log(pyscan: Pyscan, site: CardSite) -> None:
    output = pyscan("card", "log", site.mailbox)
    assert output.status == 0
    assert f"boot {site.page().boot:#x}" in output.out
    assert "session" not in output.out
    with open_source(site.uri):
        pass
    assert "session" in pyscan("card", "log", site.mailbox).out


def test_following_the_log_over_a_restart(site: CardSite, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def wait_for(text: str) -> None:
        deadline_s = monotonic() + 20
        while text not in out.read_text():
            assert monotonic() < deadline_s
            sleep(0.01)

    with out.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pyscan", "card", "log", site.mailbox, "--follow"],
            stdout=file,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(f"boot {site.page().boot:#x}")
            with open_source(site.uri):
                wait_for("session")
            site.restart()
            wait_for("-- the card was restarted --")
            wait_for(f"boot {site.page().boot:#x}")
        finally:
            process.kill()
            process.wait()
