"""All errors that pyscan raises on purpose, and the exit status each leads to.

    PyscanError
    |-- UsageError            wrong arguments, URI or machine type           exit 2
    |   `-- ConfigError       a configuration file, with file and line       exit 2
    |-- FileFormatError       a damaged, foreign or unsigned file            exit 2
    |   |-- ApprovedFileError
    |   |-- PackageError
    |   `-- EvidenceError
    |-- SignatureInvalid      a COSE message that does not verify            exit 2
    |-- Rejected              a message that is refused, with a reason code  exit 2
    |-- TargetUnavailable     the target cannot be reached or understood     exit 3
    |   |-- SourceUnavailable
    |   `-- KernelNotFound
    |-- TransportError        the broker is down or refuses                  exit 4
    |-- StoreUnavailable      the control's database server is away          exit 4
    |-- DriverError           a hypervisor did not do what it was told       exit 4
    |-- LabError              the laboratory (demo, tests) did not come up   exit 4
    `-- InternalError         a broken promise inside pyscan                 exit 4

The text of an error is one line: what happened, to what, and what to do next. No
traceback reaches an operator.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path

from pyscan.records import Command


class ExitStatus(IntEnum):
    """Exit status of every pyscan command."""

    APPROVED = 0
    UNAPPROVED = 1
    USAGE = 2
    UNDECIDED = 3
    FAILED = 4


class PyscanError(Exception):
    """Base of all errors that pyscan raises on purpose."""

    exit_status = ExitStatus.FAILED


class UsageError(PyscanError):
    """Wrong arguments, a wrong source URI, an unknown machine type."""

    exit_status = ExitStatus.USAGE


class ConfigError(UsageError):
    """A configuration file that cannot be used."""

    def __init__(self, path: Path, line: int | None, message: str) -> None:
        where = f"{path}:{line}" if line else f"{path}"
        super().__init__(f"{where}: {message}")
        self.path = path
        self.line = line


class FileFormatError(PyscanError):
    """A file that is damaged, foreign, unsigned or of another version."""

    exit_status = ExitStatus.USAGE


class ApprovedFileError(FileFormatError):
    """An approved configuration that cannot be trusted or read."""


class PackageError(FileFormatError):
    """A kernel package, or a file in it, that is damaged, foreign or of an unknown series."""


class EvidenceError(FileFormatError):
    """An evidence log that is damaged, edited or incomplete."""


class SignatureInvalid(PyscanError):
    """A COSE message that does not verify; `reason` is a code from docs/spec/wire.md."""

    exit_status = ExitStatus.USAGE

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Rejected(PyscanError):
    """A message that is refused; `reason` is a code from docs/spec/wire.md.

    `command` is the refused command once its signature has verified, so that the refusal
    can be reported; None while nothing in the message can be believed.
    """

    exit_status = ExitStatus.USAGE

    def __init__(self, reason: str, message: str, command: Command | None = None) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.command = command


class TargetUnavailable(PyscanError):
    """The target cannot be reached or understood: the verdict is undecided."""

    exit_status = ExitStatus.UNDECIDED


class SourceUnavailable(TargetUnavailable):
    """The way to the target's memory is not there (dead socket, vanished file, link down)."""


class KernelNotFound(TargetUnavailable):
    """No kernel, or no single kernel, could be found in the target's memory."""


class KernelStarting(TargetUnavailable):
    """The kernel is not up yet; what it holds says nothing before it has protected itself."""


class TransportError(PyscanError):
    """The broker is down, refuses, or lost the connection."""


class StoreUnavailable(PyscanError):
    """The control's database server is away or busy; what was asked of it may be tried again."""


class DriverError(PyscanError):
    """A hypervisor did not do what it was told; `reason` is a code from docs/spec/wire.md."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class LabError(PyscanError):
    """The laboratory did not come up or did not do what it was told: no word about a target."""


class InternalError(PyscanError):
    """A broken promise inside pyscan, such as a negative status of the native core."""
