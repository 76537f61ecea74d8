"""Sweeps: read, digest, compare with an approved configuration, tell what differs.

A sweep never decides anything: it gives counts and findings, and `policy.judge` makes a
verdict of them. It never raises for a page, and raises only TargetUnavailable when the
whole target is out of reach or cannot be understood.
"""

from pyscan.scanner.kernel import KernelReport, KernelScanner
from pyscan.scanner.open import Sweeper, SweepOptions, check_approved, open_scanner
from pyscan.scanner.sweep import Scanner, SuspectPage, SweepResult

__all__ = [
    "KernelReport",
    "KernelScanner",
    "Scanner",
    "SuspectPage",
    "SweepOptions",
    "SweepResult",
    "Sweeper",
    "check_approved",
    "open_scanner",
]
