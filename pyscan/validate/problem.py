"""What a validation has to say about a running kernel, as bounded records.

The memory that is validated may be written by an attacker, so nothing that it holds may
raise an exception out of a validation, and no number of faults may grow without bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

#: Problems that one validation keeps; the others are counted.
PROBLEMS_MAX: Final = 256


class ProblemKind(StrEnum):
    """What is wrong; `UNREADABLE` alone says nothing about the kernel's integrity."""

    UNREADABLE = "unreadable"  # no content could be read: leads to an undecided verdict
    WILD_POINTER = "wild-pointer"  # leads to no memory
    BROKEN_LIST = "broken-list"  # a cycle, no end, or neighbours that disagree
    IMPLAUSIBLE = "implausible"  # a value that no legal kernel holds
    PAGE_TABLE = "page-table"  # tables that disagree, or cannot be walked to the end
    WRITABLE_EXECUTABLE = "writable-executable"
    WRITABLE_ALIAS = "writable-alias"  # protected memory that can be written elsewhere
    ORPHAN_CODE = "orphan-code"  # executable pages that nobody owns: hidden modules
    GENERATED_CODE = "generated-code"  # code made at run time that differs from its recipe
    INTERRUPT_TABLE = "interrupt-table"
    SECURITY_HOOK = "security-hook"
    HANDLER = "handler"  # a registered function that is none of the kernel's


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault. `address` is virtual, `place` names it, `text` is one line for a person."""

    kind: ProblemKind
    address: int
    place: str
    text: str

    @property
    def undecided(self) -> bool:
        """Whether the fault is that nothing is known, rather than something wrong."""
        return self.kind is ProblemKind.UNREADABLE

    def __str__(self) -> str:
        return f"{self.kind} at {self.address:#x} ({self.place}): {self.text}"


@dataclass(slots=True)
class Problems:
    """A bounded collection of problems; `total` counts all of them."""

    kept: list[Problem] = field(default_factory=list)
    total: int = 0

    def add(self, kind: ProblemKind, address: int, place: str, text: str) -> None:
        """Keep one problem, or count it when there are too many."""
        self.extend([Problem(kind, address, place, text)])

    def extend(self, problems: Iterable[Problem]) -> None:
        """Keep several problems."""
        for problem in problems:
            self.total += 1
            if len(self.kept) < PROBLEMS_MAX:
                self.kept.append(problem)

    def merge(self, other: Problems) -> None:
        """Take over all of another collection."""
        self.extend(other.kept)
        self.total += other.total - len(other.kept)
