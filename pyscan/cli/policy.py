"""`pyscan policy`: read a policy, and see what it would have done."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
from rich.text import Text

from pyscan import protocol, render
from pyscan.cli.base import add_command, add_group, add_json, add_trust, key_ring
from pyscan.config import load_policy
from pyscan.errors import ExitStatus, Rejected, UsageError
from pyscan.evidence.chain import (
    LOG_NAME,
    Chain,
    Record,
    open_for_reading,
    quoted_message,
    stored_key,
)
from pyscan.keys import KeyRing
from pyscan.policy import Policy, Simulator, Step
from pyscan.records import Verdict, VerdictState

if TYPE_CHECKING:
    from pyscan.cli.base import Commands

LINE_BYTES_MAX: Final = 4 * protocol.VERDICT_BYTES_MAX
VERDICTS_MAX: Final = 1_000_000


def add(commands: Commands) -> None:
    """Declare the commands."""
    group = add_group(commands, "policy", "check a policy and try it on what was recorded")
    check = add_command(
        group,
        "check",
        run_check,
        "check the [policy] of a file and show its rules in their order",
        "pyscan policy check /etc/pyscan/control.toml",
    )
    simulate = add_command(
        group,
        "simulate",
        run_simulate,
        "show what a policy would have done about recorded verdicts",
        "pyscan policy simulate draft.toml /var/lib/pyscan/control/evidence",
    )
    for parser in (check, simulate):
        parser.add_argument("policy", metavar="FILE", type=Path, help="TOML with a [policy] table")
    simulate.add_argument(
        "verdicts",
        metavar="VERDICTS",
        type=Path,
        help="evidence directory, or lines of `pyscan events --json`",
    )
    simulate.add_argument(
        "--enforce", action="store_true", help="as if the policy had enforce = true"
    )
    add_trust(simulate, "a monitor (default: the keys stored beside the logs)")
    for parser in (check, simulate):
        add_json(parser)


def run_check(options: argparse.Namespace) -> ExitStatus:
    """Errors come with file and line, exit 2."""
    policy = load_policy(options.policy).policy()
    document: dict[str, Any] = {
        "mode": "enforce" if policy.enforce else "observe",
        "unapproved": policy.unapproved or "observe",
        "undecided": policy.undecided or "observe",
        "protected": sorted(policy.protected_vms),
        "rules": [_rule(policy, number) for number in range(len(policy.rules))],
        "windows": [window.name for window in policy.windows],
        "limits": msgspec.to_builtins(policy.limits),
    }
    if options.json:
        render.print_json(document)
    else:
        render.print_facts(render.console(), render.fact_rows(document))
    return ExitStatus.APPROVED


def _rule(policy: Policy, number: int) -> dict[str, object]:
    rule = policy.rules[number]
    return {
        "name": rule.name,
        "profile": rule.profile if policy.enforce else f"{rule.profile} (observing)",
        "state": rule.state,
        "answer": " then ".join(rule.answer) or "observe",
    }


def run_simulate(options: argparse.Namespace) -> ExitStatus:
    """Replay recorded verdicts in the order in which they were decided."""
    table = load_policy(options.policy)
    if options.enforce:
        table = msgspec.structs.replace(table, enforce=True)
    path: Path = options.verdicts
    ring = key_ring(options.trust) if options.trust else None
    found = _from_evidence(path, ring) if path.is_dir() else _from_lines(path)
    verdicts: dict[str, Verdict] = {}
    for verdict in found:
        verdicts.setdefault(verdict.id, verdict)
        if len(verdicts) > VERDICTS_MAX:
            raise UsageError(f"{path}: more than {VERDICTS_MAX} verdicts")
    simulator = Simulator(table.policy())
    steps = [
        simulator.step(verdict)
        for verdict in sorted(verdicts.values(), key=lambda each: (each.decided_ns, each.id))
    ]
    actions = Counter(str(step.decision.action) for step in steps if step.decision.action)
    totals: dict[str, Any] = {
        "verdicts": len(steps),
        "incidents": simulator.incidents,
        "actions": dict(actions),
        "held_back": sum(step.decision.held for step in steps),
        "circuit_breaker": any(step.decision.trips for step in steps),
    }
    if options.json:
        render.print_json(totals | {"steps": [_step(step) for step in steps]})
        return ExitStatus.APPROVED
    out = render.console()
    for step in steps:
        if step.verdict.state is not VerdictState.APPROVED:
            out.print(Text(_line(step)), soft_wrap=True)
    render.print_facts(out, render.fact_rows({k: v or "none" for k, v in totals.items()}))
    return ExitStatus.APPROVED


def _step(step: Step) -> dict[str, object]:
    verdict, decision = step.verdict, step.decision
    return {
        "verdict": verdict.id,
        "at": render.time_text(verdict.decided_ns),
        "target": verdict.target,
        "state": verdict.state,
        "action": decision.action,
        "rule": decision.rule,
        "reason": decision.reason,
        "validated": decision.validated,
        "incident_opened": decision.incident_wanted,
    }


def _line(step: Step) -> str:
    verdict, decision = step.verdict, step.decision
    validated = f" ({decision.validated})" if decision.validated else ""
    return (
        f"{render.time_text(verdict.decided_ns)}  {verdict.target:<16} {verdict.state:<10} "
        f"{decision.action or 'nothing':<8} {decision.reason}{validated}"
    )


class _Event(msgspec.Struct):
    event: str
    message: msgspec.Raw = msgspec.Raw(b"null")
    verified: bool = False


def _from_lines(path: Path) -> Iterator[Verdict]:
    """The verified verdicts among lines of `pyscan events --json`. Raises UsageError."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LINE_BYTES_MAX + 1):
                number += 1
                if len(line) > LINE_BYTES_MAX:
                    raise UsageError(f"{path}:{number}: longer than {LINE_BYTES_MAX} bytes")
                try:
                    event = msgspec.json.decode(line, type=_Event)
                    if event.event == "verdict" and event.verified:
                        yield msgspec.json.decode(event.message, type=Verdict)
                except (msgspec.DecodeError, RecursionError) as error:
                    raise UsageError(f"{path}:{number}: no event: {error}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def _from_evidence(directory: Path, ring: KeyRing | None) -> Iterator[Verdict]:
    """The verdicts that evidence quotes. Raises EvidenceError, UsageError."""
    logs = sorted(log.parent for log in directory.rglob(LOG_NAME) if not log.is_symlink())
    if not logs:
        raise UsageError(f"{directory}: holds no evidence")
    read = [_verdict_records(log) for log in logs]
    if ring is None:
        keys = {writer: stored_key(log) for log, (writer, _) in zip(logs, read, strict=True)}
        ring = KeyRing.of(keys, "monitor")
    refused, problem = 0, ""
    for record in (record for _, records in read for record in records):
        _, topic, envelope = quoted_message(record.body)
        try:
            yield protocol.decode_verdict(envelope, ring, topic=topic, now_ns=record.time_ns)
        except Rejected as rejected:
            refused, problem = refused + 1, str(rejected)
    if refused:
        print(
            f"pyscan: {refused} verdicts left out, the last one for {problem}; "
            "pass the monitors' keys with --trust",
            file=sys.stderr,
        )


def _verdict_records(directory: Path) -> tuple[str, list[Record]]:
    """The writer of a log, and the records that quote a verdict. Raises EvidenceError."""
    chain = Chain(directory / LOG_NAME, stored_key(directory))
    with open_for_reading(directory / LOG_NAME) as file:
        records = [record for record in chain.walk(file) if record.kind == "verdict"]
    return chain.writer, records
