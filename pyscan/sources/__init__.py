"""Ways to read a target's physical memory: one file per backend, one small interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyscan.errors import UsageError
from pyscan.sources.base import (
    NO_OFFSET,
    Frames,
    Offsets,
    Pages,
    Source,
    Statuses,
    View,
)
from pyscan.sources.file import open_file
from pyscan.sources.qemu import open_qemu
from pyscan.sources.uri import SourceUri, build_uri, parse_uri

__all__ = [
    "BACKENDS",
    "NO_OFFSET",
    "Backend",
    "Frames",
    "Offsets",
    "Pages",
    "Source",
    "Statuses",
    "View",
    "build_uri",
    "open_source",
]


@dataclass(frozen=True, slots=True)
class Backend:
    """One kind of source."""

    scheme: str
    form: str  # how its URI is written
    summary: str  # one line
    requires: str  # what it needs of the machine, one line
    open: Callable[[SourceUri], Source]


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
