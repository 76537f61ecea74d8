"""Everything that must hold in a running kernel beyond the bytes of its package.

`check_invariants` is the whole of it, cheap enough for every validation. The parts are in
`ownership` (permissions, aliases, owners of code), `generated` (code made at run time) and
`tables` (interrupts, security hooks, page tables).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pyscan.translate import AnomalyKind, WalkResult
from pyscan.validate.context import Target
from pyscan.validate.generated import check_generated, realmode_owner, recognise
from pyscan.validate.objects import Structures
from pyscan.validate.ownership import (
    VERIFIED,
    OwnerKind,
    Ownership,
    check_aliases,
    check_owners,
    check_permissions,
)
from pyscan.validate.problem import Problem, ProblemKind, Problems
from pyscan.validate.tables import check_hooks, check_interrupts, check_roots


@dataclass(frozen=True, slots=True)
class Invariants:
    """What the checks found. `problems` is bounded, `problems_total` counts all."""

    problems: tuple[Problem, ...]
    problems_total: int
    ownership: Ownership
    verified: Mapping[OwnerKind, int]  # bytes of generated code that are known to be good

    @property
    def unverified(self) -> dict[OwnerKind, int]:
        """Executable bytes that are owned, but whose content follows from no package."""
        return {
            kind: count - self.verified[kind]
            for kind, count in self.ownership.bytes_by_kind.items()
            if kind not in VERIFIED and count > self.verified[kind]
        }


def check_walk(found: WalkResult, problems: Problems) -> None:
    """Anomalies of a walk of the kernel half.

    A table that cannot be read leaves the kernel unknown; a walk that hit its limits does
    so by what an attacker wrote, or the machine is larger than the limits allow.
    """
    for anomaly in found.anomalies:
        kind = ProblemKind.PAGE_TABLE
        if anomaly.kind is AnomalyKind.TABLE_UNREADABLE:
            kind = ProblemKind.UNREADABLE
        problems.add(kind, anomaly.address, "kernel's page tables", str(anomaly))
    problems.total += found.anomalies_total - len(found.anomalies)


def check_invariants(target: Target, structures: Structures, found: WalkResult) -> Invariants:
    """All checks, on a `target` that knows its modules and their functions.

    `found`: the walk that target.memory was made of. `structures.problems` are not repeated.
    Raises ApprovedFileError when the approved configuration lacks a symbol or an offset.
    """
    problems = Problems()
    check_walk(found, problems)
    check_permissions(target, problems)
    check_aliases(target, problems)
    realmode = tuple(realmode_owner(target, problems))
    ownership = check_owners(target, structures, realmode, recognise, problems)
    verified = check_generated(target, structures, ownership.owners, problems)
    check_interrupts(target, problems)
    check_hooks(target, problems)
    check_roots(target, structures, problems)
    return Invariants(tuple(problems.kept), problems.total, ownership, verified)
