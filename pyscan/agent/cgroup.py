"""Processor time of a process by its control group, for hypervisors that have no call for it.

Only a group that holds this process alone is touched: a limit must not hit a neighbour.
Files: Linux Documentation/admin-guide/cgroup-v2.rst (cpu.max) and
Documentation/scheduler/sched-bwc.rst (version 1: cpu.cfs_quota_us, cpu.cfs_period_us).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pyscan.agent.drivers.base import CpuQuota
from pyscan.errors import DriverError

#: Where Linux distributions mount control groups, file-hierarchy(7).
ROOT: Final = Path("/sys/fs/cgroup")
#: cpu.max has "max" for no limit, cpu.cfs_quota_us has -1.
_UNLIMITED: Final = "max"
_FILE_BYTES_MAX: Final = 1 << 16
_VERSION_2: Final[tuple[str, ...]] = ("cpu.max",)
_VERSION_1: Final[tuple[str, ...]] = ("cpu.cfs_quota_us", "cpu.cfs_period_us")


def read_quota(pid: int, root: Path = ROOT) -> CpuQuota:
    """The limit of the process's own group. Raises DriverError("unsupported")."""
    directory, files = _own_group(pid, root)
    values = " ".join(_read(directory / name) for name in files).split()
    try:
        runtime = -1 if values[0] == _UNLIMITED else int(values[0])
        return CpuQuota(runtime, int(values[1]))
    except (IndexError, ValueError) as error:
        raise DriverError("refused", f"{directory}: not a processor limit: {values}") from error


def write_quota(pid: int, quota: CpuQuota, root: Path = ROOT) -> None:
    """Set the limit of the process's own group. Raises DriverError."""
    directory, files = _own_group(pid, root)
    try:
        if len(files) == 1:
            runtime = _UNLIMITED if quota.runtime_us < 0 else str(quota.runtime_us)
            (directory / files[0]).write_text(f"{runtime} {quota.period_us}")
            return
        # The period first would be refused where the old quota does not fit the new period.
        (directory / files[0]).write_text("-1")
        (directory / files[1]).write_text(str(quota.period_us))
        (directory / files[0]).write_text(str(quota.runtime_us))
    except OSError as error:
        raise DriverError(
            "refused", f"{directory}: the processor limit was refused: {error.strerror}"
        ) from error


def _own_group(pid: int, root: Path) -> tuple[Path, tuple[str, ...]]:
    """Directory of the group and the names of its limit's files."""
    for line in _read(Path(f"/proc/{pid}/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            directory, files = root / path.lstrip("/"), _VERSION_2
        elif "cpu" in controllers.split(","):
            directory = root / controllers / path.lstrip("/")
            files = _VERSION_1
        else:
            continue
        if all((directory / name).is_file() for name in files):
            if _read(directory / "cgroup.procs").split() != [str(pid)]:
                break
            return directory, files
    raise DriverError("unsupported", "its process has no control group of its own; start it in one")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_FILE_BYTES_MAX).decode("ascii", "replace")
    except OSError as error:
        raise DriverError("unsupported", f"{path}: cannot be read: {error.strerror}") from error
