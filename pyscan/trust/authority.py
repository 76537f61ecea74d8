"""The offline root of an installation: it issues keys and certificates, and takes them back.

One directory, kept off the network and open to its owner only:

    root.key  root.pub     Ed25519: signs the key set, pinned by every program
    ca.key    ca.pem       ECDSA P-256: signs the certificates for TLS
    register.json          all that was ever issued, and what became of it
    trust.cose  crl.pem    made of the register: take these to programs and broker

Private keys of programs are written where they are wanted and not kept here.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from pyscan.errors import UsageError
from pyscan.keys import PublicKey, SigningKey, create_file, read_private, replace_file
from pyscan.trust.certificates import BACKDATED_S, CertificateAuthority, Leaf
from pyscan.trust.keyset import (
    NAME_PATTERN,
    KeyEntry,
    KeySet,
    Role,
    decode_key_set,
    encode_key_set,
)

DAY_S: Final = 24 * 3600
AUTHORITY_DAYS: Final = 3650
#: How long a key and its certificate, and a key set and the revocation list, are valid.
KEY_DAYS: Final = 365
SET_DAYS: Final = 90
#: How long an old key stays beside the new one.
OVERLAP_DAYS: Final = 7
BROKER: Final = "broker"
_REGISTER_BYTES_MAX: Final = 64 << 20


class Issued(msgspec.Struct, forbid_unknown_fields=True):
    """One line of the register. A broker has a certificate only, an approver a key only."""

    role: str
    name: str
    key: str  # hex of the raw public key, or ""
    certificate: str  # hex of the certificate's serial number, or ""
    from_s: int
    until_s: int  # of the certificate, and of the key unless it was replaced
    key_until_s: int
    revoked_s: int = 0


class _Register(msgspec.Struct, forbid_unknown_fields=True):
    serial: int
    issued: list[Issued]


@dataclass(frozen=True, slots=True)
class Bundle:
    """The files of one identity."""

    private_key: Path | None
    public_key: Path | None
    certificate: Path | None
    tls_key: Path | None


class Authority:
    """An opened root directory. Every change publishes a new set and revocation list."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        """Open it. Raises UsageError."""
        self._directory = directory
        self._clock = clock
        self._root = SigningKey.load(directory / "root.key")
        self._certificates = CertificateAuthority.load(
            directory / "ca.pem", read_private(directory / "ca.key")
        )

    @classmethod
    def create(
        cls, directory: Path, name: str, clock: Callable[[], float] = time.time
    ) -> Authority:
        """Make a root of one's own in a new or empty directory. Raises UsageError."""
        now_s = int(clock())
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(directory.iterdir()):
                raise UsageError(f"{directory}: not empty; make the root in a new directory")
            directory.chmod(0o700)
        except OSError as error:
            raise UsageError(f"{directory}: cannot hold a root: {error.strerror}") from error
        key = SigningKey.generate()
        key.save(directory / "root.key")
        key.public.save(directory / "root.pub")
        until_s = now_s + AUTHORITY_DAYS * DAY_S
        certificates = CertificateAuthority.create(f"pyscan {name}", now_s, until_s)
        _save(directory / "ca.key", certificates.key_pem(), 0o600)
        _save(directory / "ca.pem", certificates.certificate_pem(), 0o644)
        authority = cls(directory, clock)
        authority._publish(_Register(0, []), SET_DAYS)
        return authority

    @property
    def root(self) -> PublicKey:
        """The key that programs pin."""
        return self._root.public

    def path(self, name: str) -> Path:
        """One of its files, such as ``trust.cose``."""
        return self._directory / name

    def issue(
        self,
        role: Role,
        name: str,
        out: Path,
        *,
        days: int = KEY_DAYS,
    ) -> Bundle:
        """Make key and certificate of a new identity in directory `out`. Raises UsageError."""
        with self._changing() as register:
            for issued in register.issued:
                if issued.name == name:
                    raise UsageError(
                        f"{name} was issued before, as {issued.role}; use rotate, or another name"
                    )
            return self._issue(register, role, name, out, days)

    def issue_broker(
        self, name: str, out: Path, server_names: Sequence[str], *, days: int = KEY_DAYS
    ) -> Bundle:
        """Make a certificate for a broker that programs reach by `server_names`."""
        _check_name(name)
        with self._changing() as register:
            now_s = int(self._clock())
            until_s = now_s + days * DAY_S
            leaf = self._certificates.issue(name, now_s, until_s, server_names=server_names)
            certificate, tls_key = _save_leaf(out, name, leaf)
            register.issued.append(
                Issued(BROKER, name, "", f"{leaf.serial:x}", now_s, until_s, until_s)
            )
            return Bundle(None, None, certificate, tls_key)

    def rotate(
        self, name: str, out: Path, *, days: int = KEY_DAYS, overlap_days: float = OVERLAP_DAYS
    ) -> Bundle:
        """A new key and certificate; the old key stays valid for the overlap, not longer."""
        with self._changing() as register:
            current = [each for each in register.issued if each.name == name and each.key]
            if not current or current[-1].revoked_s:
                raise UsageError(f"{name} has no key to replace; use issue")
            end_s = int(self._clock() + overlap_days * DAY_S)
            for issued in current:
                issued.key_until_s = min(issued.key_until_s, end_s)
            return self._issue(register, Role(current[-1].role), name, out, days)

    def revoke(self, name: str) -> int:
        """Take everything back that `name` has; returns how many keys and certificates."""
        with self._changing() as register:
            now_s = int(self._clock())
            live = [each for each in register.issued if each.name == name and not each.revoked_s]
            if not live:
                raise UsageError(f"{name} has nothing that could be revoked; see register.json")
            for issued in live:
                issued.revoked_s = now_s
            return len(live)

    def publish(self, days: int = SET_DAYS) -> KeySet:
        """Sign set and list anew, valid for `days` from now."""
        with self._changing(days):
            pass
        return decode_key_set(self.path("trust.cose").read_bytes(), self.root)

    def _issue(self, register: _Register, role: Role, name: str, out: Path, days: int) -> Bundle:
        _check_name(name)
        now_s = int(self._clock())
        until_s = now_s + days * DAY_S
        _make_directory(out)
        key = SigningKey.generate()
        private, public = out / f"{name}.key", out / f"{name}.pub"
        key.save(private)
        key.public.save(public)
        serial, certificate, tls_key = "", None, None
        if role is not Role.APPROVER:  # a person who signs files, and needs no broker
            leaf = self._certificates.issue(name, now_s, until_s)
            certificate, tls_key = _save_leaf(out, name, leaf)
            serial = f"{leaf.serial:x}"
        register.issued.append(
            Issued(role, name, key.public.raw.hex(), serial, now_s, until_s, until_s)
        )
        return Bundle(private, public, certificate, tls_key)

    @contextmanager
    def _changing(self, days: int = SET_DAYS) -> Iterator[_Register]:
        """The register, for one change at a time; published when the block ends well."""
        lock = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            register = self._read()
            yield register
            self._publish(register, days)
        finally:
            os.close(lock)

    def _read(self) -> _Register:
        path = self.path("register.json")
        try:
            with path.open("rb") as file:
                return msgspec.json.decode(file.read(_REGISTER_BYTES_MAX), type=_Register)
        except (OSError, msgspec.DecodeError) as error:
            raise UsageError(f"{path}: cannot be used: {error}; restore the root's copy") from error

    def _publish(self, register: _Register, days: int) -> None:
        now_s = int(self._clock())
        until_s = now_s + days * DAY_S
        register.serial += 1
        data = encode_key_set(_key_set(register, now_s, until_s), self._root)
        revocations = self._certificates.revocations(_revoked(register, now_s), now_s, until_s)
        # The register first: a serial number is never used twice.
        text = msgspec.json.format(msgspec.json.encode(register), indent=1)
        try:
            replace_file(self.path("register.json"), text, 0o600)
            replace_file(self.path("trust.cose"), data, 0o644)
            replace_file(self.path("crl.pem"), revocations, 0o644)
        except OSError as error:
            raise UsageError(f"{self._directory}: cannot be written: {error.strerror}") from error


