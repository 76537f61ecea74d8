"""From a tampering to the finding and to the frozen guest, again and again, on a real guest.

One guest is booted; every trial starts monitor, control and agent anew with an empty record
of incidents, lets them approve the guest, changes one byte at a random moment, waits for the
hypervisor's own word, and lets the guest run again.
"""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyscan.bench.document import Latency
from pyscan.bench.measure import Plan, Progress
from pyscan.demo.appliance import IDENTITIES, INTERVAL_MS, OBSERVER, Appliance, Wiring
from pyscan.demo.observer import Arrival, Observer
from pyscan.lab.broker import Broker
from pyscan.lab.guest import Guest, GuestOptions
from pyscan.lab.process import RunDirectory
from pyscan.qmp import query
from pyscan.records import Action, Command, Report, ReportState, Verdict, VerdictState
from pyscan.transport import LinkSettings

_TIMEOUT_S: Final = 60.0
_PROGRAMS: Final = ("monitor", "control", "agent")
_NETWORK: Final = "net0"  # of the laboratory's guest; a freeze unplugs it


@dataclass(frozen=True, slots=True)
class Trial:
    """One tampering and what followed; times by the clock of one machine."""

    tampered_ns: int  # right before the byte was changed
    verdict: Arrival[Verdict]
    command: Arrival[Command]
    report: Arrival[Report]  # the final one
    stopped_ns: int  # the guest's processors, by the hypervisor's clock

    @property
    def found_ms(self) -> float:
        """Until the monitor had decided: unapproved."""
        return (self.verdict.content.decided_ns - self.tampered_ns) / 1e6

    @property
    def frozen_ms(self) -> float:
        """Until the guest's processors stood still."""
        return (self.stopped_ns - self.tampered_ns) / 1e6


@dataclass(frozen=True, slots=True)
class Stand:
    """A booted guest and a broker, for one appliance after the other."""

    run: RunDirectory
    guest: Guest
    broker: Broker
    physical: int  # guest-physical address of a byte that nothing executes
    trace: Path  # of QEMU: every command of its monitors, when it is traced

    @contextmanager
    def appliance(self, interval_ms: int = INTERVAL_MS) -> Iterator[Fitted]:
        """An appliance that sweeps so often, with the guest enrolled. Raises LabError."""
        directory = self.run.path / f"appliance-{interval_ms}"
        directory.mkdir()
        guest = self.guest
        wiring = Wiring(
            f"qemu:{guest.monitor_qmp}",
            guest.agent_qmp,
            guest.pid_file,
            Action.FREEZE,
            interval_ms,
        )
        with Appliance(directory, self.broker, wiring) as appliance:
            appliance.enrol()
            yield Fitted(self, appliance, directory, interval_ms)


@contextmanager
def open_stand(guest_dir: Path, *, traced: bool = False) -> Iterator[Stand]:
    """Boot a guest. Raises LabError."""
    with RunDirectory() as run:
        trace = run.path / "qemu-trace.log"
        options = ("-msg", "timestamp=on", "-trace", "handle_qmp_command", "-D", str(trace))
        with (
            Guest(GuestOptions(guest_dir, extra=options if traced else ()), run) as guest,
            Broker(run, IDENTITIES) as broker,
        ):
            guest.wait_ready(_TIMEOUT_S)
            yield Stand(run, guest, broker, guest.text_physical(), trace)


@dataclass(frozen=True, slots=True)
class Fitted:
    """An appliance on its stand; one trial after the other."""

    stand: Stand
    appliance: Appliance
    directory: Path
    interval_ms: int

    def trial(self, dice: random.Random) -> Trial:
        """Start the programs, tamper, wait for what follows, stop the programs.

        What they recorded stays until `forget`. Raises LabError.
        """
        guest, appliance, physical = self.stand.guest, self.appliance, self.stand.physical
        with Observer(self._settings(), appliance.rings(), guest.lab_qmp, guest.pid) as observer:
            observer.wait_online(_TIMEOUT_S)
            self._wait_approved(observer)
            threading.Event().wait(dice.random() * self.interval_ms / 1e3)
            tampered_ns = time.time_ns()
            guest.ram.flip(physical, 0x01)
            try:
                trial = self._follow(observer, tampered_ns)
            finally:
                guest.ram.flip(physical, 0x01)
            appliance.stop()
        link = {"name": _NETWORK, "up": True}
        query(guest.lab_qmp, [("set_link", link), ("cont", None)], _TIMEOUT_S)
        return trial

    def forget(self) -> None:
        """Remove what the programs recorded, so that the next trial is a first one."""
        for program in _PROGRAMS:
            shutil.rmtree(self.directory / program)

    def _settings(self) -> LinkSettings:
        broker = self.stand.broker
        password = broker.password_file(OBSERVER).read_text().strip()
        return LinkSettings("127.0.0.1", broker.port, OBSERVER, OBSERVER, password)

    def _wait_approved(self, observer: Observer) -> None:
        started_ns = time.time_ns()
        logs = {program: self.directory / f"{program}.log" for program in ("control", "agent")}
        for log in logs.values():
            log.unlink(missing_ok=True)
        self.appliance.start()
        for program in logs:
            self.appliance.wait_logged(program, "link state=online", _TIMEOUT_S)
        self._wait_verdict(observer, VerdictState.APPROVED, started_ns)

    def _wait_verdict(
        self, observer: Observer, state: VerdictState, since_ns: int
    ) -> Arrival[Verdict]:
        """Not an earlier trial's verdict, which the broker may have kept."""

        def look() -> Arrival[Verdict] | None:
            self.appliance.check_alive()
            return observer.first(Verdict, lambda v: v.state is state and v.decided_ns > since_ns)

        return observer.wait(look, _TIMEOUT_S, f"verdict `{state}`")

    def _follow(self, observer: Observer, tampered_ns: int) -> Trial:
        verdict = self._wait_verdict(observer, VerdictState.UNAPPROVED, tampered_ns)
        stopped_ns = observer.wait(
            lambda: next(iter(observer.stops_ns), None), _TIMEOUT_S, "STOP event of QEMU"
        )
        command = observer.wait(
            lambda: observer.first(Command, lambda c: c.cause.verdict == verdict.content.id),
            _TIMEOUT_S,
            "command",
        )
        report = observer.wait(
            lambda: observer.first(
                Report,
                lambda r: r.command == command.content.id and r.state is ReportState.SUCCEEDED,
            ),
            _TIMEOUT_S,
            "report `succeeded`",
        )
        return Trial(tampered_ns, verdict, command, report, stopped_ns)


def measure_latency(guest_dir: Path, trials: int, plan: Plan, progress: Progress) -> list[Latency]:
    """So many trials on one guest. Raises LabError when the laboratory does not come up."""
    dice = random.Random(int(plan.random.integers(1 << 62)))  # noqa: S311 - moments, no secrets
    progress("boot a guest")
    done = []
    with open_stand(guest_dir) as stand, stand.appliance() as fitted:
        for number in range(trials):
            progress(f"tamper -> finding -> frozen, trial {number + 1} of {trials}")
            done.append(fitted.trial(dice))
            fitted.forget()
    return [
        Latency("tamper -> finding", INTERVAL_MS, sorted(trial.found_ms for trial in done)),
        Latency("tamper -> frozen", INTERVAL_MS, sorted(trial.frozen_ms for trial in done)),
    ]
