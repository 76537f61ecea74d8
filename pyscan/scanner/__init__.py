"""Sweeps: read, digest, compare with an approved configuration, tell what differs.

A sweep never decides anything: it gives counts and findings, and `policy.judge` makes a
verdict of them. It never raises for a page, and raises only SourceUnavailable when the
whole target is out of reach.
"""

from pyscan.scanner.sweep import Scanner, SuspectPage, SweepResult

__all__ = ["Scanner", "SuspectPage", "SweepResult"]
