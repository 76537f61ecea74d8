"""`pyscan vm`: what a person does to a machine, by signed commands to its agent."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec
from rich.text import Text

from pyscan import protocol, render
from pyscan.cli.base import add_command, add_group, add_json
from pyscan.cli.operator import add_config, connected, machine, operator_config
from pyscan.config import OperatorConfig
from pyscan.errors import ExitStatus, Rejected, UsageError
from pyscan.ids import is_id, new_id
from pyscan.keys import KeyRing
from pyscan.protocol import COMMAND_LIFETIME_S_MAX, Topic, TopicKind
from pyscan.records import Action, Approval, Cause, Command, Report, ReportState
from pyscan.transport import Link, Message, Publication
from pyscan.trust import Role

if TYPE_CHECKING:
    from pyscan.cli.base import Commands

#: How long a command is valid, and so how long its report is waited for.
VALID_S: Final = 60
#: Retained messages come at once; when nothing more came for so long, that was all.
QUIET_S: Final = 0.5
LISTED_MAX: Final = 10_000
FINAL: Final = frozenset({ReportState.SUCCEEDED, ReportState.FAILED, ReportState.REJECTED})

_TEXTS: Final = {
    Action.FREEZE: "stop a machine and unplug its network; its memory stays as it is",
    Action.SANDBOX: "take a machine off its networks, let it run",
    Action.KILL: "end a machine at once; what is only in its memory is lost",
    Action.RELEASE: "give back what freeze or sandbox took",
    Action.CAPTURE: "keep a machine's memory, devices and screen as evidence",
    Action.QUERY: "ask an agent for a machine's state",
}


def add(commands: Commands) -> None:
    """Declare the commands."""
    group = add_group(commands, "vm", "see machines and act on them, by hand")
    listing = add_command(
        group, "list", run_list, "show what agents say of their machines", "pyscan vm list --json"
    )
    add_config(listing)
    add_json(listing)
    for action, text in _TEXTS.items():
        example = f"pyscan vm {action} host-1/web-1 --wait"
        parser = add_command(group, action, partial(run_action, action), text, example)
        parser.add_argument("machine", metavar="HOST/VM", type=machine, help="the machine")
        _add_arguments(parser, action)
        _add_sending(parser)
    approve = add_command(
        group,
        "approve",
        run_approve,
        "be the second person for a command that needs two",
        "pyscan vm approve host-1/web-1 kill 01J... 5e88...",
    )
    approve.add_argument("machine", metavar="HOST/VM", type=machine, help="the machine")
    approve.add_argument("action", metavar="ACTION", type=Action, help="what was commanded")
    approve.add_argument("id", metavar="ID", help="of the command")
    approve.add_argument("digest", metavar="DIGEST", help="of the command: SHA-256 in hex")
    _add_sending(approve)


def _add_arguments(parser: argparse.ArgumentParser, action: Action) -> None:
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    if action in {Action.FREEZE, Action.SANDBOX}:
        parser.add_argument(
            "--ttl", metavar="SECONDS", type=int, help="released by itself after so long"
        )
    if action is Action.SANDBOX:
        parser.add_argument("--network", metavar="NAME", help="quarantine network (none)")
        parser.add_argument("--disk", action="store_true", help="its writes go to an overlay")
        parser.add_argument("--cpu-percent", metavar="N", type=int, help="of one processor each")
    if action is Action.RELEASE:
        parser.add_argument(
            "--disk", choices=("commit", "discard"), help="what becomes of an overlay's writes"
        )
    if action is Action.CAPTURE:
        for what in ("memory", "screenshot"):
            parser.add_argument(f"--no-{what}", action="store_true", help=f"without the {what}")
    if action is Action.KILL:
        parser.add_argument("--yes", action="store_true", help="do not ask")


def _add_sending(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wait", action="store_true", help="wait for the agent's last report")
    parser.add_argument(
        "--valid",
        metavar="SECONDS",
        type=int,
        default=VALID_S,
        help=f"how long it may be carried out, and is waited for ({VALID_S})",
    )
    add_config(parser)
    add_json(parser)


# ------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class Order:
    """A signed command, or an approval of one, ready to be sent."""

    command: str  # id of the command
    host: str
    vm: str
    action: Action
    topic: str
    envelope: bytes
    expires_s: int


def run_action(action: Action, options: argparse.Namespace) -> ExitStatus:
    """Send one command; with --wait, exit status 0 only for its success."""
    config = operator_config(options)
    if action is Action.KILL and not options.yes and not options.dry_run:
        _confirm(*options.machine)
    order = make_order(config, action, options.machine, _arguments(options), valid_s=options.valid)
    return send(config, order, wait=options.wait or action is Action.QUERY, json=options.json)


def run_approve(options: argparse.Namespace) -> ExitStatus:
    """Sign somebody else's command, too."""
    config = operator_config(options)
    _check_valid(options.valid)
    if not is_id(options.id) or len(options.digest) != 64:
        raise UsageError("ID and DIGEST are as the other person's command printed them")
    now_s = int(time.time())
    host, vm = options.machine
    approval = Approval(
        id=new_id(),
        command=options.id,
        digest=options.digest.lower(),
        issuer=config.identity.name,
        audience=host,
        vm=vm,
        action=options.action,
        issued_s=now_s,
        expires_s=now_s + options.valid,
    )
    envelope = protocol.encode_approval(approval, config.identity.key)
    topic = protocol.approval_topic(host, vm)
    order = Order(options.id, host, vm, options.action, topic, envelope, approval.expires_s)
    return send(config, order, wait=options.wait, json=options.json)


