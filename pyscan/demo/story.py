"""The story that the demonstration tells, step by step, and what it proves at the end.

Every claim of the summary is checked by somebody else than the one who makes it: the
finding against the byte that the laboratory changed, the answer against QEMU's own word,
messages against their signatures, the evidence against its hash chain.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from pyscan import render
from pyscan.demo.appliance import IDENTITIES, OBSERVER, Appliance, Wiring
from pyscan.demo.card import CardSide
from pyscan.demo.observer import Arrival, Observer
from pyscan.errors import ExitStatus, LabError, UsageError
from pyscan.evidence import EvidenceSummary, verify_directory
from pyscan.keys import KeyRing
from pyscan.lab.broker import Broker
from pyscan.lab.bus import CardBus
from pyscan.lab.guest import Accelerator, Guest, GuestOptions, TamperKind
from pyscan.lab.process import RunDirectory, unwind_on
from pyscan.lab.ram import ByteChange, Machine
from pyscan.records import (
    PAGE_SIZE,
    Action,
    Command,
    Report,
    ReportState,
    Verdict,
    VerdictState,
)
from pyscan.transport import LinkSettings

BOOT_TIMEOUT_S: Final = 60.0
STEP_TIMEOUT_S: Final = 30.0
#: How long the untouched guest is watched before it is tampered with.
QUIET_SWEEPS: Final = 20
EXTERNAL: Final = "external"
PACKAGE: Final = "package"
CARD: Final = "card"
#: Lines of `pyscan approve linux` that the demonstration shows.
COMPILED_SHOWN: Final = ("approved", "release", "units", "protected", "patch sites")
TERMINAL_STATES: Final = (ReportState.SUCCEEDED, ReportState.FAILED, ReportState.REJECTED)
DONE_WORDS: Final = {"freeze": "frozen", "kill": "gone"}


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What `pyscan demo` was asked for."""

    source: str  # "qemu" or CARD
    action: Action
    tamper: str  # a TamperKind, or EXTERNAL
    approve: str  # "snapshot" or "package"
    machine: Machine
    memory_mib: int
    accelerator: Accelerator
    guest_dir: Path
    keep: Path | None
    json: bool


@dataclass(frozen=True, slots=True)
class _Tampering:
    """What was changed in the guest, and when by the laboratory's own watch."""

    how: str
    address: int | None
    physical: int
    change: ByteChange


@dataclass(frozen=True, slots=True)
class _Answer:
    """The messages and events that followed the tampering."""

    verdict: Verdict
    command: Command
    report: Report
    command_ns: int  # the command was seen on the broker
    done_ns: int  # the guest was frozen or gone, by the hypervisor's word


@dataclass(frozen=True, slots=True)
class _Told:
    """The finished story: all that the document is made of."""

    source: str
    card: dict[str, Any] | None  # what the card machine did, where there is one
    boot_s: float
    coverage: dict[str, Any]
    tampering: _Tampering
    answer: _Answer
    checks: dict[str, bool]


def run_demo(options: DemoOptions) -> ExitStatus:
    """Tell the whole story; exit status 0 only if all of it happened and was verified."""
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        raise UsageError(f"{options.keep} is not empty; choose a new directory for the evidence")
    if options.approve == PACKAGE and options.tamper != EXTERNAL:
        raise UsageError(
            "--approve package goes with --tamper external: the module that would tamper is in no "
            "package, and found before it does anything"
        )
    started = time.monotonic()
    steps = _Steps(render.console(stderr=options.json))
    with unwind_on(signal.SIGINT, signal.SIGTERM):
        document = _Story(options, steps).tell()
    document["seconds"] = round(time.monotonic() - started, 1)
    if options.json:
        render.print_json(document)
    else:
        _print_summary(render.console(), document)
    return ExitStatus.APPROVED if document["verified"] else ExitStatus.FAILED


class _Steps:
    """Progress for a person: one line a finished step, a spinner while it runs."""

    def __init__(self, out: Console) -> None:
        self._out = out

    @contextmanager
    def step(self, text: str) -> Iterator[list[str]]:
        """Run one step; what is appended to the list is printed behind it."""
        details: list[str] = []
        started = time.monotonic()
        if self._out.is_terminal:
            with self._out.status(text):
                yield details
        else:
            yield details
        spent = f"{time.monotonic() - started:5.1f} s"
        self._out.print(Text.assemble((" ok ", "bold green"), f"{spent}  {text}"))
        for detail in details:
            self._out.print(Text(f"            {detail}", style="dim"))


