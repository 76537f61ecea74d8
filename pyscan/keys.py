"""Ed25519 keys (RFC 8032): files, signatures and the pinned keys of other programs.

A *key id* is the first 8 bytes of the SHA-256 of the raw 32 byte public key. It selects
a pinned key and proves nothing by itself. Private keys are PKCS #8 PEM files without a
password that only their owner may read (protect them by the file system or a TPM);
public keys are SubjectPublicKeyInfo PEM files (RFC 8410), as `openssl pkey` writes them.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from pyscan.errors import SignatureInvalid, UsageError

KEY_ID_BYTES = 8
#: A PEM file of one Ed25519 key has about 120 bytes.
_FILE_BYTES_MAX = 4096
#: How the names of files end that `create_file` had no time to finish.
PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An Ed25519 public key."""

    key: Ed25519PublicKey = field(repr=False)
    key_id: bytes = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.key.public_bytes_raw()).digest()
        object.__setattr__(self, "key_id", digest[:KEY_ID_BYTES])

    @classmethod
    def load(cls, path: Path) -> PublicKey:
        """Read a PEM file. Raises UsageError when it is not an Ed25519 public key."""
        data, _ = _read(path)
        try:
            key = serialization.load_pem_public_key(data)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise UsageError(
                f"{path}: not a public key in PEM form; use the .pub file of `pyscan keys create`"
            ) from error
        if not isinstance(key, Ed25519PublicKey):
            raise UsageError(f"{path}: not an Ed25519 key; other kinds are not accepted")
        return cls(key)

    @classmethod
    def from_raw(cls, raw: bytes) -> PublicKey:
        """The key of 32 raw bytes (RFC 8032, 5.1.5). Raises ValueError for another length."""
        return cls(Ed25519PublicKey.from_public_bytes(raw))

    @property
    def raw(self) -> bytes:
        """The 32 raw bytes."""
        return self.key.public_bytes_raw()

    def pem(self) -> bytes:
        """SubjectPublicKeyInfo in PEM form: the one spelling that `save` writes."""
        return self.key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def save(self, path: Path) -> None:
        """Create `path`, readable by all. Raises UsageError when it exists."""
        _save(path, self.pem(), 0o644)

    def verify(self, signature: bytes, data: bytes) -> None:
        """Raise SignatureInvalid unless `signature` is this key's signature of `data`."""
        try:
            self.key.verify(signature, data)
        except InvalidSignature as error:
            raise SignatureInvalid(
                "bad_signature",
                f"the signature does not verify with key {self.key_id.hex()}: "
                "the data were altered, re-addressed or signed by someone else",
            ) from error


@dataclass(frozen=True, slots=True)
class SigningKey:
    """An Ed25519 private key. Neither its repr nor any error shows the secret."""

    _private: Ed25519PrivateKey = field(repr=False)
    key_id: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_id", self.public.key_id)

    @classmethod
    def generate(cls) -> SigningKey:
        """A fresh key from the operating system's random numbers."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read a PEM file.

        Raises UsageError when the file is not an Ed25519 private key without password, or
        when anyone but its owner may read or write it.
        """
        data = read_private(path)
        try:
            key = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            # No cause is chained: the parser's message may quote what it read.
            raise UsageError(f"{path}: not a private key in PEM form without a password") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise UsageError(f"{path}: not an Ed25519 key; other kinds are not accepted")
        return cls(key)

    def save(self, path: Path) -> None:
        """Create `path` with mode 0600. Raises UsageError when it exists."""
        pem = self._private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        _save(path, pem, 0o600)

    @property
    def public(self) -> PublicKey:
        """The public half."""
        return PublicKey(self._private.public_key())

    def sign(self, data: bytes) -> bytes:
        """The 64 byte signature of `data`."""
        return self._private.sign(data)


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The pinned public keys of one role (such as ``monitor``), found by key id."""

    role: str
    _entries: Mapping[bytes, tuple[str, PublicKey]] = field(repr=False)

    @classmethod
    def of(cls, keys: Mapping[str, PublicKey], role: str = "peer") -> KeyRing:
        """Pin each key to its owner's name. Raises UsageError when two names share a key."""
        return cls.of_pairs(keys.items(), role)

    @classmethod
    def of_pairs(cls, keys: Iterable[tuple[str, PublicKey]], role: str) -> KeyRing:
        """As `of`; a name may have several keys, as it has while its key is replaced."""
        entries: dict[bytes, tuple[str, PublicKey]] = {}
        for name, key in keys:
            if key.key_id in entries:
                raise UsageError(
                    f"{role} keys: {entries[key.key_id][0]} and {name} have the same key; "
                    "give each its own"
                )
            entries[key.key_id] = (name, key)
        return cls(role, entries)

    def get(self, key_id: bytes) -> tuple[str, PublicKey]:
        """Name and key. Raises SignatureInvalid when the id is not pinned."""
        try:
            return self._entries[key_id]
        except KeyError:
            raise SignatureInvalid(
                "unknown_key", f"key {key_id.hex()} is not pinned as a {self.role} key"
            ) from None


def read_private(path: Path) -> bytes:
    """What a private key's file holds. Raises UsageError when others may read or write it."""
    data, mode = _read(path)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(
            f"{path}: a private key that others may reach (mode {stat.S_IMODE(mode):04o}); "
            f"run: chmod 600 '{path}', and replace the key if it was readable"
        )
    return data


def _open_file(path: str, flags: int) -> int:
    # A named pipe in the key's place must not hang the program.
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _read(path: Path) -> tuple[bytes, int]:
    """Content and mode of a small regular file, both from the one open descriptor."""
    try:
        with open(path, "rb", opener=_open_file) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise UsageError(f"{path}: not a regular file, so not a key")
            data = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the key: {error.strerror}") from error
    if len(data) > _FILE_BYTES_MAX:
        raise UsageError(f"{path}: larger than any key ({_FILE_BYTES_MAX} bytes)")
    return data, mode


def _save(path: Path, pem: bytes, mode: int) -> None:
    try:
        create_file(path, pem, mode)
    except FileExistsError as error:
        raise UsageError(f"{path}: exists already; move it away first") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot write the key: {error.strerror}") from error


def create_file(path: Path, data: bytes, mode: int) -> None:
    """Create a file whole or not at all, on the disk when this returns.

    Never replaces a file: raises FileExistsError, or any other OSError.
    """
    with _partial(path, data, mode) as partial:
        # link() fails where rename() would replace.
        os.link(partial, path)
    sync_directory(path.parent)


def replace_file(path: Path, data: bytes, mode: int) -> None:
    """Put a whole file in the place of what was there, on the disk when this returns.

    Raises OSError; what was there stays then.
    """
    with _partial(path, data, mode) as partial:
        partial.rename(path)
    sync_directory(path.parent)


@contextmanager
def _partial(path: Path, data: bytes, mode: int) -> Iterator[Path]:
    """The data in a file beside `path`, which is gone afterwards."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
