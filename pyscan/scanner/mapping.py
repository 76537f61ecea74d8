"""Do the approved addresses still lead where they led?

Digests alone would go on approving the old frames after the kernel was moved away from
under them, so the kernel's page tables are walked and compared with what was approved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.approved import Snapshot
from pyscan.errors import KernelNotFound
from pyscan.ids import new_id
from pyscan.kernel import (
    EXECUTABLE,
    WRITABLE,
    KernelImage,
    WatchedPages,
    check_root,
    mapped_pages,
    place,
)
from pyscan.records import PAGE_SIZE, Finding, FindingKind, PageStatus
from pyscan.sources import Source
from pyscan.translate import Anomaly, AnomalyKind

#: Findings that one sweep lists; totals count them all.
FINDINGS_MAX: Final = 32
TABLES_PLACE: Final = "kernel page tables"


@dataclass(frozen=True, slots=True)
class MappingCheck:
    """What a walk of the kernel's page tables found.

    `unlisted_executable` counts executable kernel pages that the approved configuration
    does not list (a snapshot cannot judge them); None when the tables were not walked.
    """

    findings: tuple[Finding, ...]
    findings_total: int
    unlisted_executable: int | None


def check_mapping(sweep_id: str, snapshot: Snapshot, source: Source) -> MappingCheck:
    """Findings for approved addresses that lead elsewhere, lost a protection, or are gone.

    When most of them are, or when the tables are not those of the running kernel any more
    (an old kernel's image may survive a reboot intact), one finding says so. It stands for
    all that are gone when most are, and never for one that leads elsewhere: whoever leads
    most of a kernel to copies of its pages must not pass for a reboot. Every anomaly of
    the tables (writable and executable, wild pointers, hostile shapes) is a finding too:
    none was there when the snapshot was enrolled. What hangs below a table that cannot be
    read is unreadable, not gone.
    """
    kernel = snapshot.kernel
    found = mapped_pages(source, kernel)
    at = np.minimum(np.searchsorted(found.addresses, snapshot.addresses), max(len(found) - 1, 0))
    present = np.zeros(snapshot.pages, dtype=bool)
    same = present
    if len(found):
        present = found.addresses[at] == snapshot.addresses
        same = present & (found.frames[at] == snapshot.frames) & (found.flags[at] == snapshot.flags)
    anomalies = [_anomaly(sweep_id, anomaly) for anomaly in found.anomalies]
    unread = [finding for finding in anomalies if finding.kind is FindingKind.UNREADABLE]
    wrong = [finding for finding in anomalies if finding.kind is not FindingKind.UNREADABLE]
    moved = np.flatnonzero(present & ~same if unread else ~same)
    if 2 * len(moved) > snapshot.pages:
        problem: str | None = f"{len(moved)} of them lead elsewhere or nowhere"
        moved = np.flatnonzero(present & ~same)
    else:
        problem = _not_running(source, kernel)
    attach = [] if problem is None else [_attach(sweep_id, snapshot, problem)]
    mappings = [
        _mapping(sweep_id, snapshot, index, _actual(found, int(at[index]), present[index]))
        for index in moved[:FINDINGS_MAX].tolist()
    ]
    return MappingCheck(
        # By weight: what is listed decides, and gaps must not crowd facts out.
        findings=tuple((*attach, *mappings, *wrong, *unread)[:FINDINGS_MAX]),
        findings_total=len(attach) + len(moved) + found.anomalies_total,
        unlisted_executable=_unlisted(snapshot, found),
    )


def _not_running(source: Source, kernel: KernelImage) -> str | None:
    """Why the approved tables are not those of a running kernel; None: they are."""
    try:
        check_root(source, kernel.root_gpa, kernel.paging_levels)
    except KernelNotFound as error:
        return str(error)
    return None


def _unlisted(snapshot: Snapshot, found: WatchedPages) -> int:
    executable: NDArray[np.bool_] = (found.flags & EXECUTABLE) != 0
    return int((~np.isin(found.addresses[executable], snapshot.addresses)).sum())


def _actual(found: WatchedPages, row: int, present: bool) -> str:
    if not present:
        return "not mapped as executable or read-only"
    return _leads_to(int(found.frames[row]), int(found.flags[row]))


def _leads_to(frame: int, flags: int) -> str:
    names = ((EXECUTABLE, "executable"), (WRITABLE, "writable"))
    what = " ".join(name for bit, name in names if flags & bit)
    return f"frame {frame:#x} {what or 'read-only'}"


def _mapping(sweep_id: str, snapshot: Snapshot, index: int, actual: str) -> Finding:
    address, flags = int(snapshot.addresses[index]), int(snapshot.flags[index])
    frame = int(snapshot.frames[index])
    return Finding(
        id=new_id(),
        sweep=sweep_id,
        kind=FindingKind.MAPPING,
        status=PageStatus.OK,
        address=address,
        frame=frame,
        place=place(address, flags, snapshot.kernel),
        expected=_leads_to(frame, flags),
        actual=actual,
    )


def _anomaly(sweep_id: str, anomaly: Anomaly) -> Finding:
    unread = anomaly.kind is AnomalyKind.TABLE_UNREADABLE
    return Finding(
        id=new_id(),
        sweep=sweep_id,
        kind=FindingKind.UNREADABLE if unread else FindingKind.MAPPING,
        status=PageStatus.LINK_DOWN if unread else PageStatus.OK,
        address=anomaly.address,
        frame=anomaly.gpa // PAGE_SIZE,
        place=TABLES_PLACE,
        expected="no anomaly",
        actual=str(anomaly.kind),
    )


def _attach(sweep_id: str, snapshot: Snapshot, actual: str) -> Finding:
    kernel = snapshot.kernel
    return Finding(
        id=new_id(),
        sweep=sweep_id,
        kind=FindingKind.ATTACH,
        status=PageStatus.OK,
        address=kernel.virtual_base,
        frame=kernel.root_gpa // PAGE_SIZE,
        place=TABLES_PLACE,
        expected=f"{kernel.paging_levels}-level tables that map {snapshot.pages} approved pages",
        actual=actual,
    )