class _Story:
    def __init__(self, options: DemoOptions, steps: _Steps) -> None:
        self._options = options
        self._steps = steps

    def tell(self) -> dict[str, Any]:
        """Run every step; returns the document that `--json` prints."""
        options, steps = self._options, self._steps
        with ExitStack() as stack:
            run = stack.enter_context(RunDirectory())
            with steps.step(
                "start a private MQTT broker and boot Debian's cloud kernel"
            ) as details:
                guest = stack.enter_context(Guest(self._guest_options(), run))
                broker = stack.enter_context(Broker(run, IDENTITIES))
                boot_s = guest.wait_ready(BOOT_TIMEOUT_S)
                self._check_card(guest)
                details.append(self._describe_guest(guest, boot_s))
            card = self._start_card(stack, run, guest)
            source = f"qemu:{guest.monitor_qmp}" if card is None else card.source
            wiring = Wiring(source, guest.agent_qmp, guest.pid_file, options.action)
            directory = run.path / "appliance"
            directory.mkdir()
            appliance = stack.enter_context(Appliance(directory, broker, wiring))
            self._approve(appliance)
            observer = stack.enter_context(self._observer(appliance, broker, guest))
            with steps.step(
                "start monitor, control and agent; watch the untouched guest"
            ) as details:
                coverage = self._watch_quietly(appliance, observer)
                details.append(_coverage_line(coverage))
                if card is not None:
                    card.look_at_monitor(appliance.pid("monitor"))
            with steps.step(f"tamper with the running guest ({options.tamper})") as details:
                tampering = self._tamper(guest)
                details.append(tampering.how)
            with steps.step(f"found out, answered: {options.action}") as details:
                answer = self._await_answer(observer)
                details.append(answer.verdict.reason)
            with steps.step("stop the programs, verify the evidence") as details:
                appliance.stop()
                observer.close()  # frees the laboratory's QMP socket for a last question
                checks = self._check(guest, observer, tampering, answer)
                if card is not None:
                    checks |= card.checks(coverage["pages_swept"])
                summary = self._verify_evidence(appliance, run.path / "evidence")
                details.append(_evidence_line(summary))
                checks["evidence is closed and verified"] = True
            account = card.account() if card is not None else None
            told = _Told(source, account, boot_s, coverage, tampering, answer, checks)
            return _document(self._options, told)

    def _start_card(self, stack: ExitStack, run: RunDirectory, guest: Guest) -> CardSide | None:
        """The card machine, when it is to read the guest."""
        if self._options.source != CARD:
            return None
        with self._steps.step("start the card: a machine of its own, with firmware") as details:
            card = stack.enter_context(CardSide(run, guest))
            details.append(card.describe())
        return card

    def _approve(self, appliance: Appliance) -> None:
        """Make the approved configuration, of the guest or of its kernel's package."""
        if self._options.approve == PACKAGE:
            (package,) = self._options.guest_dir.glob("linux-image-*.deb")
            with self._steps.step(
                "compile the kernel's package; the guest is not asked"
            ) as details:
                output = appliance.compile(package)
                details.extend(line for line in output if line.startswith(COMPILED_SHOWN))
            return
        with self._steps.step(
            "enrol the guest: find its kernel in memory, digest it, sign"
        ) as details:
            details.extend(appliance.enrol())

    def _guest_options(self) -> GuestOptions:
        options = self._options
        return GuestOptions(
            guest_dir=options.guest_dir,
            machine=options.machine,
            memory_mib=options.memory_mib,
            accelerator=options.accelerator,
            card=CardBus() if options.source == CARD else None,
        )

    def _check_card(self, guest: Guest) -> None:
        if not (guest.card_seen_inside() and guest.card_seen_outside()):
            raise LabError("the card (pci-testdev) is not on the guest's bus")

    def _describe_guest(self, guest: Guest, boot_s: float) -> str:
        options = self._options
        release = guest.shell("uname -r").strip()
        return (
            f"{release}, {options.machine}, {options.memory_mib} MiB, {options.accelerator}, "
            f"ready after {boot_s:.1f} s; card on its PCI bus"
        )

    def _observer(self, appliance: Appliance, broker: Broker, guest: Guest) -> Observer:
        password = broker.password_file(OBSERVER).read_text().strip()
        settings = LinkSettings("127.0.0.1", broker.port, OBSERVER, OBSERVER, password)
        return Observer(settings, appliance.rings(), guest.lab_qmp, guest.pid)

    def _watch_quietly(self, appliance: Appliance, observer: Observer) -> dict[str, Any]:
        """Start the programs, see them approve the guest, and measure the sweeps."""
        observer.wait_online(STEP_TIMEOUT_S)
        appliance.start()

        def any_verdict() -> Arrival[Verdict] | None:
            appliance.check_alive()
            return observer.first(Verdict, lambda _verdict: True)

        first = observer.wait(any_verdict, STEP_TIMEOUT_S, "verdict").content
        if first.state is not VerdictState.APPROVED:
            raise LabError(f"the untouched guest is {first.state}: {first.reason}")
        return observer.wait(lambda: _coverage(observer.sweeps()), STEP_TIMEOUT_S, "statistics")

    def _tamper(self, guest: Guest) -> _Tampering:
        """Change one place of the kernel; the laboratory's own watch sees the byte change."""
        if self._options.tamper == EXTERNAL:
            physical = guest.text_physical()
            with guest.ram.watch(physical) as watch:
                guest.ram.flip(physical, 0x01)
                change = watch.wait(STEP_TIMEOUT_S)
            how = f"one bit at physical {physical:#x} flipped through the RAM file"
            return _Tampering(how, None, physical, change)
        kind = TamperKind(self._options.tamper)
        target = guest.load_tamper(kind)
        first = next(i for i in range(len(target.old)) if target.old[i] != target.new[i])
        with guest.ram.watch(target.physical + first) as watch:
            guest.fire()
            change = watch.wait(STEP_TIMEOUT_S)
        how = (
            f"module in the guest: {target.symbol} at {target.address:#x} "
            f"(physical {target.physical:#x}), {target.old.hex()} -> {target.new.hex()}"
        )
        return _Tampering(how, target.address, target.physical, change)

    def _await_answer(self, observer: Observer) -> _Answer:
        """Wait for verdict, command, report, and the hypervisor's own word."""
        verdict = observer.wait(
            lambda: observer.first(Verdict, lambda v: v.state is VerdictState.UNAPPROVED),
            STEP_TIMEOUT_S,
            "verdict `unapproved`",
        )
        command = observer.wait(
            lambda: observer.first(Command, lambda c: c.cause.verdict == verdict.content.id),
            STEP_TIMEOUT_S,
            "command that answers the verdict",
        )
        report = observer.wait(
            lambda: observer.first(
                Report, lambda r: r.command == command.content.id and r.state in TERMINAL_STATES
            ),
            STEP_TIMEOUT_S,
            "final report about the command",
        )
        if self._options.action is Action.KILL:
            done_ns = observer.wait(lambda: observer.ended_ns, STEP_TIMEOUT_S, "end of QEMU")
        else:
            done_ns = observer.wait(
                lambda: next(iter(observer.stops_ns), None), STEP_TIMEOUT_S, "STOP event of QEMU"
            )
        return _Answer(verdict.content, command.content, report.content, command.at_ns, done_ns)

    def _check(
        self, guest: Guest, observer: Observer, tampering: _Tampering, answer: _Answer
    ) -> dict[str, bool]:
        """What must hold at the end, each checked against somebody else's word."""
        frame = tampering.physical // PAGE_SIZE
        checks = {
            "the finding names the tampered frame": any(
                finding.frame == frame for finding in answer.verdict.findings
            ),
            "nothing else was found": answer.verdict.findings_total == 1,
            "the agent reported success": answer.report.state is ReportState.SUCCEEDED,
        }
        if self._options.action is Action.KILL:
            checks["the QEMU process is gone"] = not guest.alive
        else:
            checks["QEMU says the guest is paused"] = guest.status() == "paused"
            checks["QEMU stopped the guest exactly once"] = len(observer.stops_ns) == 1
        return checks

    def _verify_evidence(self, appliance: Appliance, directory: Path) -> EvidenceSummary:
        """Gather the three logs, keep them if asked, and verify them offline."""
        directory = self._options.keep or directory
        for program, log in appliance.evidence().items():
            shutil.copytree(log, directory / program)
        return verify_directory(directory, KeyRing.of(appliance.writers(), "evidence"))


