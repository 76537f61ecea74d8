"""What a verdict costs a control: a batch is verified, recorded, judged and committed.

The unit of a round is a batch of BATCH verdicts, as many as a broker has in flight; divide
by it. The disk's fdatasync is part of it: twice for a batch (evidence, store).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from postgres import Postgres
from pytest_benchmark.fixture import BenchmarkFixture

from pyscan import protocol
from pyscan.control.clerk import Clerk, Heard, Office
from pyscan.control.database import open_engine, sqlite_url
from pyscan.control.store import Store
from pyscan.evidence import EvidenceLog
from pyscan.ids import new_id
from pyscan.keys import KeyRing, SigningKey
from pyscan.policy import Limits, Policy
from pyscan.records import Action, Finding, FindingKind, PageStatus, Verdict, VerdictState
from pyscan.transport import RECEIVE_MAX

BATCH = RECEIVE_MAX
MONITOR = SigningKey.generate()
RING = KeyRing.of({"mon-1": MONITOR.public})


@pytest.fixture(params=["file", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store of its own, of either kind."""
    if request.param == "file":
        store = Store(open_engine(sqlite_url(tmp_path / "state.sqlite")))
        yield store
        store.close()
        return
    with Postgres() as server:
        store = Store(open_engine(server.create()))
        yield store
        store.close()


def _batch(state: VerdictState, targets: Iterator[int]) -> list[tuple[str, bytes]]:
    """Signed verdicts about targets that follow each other."""
    batch = []
    for number in (next(targets) for _ in range(BATCH)):
        sweep, bad = new_id(), state is not VerdictState.APPROVED
        finding = Finding(new_id(), sweep, FindingKind.CODE, PageStatus.OK, 1, 1, "ksys_read")
        verdict = Verdict(
            id=new_id(),
            sweep=sweep,
            monitor="mon-1",
            target=f"web-{number}",
            host="host-1",
            vm=f"web-{number}",
            state=state,
            reason="as it is",
            decided_ns=time.time_ns(),
            watched=10_000,
            ok=10_000 - bad,
            unreadable=0,
            findings=(finding,) if bad else (),
            findings_total=int(bad),
        )
        topic = protocol.verdict_topic("mon-1", verdict.target)
        batch.append((topic, protocol.encode_verdict(verdict, MONITOR)))
    return batch


def _measure(
    benchmark: BenchmarkFixture,
    store: Store,
    evidence: EvidenceLog,
    state: VerdictState,
    fleet: int,
) -> None:
    limits = Limits(actions_per_minute=10**9, unapproved_percent_max=100)
    policy = Policy(enforce=True, unapproved=Action.FREEZE, limits=limits)
    clerk = Clerk(Office("ctl-1", SigningKey.generate(), policy, 30), store, evidence)
    numbers = count()
    targets = (number % fleet for number in numbers)

    def take(batch: list[tuple[str, bytes]]) -> None:
        now_ns = time.time_ns()
        heard = [
            Heard(protocol.decode_verdict(data, RING, topic=topic, now_ns=now_ns), topic, data)
            for topic, data in batch
        ]
        clerk.take(heard)

    benchmark.group = f"batch of {BATCH} verdicts"
    benchmark.pedantic(take, setup=lambda: ((_batch(state, targets),), {}), rounds=30)
    benchmark.extra_info["verdicts_per_s"] = round(BATCH / benchmark.stats.stats.median)
    print(f"\n{benchmark.name}: {benchmark.extra_info['verdicts_per_s']} verdicts/s")


def bench_approved(benchmark: BenchmarkFixture, store: Store, tmp_path: Path) -> None:
    """A fleet of a thousand, all as approved."""
    with EvidenceLog.open(tmp_path / "evidence", SigningKey.generate(), "ctl-1") as evidence:
        _measure(benchmark, store, evidence, VerdictState.APPROVED, 1000)


def bench_repeated_alarm(benchmark: BenchmarkFixture, store: Store, tmp_path: Path) -> None:
    """Targets that were answered, and are told of again."""
    with EvidenceLog.open(tmp_path / "evidence", SigningKey.generate(), "ctl-1") as evidence:
        _measure(benchmark, store, evidence, VerdictState.UNAPPROVED, BATCH)


def bench_command(benchmark: BenchmarkFixture, store: Store, tmp_path: Path) -> None:
    """A new target each time: an incident, and a signed command in the outbox."""
    with EvidenceLog.open(tmp_path / "evidence", SigningKey.generate(), "ctl-1") as evidence:
        _measure(benchmark, store, evidence, VerdictState.UNAPPROVED, 10**9)
