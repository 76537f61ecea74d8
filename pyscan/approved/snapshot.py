"""Approved configuration of kind *snapshot*: the kernel pages of one boot of one target.

A snapshot is enrolled from a target that is known to be good at that moment. It holds
the SHA-256 of every executable and every read-only kernel page together with the page's
virtual address and frame, so it fits exactly one boot: after a reboot the kernel lies
elsewhere and the answer is *undecided* until it is enrolled anew.

The payload is specified in docs/spec/approved.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.approved.fields import typed
from pyscan.digest import Digester
from pyscan.errors import ApprovedFileError, SourceUnavailable, TargetUnavailable
from pyscan.kernel import EXECUTABLE, KernelImage, find_kernel, watched_pages
from pyscan.records import PAGE_SIZE, MemoryMap, MemoryRegion, PageStatus, RegionKind
from pyscan.sources import Source

DIGEST_BYTES: Final = 32
#: 4 Mi pages are 16 GiB of kernel text and read-only data: far above any real kernel.
PAGES_MAX: Final = 1 << 22
REGIONS_MAX: Final = 1 << 12
#: Pages that are read and digested at a time while enrolling (2 MiB).
CHUNK_PAGES: Final = 512
#: How often enrolment starts again when pages changed between its two passes.
SETTLE_TRIES: Final = 5


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The approved pages of one boot, as columns sorted by `addresses`.

    `addresses` (n,) uint64 virtual addresses, `frames` (n,) uint64, `flags` (n,) uint8
    (pyscan.kernel page flags), `digests` (n, 32) uint8.
    """

    created_ns: int
    source: str
    memory_map: MemoryMap
    kernel: KernelImage
    addresses: NDArray[np.uint64]
    frames: NDArray[np.uint64]
    flags: NDArray[np.uint8]
    digests: NDArray[np.uint8]

    @property
    def pages(self) -> int:
        """Number of approved pages."""
        return len(self.frames)

    def to_payload(self) -> dict[str, object]:
        """The CBOR map of docs/spec/approved.md, without the common header."""
        return {
            "created_ns": self.created_ns,
            "source": self.source,
            "regions": [[r.gpa, r.length, r.kind.value] for r in self.memory_map],
            "kernel": {
                "root": self.kernel.root_gpa,
                "levels": self.kernel.paging_levels,
                "virtual_base": self.kernel.virtual_base,
                "physical_base": self.kernel.physical_base,
                "bytes": self.kernel.image_bytes,
            },
            "digest": "sha256",
            "addresses": self.addresses.astype("<u8").tobytes(),
            "frames": self.frames.astype("<u8").tobytes(),
            "flags": self.flags.tobytes(),
            "digests": self.digests.tobytes(),
        }

    @classmethod
    def from_payload(cls, payload: Mapping[str, object]) -> Snapshot:
        """Read the map of docs/spec/approved.md. Raises ApprovedFileError."""
        if payload.get("digest") != "sha256":
            raise ApprovedFileError(f"unknown digest {payload.get('digest')!r}; sha256 is expected")
        addresses = _column(payload, "addresses")
        count = len(addresses)
        if not 0 < count <= PAGES_MAX:
            raise ApprovedFileError(f"{count} pages listed; 1 to {PAGES_MAX} are allowed")
        if np.any(addresses % np.uint64(PAGE_SIZE)) or np.any(addresses[1:] <= addresses[:-1]):
            raise ApprovedFileError("page addresses are not aligned, ascending and unique")
        frames = _column(payload, "frames")
        flags = np.frombuffer(typed(payload, "flags", bytes), dtype=np.uint8)
        digests = np.frombuffer(typed(payload, "digests", bytes), dtype=np.uint8)
        if not count == len(frames) == len(flags) or len(digests) != count * DIGEST_BYTES:
            raise ApprovedFileError("the page columns differ in length")
        if np.any(flags & ~np.uint8(EXECUTABLE)):
            raise ApprovedFileError("a page has unknown flags")
        return cls(
            created_ns=typed(payload, "created_ns", int),
            source=typed(payload, "source", str),
            memory_map=_memory_map(typed(payload, "regions", list)),
            kernel=_kernel(typed(payload, "kernel", dict)),
            addresses=addresses,
            frames=frames,
            flags=flags,
            digests=digests.reshape(count, DIGEST_BYTES),
        )