def _document(options: DemoOptions, told: _Told) -> dict[str, Any]:
    """What `--json` prints, and what the summary is made of."""
    tampering, answer = told.tampering, told.answer
    tampered_ns = tampering.change.first_seen_after_ns
    finding = next(iter(answer.verdict.findings), None)
    return {
        "verified": all(told.checks.values()),
        "checks": told.checks,
        "source": told.source,
        "card": told.card,
        "action": str(options.action),
        "tamper": options.tamper,
        "tampered": tampering.how,
        "guest": {
            "machine": str(options.machine),
            "memory_mib": options.memory_mib,
            "accelerator": str(options.accelerator),
            "boot_s": round(told.boot_s, 1),
        },
        "coverage": told.coverage,
        "finding": render.finding_json(finding) if finding else None,
        "verdict": {"id": answer.verdict.id, "reason": answer.verdict.reason},
        "command": {"id": answer.command.id, "audience": answer.command.audience},
        "report": {"state": str(answer.report.state), "vm_state": answer.report.vm_state},
        "timings_ms": {
            "tamper_to_verdict": _ms(tampered_ns, answer.verdict.decided_ns),
            "verdict_to_command": _ms(answer.verdict.decided_ns, answer.command_ns),
            "command_to_done": _ms(answer.command_ns, answer.done_ns),
            "tamper_to_done": _ms(tampered_ns, answer.done_ns),
        },
        "evidence": str(options.keep) if options.keep else None,
    }


