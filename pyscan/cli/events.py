"""`pyscan events`: what the programs say to each other, verified, one line each."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec
from rich.text import Text

from pyscan import protocol, render
from pyscan.cli.base import add_command
from pyscan.cli.operator import add_config, connected, operator_config
from pyscan.cli.vm import report_line
from pyscan.config import OperatorConfig
from pyscan.errors import ExitStatus, Rejected
from pyscan.protocol import Topic, TopicKind
from pyscan.records import Command, Report, Verdict
from pyscan.transport import Message
from pyscan.trust import Keeper, Role

if TYPE_CHECKING:
    from pyscan.cli.base import Commands

#: Without --follow: when nothing more came for so long, what the broker keeps was shown.
QUIET_S: Final = 0.5
#: They inform and are not signed.
UNSIGNED: Final = frozenset(
    {TopicKind.STATE, TopicKind.HOST_STATUS, TopicKind.SWEEP, TopicKind.MONITOR_STATUS}
)
SHOWN: Final = (
    TopicKind.VERDICT,
    TopicKind.COMMAND,
    TopicKind.REPORT,
    TopicKind.STATE,
    TopicKind.HOST_STATUS,
    TopicKind.MONITOR_STATUS,
)


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "events",
        run,
        "show verdicts, commands, reports and states as they come",
        "pyscan events --follow --json >events.jsonl",
    )
    parser.add_argument(
        "--follow", action="store_true", help="go on until Ctrl-C (else: only what the broker has)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document a line")
    add_config(parser)


def run(options: argparse.Namespace) -> ExitStatus:
    """Print events until there are no more, or for ever."""
    asyncio.run(_show(operator_config(options), follow=options.follow, json=options.json))
    return ExitStatus.APPROVED


async def _show(config: OperatorConfig, *, follow: bool, json: bool) -> None:
    keeper = config.keeper()
    async with connected(config, [protocol.subscription(kind) for kind in SHOWN]) as link:
        messages = link.messages
        while True:
            try:
                async with asyncio.timeout(None if follow else QUIET_S):
                    message = await anext(messages)
            except TimeoutError:
                return
            event = read_event(message, keeper)
            if json:
                sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
            else:
                render.console().print(Text(_line(event)), soft_wrap=True)
            sys.stdout.flush()
            message.acknowledge()


def read_event(message: Message, keeper: Keeper) -> dict[str, Any]:
    """What a message says, and whether its signature is one that is believed."""
    event: dict[str, Any] = {
        "at": render.time_text(time.time_ns()),
        "event": "unknown",
        "topic": protocol.one_line(message.topic),
        "verified": False,
    }
    try:
        topic = Topic.parse(message.topic)
        event["event"] = topic.kind.value
        if topic.kind in UNSIGNED:
            event["message"] = _unsigned(message.payload)
        else:
            event["message"] = _signed(message, topic, keeper)
            event["verified"] = True
    except Rejected as rejected:
        event["problem"] = str(rejected)
    return event


def _signed(message: Message, topic: Topic, keeper: Keeper) -> Verdict | Command | Report:
    """Raises Rejected."""
    data, now_ns = message.payload, time.time_ns()
    if topic.kind is TopicKind.VERDICT:
        ring = keeper.ring(Role.MONITOR)
        return protocol.decode_verdict(data, ring, topic=message.topic, now_ns=now_ns)
    if topic.kind is TopicKind.REPORT:
        return protocol.decode_report(data, keeper.ring(Role.AGENT), topic=message.topic)
    return protocol.decode_command(
        data,
        keeper.ring(Role.CONTROL, Role.OPERATOR),
        topic=message.topic,
        audience=topic.owner,
        now_s=now_ns // 10**9,
        replay=_Bystander(),
    )


class _Bystander:
    """Sees commands and takes none, so it cannot tell a repeated one."""

    def seen(self, command_id: str) -> bool:
        """Never."""
        del command_id
        return False

    def highest_sequence(self, issuer: str, vm: str) -> int:
        """None was taken."""
        del issuer, vm
        return -1


def _unsigned(payload: bytes) -> object:
    try:
        return msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError):
        return None


def _line(event: dict[str, Any]) -> str:
    message = event.get("message")
    if isinstance(message, Verdict):
        text = f"{message.target} {message.state}  {message.reason}"
    elif isinstance(message, Command):
        text = f"{message.audience}/{message.vm} {message.action} by {message.issuer}"
    elif isinstance(message, Report):
        text = f"{message.host}/{message.vm} {message.action} {report_line(message)}"
    elif "problem" in event:
        text = f"{event['topic']} REFUSED {event['problem']}"
    else:
        text = f"{event['topic']} (unsigned) {protocol.one_line(str(message), 200)}"
    return f"{event['at']} {event['event']:<14} {protocol.one_line(text)}"
