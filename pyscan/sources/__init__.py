"""Ways to read a target's physical memory: one file per backend, one small interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyscan.errors import UsageError
from pyscan.sources.base import (
    NO_OFFSET,
    Digested,
    Digesting,
    Frames,
    Offsets,
    Pages,
    Source,
    Statuses,
    View,
)
from pyscan.sources.card import open_card, probe_card
from pyscan.sources.edu import open_edu
from pyscan.sources.file import open_file
from pyscan.sources.leechcore import open_leechcore, probe_leechcore
from pyscan.sources.nvme import open_nvme_dma
from pyscan.sources.probe import probe_qemu
from pyscan.sources.qemu import open_qemu
from pyscan.sources.uri import SourceUri, build_uri, parse_uri
from pyscan.sources.xdma import open_xdma, probe_xdma

__all__ = [
    "BACKENDS",
    "NO_OFFSET",
    "Backend",
    "Digested",
    "Digesting",
    "Frames",
    "Offsets",
    "Pages",
    "Source",
    "Statuses",
    "View",
    "build_uri",
    "open_source",
]


def _nothing_to_find() -> str:
    return "nothing to look for"


@dataclass(frozen=True, slots=True)
class Backend:
    """One kind of source."""

    scheme: str
    form: str  # how its URI is written
    summary: str  # one line
    requires: str  # what it needs of the machine, one line
    open: Callable[[SourceUri], Source]
    # What of it is on this machine, one line; bounded, never raises.
    probe: Callable[[], str] = _nothing_to_find


BACKENDS: tuple[Backend, ...] = (
    Backend(
        scheme="file",
        form="file:PATH?machine=q35|pc&size=SIZE or file:PATH?map=FILE [&access=map|pread]",
        summary="a RAM file or a raw memory image",
        requires="read access to the file",
        open=open_file,
    ),
    Backend(
        scheme="qemu",
        form="qemu:QMP-SOCKET",
        summary="a running QEMU, which is asked for its RAM file and memory map",
        requires="a free QMP socket, RAM in a shared file (memory-backend-file,share=on)",
        open=open_qemu,
        probe=probe_qemu,
    ),
    Backend(
        scheme="nvme-dma",
        form=(
            "nvme-dma:QTEST-SOCKET?memory=FILE&landing=FILE&machine=q35|pc&size=SIZE or &map=FILE "
            "[&device=SLOT&card=SLOT]"
        ),
        summary="a server's memory by DMA through an NVMe controller on its bus",
        requires="a QEMU with -qtest, ivshmem-plain (memory=) and nvme (landing=) on its bus",
        open=open_nvme_dma,
        probe=probe_qemu,
    ),
    Backend(
        scheme="edu",
        form=(
            "edu:QTEST-SOCKET?memory=FILE&machine=q35|pc&size=SIZE or &map=FILE "
            "[&device=SLOT&card=SLOT]"
        ),
        summary="the same by QEMU's edu device, two pages a second: for conformance",
        requires="a QEMU with -qtest, ivshmem-plain (memory=) and edu on its bus",
        open=open_edu,
        probe=probe_qemu,
    ),
    Backend(
        scheme="card",
        form="card:MAILBOX?machine=q35|pc&size=SIZE or card:MAILBOX?map=FILE",
        summary="a monitoring card that reads and digests the memory by itself",
        requires="the mailbox's file, or the BAR's resource file in /sys/bus/pci/devices",
        open=open_card,
        probe=probe_card,
    ),
    Backend(
        scheme="xdma",
        form=(
            "xdma:/dev/xdma0?map=FILE or xdma:/dev/xdma0?machine=q35|pc&size=SIZE[&base=AXI] "
            "[&channels=N] [&user=REGISTER]"
        ),
        summary="an AMD/Xilinx XDMA card that maps the target's memory into its AXI space",
        requires="AMD's driver (dma_ip_drivers), read access to its device nodes",
        open=open_xdma,
        probe=probe_xdma,
    ),
    Backend(
        scheme="leechcore",
        form=(
            "leechcore:file:///DUMP or leechcore:DEVICE?machine=q35|pc&size=SIZE "
            "or leechcore:DEVICE?map=FILE"
        ),
        summary="PCILeech hardware or a memory dump, through LeechCore",
        requires="the package leechcorepyc (pyscan[leechcore])",
        open=open_leechcore,
        probe=probe_leechcore,
    ),
)


def open_source(uri: str) -> Source:
    """Open the source that `uri` names.

    Raises UsageError for a wrong URI, FileFormatError for a file that does not fit it, and
    SourceUnavailable when the target is out of reach. Call it from a thread without a
    running event loop.
    """
    parsed = parse_uri(uri)
    for backend in BACKENDS:
        if backend.scheme == parsed.scheme:
            return backend.open(parsed)
    known = ", ".join(backend.scheme for backend in BACKENDS)
    raise UsageError(
        f"{uri}: unknown kind of source {parsed.scheme!r}; known are {known} ('pyscan sources')"
    )
