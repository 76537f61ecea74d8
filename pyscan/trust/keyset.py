"""The signed key set: whose key speaks in which role, by the word of an offline root.

A set is one COSE_Sign1 message (docs/spec/wire.md section 2) that only the root signs,
with a serial number that rises. Sets overlap: while a key is replaced, the old and the
new one are both in, so programs may learn of it in any order. A key that is revoked is
named as such, so that it is not believed even where a configuration file pins it.

Rules only; what reads and writes files is in `pyscan.trust.keeper` and `.authority`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final, Literal

import msgspec

from pyscan.cose import decode_cbor, encode_cbor, media_type, sign1, verify1
from pyscan.errors import FileFormatError, SignatureInvalid
from pyscan.keys import KEY_ID_BYTES, KeyRing, PublicKey, SigningKey

FORMAT: Final = "pyscan-trust"
VERSION: Final = 1
CONTENT_TYPE: Final = media_type("trust")
EXTERNAL_AAD: Final = b"pyscan/v1/trust"
SET_BYTES_MAX: Final = 4 << 20
ENTRIES_MAX: Final = 20_000
NAME_PATTERN: Final = r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"


class Role(StrEnum):
    """What a key's owner does, and so what its signature is good for."""

    MONITOR = "monitor"  # signs verdicts
    CONTROL = "control"  # signs commands, by policy
    AGENT = "agent"  # signs reports
    OPERATOR = "operator"  # a person: signs commands and approvals
    APPROVER = "approver"  # a person: signs approved configurations
    OBSERVER = "observer"  # hears everything, says nothing


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One key of the set; it is believed from `from_s` until before `until_s` (Unix time)."""

    role: Role
    name: str
    key: PublicKey
    from_s: int
    until_s: int


@dataclass(frozen=True, slots=True)
class KeySet:
    """All keys of an installation, as the root has them."""

    serial: int
    from_s: int
    until_s: int  # the whole set is void from then on
    entries: tuple[KeyEntry, ...]
    revoked: frozenset[bytes] = frozenset()  # key ids

    def believed(self, role: Role, now_s: int) -> Iterator[KeyEntry]:
        """The keys of a role that are valid now; none when the set itself is not."""
        if self.from_s <= now_s < self.until_s:
            for entry in self.entries:
                if entry.role is role and entry.from_s <= now_s < entry.until_s:
                    yield entry

    def next_change_s(self, now_s: int) -> int | None:
        """When time alone changes what is believed; None: never."""
        times = {self.from_s, self.until_s}
        for entry in self.entries:
            times |= {entry.from_s, entry.until_s}
        return min((moment for moment in times if moment > now_s), default=None)


_Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
_Seconds = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
_KeyId = Annotated[bytes, msgspec.Meta(min_length=KEY_ID_BYTES, max_length=KEY_ID_BYTES)]


class _Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A map with these keys, all of them, no others."""


class _EntryWire(_Wire, frozen=True):
    role: Role
    name: _Name
    key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    iat: _Seconds
    exp: _Seconds


class _SetWire(_Wire, frozen=True):
    format: Literal["pyscan-trust"]
    version: Literal[1]
    serial: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    iat: _Seconds
    exp: _Seconds
    keys: Annotated[list[_EntryWire], msgspec.Meta(max_length=ENTRIES_MAX)]
    revoked: Annotated[list[_KeyId], msgspec.Meta(max_length=ENTRIES_MAX)]


def encode_key_set(key_set: KeySet, root: SigningKey) -> bytes:
    """Sign a set. Raises FileFormatError when it breaks its own rules."""
    _check(key_set)
    wire = _SetWire(
        format="pyscan-trust",
        version=1,
        serial=key_set.serial,
        iat=key_set.from_s,
        exp=key_set.until_s,
        keys=[
            _EntryWire(entry.role, entry.name, entry.key.raw, entry.from_s, entry.until_s)
            for entry in key_set.entries
        ],
        revoked=sorted(key_set.revoked),
    )
    payload = encode_cbor(msgspec.to_builtins(wire, builtin_types=(bytes,)))
    return sign1(payload, root, CONTENT_TYPE, EXTERNAL_AAD)


def decode_key_set(data: bytes, root: PublicKey) -> KeySet:
    """Verify a set with the root's key. Raises FileFormatError, which says why not.

    Validity in time is the caller's: `check_successor`.
    """
    ring = KeyRing.of({"root": root}, "root")
    try:
        payload = verify1(data, ring, CONTENT_TYPE, EXTERNAL_AAD, SET_BYTES_MAX).payload
        wire = msgspec.convert(decode_cbor(payload, SET_BYTES_MAX), _SetWire)
    except (SignatureInvalid, msgspec.ValidationError) as error:
        raise FileFormatError(f"no key set of this root: {error}") from error
    key_set = KeySet(
        serial=wire.serial,
        from_s=wire.iat,
        until_s=wire.exp,
        entries=tuple(
            KeyEntry(each.role, each.name, PublicKey.from_raw(each.key), each.iat, each.exp)
            for each in wire.keys
        ),
        revoked=frozenset(wire.revoked),
    )
    _check(key_set)
    return key_set


def check_successor(new: KeySet, current: KeySet | None, now_s: int) -> None:
    """Raise FileFormatError unless `new` may take the place of `current`."""
    if current is not None and new.serial < current.serial:
        raise FileFormatError(
            f"serial {new.serial} is older than {current.serial}, which is in use; "
            "was an old set put back?"
        )
    if current is not None and new.serial == current.serial and new != current:
        raise FileFormatError(f"a second set with serial {new.serial}; publish a new one")
    if now_s < new.from_s:
        raise FileFormatError(f"valid in {new.from_s - now_s} s only; compare the clocks")
    if now_s >= new.until_s:
        raise FileFormatError(
            f"expired {now_s - new.until_s} s ago; publish a new one: pyscan keys trust"
        )


def _check(key_set: KeySet) -> None:
    """A key has one owner, and a name has one role: no key can speak for another."""
    roles: dict[str, Role] = {}
    keys: set[bytes] = set()
    for entry in key_set.entries:
        if roles.setdefault(entry.name, entry.role) is not entry.role:
            raise FileFormatError(f"{entry.name} has two roles; names belong to one")
        if entry.key.key_id in keys:
            raise FileFormatError(f"{entry.name}: a key that stands twice")
        if entry.key.key_id in key_set.revoked:
            raise FileFormatError(f"{entry.name}: a key that is revoked")
        keys.add(entry.key.key_id)
