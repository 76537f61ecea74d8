"""What a Linux kernel looks like in memory, free of symbols."""

from pyscan.kernel.discover import KernelImage, check_root, find_kernel
from pyscan.kernel.pages import WatchedPages, mapped_pages, place, watched_pages
from pyscan.translate import EXECUTABLE, WRITABLE

__all__ = [
    "EXECUTABLE",
    "WRITABLE",
    "KernelImage",
    "WatchedPages",
    "check_root",
    "find_kernel",
    "mapped_pages",
    "place",
    "watched_pages",
]
