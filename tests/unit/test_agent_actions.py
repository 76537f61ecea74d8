"""Arguments, what a sandbox owes, limits of processor time, and the revocation hook."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyscan.agent import cgroup
from pyscan.agent.actions import Means, Observation, VmState, read_arguments, wanted_containment
from pyscan.agent.actions.arguments import Arguments
from pyscan.agent.actions.hook import revoke
from pyscan.agent.drivers.base import CpuQuota, Disk, NetworkLink, Setup, Throttle
from pyscan.agent.journal import Containment, Layer
from pyscan.agent.process import ProcessHandle, ProcessIdentity, identify
from pyscan.errors import DriverError
from pyscan.evidence import EvidenceLog
from pyscan.ids import new_id
from pyscan.keys import SigningKey
from pyscan.records import Action, Command

PROCESS = ProcessIdentity(100, 5, "boot")


def command(action: Action, arguments: dict[str, str | int | bool]) -> Command:
    return Command(new_id(), "ctl-1", "host-1", 1, 1000, 1060, action, "web-1", arguments)


@pytest.mark.parametrize(
    ("action", "given", "read"),
    [
        (Action.KILL, {}, Arguments()),
        (Action.FREEZE, {"ttl_s": 60, "dry_run": True}, Arguments(dry_run=True, ttl_s=60)),
        (
            Action.SANDBOX,
            {"network": "quarantine", "disk": True, "cpu_percent": 100},
            Arguments(network="quarantine", disk=True, cpu_percent=100),
        ),
        (Action.RELEASE, {"disk": "commit"}, Arguments(disk_choice="commit")),
        (Action.CAPTURE, {"memory": False}, Arguments(memory=False)),
    ],
)
def test_arguments(action: Action, given: dict[str, str | int | bool], read: Arguments) -> None:
    assert read_arguments(command(action, given)) == read


@pytest.mark.parametrize(
    ("action", "given", "problem"),
    [
        (Action.KILL, {"disk": True}, "kill has no argument disk"),
        (Action.QUERY, {"x": 1, "a": 2}, "query has no argument a, x"),
        (Action.FREEZE, {"dry_run": 1}, "dry_run is true or false, not 1"),
        (Action.FREEZE, {"ttl_s": True}, "ttl_s is a number"),
        (Action.FREEZE, {"ttl_s": -1}, "ttl_s is a number from 1"),
        (Action.FREEZE, {"ttl_s": 10**9}, "ttl_s is a number from 1"),
        (Action.SANDBOX, {"cpu_percent": 101}, "from 1 to 100, not 101"),
        (Action.SANDBOX, {"network": "a b"}, "network is a name, not 'a b'"),
        (Action.SANDBOX, {"network": ""}, "network is a name"),
        (Action.SANDBOX, {"disk": "commit"}, "disk is true or false"),
        (Action.SANDBOX, {"disk": True, "ttl_s": 5}, "exclude each other"),
        (Action.RELEASE, {"disk": "keep"}, "disk is commit or discard, not 'keep'"),
        (Action.RELEASE, {"disk": False}, "disk is commit or discard"),
    ],
)
def test_bad_arguments(action: Action, given: dict[str, str | int | bool], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_arguments(command(action, given))


DISK = Disk("vda", "/vm/disk.raw", "node0", Throttle(iops=7))
SETUP = Setup(
    (NetworkLink("n0", up=True, network="lan"), NetworkLink("n1", up=False, network="dmz")),
    (DISK,),
    CpuQuota(-1, 100_000),
)
BEFORE = Observation(VmState.RUNNING, ("n0", "n1"), PROCESS, unplugged=("n1",), setup=SETUP)
ALL = Arguments(network="quarantine", disk=True, cpu_percent=10)
OWED = Containment(
    True,
    ("n0",),
    PROCESS,
    networks={"n0": "lan", "n1": "dmz"},
    layers={"vda": Layer(DISK, "/o/c1/0.qcow2")},
    throttles={"vda": Throttle(iops=7)},
    cpu=CpuQuota(-1, 100_000),
)


def test_a_sandbox_owes_what_it_takes_and_no_more() -> None:
    owed = wanted_containment(Action.SANDBOX, BEFORE, None, ALL, Path("/o/c1"))
    assert owed == OWED
    plain = wanted_containment(Action.SANDBOX, BEFORE, None, Arguments(), Path("/o/c1"))
    assert plain == Containment(True, ("n0",), PROCESS)


def test_what_it_was_before_the_first_sandbox_counts() -> None:
    inside = Setup(
        (NetworkLink("n0", up=True, network="quarantine"),),
        (Disk("vda", "/o/c1/0.qcow2", "pyscan-1", Throttle(100)), Disk("vdb", "/vm/b.raw")),
        CpuQuota(10_000, 100_000),
    )
    again = replace(BEFORE, vm_state=VmState.PAUSED, setup=inside)
    owed = wanted_containment(Action.SANDBOX, again, OWED, ALL, Path("/o/c2"))
    assert owed is not None
    assert owed.layers.pop("vdb") == Layer(Disk("vdb", "/vm/b.raw"), "/o/c2/1.qcow2")
    assert owed.throttles.pop("vdb") == Throttle()
    assert owed == OWED


def test_nothing_is_owed_to_a_machine_that_cannot_be_looked_at() -> None:
    unknown = Observation(VmState.UNKNOWN, (), PROCESS, "it does not answer", "timeout")
    assert wanted_containment(Action.FREEZE, unknown, None) is None


def test_the_newest_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.5)
    first = wanted_containment(Action.FREEZE, BEFORE, None, Arguments(ttl_s=60))
    assert first is not None
    assert first.release_at_s == 1060
    second = wanted_containment(Action.FREEZE, BEFORE, first, Arguments())
    assert second is not None
    assert second.release_at_s is None


@pytest.fixture
def sleeper() -> Iterator[int]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process.pid
        process.kill()


def group(root: Path, pid: int, *, alone: bool = True) -> Path:
    """A control group file system as far as it is used, with the process where the kernel has it.

    Where it is depends on the machine; both versions have the same shape.
    """
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            directory = root / controllers / path.lstrip("/")
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "cgroup.procs").write_text(f"{pid}\n" + ("" if alone else "1\n"))
            if controllers:
                (directory / "cpu.cfs_quota_us").write_text("-1\n")
                (directory / "cpu.cfs_period_us").write_text("100000\n")
                return directory
    (directory / "cpu.max").write_text("max 100000\n")
    return directory


def test_processor_time_of_a_group_of_its_own(tmp_path: Path, sleeper: int) -> None:
    group(tmp_path, sleeper)
    assert cgroup.read_quota(sleeper, tmp_path) == CpuQuota(-1, 100_000)
    cgroup.write_quota(sleeper, CpuQuota(20_000, 100_000), tmp_path)
    assert cgroup.read_quota(sleeper, tmp_path) == CpuQuota(20_000, 100_000)
    cgroup.write_quota(sleeper, CpuQuota(-1, 100_000), tmp_path)
    assert cgroup.read_quota(sleeper, tmp_path) == CpuQuota(-1, 100_000)


def test_a_shared_group_is_not_touched(tmp_path: Path, sleeper: int) -> None:
    group(tmp_path, sleeper, alone=False)
    with pytest.raises(DriverError, match="no control group of its own") as caught:
        cgroup.write_quota(sleeper, CpuQuota(20_000, 100_000), tmp_path)
    assert caught.value.reason == "unsupported"


def means(tmp_path: Path, *program: str, timeout_s: int = 10) -> Means:
    key = SigningKey.generate()
    with EvidenceLog.open(tmp_path / new_id(), key, "host-1") as evidence:
        pass
    return Means(
        host="host-1",
        key=key,
        evidence=evidence,
        envelope=lambda _id: b"",
        overlays=tmp_path,
        captures=tmp_path,
        throttle=Throttle(),
        revoke=program,
        revoke_timeout_s=timeout_s,
    )


async def test_hook_gets_the_name_and_no_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    script = f'echo "$@" >"{out}"; env >>"{out}"'
    monkeypatch.setenv("SECRET", "x")
    assert await revoke(means(tmp_path, "/bin/sh", "-c", script, "hook"), "web-1; rm") == ""
    text = out.read_text()
    assert text.startswith("web-1; rm\n")
    assert "SECRET" not in text


async def test_hook_that_fails(tmp_path: Path) -> None:
    assert await revoke(means(tmp_path, "/bin/false"), "x") == "/bin/false: exit status 1"
    assert "No such file" in await revoke(means(tmp_path, "/nowhere/hook"), "x")


async def test_hook_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    script = f'sleep 600 & echo $! >"{file}"; wait'
    problem = await revoke(means(tmp_path, "/bin/sh", "-c", script, timeout_s=1), "web-1")
    assert problem == "/bin/sh: not done after 1 s"
    child = identify(int(file.read_text()))
    if child is not None:  # else it is gone already
        with ProcessHandle(child) as handle:
            assert await handle.wait_gone(timeout_s=10)
