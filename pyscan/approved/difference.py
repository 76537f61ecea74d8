"""What differs between two approved configurations of kind *linux*, for a person to judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from pyscan.approved.encode import SITE_CLASSES
from pyscan.approved.linux import LinuxApproved
from pyscan.approved.unit import SegmentKind, Unit


@dataclass(frozen=True, slots=True)
class Contents:
    """How much an approved configuration covers, over all units."""

    units: int
    symbols: int
    exports: int
    relocations: int
    protected_bytes: Mapping[str, int]  # by segment kind
    patch_sites: Mapping[str, int]  # by class


@dataclass(frozen=True, slots=True)
class UnitDifference:
    """How a unit differs. Every text is one line; `parts` is never empty."""

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """How a second configuration differs from a first; nothing listed: it does not."""

    fields: Mapping[str, tuple[str, str]]  # first's and second's value
    added: tuple[str, ...]  # modules
    removed: tuple[str, ...]
    changed: tuple[UnitDifference, ...]  # vmlinux may be among them

    @property
    def equal(self) -> bool:
        """Whether both allow the same."""
        return not (self.fields or self.added or self.removed or self.changed)


def contents_of(
    approved: LinuxApproved,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Contents:
    """Count; loads and so checks every unit. `progress` gets (done, total) in units.

    Raises ApprovedFileError when a unit is damaged.
    """
    protected = dict.fromkeys(map(str, SegmentKind), 0)
    sites = dict.fromkeys(SITE_CLASSES, 0)
    symbols = exports = relocations = 0
    total = 1 + len(approved.modules)
    for done, unit in enumerate(_units(approved), start=1):
        for segment in unit.segments:
            protected[segment.kind.value] += segment.length
        for name in SITE_CLASSES:
            sites[name] += len(getattr(unit.sites, name))
        symbols += len(unit.symbols.offsets)
        exports += len(unit.exports)
        relocations += len(unit.relocations32) + len(unit.relocations64)
        progress(done, total)
    # Runs of nops are no sites of their own.
    del sites["alternative_runs"]
    return Contents(total, symbols, exports, relocations, protected, sites)


def compare_linux(first: LinuxApproved, second: LinuxApproved) -> Difference:
    """Compare everything; loads every unit of both. Raises ApprovedFileError."""
    changed = _compare_units(first.vmlinux, second.vmlinux)
    for name in sorted(first.modules.keys() & second.modules.keys()):
        changed += _compare_units(first.modules[name], second.modules[name])
    return Difference(
        fields=dict(_compare_fields(first, second)),
        added=tuple(sorted(second.modules.keys() - first.modules.keys())),
        removed=tuple(sorted(first.modules.keys() - second.modules.keys())),
        changed=tuple(changed),
    )


def _units(approved: LinuxApproved) -> Iterator[Unit]:
    yield approved.vmlinux
    for name in sorted(approved.modules):
        yield approved.modules[name]


def _compare_fields(
    first: LinuxApproved, second: LinuxApproved
) -> Iterator[tuple[str, tuple[str, str]]]:
    for name in ("release", "banner", "series"):
        texts = (getattr(first, name), getattr(second, name))
        if texts[0] != texts[1]:
            yield name, texts
    if first.provenance != second.provenance:
        yield "provenance", (_packages(first), _packages(second))
    if first.anchors != second.anchors:
        yield "anchors", (_anchors(first), _anchors(second))
    paths = first.offsets.keys() | second.offsets.keys()
    moved = sorted(p for p in paths if first.offsets.get(p) != second.offsets.get(p))
    if moved:
        yield "offsets", (_offsets(first.offsets, moved), _offsets(second.offsets, moved))


def _packages(approved: LinuxApproved) -> str:
    return ", ".join(f"{p.package} {p.version} {p.sha256[:16]}" for p in approved.provenance)


def _anchors(approved: LinuxApproved) -> str:
    return ", ".join(f"{a.name} at {a.offset:#x} {a.data[:8].hex()}" for a in approved.anchors)


def _offsets(offsets: Mapping[str, int], paths: list[str]) -> str:
    return ", ".join(f"{path} {offsets.get(path, 'none')}" for path in paths)


def _compare_units(first: Unit, second: Unit) -> list[UnitDifference]:
    parts = tuple(_compare_parts(first, second))
    return [UnitDifference(first.name, parts)] if parts else []


def _compare_parts(first: Unit, second: Unit) -> Iterator[str]:
    """One line for each part of a unit that differs."""
    if not np.array_equal(first.image, second.image):
        yield from _compare_images(first, second)
    for name in ("relocations32", "relocations64"):
        yield from _compare_columns(name, getattr(first, name), getattr(second, name))
    if _differ(first.symbols, second.symbols):
        mine, other = len(first.symbols.offsets), len(second.symbols.offsets)
        yield f"symbols {mine} -> {other}"
    for name in SITE_CLASSES:
        yield from _compare_columns(
            name.replace("_", " "), getattr(first.sites, name), getattr(second.sites, name)
        )
    for name in ("segments", "sections", "tables", "slots", "exports"):
        mine, other = getattr(first, name), getattr(second, name)
        if mine != other:
            yield f"{name} {len(mine)} -> {len(other)}"
    for name in ("link_address", "length", "sizes", "init_function"):
        mine, other = getattr(first, name), getattr(second, name)
        if mine != other:
            yield f"{name.replace('_', ' ')} {mine} -> {other}"


def _compare_images(first: Unit, second: Unit) -> Iterator[str]:
    """The sections whose bytes differ, or appear in one of both only."""
    mine, other = _section_bytes(first), _section_bytes(second)
    named = False
    for name in sorted(mine.keys() | other.keys()):
        left, right = mine.get(name), other.get(name)
        if left is None or right is None:
            yield f"section {name} {'added' if left is None else 'removed'}"
        elif left != right:
            yield f"section {name} differs, {len(left)} -> {len(right)} bytes"
        else:
            continue
        named = True
    if not named:
        yield f"image {len(first.image)} -> {len(second.image)} bytes, between its sections"


def _section_bytes(unit: Unit) -> dict[str, bytes]:
    """What each section holds; sections of one name are taken together."""
    content: dict[str, bytes] = {}
    for section in unit.sections:
        part = unit.image[section.offset : section.offset + section.length].tobytes()
        content[section.name] = content.get(section.name, b"") + part
    return content


def _compare_columns(name: str, first: Any, second: Any) -> Iterator[str]:
    if not np.array_equal(first, second):
        yield f"{name} {len(first)} -> {len(second)}"


def _differ(first: Any, second: Any) -> bool:
    return any(
        not np.array_equal(getattr(first, field.name), getattr(second, field.name))
        for field in fields(first)
    )
