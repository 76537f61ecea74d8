"""From a validation to what sweeps compare: the legal content of every protected page."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyscan.approved import Snapshot
from pyscan.digest import Digester
from pyscan.kernel import EXECUTABLE
from pyscan.records import PAGE_SHIFT, PAGE_SIZE
from pyscan.validate.validation import Validation

_CHUNK_PAGES: Final = 1024


def baseline(validation: Validation, digester: Digester, created_ns: int) -> Snapshot:
    """A snapshot of what the pages of this boot *may* hold, whatever they do hold.

    Where memory differed from the package, the digest is that of the legal bytes: a sweep
    goes on finding the difference. Pages that lead to no memory are left out; they are
    findings of the validation.
    """
    addresses, digests, flags = [], [], []
    for extent in validation.extents:
        pages = extent.legal.reshape(-1, PAGE_SIZE)
        start = np.uint64(extent.placed.address + extent.offset)
        steps = np.arange(len(pages), dtype=np.uint64) << np.uint64(PAGE_SHIFT)
        addresses.append(start + steps)
        flags.append(np.full(len(pages), EXECUTABLE if extent.executable else 0, dtype=np.uint8))
        digests.append(_digests(pages, digester))
    all_addresses = np.concatenate(addresses)
    order = np.argsort(all_addresses)
    frames, mapped = validation.target.memory.frames(all_addresses)
    order = order[mapped[order]]
    source = validation.attached.source
    return Snapshot(
        created_ns=created_ns,
        source=source.uri,
        memory_map=source.regions(),
        kernel=validation.attached.kernel,
        addresses=all_addresses[order],
        frames=frames[order],
        flags=np.concatenate(flags)[order],
        digests=np.concatenate(digests)[order],
    )


def _digests(pages: NDArray[np.uint8], digester: Digester) -> NDArray[np.uint8]:
    parts = [
        digester.hash_pages(np.ascontiguousarray(pages[at : at + _CHUNK_PAGES]))[0]
        for at in range(0, len(pages), _CHUNK_PAGES)
    ]
    return np.concatenate(parts) if parts else np.empty((0, 32), dtype=np.uint8)
