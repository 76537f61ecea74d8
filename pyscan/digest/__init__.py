"""Page digests: one interface, two backends that give the same bytes.

The backend is an explicit setting (`open_digester("native")` or ``"numba"``) and is never
swapped silently.
"""

from pyscan.digest._native import NativeDigester
from pyscan.digest.base import DIGEST_SIZE, INDICES_MAX, Comparison, Digester
from pyscan.errors import UsageError

__all__ = ["DIGEST_SIZE", "INDICES_MAX", "Comparison", "Digester", "open_digester"]


def open_digester(name: str = "native") -> Digester:
    """The backend `name`. Raises UsageError when it is unknown or cannot run here."""
    if name == "native":
        return NativeDigester()
    if name != "numba":
        raise UsageError(f"digest backend {name!r} is unknown; use native or numba")
    try:
        from pyscan.digest._numba import NumbaDigester  # noqa: PLC0415 (an extra, slow to load)
    except (ImportError, RuntimeError) as error:  # no numba, or no folder for its cache
        raise UsageError(
            f"digest backend 'numba' cannot be loaded ({error}); "
            "install pyscan[numba] or use native"
        ) from error
    return NumbaDigester()
