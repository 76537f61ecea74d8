"""What a digest of pages cannot see change: lists, tables and handlers in writable memory.

A full validation reads every protected byte. Between two of them the pages are held against
digests, and everything else - which modules there are, who owns executable pages, where
handlers, hooks and interrupts lead, what page tables permit - is read again by `recheck`.
"""

from __future__ import annotations

from dataclasses import replace

from pyscan.validate.invariants import check_invariants
from pyscan.validate.memory import VirtualMemory, walk_kernel
from pyscan.validate.objects import Structures, read_structures
from pyscan.validate.validation import Validation


def recheck(validation: Validation) -> bool:
    """Whether anything beyond protected bytes is other than `validation` has found it.

    Either way: what has come, and what is gone. It changes nothing in `validation`; a new
    validation tells what it is. A kernel that was updating a list meanwhile is told, too.
    """
    attached = validation.attached
    walked = walk_kernel(attached.source, attached.kernel)
    memory = VirtualMemory(attached.source, attached.kernel, walked.leaves)
    target = replace(validation.target, memory=memory)
    structures = read_structures(target)
    if _lists(structures) != _lists(validation.structures):
        return True
    problems = {*structures.problems.kept}
    problems.update(check_invariants(target, structures, walked).problems)
    return problems != set(validation.problems.kept)


def _lists(structures: Structures) -> tuple[object, ...]:
    """What a state is made of. Processes come and go; `check_invariants` looks at them."""
    return structures.modules, structures.ftrace, structures.kprobes, structures.bpf