def enrol(
    source: Source,
    digester: Digester,
    created_ns: int,
    progress: Callable[[str, int, int], None] = lambda _step, _done, _total: None,
) -> Snapshot:
    """Enrol a target that is known to be good, as it is now.

    The pages are digested twice; when any differs (a kernel patches itself now and then)
    enrolment starts again, at most SETTLE_TRIES times. `progress` gets (step, done, total)
    in pages. Raises KernelNotFound, and SourceUnavailable when a page cannot be read or
    the target does not settle: a snapshot is never made of doubtful pages.
    """
    progress("find kernel", 0, 1)
    kernel = find_kernel(source)
    progress("find kernel", 1, 1)
    changed = 0
    for _ in range(SETTLE_TRIES):
        watched = watched_pages(source, kernel)
        if watched.anomalies:
            first = watched.anomalies[0]
            raise TargetUnavailable(
                f"{len(watched.anomalies)} anomalies in the kernel's page tables, first: {first}; "
                "enrol a target that is known to be good"
            )
        first_pass = _digest_all(source, digester, watched.frames, partial(progress, "digest"))
        second_pass = _digest_all(source, digester, watched.frames, partial(progress, "verify"))
        changed = int(np.any(first_pass != second_pass, axis=1).sum())
        if not changed:
            return Snapshot(
                created_ns=created_ns,
                source=source.uri,
                memory_map=source.regions(),
                kernel=kernel,
                addresses=watched.addresses,
                frames=watched.frames,
                flags=watched.flags,
                digests=first_pass,
            )
    raise SourceUnavailable(
        f"{changed} kernel pages keep changing after {SETTLE_TRIES} tries; "
        "wait until the target has finished booting and enrol again"
    )


def _digest_all(
    source: Source,
    digester: Digester,
    frames: NDArray[np.uint64],
    progress: Callable[[int, int], None],
) -> NDArray[np.uint8]:
    digests = np.empty((len(frames), DIGEST_BYTES), dtype=np.uint8)
    buffer = np.empty((CHUNK_PAGES, PAGE_SIZE), dtype=np.uint8)
    for start in range(0, len(frames), CHUNK_PAGES):
        part = frames[start : start + CHUNK_PAGES]
        pages = buffer[: len(part)]
        statuses = source.read(part, pages)
        failed = np.flatnonzero(statuses)
        if len(failed):
            status = PageStatus(int(statuses[failed[0]]))
            raise SourceUnavailable(
                f"kernel page at frame {int(part[failed[0]]):#x} cannot be read ({status.name}); "
                "enrolment needs every page"
            )
        digests[start : start + len(part)] = digester.hash_pages(pages)[0]
        progress(start + len(part), len(frames))
    return digests


def _column(payload: Mapping[str, object], key: str) -> NDArray[np.uint64]:
    data = typed(payload, key, bytes)
    if len(data) % 8:
        raise ApprovedFileError(f"field {key!r} is not a list of 64-bit values")
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)


def _memory_map(rows: list[object]) -> MemoryMap:
    if len(rows) > REGIONS_MAX:
        raise ApprovedFileError(f"{len(rows)} memory regions; at most {REGIONS_MAX} are allowed")
    try:
        return MemoryMap.of(_region(row) for row in rows)
    except (TypeError, ValueError) as error:
        raise ApprovedFileError(f"the memory map cannot be read: {error}") from error


def _region(row: object) -> MemoryRegion:
    if not isinstance(row, list) or len(row) != 3:
        raise ValueError(f"{row!r} is not a region")
    gpa, length, kind = row
    if type(gpa) is not int or type(length) is not int or gpa + length > 1 << 64:
        raise ValueError(f"{row!r} is not a region")
    return MemoryRegion(gpa, length, RegionKind(kind))


def _kernel(fields: dict[str, object]) -> KernelImage:
    levels = typed(fields, "levels", int)
    if levels not in (4, 5):
        raise ApprovedFileError(f"{levels} paging levels; 4 or 5 are expected")
    return KernelImage(
        root_gpa=typed(fields, "root", int),
        paging_levels=levels,
        virtual_base=typed(fields, "virtual_base", int),
        physical_base=typed(fields, "physical_base", int),
        image_bytes=typed(fields, "bytes", int),
    )
