"""Address translation: page-table formats as data, and bounded walks over them."""

from pyscan.translate.paging import X86_64, X86_64_4_LEVEL, X86_64_5_LEVEL, PagingFormat
from pyscan.translate.walk import (
    EXECUTABLE,
    USER,
    WRITABLE,
    Anomaly,
    AnomalyKind,
    Leaves,
    Span,
    Translation,
    WalkLimits,
    WalkResult,
    translate,
    walk,
)

__all__ = [
    "EXECUTABLE",
    "USER",
    "WRITABLE",
    "X86_64",
    "X86_64_4_LEVEL",
    "X86_64_5_LEVEL",
    "Anomaly",
    "AnomalyKind",
    "Leaves",
    "PagingFormat",
    "Span",
    "Translation",
    "WalkLimits",
    "WalkResult",
    "translate",
    "walk",
]
