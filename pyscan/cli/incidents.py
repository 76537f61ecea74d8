"""`pyscan incidents`: what the control found, what was done about it, and the way back."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.text import Text

from pyscan import render
from pyscan.cli.base import add_command, add_json
from pyscan.cli.operator import add_config, operator_config
from pyscan.cli.vm import VALID_S, make_order, send
from pyscan.config import OperatorConfig
from pyscan.control.database import open_engine, sqlite_url
from pyscan.control.store import Note, Store
from pyscan.errors import ExitStatus, UsageError
from pyscan.ids import new_id
from pyscan.records import Action, Cause, Incident, IncidentState

if TYPE_CHECKING:
    from pyscan.cli.base import Commands


def add(commands: Commands) -> None:
    """Declare the commands; without one of its own, `incidents` lists."""
    parser = add_command(
        commands, "incidents", run_list, "show incidents and end them", "pyscan incidents --json"
    )
    parser.add_argument("--all", action="store_true", help="the released ones, too")
    add_config(parser)
    add_json(parser)
    group = parser.add_subparsers(title="commands", metavar="COMMAND")
    show = add_command(
        group,
        "show",
        run_show,
        "show an incident with its commands and reports",
        "pyscan incidents show 01J...",
    )
    release = add_command(
        group,
        "release",
        run_release,
        "let the incident's machine go; the agent's report ends the incident",
        "pyscan incidents release 01J... --wait",
    )
    resume = add_command(
        group,
        "resume",
        run_resume,
        "let the control act again after its circuit breaker opened",
        "pyscan incidents resume --because 'the update was ours'",
    )
    for each in (show, release):
        each.add_argument("id", metavar="ID", help="of the incident")
    release.add_argument("--disk", choices=("commit", "discard"), help="of an overlay's writes")
    release.add_argument("--wait", action="store_true", help="wait for the agent's last report")
    release.add_argument("--valid", metavar="SECONDS", type=int, default=VALID_S)
    release.add_argument(
        "--by-hand",
        metavar="REASON",
        help="end the incident without a command: its machine is gone, or was never acted on",
    )
    resume.add_argument("--because", metavar="REASON", required=True, help="for the record")
    for each in (show, release, resume):
        add_config(each, default=argparse.SUPPRESS)
        each.add_argument("--json", action="store_true", default=argparse.SUPPRESS,
                          help="print one JSON document")  # fmt: skip


@contextmanager
def _store(config: OperatorConfig) -> Iterator[Store]:
    """The control's store. Raises UsageError, StoreUnavailable."""
    url = config.store.url
    if url is None:
        if not config.state.database.exists():
            raise UsageError(
                f"{config.state.database}: no such file; set [state] directory to the control's, "
                "or [store] url"
            )
        url = sqlite_url(config.state.database)
    store = Store(open_engine(url))
    try:
        yield store
    finally:
        store.close()


def run_list(options: argparse.Namespace) -> ExitStatus:
    """List incidents, the latest first."""
    with _store(operator_config(options)) as store, store.transaction() as books:
        incidents = books.incidents(released=options.all)
        fleet = books.lock_fleet()
    if options.json:
        render.print_json(
            {
                "circuit_breaker": fleet.tripped or None,
                "incidents": [_json(incident, reason) for incident, reason in incidents],
            }
        )
        return ExitStatus.APPROVED
    out = render.console()
    if fleet.tripped:
        out.print(Text(f"the circuit breaker is open: {fleet.tripped}", "bold red"), soft_wrap=True)
    if not incidents:
        out.print("no incidents")
    for incident, reason in incidents:
        opened = render.time_text(incident.opened_ns)
        action = incident.action or "-"
        line = f"{incident.id}  {opened}  {incident.state:<8} {action:<8} {incident.target}"
        out.print(Text(f"{line}  {reason}"), soft_wrap=True)
    return ExitStatus.APPROVED


def run_show(options: argparse.Namespace) -> ExitStatus:
    """One incident, and all that was said about its commands."""
    with _store(operator_config(options)) as store, store.transaction() as books:
        incident = books.incident(options.id)
        reason = books.reason(options.id)
        history = books.history(options.id)
    document = _json(incident, reason)
    document["commands"] = [
        {
            **{key: command[key] for key in ("id", "action", "issuer", "attempt", "state")},
            "issued": render.time_text(command["issued_s"] * 10**9),
            "reports": [dict(report) for report in reports],
        }
        for command, reports in history
    ]
    if options.json:
        render.print_json(document)
        return ExitStatus.APPROVED
    rows = render.fact_rows({k: v or "-" for k, v in document.items() if k != "commands"})
    for command, reports in history:
        issued = render.time_text(command["issued_s"] * 10**9)
        rows.append(("command", f"{issued}  {command['action']}  {command['id']}"))
        for report in reports:
            parts = (report["state"], report["reason"], report["detail"])
            text = "  ".join(part for part in parts if part)
            rows.append(("", f"{render.time_text(report['at_ns'])}  {text}"))
    render.print_facts(render.console(), rows)
    return ExitStatus.APPROVED


def run_release(options: argparse.Namespace) -> ExitStatus:
    """Send a release under the incident, or end it by hand."""
    config = operator_config(options)
    with _store(config) as store, store.transaction() as books:
        incident = books.incident(options.id)
        if incident.state is IncidentState.RELEASED:
            raise UsageError(f"incident {incident.id} is released already")
        if options.by_hand:
            books.lock([incident.target])
            name = config.identity.name
            books.release(books.incident(options.id), name, options.by_hand, time.time_ns())
    if options.by_hand:
        if options.json:
            render.print_json(_json(incident, "") | {"state": IncidentState.RELEASED})
        else:
            print(f"incident {incident.id} is released by hand")
        return ExitStatus.APPROVED
    if not incident.host or not incident.vm:
        raise UsageError(f"{incident.target} is no machine of a host; end it with --by-hand REASON")
    arguments: dict[str, str | int | bool] = {"disk": options.disk} if options.disk else {}
    cause = Cause(incident.id, "", incident.verdict)
    where = incident.host, incident.vm
    order = make_order(config, Action.RELEASE, where, arguments, valid_s=options.valid, cause=cause)
    return send(config, order, wait=options.wait, json=options.json)


def run_resume(options: argparse.Namespace) -> ExitStatus:
    """Close the circuit breaker; the control records who did it, and why."""
    config = operator_config(options)
    with _store(config) as store, store.transaction() as books:
        tripped = books.lock_fleet().tripped
        if tripped:
            books.set_breaker(0, "")
            text = f"circuit breaker closed: {options.because}"
            books.put_note(Note(new_id(), time.time_ns(), config.identity.name, "", text))
    if options.json:
        render.print_json({"was_open": tripped or None})
    else:
        print(f"was open: {tripped}" if tripped else "the circuit breaker is not open")
    sys.stdout.flush()
    return ExitStatus.APPROVED


def _json(incident: Incident, reason: str) -> dict[str, Any]:
    return {
        **asdict(incident),
        "opened": render.time_text(incident.opened_ns),
        "reason": reason,
    }