def make_order(
    config: OperatorConfig,
    action: Action,
    where: tuple[str, str],
    arguments: dict[str, str | int | bool],
    *,
    valid_s: int,
    cause: Cause | None = None,
) -> Order:
    """A command that the operator signs. Raises UsageError."""
    _check_valid(valid_s)
    host, vm = where
    now_ns = time.time_ns()
    command = Command(
        id=new_id(),
        issuer=config.identity.name,
        audience=host,
        sequence=now_ns // 10**6,
        issued_s=now_ns // 10**9,
        expires_s=now_ns // 10**9 + valid_s,
        action=action,
        vm=vm,
        arguments=arguments,
        cause=cause or Cause(),
    )
    envelope = protocol.encode_command(command, config.identity.key)
    topic = protocol.command_topic(host, vm)
    return Order(command.id, host, vm, action, topic, envelope, command.expires_s)


def _check_valid(valid_s: int) -> None:
    if not 1 <= valid_s <= COMMAND_LIFETIME_S_MAX:
        raise UsageError(f"--valid {valid_s}: 1 to {COMMAND_LIFETIME_S_MAX} seconds")


def _arguments(options: argparse.Namespace) -> dict[str, str | int | bool]:
    """The command's `args`; what is not asked for stays out."""
    given = vars(options)
    arguments: dict[str, str | int | bool] = {}
    for name, option in (
        ("dry_run", "dry_run"),
        ("ttl_s", "ttl"),
        ("network", "network"),
        ("disk", "disk"),
        ("cpu_percent", "cpu_percent"),
    ):
        if (value := given.get(option)) not in {None, False}:
            arguments[name] = value
    for what in ("memory", "screenshot"):
        if given.get(f"no_{what}"):
            arguments[what] = False
    return arguments


def _confirm(host: str, vm: str) -> None:
    """Have a person say which machine is to end. Raises UsageError."""
    if not sys.stdin.isatty():
        raise UsageError(f"kill {host}/{vm}: no terminal to ask on; pass --yes")
    sys.stderr.write(f"kill {host}/{vm}: its memory is lost. Type {vm} to go on: ")
    sys.stderr.flush()
    if sys.stdin.readline().strip() != vm:
        raise UsageError(f"kill {host}/{vm}: not confirmed, nothing was sent")


