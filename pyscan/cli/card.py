"""`pyscan card`: how a monitoring card is, and what it has logged."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyscan import render
from pyscan.cli.base import add_command, add_group, add_json
from pyscan.errors import ExitStatus, SourceUnavailable
from pyscan.sources import link
from pyscan.sources.link import CardPage
from pyscan.sources.mailbox import Mailbox, open_mailbox, read_card, read_log

if TYPE_CHECKING:
    from pyscan.cli.base import Commands

#: The heartbeat of a living card has moved in this time (docs/spec/card-link.md, 3.5).
_HEARTBEAT_S: Final = 1.0
_LOOK_S: Final = 0.05
_FOLLOW_S: Final = 0.2

_STATES: Final = {state.value: state.name.lower() for state in link.CardState}
_ENGINES: Final[dict[int, str]] = {
    link.Engine.NONE: "none",
    link.Engine.DMA: "DMA by a bus master on the target's bus",
    link.Engine.WINDOW: "window into the target's RAM, past its bus and IOMMU",
}


def add(commands: Commands) -> None:
    """Declare the commands."""
    group = add_group(commands, "card", "look at a monitoring card")
    status = add_command(
        group,
        "status",
        run_status,
        "show how a card is: firmware, engine, session, counters",
        "pyscan card status /sys/bus/pci/devices/0000:03:00.0/resource2",
    )
    log = add_command(
        group,
        "log",
        run_log,
        "print what a card has logged since it was started",
        "pyscan card log card.mailbox --follow",
    )
    for parser in (status, log):
        parser.add_argument(
            "mailbox",
            metavar="MAILBOX",
            type=Path,
            help="the mailbox's file, or the resource file of the card's BAR",
        )
    add_json(status)
    log.add_argument("--follow", action="store_true", help="go on until interrupted")


def run_status(options: argparse.Namespace) -> ExitStatus:
    """Print the card's page; exit 3 for one without a heartbeat."""
    with _look_at(options.mailbox) as mailbox:
        first = _running(options.mailbox, mailbox)
        card, alive = _heartbeat(mailbox, first)
    document: dict[str, object] = {
        "card": "alive" if alive else "no heartbeat: it hangs, or was switched off",
        "state": _STATES.get(card.state, f"unknown ({card.state})"),
        "firmware": link.firmware_text(card.firmware),
        "link": f"version {card.version_min} to {card.version_max}",
        "engine": _ENGINES.get(card.engine, f"unknown ({card.engine})"),
        "boot": f"{card.boot:#018x}",
        "session": f"{card.session:#018x}" if card.session else "none",
        "commands": card.completed,
        "pages": {"read": card.pages, "unread": card.unread},
        "torn": card.torn,
        "resets": card.resets,
    }
    if options.json:
        render.print_json({"alive": alive, **document})
    else:
        render.print_facts(render.console(), render.fact_rows(document))
    return ExitStatus.APPROVED if alive else ExitStatus.UNDECIDED


def run_log(options: argparse.Namespace) -> ExitStatus:
    """Print the log, and with --follow what comes."""
    with _look_at(options.mailbox) as mailbox:
        card = _running(options.mailbox, mailbox)
        for text in _log(mailbox, card, follow=options.follow):
            sys.stdout.write(text)
            sys.stdout.flush()
    return ExitStatus.APPROVED


def _log(mailbox: Mailbox, card: CardPage, *, follow: bool) -> Iterator[str]:
    """The log in parts, free of control characters; a card that was restarted begins anew."""
    shown = max(0, card.log_end - link.LOG_BYTES)
    while True:
        yield "".join(
            chr(byte) if 0x20 <= byte < 0x7F or byte == 0x0A else f"\\x{byte:02x}"
            for byte in read_log(mailbox, shown, card.log_end)
        )
        shown = card.log_end
        if not follow:
            return
        time.sleep(_FOLLOW_S)
        boot, card = card.boot, read_card(mailbox)
        if card.boot != boot or card.log_end < shown:
            shown = 0
            yield "-- the card was restarted --\n"


@contextmanager
def _look_at(path: Path) -> Iterator[Mailbox]:
    mailbox = open_mailbox(path, alone=False)
    try:
        yield mailbox
    finally:
        mailbox.close()


def _running(path: Path, mailbox: Mailbox) -> CardPage:
    """The card's page. Raises SourceUnavailable when there never was a card."""
    card = read_card(mailbox)
    if card.magic != link.CARD_MAGIC:
        raise SourceUnavailable(f"{path}: no card is up in this mailbox; start it, or wait")
    return card


def _heartbeat(mailbox: Mailbox, first: CardPage) -> tuple[CardPage, bool]:
    """The card's page once its heartbeat has moved, and whether it has."""
    deadline_s = time.monotonic() + _HEARTBEAT_S
    while True:
        card = read_card(mailbox)
        if card.heartbeat != first.heartbeat:
            return card, True
        if time.monotonic() > deadline_s:
            return card, False
        time.sleep(_LOOK_S)
