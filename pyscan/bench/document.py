"""What a run of the benchmarks leaves behind: one JSON document, checked when read back.

Rates are in GB/s (10^9 bytes of watched memory a second), times in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from pyscan.errors import FileFormatError

VERSION: Final = 1
#: A full run is a few hundred kilobytes.
DOCUMENT_BYTES_MAX: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of the rounds."""

    median: float
    min: float
    max: float


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the figures come from."""

    cpu: str
    flags: list[str]  # the instruction sets that matter here, of those that the CPU has
    cores: int
    memory_bytes: int
    cache_bytes: int  # last level
    kernel: str
    hypervisor: str  # "" on bare metal or where it cannot be told
    governor: str  # "" where there is none, as in most virtual machines
    huge_pages: str  # transparent huge pages: anonymous and shared memory
    python: str
    versions: dict[str, str]
    load: float  # one-minute load average at the start


@dataclass(frozen=True, slots=True)
class Result:
    """One contender over one shape. `limit` is its share of the read limit, round by round."""

    shape: str
    contender: str
    form: str
    threads: int
    pages: int
    rounds: int
    gb_per_s: Spread
    pages_per_s: float
    ms: Spread  # one sweep over the whole shape
    limit: Spread | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast as `against` a contender is, round by round."""

    shape: str
    threads: int
    contender: str
    against: str
    value: Spread


@dataclass(frozen=True, slots=True)
class Rate:
    """Something that is counted by itself: so many a second."""

    name: str
    contender: str
    per_s: Spread


@dataclass(frozen=True, slots=True)
class Absent:
    """A contender or a shape that could not run here, and why."""

    shape: str
    contender: str
    reason: str


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure that has to be reached; `met` is None when it was not measured."""

    name: str
    wanted: str
    got: str
    met: bool | None


@dataclass(frozen=True, slots=True)
class Point:
    """Cost at one size."""

    x: float
    ms: Spread


@dataclass(frozen=True, slots=True)
class Series:
    """Cost against size, with the straight line that fits it best."""

    name: str
    unit: str  # of x
    contender: str
    threads: int
    points: list[Point]
    ms_per_unit: float
    ms_at_zero: float
    r_squared: float
    residual_max: float  # greatest distance from the line, as a share of the measured cost


@dataclass(frozen=True, slots=True)
class Latency:
    """Times from a tampering to what followed, one a trial, ascending."""

    name: str
    interval_ms: float
    ms: list[float]

    def quantile(self, share: float) -> float:
        """The time that this share of the trials did not exceed."""
        return self.ms[min(len(self.ms) - 1, int(share * len(self.ms)))]


@dataclass(frozen=True, slots=True)
class Life:
    """How often a modification that lives `lives_ms` was seen, and what theory says."""

    lives_ms: float
    trials: int
    found: int  # a finding
    seen: int  # a finding, or noticed and gone when it was read again
    found_theory: float
    seen_theory: float


@dataclass(frozen=True, slots=True)
class Detection:
    """Probability of detection against the lifetime of a modification.

    `interval_ms` and `sweep_ms` are the mean interval and duration of the sweeps, as measured.
    """

    interval_ms: float
    sweep_ms: float
    pages: int
    lives: list[Life]


@dataclass(frozen=True, slots=True)
class Document:
    """A whole run."""

    machine: Machine
    started: str
    seconds: float
    quick: bool
    seed: int
    note: str
    results: list[Result]
    ratios: list[Ratio]
    rates: list[Rate]
    targets: list[Goal]
    series: list[Series]
    latency: list[Latency]
    detection: list[Detection]
    absent: list[Absent]
    version: int = VERSION

    def result(self, shape: str, contender: str, threads: int) -> Result | None:
        """One result, or None if it was not measured."""
        for each in self.results:
            if (each.shape, each.contender, each.threads) == (shape, contender, threads):
                return each
        return None


def save(document: Document, path: Path) -> None:
    """Write the document. Raises FileFormatError where that fails."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
    except OSError as error:
        raise FileFormatError(
            f"cannot write {path}: {error.strerror}; choose another file for --json"
        ) from error


def load(path: Path) -> Document:
    """Read a document back. Raises FileFormatError for what is not one."""
    try:
        with path.open("rb") as file:
            data = file.read(DOCUMENT_BYTES_MAX + 1)
    except OSError as error:
        raise FileFormatError(
            f"cannot read {path}: {error.strerror}; give a file that --json wrote"
        ) from error
    if len(data) > DOCUMENT_BYTES_MAX:
        raise FileFormatError(f"{path} is larger than any benchmark document; check the name")
    try:
        document = msgspec.json.decode(data, type=Document)
    except msgspec.DecodeError as error:
        raise FileFormatError(
            f"{path} is no benchmark document ({error}); give a file that --json wrote"
        ) from error
    if document.version != VERSION:
        raise FileFormatError(
            f"{path} has version {document.version}, {VERSION} is read; measure again"
        )
    return document
