"""Attaching: find the running kernel, and the approved configuration that fits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyscan.approved.linux import LinuxApproved
from pyscan.errors import KernelNotFound
from pyscan.kernel import KernelImage, check_root, find_kernel
from pyscan.records import PAGE_SHIFT, PAGE_SIZE, PageStatus
from pyscan.sources import Source
from pyscan.translate import WalkResult
from pyscan.validate.context import Target
from pyscan.validate.memory import VirtualMemory, walk_kernel

#: Anchors that must be in place: all but one, so that one flipped byte does not blind.
_ANCHORS_MISSING_MAX = 1


@dataclass(frozen=True, slots=True, eq=False)
class Attached:
    """A kernel that is known by its package."""

    source: Source
    kernel: KernelImage
    approved: LinuxApproved
    walked: WalkResult
    target: Target
    anchors_missing: tuple[str, ...]


def attach(
    source: Source, candidates: Sequence[LinuxApproved], known: KernelImage | None = None
) -> Attached:
    """Find the running kernel and choose its approved configuration.

    `known` is where it was: that is looked at first, which saves the search. Raises
    KernelNotFound: no kernel is found, or none of the `candidates` fits it.
    """
    kernel = _still(source, known) or find_kernel(source)
    approved, missing = choose(source, kernel, candidates)
    walked = walk_kernel(source, kernel)
    memory = VirtualMemory(source, kernel, walked.leaves)
    target = Target.of(memory, approved, kernel)
    return Attached(source, kernel, approved, walked, target, missing)


def _still(source: Source, known: KernelImage | None) -> KernelImage | None:
    if known is None:
        return None
    try:
        return check_root(source, known.root_gpa, known.paging_levels)
    except KernelNotFound:
        return None


def choose(
    source: Source, kernel: KernelImage, candidates: Sequence[LinuxApproved]
) -> tuple[LinuxApproved, tuple[str, ...]]:
    """The candidate whose anchors are in the image, and the names of those that are not.

    Raises KernelNotFound.
    """
    for approved in candidates:
        missing = tuple(
            anchor.name
            for anchor in approved.anchors
            if _read(source, kernel.physical_base + anchor.offset, len(anchor.data)) != anchor.data
        )
        if len(missing) <= _ANCHORS_MISSING_MAX < len(approved.anchors):
            return approved, missing
    names = ", ".join(approved.release for approved in candidates)
    raise KernelNotFound(
        f"{source.uri}: the running kernel is none of the approved ones ({names}); "
        "approve its package"
    )


def _read(source: Source, gpa: int, length: int) -> bytes | None:
    """Bytes of physical memory; None when a page cannot be read."""
    first, last = gpa >> PAGE_SHIFT, (gpa + length - 1) >> PAGE_SHIFT
    frames = np.arange(first, last + 1, dtype=np.uint64)
    pages = np.empty((len(frames), PAGE_SIZE), dtype=np.uint8)
    if (source.read(frames, pages) != PageStatus.OK).any():
        return None
    start = gpa - (first << PAGE_SHIFT)
    return pages.reshape(-1)[start : start + length].tobytes()
