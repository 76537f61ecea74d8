"""`pyscan keys show`: what a file of keys is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from pyscan import render
from pyscan.errors import ExitStatus, FileFormatError, UsageError
from pyscan.keys import PublicKey, SigningKey
from pyscan.trust import KeyEntry, KeySet, decode_key_set
from pyscan.trust.certificates import load_certificate
from pyscan.trust.keyset import SET_BYTES_MAX

Facts = list[tuple[str, str]]


def run_show(options: argparse.Namespace) -> ExitStatus:
    """Show one file; a key set only when its signature is good."""
    path: Path = options.path
    try:
        with path.open("rb") as file:
            data = file.read(SET_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    for mark, facts in _KINDS:
        if mark in data[:64]:
            render.print_facts(render.console(), facts(path))
            return ExitStatus.APPROVED
    if options.root_key is None:
        raise UsageError(f"{path}: no PEM file; to see a key set, give the root's: --root-key")
    try:
        key_set = decode_key_set(data, PublicKey.load(options.root_key))
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    render.print_facts(render.console(), _key_set(key_set))
    return ExitStatus.APPROVED


def _private(path: Path) -> Facts:
    key = SigningKey.load(path)
    return [("kind", "private key, Ed25519"), ("key id", key.key_id.hex())]


def _public(path: Path) -> Facts:
    key = PublicKey.load(path)
    return [
        ("kind", "public key, Ed25519"),
        ("key id", key.key_id.hex()),
        ("raw", key.raw.hex()),
    ]


def _certificate(path: Path) -> Facts:
    certificate = load_certificate(path)
    return [
        ("kind", "certificate"),
        ("subject", certificate.subject.rfc4514_string()),
        ("issuer", certificate.issuer.rfc4514_string()),
        ("serial", f"{certificate.serial_number:x}"),
        ("from", str(certificate.not_valid_before_utc)),
        ("until", str(certificate.not_valid_after_utc)),
    ]


def _revocations(path: Path) -> Facts:
    try:
        revoked = x509.load_pem_x509_crl(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path}: not a revocation list in PEM form") from error
    return [
        ("kind", "revocation list"),
        ("issuer", revoked.issuer.rfc4514_string()),
        ("until", str(revoked.next_update_utc)),
        *(("revoked", f"{each.serial_number:x} at {each.revocation_date_utc}") for each in revoked),
    ]


#: What a PEM file begins with, and what is told of it.
_KINDS: tuple[tuple[bytes, Callable[[Path], Facts]], ...] = (
    (b"-----BEGIN CERTIFICATE-----", _certificate),
    (b"-----BEGIN X509 CRL-----", _revocations),
    (b"-----BEGIN PUBLIC KEY-----", _public),
    (b"-----BEGIN PRIVATE KEY-----", _private),
)


def _key_set(key_set: KeySet) -> Facts:
    return [
        ("kind", "key set, signature verified"),
        ("serial", str(key_set.serial)),
        ("from", _moment(key_set.from_s)),
        ("until", _moment(key_set.until_s)),
        *((entry.role.value, _entry(entry)) for entry in key_set.entries),
        *(("revoked", key_id.hex()) for key_id in sorted(key_set.revoked)),
    ]


def _entry(entry: KeyEntry) -> str:
    return f"{entry.name} {entry.key.key_id.hex()} until {_moment(entry.until_s)}"


def _moment(seconds: int) -> str:
    return str(datetime.fromtimestamp(seconds, UTC))
