"""Keys of the keyed digests: drawn, held and wiped by the native core.

A key never is a Python object: the core draws the master secret, expands it with SHAKE-256
and keeps it in locked memory that is left out of core dumps. Python holds a handle that
shows nothing, cannot be copied or pickled, and wipes the key when it is closed, collected, or
when the interpreter ends.
"""

from __future__ import annotations

import os
import weakref
from types import TracebackType
from typing import Any, Final, NoReturn, Self

from pyscan.digest._core import ffi, lib
from pyscan.digest.base import digest_kind
from pyscan.errors import InternalError, UsageError

SECRET_BYTES: Final = 32
_IDS: Final[dict[str, int]] = {
    "nh4aes": lib.PS_DIGEST_NH4AES,
    "gf128aes": lib.PS_DIGEST_GF128AES,
}


class DigestKey:
    """The key of one keyed digest, for as long as this object lives.

    Digests made with it are worth nothing without it: a new start has a new key, and
    baselines are made anew. Close it only when no call uses it any more.
    """

    __slots__ = ("__weakref__", "_digest", "_pointer", "_release")

    def __init__(self, digest: str, secret: bytes | None) -> None:
        if not digest_kind(digest).keyed:
            raise UsageError(f"digest {digest!r} takes no key; open it without one")
        if secret is not None and len(secret) != SECRET_BYTES:
            raise ValueError(f"secret: {len(secret)} bytes given, {SECRET_BYTES} needed")
        pointer = lib.ps_key_new(_IDS[digest], ffi.NULL if secret is None else secret)
        if pointer == ffi.NULL:
            raise InternalError(
                f"no locked memory for a digest key ({os.strerror(ffi.errno)}); "
                "raise the limit of locked memory (ulimit -l) to 64 KiB or more"
            )
        self._digest = digest
        self._pointer = pointer
        self._release = weakref.finalize(self, lib.ps_key_free, pointer)

    @classmethod
    def generate(cls, digest: str) -> Self:
        """A new key from a master secret that the operating system draws.

        Raises UsageError when `digest` takes no key, InternalError when the memory of the
        key cannot be locked.
        """
        return cls(digest, None)

    @classmethod
    def from_secret(cls, digest: str, secret: bytes) -> Self:
        """The key of a known master secret of SECRET_BYTES: for test vectors."""
        return cls(digest, secret)

    @property
    def digest(self) -> str:
        """The digest that this key is for."""
        return self._digest

    @property
    def pointer(self) -> Any:
        """The key as the native core takes it. Raises ValueError after `close`."""
        if not self._release.alive:
            raise ValueError("key: it is closed")
        return self._pointer

    def close(self) -> None:
        """Wipe the key. Every later use raises ValueError; closing twice is allowed."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<DigestKey of {self._digest}>"

    def __reduce__(self) -> NoReturn:
        """Neither copy nor pickle takes a key out of its memory."""
        raise TypeError("a DigestKey cannot be copied or pickled")