def _key_set(register: _Register, now_s: int, until_s: int) -> KeySet:
    keyed = [each for each in register.issued if each.key]
    live = [each for each in keyed if not each.revoked_s and each.key_until_s > now_s]
    keys = {each.key: PublicKey.from_raw(bytes.fromhex(each.key)) for each in keyed}
    return KeySet(
        serial=register.serial,
        from_s=now_s - BACKDATED_S,
        until_s=until_s,
        entries=tuple(
            KeyEntry(
                Role(each.role),
                each.name,
                keys[each.key],
                each.from_s - BACKDATED_S,
                each.key_until_s,
            )
            for each in live
        ),
        revoked=frozenset(keys[each.key].key_id for each in keyed if each.revoked_s),
    )


def _revoked(register: _Register, now_s: int) -> Iterator[tuple[int, int]]:
    """Certificates that were taken back, or whose key was replaced and whose overlap is over."""
    for each in register.issued:
        ended_s = each.revoked_s or (each.key_until_s if each.key_until_s < each.until_s else 0)
        if each.certificate and ended_s and ended_s <= now_s < each.until_s:
            yield int(each.certificate, 16), ended_s


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME_PATTERN, name):
        raise UsageError(f"{name!r} is no name; use 1 to 64 of A-Z a-z 0-9 . _ -")


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot be made: {error.strerror}") from error


def _save_leaf(out: Path, name: str, leaf: Leaf) -> tuple[Path, Path]:
    _make_directory(out)
    certificate, key = out / f"{name}.pem", out / f"{name}.tls.key"
    _save(key, leaf.key, 0o600)
    _save(certificate, leaf.certificate, 0o644)
    return certificate, key


def _save(path: Path, data: bytes, mode: int) -> None:
    try:
        create_file(path, data, mode)
    except FileExistsError as error:
        raise UsageError(f"{path}: exists already; move it away first") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