def _ms(start_ns: int, end_ns: int) -> float:
    return round((end_ns - start_ns) / 1e6, 1)


def _coverage(statistics: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Sweep rate and coverage between the first and the latest statistics, once they say enough."""
    if not statistics:
        return None
    (first,), (last,) = statistics[0]["targets"], statistics[-1]["targets"]
    sweeps = last["sweeps"] - first["sweeps"]
    if sweeps < QUIET_SWEEPS:
        return None
    seconds = (statistics[-1]["at"] - statistics[0]["at"]) / 1e9
    busy_s = max(1, last["busy_ns"] - first["busy_ns"]) / 1e9
    return {
        "pages": last["pages"],
        "bytes": last["pages"] * PAGE_SIZE,
        "pages_swept": last["bytes"] // PAGE_SIZE,
        "sweeps": sweeps,
        "sweeps_per_second": round(sweeps / seconds, 1),
        "sweep_ms": round(1e3 * busy_s / sweeps, 2),
        "gb_per_second_while_sweeping": round((last["bytes"] - first["bytes"]) / busy_s / 1e9, 2),
        "unreadable": last["unreadable"],
    }


def _coverage_line(coverage: dict[str, Any]) -> str:
    return (
        f"{coverage['pages']} kernel pages ({coverage['bytes'] / 1e6:.1f} MB), "
        f"{coverage['sweeps_per_second']} sweeps/s of {coverage['sweep_ms']} ms each, "
        f"{coverage['gb_per_second_while_sweeping']} GB/s while sweeping, all approved"
    )


def _evidence_line(summary: EvidenceSummary) -> str:
    records = sum(log.records for log in summary.logs)
    return (
        f"{records} records in {len(summary.logs)} logs, {summary.messages} signed messages, "
        "all chains closed"
    )


def _source_text(document: dict[str, Any]) -> str:
    card = document["card"]
    if card is None:
        return str(document["source"])
    return (
        f"card machine, full chain: firmware {card['firmware']}, NVMe gather over the server's "
        f"bus, {card['pages']} pages read by the card"
    )


def _print_summary(out: Console, document: dict[str, Any]) -> None:
    finding, timings = document["finding"] or {}, document["timings_ms"]
    passed = document["verified"]
    out.print()
    render.print_facts(
        out,
        [
            ("found", f"{finding.get('place')}, {finding.get('address')}"),
            ("frame", f"{finding.get('physical_frame')}"),
            ("expected", str(finding.get("expected"))),
            ("actual", str(finding.get("actual"))),
            (
                "times",
                f"tamper -> verdict {timings['tamper_to_verdict']} ms"
                f" -> command {timings['verdict_to_command']} ms"
                f" -> {DONE_WORDS[document['action']]} {timings['command_to_done']} ms"
                f"  (together {timings['tamper_to_done']} ms)",
            ),
            ("source", _source_text(document)),
            ("evidence", document["evidence"] or "verified and removed; --keep DIR keeps it"),
            *((("ok" if good else "FAILED"), text) for text, good in document["checks"].items()),
            (
                "result",
                Text(
                    "all of it happened and was verified" if passed else "NOT verified",
                    style="bold green" if passed else "bold red",
                ),
            ),
        ],
    )
