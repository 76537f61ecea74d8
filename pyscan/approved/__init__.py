"""Approved configurations: signed documents that say what may be in a target's memory.

`file` is the way in for all kinds. Kind snapshot: `snapshot`. Kind linux: the data model in
`linux` and `unit`, their bytes in `encode`, what is refused in `check`, the file in `container`.
`envelope` and `fields` are what the kinds share.
"""

from pyscan.approved.container import save_linux
from pyscan.approved.file import load_approved, save_approved
from pyscan.approved.linux import LinuxApproved
from pyscan.approved.snapshot import Snapshot, enrol

__all__ = [
    "LinuxApproved",
    "Snapshot",
    "enrol",
    "load_approved",
    "save_approved",
    "save_linux",
]
