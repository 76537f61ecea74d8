"""What the way from a tampering to the frozen guest is made of, stage by stage.

Nothing is added to the programs for it. The times are those of the signed records that they
leave anyway, of what an observer sees of the broker, and of QEMU's own trace of its monitor
(docs/devel/tracing.rst, `handle_qmp_command` of monitor/trace-events).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from ulid import ULID

from pyscan.bench.latency import Fitted, Trial, open_stand
from pyscan.bench.measure import Progress
from pyscan.errors import LabError
from pyscan.evidence.events import Event, read_events

#: Stages in their order. Moments that are known only from an id are good to a millisecond.
STAGES: Final = (
    "tamper -> sweep begins",
    "sweep begins -> found, decided",
    "decided -> verdict signed",
    "verdict signed -> stored, sent, received",
    "verdict received -> command decided",
    "command decided -> signed",
    "command signed -> stored, sent, received",
    "command received -> verified",
    "verified -> stored, agent at the monitor socket",
    "at the monitor socket -> machine looked at",
    "looked at -> started stored, stop in QEMU",
    "stop in QEMU -> processors stand still",
)

_TRACED: Final = re.compile(
    rb"^\d+@(\d+)\.(\d{6}):handle_qmp_command .*?\"execute\": ?\"([a-z_-]+)\"", re.MULTILINE
)
_NS_PER_MS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Staged:
    """One trial."""

    frozen_ms: float
    stages_ms: tuple[float, ...]  # as STAGES; their sum is `frozen_ms`


@dataclass(frozen=True, slots=True)
class StagedTrials:
    """All trials with sweeps that begin every `interval_ms`."""

    interval_ms: int
    trials: tuple[Staged, ...]


def measure_stages(
    guest_dir: Path,
    intervals_ms: tuple[int, ...],
    trials: int,
    dice: random.Random,
    progress: Progress,
) -> list[StagedTrials]:
    """So many trials for each interval, all on one guest. Raises LabError."""
    progress("boot a guest")
    measured = []
    with open_stand(guest_dir, traced=True) as stand:
        for interval_ms in intervals_ms:
            with stand.appliance(interval_ms) as fitted:
                done = []
                for number in range(trials):
                    progress(
                        f"tamper -> frozen, sweeps every {interval_ms} ms, "
                        f"trial {number + 1} of {trials}"
                    )
                    done.append(_stages(fitted, fitted.trial(dice)))
                    fitted.forget()
            measured.append(StagedTrials(interval_ms, tuple(done)))
    return measured


def _stages(fitted: Fitted, trial: Trial) -> Staged:
    evidence = fitted.appliance.evidence()
    verdict, command = trial.verdict.content, trial.command.content
    started_ns = _started_ns(evidence["agent"], command.id)
    capabilities_ns, stop_ns = _monitor_ns(fitted.stand.trace, trial)
    moments = (
        trial.tampered_ns,
        _made_ns(verdict.sweep),
        verdict.decided_ns,
        _recorded_ns(evidence["monitor"], "verdict", verdict.id),
        trial.verdict.at_ns,
        _made_ns(command.id),
        _recorded_ns(evidence["control"], "command", command.id),
        trial.command.at_ns,
        _recorded_ns(evidence["agent"], "command", command.id),
        capabilities_ns,
        started_ns,
        stop_ns,
        trial.stopped_ns,
    )
    stages = (after - before for before, after in pairwise(moments))
    return Staged(trial.frozen_ms, tuple(stage / _NS_PER_MS for stage in stages))


def _made_ns(ulid: str) -> int:
    """When an id was made, to a millisecond."""
    return int(ULID.from_str(ulid).milliseconds) * _NS_PER_MS


def _recorded_ns(directory: Path, kind: str, message_id: str) -> int:
    """When a message was about to be written to the evidence."""
    return _message(directory, kind, message_id).time_ns


def _message(directory: Path, kind: str, message_id: str) -> Event:
    for event in read_events(directory):
        if event.kind == kind and event.message is not None and event.message.id == message_id:
            return event
    raise LabError(f"{directory}: no record of {kind} {message_id}")


def _started_ns(directory: Path, command_id: str) -> int:
    """When the agent was about to record that it starts with a command."""
    for event in read_events(directory):
        body = event.body
        if (event.kind, body.get("cmd"), body.get("state")) == ("report", command_id, "started"):
            return event.time_ns
    raise LabError(f"{directory}: no report that command {command_id} was started")


def _monitor_ns(trace: Path, trial: Trial) -> tuple[int, int]:
    """When QEMU was greeted by the agent, and told to stop."""
    greeted_ns = 0
    for seconds, micros, name in _TRACED.findall(trace.read_bytes()):
        at_ns = int(seconds) * 10**9 + int(micros) * 1000
        if trial.tampered_ns <= at_ns <= trial.stopped_ns:
            if name == b"qmp_capabilities":
                greeted_ns = at_ns
            elif name == b"stop":
                return greeted_ns, at_ns
    raise LabError(f"{trace}: QEMU was not told to stop")
