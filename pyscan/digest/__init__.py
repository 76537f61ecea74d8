"""Page digests: one interface, two backends that give the same bytes.

Backend and digest are explicit settings (`open_digester("native", "nh4aes", key)`) and are
never swapped silently.
"""

from pyscan.digest._native import (
    FORM_VARIABLE,
    NativeDigester,
    ReadLimit,
    WatchList,
    available_forms,
)
from pyscan.digest.base import (
    DIGESTS,
    INDICES_MAX,
    THREADS_MAX,
    Comparison,
    Digester,
    DigestKind,
)
from pyscan.digest.copied import CopiedSweep
from pyscan.digest.key import DigestKey
from pyscan.errors import UsageError

#: Names that `open_digester` knows.
BACKENDS = ("native", "numba")

__all__ = [
    "BACKENDS",
    "DIGESTS",
    "FORM_VARIABLE",
    "INDICES_MAX",
    "THREADS_MAX",
    "Comparison",
    "CopiedSweep",
    "DigestKey",
    "DigestKind",
    "Digester",
    "ReadLimit",
    "WatchList",
    "available_forms",
    "open_digester",
]


def open_digester(
    name: str = "native",
    digest: str = "sha256",
    key: DigestKey | None = None,
    threads: int = 1,
) -> Digester:
    """The backend `name` for `digest`, on so many threads.

    A keyed digest takes a `key` of its own and the others take none. Raises UsageError when
    a name is unknown, when the backend or the digest cannot run here, or when the key or
    the number of threads does not fit.
    """
    if name == "native":
        return NativeDigester(digest, key, threads)
    if name != "numba":
        raise UsageError(f"digest backend {name!r} is unknown; use native or numba")
    try:
        from pyscan.digest._numba import NumbaDigester  # noqa: PLC0415 (an extra, slow to load)
    except (ImportError, RuntimeError) as error:  # no numba, or no folder for its cache
        raise UsageError(
            f"digest backend 'numba' cannot be loaded ({error}); "
            "install pyscan[numba] or use native"
        ) from error
    return NumbaDigester(digest, key, threads)
