"""Evidence: an append-only, hash-chained log per program, and its verification.

docs/spec/evidence.md gives the bytes; numbers in brackets are its clauses. A directory
holds ``log.cborseq`` (the records), ``blobs/`` (attached data, named by SHA-256) and
``writer.pub``. A record is on the disk before `append` returns, so a command that follows
it cannot destroy what it was based on.

A log proves by itself that nothing before a signature in it was changed, dropped or put
in between. That its end was cut off at an earlier signature only the other programs'
logs can show: `verify_directory` compares them.
"""

from pyscan.evidence.capture import CaptureWriter, finished_capture
from pyscan.evidence.chain import message_body
from pyscan.evidence.log import EvidenceLog
from pyscan.evidence.verify import (
    CaptureSummary,
    EvidenceSummary,
    LogSummary,
    verify_directory,
)

__all__ = [
    "CaptureSummary",
    "CaptureWriter",
    "EvidenceLog",
    "EvidenceSummary",
    "LogSummary",
    "finished_capture",
    "message_body",
    "verify_directory",
]
