"""Bounded walks of the kernel's linked lists, which an attacker may have written.

A walk ends after `bound` entries whatever the pointers say, never raises, and tells the
first fault that it met. Formats: include/linux/types.h (struct list_head, hlist_head,
hlist_node).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pyscan.validate.memory import AccessFailed, Unreadable, VirtualMemory

_NEXT: Final = 0
_PREVIOUS: Final = 8  # hlist_node.pprev too
_ADDRESS_MASK: Final = (1 << 64) - 1

#: How often a place where a list disagrees is looked at before it is believed: the kernel
#: links a node with a few stores, but a processor may stop for a moment between them.
_LOOKS: Final = 4


class Fault(StrEnum):
    """Why a list is broken."""

    UNREADABLE = "unreadable"  # a page could not be read: nothing is known of the rest
    WILD = "wild"  # a pointer leads to no memory
    CYCLE = "cycle"  # it comes back to an entry, not to its head
    ENDLESS = "endless"  # more entries than a legal list has
    DISAGREE = "disagree"  # an entry does not point back to the one before


@dataclass(frozen=True, slots=True)
class Broken:
    """The first fault of a list, at the address of one node."""

    fault: Fault
    node: int
    text: str


@dataclass(frozen=True, slots=True)
class Walked:
    """Addresses of the objects that hold the nodes, in order, as far as the list goes."""

    entries: tuple[int, ...]
    broken: Broken | None = None


def list_entries(memory: VirtualMemory, head: int, offset: int, bound: int) -> Walked:
    """Objects of a doubly linked, circular list.

    `head`: address of its list_head; `offset`: of the list_head in an object. Neighbours
    that disagree do not end the walk.
    """

    def follow(node: int) -> int | None:
        following = memory.u64(node + _NEXT)
        return None if following == head else following

    def agrees(node: int, before: int) -> bool:
        return memory.u64(node + _PREVIOUS) == before or _changed(memory, node, before)

    walked = _walk(head, follow, agrees, offset, bound)
    if walked.broken is None:
        last = (walked.entries[-1] + offset) & _ADDRESS_MASK if walked.entries else head
        broken = _check_back(memory, head, last)
        return Walked(walked.entries, broken)
    return walked


def _changed(memory: VirtualMemory, node: int, before: int) -> bool:
    """Whether nodes disagree only because the kernel has changed the list since it was read.

    A walk is no snapshot. While it goes on, processes end, and each new one comes between the
    last node and the head. So the place is read anew: it is sound when `node` is linked from
    both sides, and `before` either is its neighbour, too, or has left the list or the place.
    """
    for _ in range(_LOOKS):
        memory.forget()
        try:
            back = memory.u64(node + _PREVIOUS)
            if back == before:
                return True
            if memory.u64(back + _NEXT) == node and not _leads(memory, before, node):
                return True
        except AccessFailed:
            continue
    return False


def _leads(memory: VirtualMemory, before: int, node: int) -> bool:
    """Whether `before` is on a list, and `node` comes next.

    What was taken out keeps the way on, but not the way back (list_del_rcu, rculist.h).
    """
    try:
        if memory.u64(before + _NEXT) != node:
            return False
        return memory.u64(memory.u64(before + _PREVIOUS) + _NEXT) == before
    except AccessFailed:
        return False


def hlist_entries(memory: VirtualMemory, head: int, offset: int, bound: int) -> Walked:
    """Objects of a hash list; `head`: address of its hlist_head."""

    def follow(node: int) -> int | None:
        return memory.u64(node + _NEXT) or None

    def agrees(node: int, before: int) -> bool:
        return memory.u64(node + _PREVIOUS) == before

    return _walk(head, follow, agrees, offset, bound)


def chain_entries(
    memory: VirtualMemory, head: int, offset: int, bound: int, end: int = 0
) -> Walked:
    """Objects of a singly linked list, which ends with NULL or the object at `end`.

    `head`: address of the pointer to the first; `offset`: of the pointer to the next.
    """
    stops = (0, end)

    def follow(node: int) -> int | None:
        following = memory.u64(node)
        return None if following in stops else (following + offset) & _ADDRESS_MASK

    return _walk(head, follow, lambda _node, _before: True, offset, bound)


def _walk(
    head: int,
    follow: Callable[[int], int | None],
    agrees: Callable[[int, int], bool],
    offset: int,
    bound: int,
) -> Walked:
    """Walk from `head` on; `follow` gives the next node, `agrees` checks its way back."""
    entries: list[int] = []
    seen = {head}
    disagrees: Broken | None = None
    node = head
    try:
        while (following := follow(node)) is not None:
            if following in seen:
                return _broken(entries, Fault.CYCLE, following, "the list comes back to it")
            if len(entries) == bound:
                return _broken(entries, Fault.ENDLESS, node, f"more than {bound} entries")
            if disagrees is None and not agrees(following, node):
                disagrees = Broken(
                    Fault.DISAGREE, following, f"it does not point back to {node:#x}"
                )
            seen.add(following)
            entries.append((following - offset) & _ADDRESS_MASK)
            node = following
    except AccessFailed as error:
        fault = Fault.UNREADABLE if isinstance(error, Unreadable) else Fault.WILD
        return _broken(entries, fault, node, f"behind {node:#x}: {error}")
    return Walked(tuple(entries), disagrees)


def _check_back(memory: VirtualMemory, head: int, last: int) -> Broken | None:
    """Whether the head of a circular list points back to its last node."""
    try:
        if memory.u64(head + _PREVIOUS) == last or _changed(memory, head, last):
            return None
    except AccessFailed as error:
        fault = Fault.UNREADABLE if isinstance(error, Unreadable) else Fault.WILD
        return Broken(fault, head, str(error))
    return Broken(Fault.DISAGREE, head, f"it does not point back to {last:#x}")


def _broken(entries: list[int], fault: Fault, node: int, text: str) -> Walked:
    return Walked(tuple(entries), Broken(fault, node, text))
