"""Approved configuration of kind *linux*: what a kernel package allows in memory.

It is compiled from the distribution's package alone (`pyscan.compile`) and fits every boot of
that kernel on every machine. The file is specified in docs/spec/approved.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pyscan.approved.unit import Unit


@dataclass(frozen=True, slots=True)
class Provenance:
    """One package that an approved configuration was compiled from."""

    package: str  # "linux-image-6.1.0-56-cloud-amd64"
    version: str  # "6.1.192-2"
    architecture: str  # "amd64"
    sha256: str  # of the .deb; of the sorted list of file digests for a directory


@dataclass(frozen=True, slots=True)
class Anchor:
    """Bytes of the kernel that nothing ever patches, by their place in the image."""

    name: str
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True, eq=False)
class LinuxApproved:
    """Everything that is known of one build of a kernel and its modules.

    `offsets` holds type layouts by path ("task_struct.mm": offset in bytes, "module": size
    in bytes). `modules` maps module names (with underscores, as the kernel has them) to
    units, which are loaded when they are first asked for.
    """

    release: str  # "6.1.0-56-cloud-amd64"
    banner: str  # linux_banner, without its newline: names compiler and build
    series: str  # "6.1": which tables of formats it was compiled with
    provenance: tuple[Provenance, ...]
    anchors: tuple[Anchor, ...]  # the first is linux_banner
    offsets: Mapping[str, int]
    vmlinux: Unit
    modules: Mapping[str, Unit]
