"""The scanner that fits the kind of an approved configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from pyscan.approved import LinuxApproved, Snapshot
from pyscan.digest import Digester
from pyscan.errors import UsageError
from pyscan.scanner.kernel import KernelReport, KernelScanner
from pyscan.scanner.sweep import Scanner, SweepResult
from pyscan.sources import Source
from pyscan.validate import StateRules


class Sweeper(Protocol):
    """What sweeps one target. Not thread-safe; closed by leaving its context."""

    @property
    def report(self) -> KernelReport | None:
        """The running kernel, where it is known by its package."""

    def sweep(self, *, walk_tables: bool = True) -> SweepResult:
        """One pass. Raises TargetUnavailable."""

    def close(self) -> None:
        """Release everything but the source. Idempotent."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_exception: object) -> None: ...


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """How to sweep. `rules` and what follows are for kernels known by their package."""

    rereads: int = 3
    audit_percent: float = 1.0
    rules: StateRules = field(default_factory=StateRules)
    judge_starting: bool = False  # whether a kernel that says it is starting is judged
    live: bool = False  # whether the target runs all the time, so that it may be reset


def check_approved(approved: Sequence[Snapshot | LinuxApproved]) -> None:
    """Raise UsageError unless it is one snapshot, or one or more of kind linux."""
    if not approved:
        raise UsageError("no approved configuration is given")
    if len(approved) > 1 and any(isinstance(each, Snapshot) for each in approved):
        raise UsageError(
            "a snapshot fits one boot of one target and is given alone; several approved "
            "configurations must all be of kind linux"
        )


def open_scanner(
    source: Source,
    approved: Sequence[Snapshot | LinuxApproved],
    digester: Digester,
    *,
    target: str,
    keyed: Digester | None = None,
    options: SweepOptions | None = None,
) -> Sweeper:
    """A scanner for `approved`. Raises UsageError, see `check_approved`."""
    check_approved(approved)
    options = options or SweepOptions()
    first = approved[0]
    if isinstance(first, Snapshot):
        return Scanner(
            source,
            first,
            digester,
            target=target,
            rereads=options.rereads,
            keyed=keyed,
            audit_percent=options.audit_percent,
        )
    kernels = [each for each in approved if isinstance(each, LinuxApproved)]
    return KernelScanner(
        source,
        kernels,
        digester,
        target=target,
        rules=options.rules,
        keyed=keyed,
        audit_percent=options.audit_percent,
        judge_starting=options.judge_starting,
        live=options.live,
    )
