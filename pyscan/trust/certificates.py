"""X.509 certificates for TLS between programs and broker (RFC 5280): authority, leaf, revocation.

Keys are ECDSA P-256, which every broker takes; what a message says is signed with another
key, Ed25519, which never leaves its program. The name of a program is its certificate's
common name, and so its user name at a broker that takes identities as user names.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pyscan.errors import UsageError

#: Clocks may differ: certificates and lists count from a little before they are made.
BACKDATED_S: Final = 300
_FILE_BYTES_MAX: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Leaf:
    """A certificate and its private key, in PEM form."""

    certificate: bytes
    key: bytes
    serial: int


@dataclass(frozen=True, slots=True)
class CertificateAuthority:
    """The authority's certificate and private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, name: str, now_s: int, until_s: int) -> CertificateAuthority:
        """A self-signed authority whose leaves may not issue anything themselves."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(name)
        builder = (
            _builder(subject, subject, key.public_key(), now_s, until_s)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, certificate: Path, key: bytes) -> CertificateAuthority:
        """From files; `key` is the content of a private one. Raises UsageError."""
        loaded = load_certificate(certificate)
        try:
            private = serialization.load_pem_private_key(key, password=None)
        except (ValueError, TypeError):
            private = None
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise UsageError(f"{certificate}: its private key is not an ECDSA key in PEM form")
        return cls(loaded, private)

    def certificate_pem(self) -> bytes:
        """What programs and brokers trust."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self) -> bytes:
        """The secret."""
        return _key_pem(self.key)

    def issue(
        self, name: str, now_s: int, until_s: int, *, server_names: Sequence[str] = ()
    ) -> Leaf:
        """A certificate for a program, or for a broker that is reached by `server_names`."""
        key = ec.generate_private_key(ec.SECP256R1())
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if server_names else None
        builder = _builder(_name(name), self.certificate.subject, key.public_key(), now_s, until_s)
        authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([purpose or ExtendedKeyUsageOID.CLIENT_AUTH]), False
            )
            .add_extension(authority_id, False)
            .add_extension(
                x509.SubjectAlternativeName(list(_alternatives(server_names or [name]))), False
            )
            .sign(self.key, hashes.SHA256())
        )
        return Leaf(
            certificate.public_bytes(serialization.Encoding.PEM),
            _key_pem(key),
            certificate.serial_number,
        )

    def revocations(self, serials: Iterable[tuple[int, int]], now_s: int, until_s: int) -> bytes:
        """A signed list in PEM form of (serial number, revoked at), RFC 5280 section 5.

        A broker that checks it refuses everybody once `until_s` is over.
        """
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(_moment(now_s - BACKDATED_S))
            .next_update(_moment(until_s))
            .add_extension(x509.CRLNumber(now_s), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False
            )
        )
        for serial, revoked_s in serials:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(serial)
                .revocation_date(_moment(revoked_s))
                .build()
            )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def load_certificate(path: Path) -> x509.Certificate:
    """One certificate in PEM form. Raises UsageError."""
    try:
        with path.open("rb") as file:
            return x509.load_pem_x509_certificate(file.read(_FILE_BYTES_MAX))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not a certificate in PEM form") from error


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now_s: int,
    until_s: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_moment(now_s - BACKDATED_S))
        .not_valid_after(_moment(until_s))
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternatives(names: Iterable[str]) -> Iterable[x509.GeneralName]:
    for name in names:
        try:
            yield x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            yield x509.DNSName(name)


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
