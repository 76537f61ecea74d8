"""Approved configurations: signed documents that say what may be in a target's memory.

One module per kind; `file` holds the envelope that all kinds share.
"""

from pyscan.approved.file import load_approved, save_approved
from pyscan.approved.snapshot import Snapshot, enrol

__all__ = ["Snapshot", "enrol", "load_approved", "save_approved"]
