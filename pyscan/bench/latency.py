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
from contextlib import ExitStack
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
from pyscan.records import Action, Verdict, VerdictState
from pyscan.transport import LinkSettings

_TIMEOUT_S: Final = 60.0
_PROGRAMS: Final = ("monitor", "control", "agent")


@dataclass(frozen=True, slots=True)
class _Trial:
    """Times from the tampering in milliseconds."""

    found: float  # the monitor decided: unapproved
    frozen: float  # the guest's processors stopped, by the hypervisor's clock


def measure_latency(guest_dir: Path, trials: int, plan: Plan, progress: Progress) -> list[Latency]:
    """So many trials on one guest. Raises LabError when the laboratory does not come up."""
    dice = random.Random(int(plan.random.integers(1 << 62)))  # noqa: S311 - moments, no secrets
    with ExitStack() as stack:
        run = stack.enter_context(RunDirectory())
        progress("boot a guest")
        guest = stack.enter_context(Guest(GuestOptions(guest_dir), run))
        broker = stack.enter_context(Broker(run, IDENTITIES))
        guest.wait_ready(_TIMEOUT_S)
        directory = run.path / "appliance"
        directory.mkdir()
        wiring = Wiring(f"qemu:{guest.monitor_qmp}", guest.agent_qmp, guest.pid_file, Action.FREEZE)
        appliance = stack.enter_context(Appliance(directory, broker, wiring))
        appliance.enrol()
        physical = guest.text_physical()
        done = []
        for number in range(trials):
            progress(f"tamper -> finding -> frozen, trial {number + 1} of {trials}")
            done.append(_trial(guest, broker, appliance, physical, dice))
            for program in _PROGRAMS:
                shutil.rmtree(directory / program)
    return [
        Latency("tamper -> finding", INTERVAL_MS, sorted(trial.found for trial in done)),
        Latency("tamper -> frozen", INTERVAL_MS, sorted(trial.frozen for trial in done)),
    ]


def _trial(
    guest: Guest, broker: Broker, appliance: Appliance, physical: int, dice: random.Random
) -> _Trial:
    password = broker.password_file(OBSERVER).read_text().strip()
    settings = LinkSettings("127.0.0.1", broker.port, OBSERVER, OBSERVER, password)
    with Observer(settings, appliance.rings(), guest.lab_qmp, guest.pid) as observer:
        observer.wait_online(_TIMEOUT_S)

        def verdict(state: VerdictState, since_ns: int) -> Arrival[Verdict] | None:
            """Not an earlier trial's verdict, which the broker may have kept."""
            appliance.check_alive()
            return observer.first(Verdict, lambda v: v.state is state and v.decided_ns > since_ns)

        started_ns = time.time_ns()
        appliance.start()
        observer.wait(
            lambda: verdict(VerdictState.APPROVED, started_ns), _TIMEOUT_S, "verdict `approved`"
        )
        threading.Event().wait(dice.random() * INTERVAL_MS / 1e3)
        with guest.ram.watch(physical) as watch:
            guest.ram.flip(physical, 0x01)
            tampered_ns = watch.wait(_TIMEOUT_S).first_seen_after_ns
        found = observer.wait(
            lambda: verdict(VerdictState.UNAPPROVED, tampered_ns),
            _TIMEOUT_S,
            "verdict `unapproved`",
        )
        frozen_ns = observer.wait(
            lambda: next(iter(observer.stops_ns), None), _TIMEOUT_S, "STOP event of QEMU"
        )
        appliance.stop()
    guest.ram.flip(physical, 0x01)
    query(guest.lab_qmp, [("cont", None)], _TIMEOUT_S)
    return _Trial(
        found=(found.content.decided_ns - tampered_ns) / 1e6,
        frozen=(frozen_ns - tampered_ns) / 1e6,
    )
