"""Where the digests of a target's pages are made: here, or by a source that does it itself.

What compares them (compare.py) does not see the difference. Digests that are made elsewhere
come with the name of the key, because they are made under another one after a restart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pyscan.digest import DIGESTS, Comparison, CopiedSweep, Digester
from pyscan.records import PAGE_SIZE, PageStatus
from pyscan.sources import Digesting, Frames, Source, Statuses

#: Pages of one copied-in batch (256 KiB, held for each target).
CHUNK_PAGES: Final = 64

Digests = NDArray[np.uint8]  # shape (n, size)

#: What a source that digests by itself is asked for.
_EXACT: Final = "sha256"
_KEYED: Final = "nh4aes"

#: The one key that this program has for its own digests.
_OWN_KEY: Final = 0


@dataclass(frozen=True, slots=True, eq=False)
class Learnt:
    """Both digests of the pages at `part`, each pair made of the same bytes."""

    part: slice
    statuses: Statuses
    exact: Digests
    keyed: Digests
    key: int


class ExactDigests(Protocol):
    """Makes digests by SHA-256."""

    def compare(self, frames: Frames, expected: Digests, listed_max: int) -> Comparison:
        """Hold pages against `expected`, and list at most so many that differ."""

    def close(self) -> None:
        """Release what is held, but not the source. Idempotent."""


class KeyedDigests(Protocol):
    """Makes keyed digests, and exact ones of the same bytes."""

    @property
    def size(self) -> int:
        """Bytes of a keyed digest."""

    def compare(self, frames: Frames, expected: Digests) -> tuple[Comparison, int]:
        """Hold pages against `expected`, and list all that differ; also names the key.

        Of another key than that of `expected`, the comparison says nothing.
        """

    def learn(self, frames: Frames) -> Iterator[Learnt]:
        """Both digests of all pages, part by part."""

    def close(self) -> None:
        """Release what is held, but not the source. Idempotent."""


class ExactHere(ExactDigests):
    """Pages are read, or seen through the source's view, and digested by this program."""

    def __init__(self, source: Source, digester: Digester) -> None:
        self._hands = _Hands(source, digester)

    def compare(self, frames: Frames, expected: Digests, listed_max: int) -> Comparison:
        """See `ExactDigests.compare`."""
        return self._hands.compare(frames, expected, listed_max)

    def close(self) -> None:
        """See `ExactDigests.close`."""
        self._hands.close()


class KeyedHere(KeyedDigests):
    """As `ExactHere`, by a keyed digest."""

    def __init__(self, source: Source, exact: Digester, keyed: Digester) -> None:
        self._source = source
        self._exact = exact
        self._keyed = keyed
        self._hands = _Hands(source, keyed)
        self._buffer = np.empty((CHUNK_PAGES, PAGE_SIZE), dtype=np.uint8)

    @property
    def size(self) -> int:
        """See `KeyedDigests.size`."""
        return self._keyed.digest_bytes

    def compare(self, frames: Frames, expected: Digests) -> tuple[Comparison, int]:
        """See `KeyedDigests.compare`."""
        return self._hands.compare(frames, expected, len(frames)), _OWN_KEY

    def learn(self, frames: Frames) -> Iterator[Learnt]:
        """See `KeyedDigests.learn`."""
        for start in range(0, len(frames), CHUNK_PAGES):
            part = slice(start, min(start + CHUNK_PAGES, len(frames)))
            pages = self._buffer[: part.stop - start]
            statuses = self._source.read(frames[part], pages)
            exact = self._exact.hash_pages(pages)[0]
            keyed = self._keyed.hash_pages(pages, frames=frames[part])[0]
            yield Learnt(part, statuses, exact, keyed, _OWN_KEY)

    def close(self) -> None:
        """See `KeyedDigests.close`."""
        self._hands.close()


class ExactThere(ExactDigests):
    """The source digests its pages by itself."""

    def __init__(self, source: Digesting) -> None:
        self._source = source

    def compare(self, frames: Frames, expected: Digests, listed_max: int) -> Comparison:
        """See `ExactDigests.compare`."""
        made = self._source.digest_pages(frames, (_EXACT,))
        return comparison(made.statuses, differ(made.digests[0], expected), listed_max)

    def close(self) -> None:
        """Nothing is held."""


class KeyedThere(KeyedDigests):
    """As `ExactThere`, under the source's own key, which it does not tell."""

    size: Final = DIGESTS[_KEYED].size

    def __init__(self, source: Digesting) -> None:
        self._source = source

    def compare(self, frames: Frames, expected: Digests) -> tuple[Comparison, int]:
        """See `KeyedDigests.compare`."""
        made = self._source.digest_pages(frames, (_KEYED,))
        different = differ(made.digests[0], expected)
        return comparison(made.statuses, different, len(frames)), made.key

    def learn(self, frames: Frames) -> Iterator[Learnt]:
        """See `KeyedDigests.learn`."""
        made = self._source.digest_pages(frames, (_EXACT, _KEYED))
        exact, keyed = made.digests
        yield Learnt(slice(0, len(frames)), made.statuses, exact, keyed, made.key)

    def close(self) -> None:
        """Nothing is held."""


class _Hands:
    """Compares by one digester: zero-copy where the source has a view, else copied in."""

    def __init__(self, source: Source, digester: Digester) -> None:
        self._source = source
        self._digester = digester
        self._copied = CopiedSweep(digester, source.read)

    def compare(self, frames: Frames, expected: Digests, listed_max: int) -> Comparison:
        view = self._source.view()
        if view is None:
            return self._copied.compare(frames, expected, listed_max)
        offsets = view.offsets(frames)
        return self._digester.compare_view(view.data, offsets, expected, listed_max, frames=frames)

    def close(self) -> None:
        self._copied.close()


def differ(digests: Digests, expected: Digests) -> NDArray[np.bool_]:
    """Which digests are not as expected; shape (n,)."""
    different: NDArray[np.bool_] = (digests != expected).any(axis=1)
    return different


def comparison(statuses: Statuses, different: NDArray[np.bool_], listed_max: int) -> Comparison:
    """What was found, by row; a page that was not read is not counted as different."""
    unread = statuses != PageStatus.OK
    listed = np.flatnonzero(different | unread)
    unreadable = int(unread.sum())
    return Comparison(
        statuses=statuses,
        indices=listed[:listed_max].astype(np.uint64),
        ok=len(statuses) - len(listed),
        mismatched=len(listed) - unreadable,
        unreadable=unreadable,
    )
