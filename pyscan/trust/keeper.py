"""What a running program believes: its pinned keys and the key set, kept up to date.

The set's file is looked at every `LOOK_INTERVAL_S`, and at once on SIGHUP. A set that is
older, damaged, not the root's, or not valid now is refused and logged; what was believed
before stays. The accepted set is kept in the program's state directory, so that an old
one cannot be slipped in over a restart either.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyscan.errors import FileFormatError
from pyscan.keys import KeyRing, PublicKey, replace_file
from pyscan.trust.keyset import SET_BYTES_MAX, KeySet, Role, check_successor, decode_key_set

log = logging.getLogger(__name__)

LOOK_INTERVAL_S: Final = 1.0
#: A set that ends within this time is worth a warning.
ENDING_S: Final = 7 * 24 * 3600

Pinned = Mapping[Role, Mapping[str, PublicKey]]


@dataclass(frozen=True, slots=True)
class SetFiles:
    """Where a program's key set is, and who must have signed it."""

    root: PublicKey
    file: Path
    copy: Path  # of the set in use, in the program's state directory


class Keeper:
    """The keys that are believed now.

    Rings are cheap to ask for: they are made anew only when the set or the time changes
    them. A key of the set outweighs a pinned one, and one that the set revokes is gone.
    """

    def __init__(
        self,
        pinned: Pinned,
        files: SetFiles | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Load the set; writes nothing. Raises FileFormatError when there is none that is valid."""
        self._pinned = pinned
        self._files = files
        self._clock = clock
        self._set: KeySet | None = None
        self._unkept = b""  # the set in use, while it is not in the state directory yet
        self._seen: tuple[int, int, int] | None = None  # of the file that was looked at last
        self._rings: dict[tuple[Role, ...], KeyRing] = {}
        self._rings_from_s = 0
        self._rings_until_s: int | None = 0
        if files is not None:
            self._load_first(files)

    @property
    def serial(self) -> int:
        """Of the set in use; 0 without one."""
        return self._set.serial if self._set else 0

    def ring(self, *roles: Role) -> KeyRing:
        """The keys that are believed now in any of `roles`."""
        now_s = int(self._clock())
        if not self._rings_from_s <= now_s < (self._rings_until_s or now_s + 1):
            self._forget_rings(now_s)
        if roles not in self._rings:
            self._rings[roles] = self._make(roles, now_s)
        return self._rings[roles]

    def _make(self, roles: tuple[Role, ...], now_s: int) -> KeyRing:
        named: dict[bytes, tuple[str, PublicKey]] = {}
        revoked = self._set.revoked if self._set else frozenset()
        for role in roles:
            for name, key in self._pinned.get(role, {}).items():
                if key.key_id not in revoked:
                    named[key.key_id] = (name, key)
            for entry in self._set.believed(role, now_s) if self._set else ():
                named[entry.key.key_id] = (entry.name, entry.key)
        return KeyRing.of_pairs(named.values(), " or ".join(roles))

    def _forget_rings(self, now_s: int) -> None:
        self._rings.clear()
        self._rings_from_s = now_s
        self._rings_until_s = self._set.next_change_s(now_s) if self._set else None
        if self._set is not None and now_s >= self._set.until_s:
            log.error(
                "key set expired serial=%d; no key of it is believed, publish a new one",
                self._set.serial,
            )

    async def watch(self) -> None:
        """Take new sets as they come, for ever; returns at once when there is no set."""
        if self._files is None:
            return
        self.keep()
        wanted = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, wanted.set)
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_INTERVAL_S):
                        await wanted.wait()
                self.look(again=wanted.is_set())
                wanted.clear()
        finally:
            loop.remove_signal_handler(signal.SIGHUP)

    def look(self, *, again: bool = False) -> bool:
        """Take the set's file when it changed (or `again`); tells whether it was taken."""
        files = self._files
        if files is None:
            return False
        seen = _signature(files.file)
        if seen == self._seen and not again:
            return False
        self._seen = seen
        try:
            new = self._read_new(files)
        except FileFormatError as error:
            self._refused(error)
            return False
        self.keep()
        return new

    def _load_first(self, files: SetFiles) -> None:
        """At the start: the file, or else what was in use before. Raises FileFormatError."""
        if _signature(files.copy) is not None:
            self._set = _decode(files.copy, _read(files.copy), files.root)
        now_s = int(self._clock())
        self._seen = _signature(files.file)
        try:
            self._read_new(files)
        except FileFormatError as error:
            if self._set is None or now_s >= self._set.until_s:
                raise
            self._refused(error)

    def _refused(self, error: FileFormatError) -> None:
        log.error("key set refused in_use=%d problem=%s", self.serial, error)

    def _read_new(self, files: SetFiles) -> bool:
        """Take the file if it may follow what is in use. Raises FileFormatError."""
        data = _read(files.file)
        new = _decode(files.file, data, files.root)
        now_s = int(self._clock())
        try:
            check_successor(new, self._set, now_s)
        except FileFormatError as error:
            raise FileFormatError(f"{files.file}: {error}") from error
        if new == self._set:
            return False
        self._set = new
        self._unkept = data
        self._forget_rings(now_s)
        level = logging.WARNING if new.until_s - now_s < ENDING_S else logging.INFO
        log.log(
            level,
            "key set taken serial=%d keys=%d revoked=%d valid_for_s=%d",
            new.serial,
            len(new.entries),
            len(new.revoked),
            new.until_s - now_s,
        )
        return True

    def keep(self) -> None:
        """Note the set in use, so that no older one is taken after a restart."""
        if self._files is None or not self._unkept:
            return
        try:
            replace_file(self._files.copy, self._unkept, 0o600)
        except OSError as error:
            log.error("key set not kept file=%s problem=%s", self._files.copy, error.strerror)  # noqa: TRY400 - expected, one line
        else:
            self._unkept = b""


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Changes when the file is replaced or written; None while it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _decode(path: Path, data: bytes, root: PublicKey) -> KeySet:
    try:
        return decode_key_set(data, root)
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(SET_BYTES_MAX + 1)
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > SET_BYTES_MAX:
        raise FileFormatError(f"{path}: larger than any key set ({SET_BYTES_MAX} bytes)")
    return data