def send(config: OperatorConfig, order: Order, *, wait: bool, json: bool) -> ExitStatus:
    """Send an order and, if wanted, show what its agent reports."""
    digest = protocol.command_digest(order.envelope)
    if not json:
        out = render.console()
        out.print(Text(f"command {order.command} {order.action} {order.host}/{order.vm}"))
        if order.topic == protocol.command_topic(order.host, order.vm):
            out.print(Text(f"digest {digest}"), soft_wrap=True)
    reports = asyncio.run(_send(config, order, wait=wait, shown=not json))
    last = reports[-1] if reports else None
    if json:
        document: dict[str, object] = {
            "command": order.command,
            "action": order.action,
            "host": order.host,
            "vm": order.vm,
            "digest": digest,
            "reports": [asdict(report) for report in reports],
        }
        render.print_json(document)
    if not wait:
        return ExitStatus.APPROVED
    if last is None or last.state not in FINAL:
        print(
            f"pyscan: {order.host} did not report the end of {order.command} in time; "
            "is its agent running? `pyscan vm list` shows it",
            file=sys.stderr,
        )
        return ExitStatus.UNDECIDED
    return ExitStatus.APPROVED if last.state is ReportState.SUCCEEDED else ExitStatus.FAILED


async def _send(config: OperatorConfig, order: Order, *, wait: bool, shown: bool) -> list[Report]:
    topic = protocol.report_topic(order.host, order.command)
    ring = config.keeper().ring(Role.AGENT)
    reports: list[Report] = []
    async with connected(config, [topic] if wait else []) as link:
        correlation = order.command.encode("ascii")
        await link.publish(Publication(order.topic, order.envelope, correlation=correlation))
        if not wait:
            return reports
        try:
            async with asyncio.timeout(max(0, order.expires_s - time.time())):
                await _follow(link, ring, reports, shown=shown)
        except TimeoutError:
            pass
    return reports


async def _follow(link: Link, ring: KeyRing, reports: list[Report], *, shown: bool) -> None:
    """Collect reports up to the last one."""
    async for message in link.messages:
        message.acknowledge()
        try:
            report = protocol.decode_report(message.payload, ring, topic=message.topic)
        except Rejected as rejected:
            print(f"pyscan: a report is refused: {rejected}", file=sys.stderr)
            continue
        if any(report.id == known.id for known in reports):
            continue
        reports.append(report)
        if shown:
            render.console().print(Text(report_line(report)), soft_wrap=True)
        if report.state in FINAL:
            return


def report_line(report: Report) -> str:
    """A report for a person."""
    parts = [str(report.state), report.reason, report.detail]
    if report.vm_state:
        parts.append(f"machine {report.vm_state}")
    return "  ".join(part for part in parts if part)


# ------------------------------------------------------------------------------ listing


def run_list(options: argparse.Namespace) -> ExitStatus:
    """Show the states that agents keep at the broker; they inform and are not signed."""
    rows = asyncio.run(_states(operator_config(options)))
    if options.json:
        render.print_json(rows)
        return ExitStatus.APPROVED
    out = render.console()
    if not rows:
        out.print("no agent has told of a machine")
    for row in rows:
        contained = "contained" if row["contained"] else ""
        line = f"{row['host']}/{row['vm']:<24} {row['state']:<8} {contained:<10} "
        out.print(Text(f"{line}agent {row['agent']}"), soft_wrap=True)
    return ExitStatus.APPROVED


async def _states(config: OperatorConfig) -> list[dict[str, Any]]:
    kinds = (TopicKind.STATE, TopicKind.HOST_STATUS)
    machines: dict[tuple[str, str], Mapping[str, Any]] = {}
    hosts: dict[str, str] = {}
    async with connected(config, [protocol.subscription(kind) for kind in kinds]) as link:
        messages = link.messages
        while len(machines) < LISTED_MAX:
            try:
                async with asyncio.timeout(QUIET_S):
                    message = await anext(messages)
            except TimeoutError:
                break
            message.acknowledge()
            topic = Topic.parse(message.topic)
            told = _told(message)
            if topic.kind is TopicKind.HOST_STATUS:
                hosts[topic.owner] = _word(told.get("status"))
            else:
                machines[topic.owner, topic.item] = told
    return [
        {
            "host": host,
            "vm": vm,
            "state": _word(told.get("state")),
            "contained": told.get("contained") is True,
            "agent": hosts.get(host, "unknown"),
            "at_ns": told.get("at_ns") if isinstance(told.get("at_ns"), int) else None,
        }
        for (host, vm), told in sorted(machines.items())
    ]


def _told(message: Message) -> Mapping[str, Any]:
    """An unsigned message: whatever it is, it must not stop the list."""
    try:
        return msgspec.json.decode(message.payload, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {}


def _word(value: object) -> str:
    return protocol.one_line(value, 32) if isinstance(value, str) and value else "unknown"
