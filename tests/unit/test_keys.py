"""Ed25519 keys: published vectors, files, pinned keys."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from pyscan.errors import SignatureInvalid, UsageError
from pyscan.keys import KeyRing, PublicKey, SigningKey, create_file

# RFC 8032 section 7.1, tests 1, 2, 3 and SHA(abc): secret, public, message, signature.
RFC8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
    (
        "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        hashlib.sha512(b"abc").hexdigest(),
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b589"
        "09351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704",
    ),
]


def _key(secret: str) -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret)))


@pytest.mark.parametrize(("secret", "public", "message", "signature"), RFC8032)
def test_rfc_8032_vectors(secret: str, public: str, message: str, signature: str) -> None:
    key = _key(secret)
    assert key.public.key.public_bytes_raw().hex() == public
    assert key.sign(bytes.fromhex(message)).hex() == signature
    key.public.verify(bytes.fromhex(signature), bytes.fromhex(message))
    with pytest.raises(SignatureInvalid) as refused:
        key.public.verify(bytes.fromhex(signature), bytes.fromhex(message) + b"\0")
    assert refused.value.reason == "bad_signature"


def test_a_signature_with_a_scalar_beyond_the_order_is_refused() -> None:
    # RFC 8032 section 5.1.7: S and S + L would verify alike, so one message had two signatures.
    order = 2**252 + 27742317777372353535851937790883648493
    key = SigningKey.generate()
    signature = key.sign(b"data")
    scalar = int.from_bytes(signature[32:], "little") + order
    twin = signature[:32] + scalar.to_bytes(32, "little")
    key.public.verify(signature, b"data")
    with pytest.raises(SignatureInvalid):
        key.public.verify(twin, b"data")


def test_key_id_is_the_start_of_the_digest_of_the_raw_key() -> None:
    key = _key(RFC8032[0][0])
    expected = hashlib.sha256(bytes.fromhex(RFC8032[0][1])).digest()[:8]
    assert key.key_id == key.public.key_id == expected


def test_keys_survive_their_files(tmp_path: Path) -> None:
    key = SigningKey.generate()
    key.save(tmp_path / "key")
    key.public.save(tmp_path / "key.pub")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert SigningKey.load(tmp_path / "key").key_id == key.key_id
    assert PublicKey.load(tmp_path / "key.pub") == key.public
    assert {path.name for path in tmp_path.iterdir()} == {"key", "key.pub"}


def test_openssl_agrees_about_the_files(tmp_path: Path) -> None:
    SigningKey.generate().save(tmp_path / "key")
    exported = subprocess.run(
        ["openssl", "pkey", "-in", tmp_path / "key", "-pubout"], capture_output=True, check=True
    ).stdout
    assert exported == SigningKey.load(tmp_path / "key").public.pem()


def test_an_existing_file_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("precious")
    with pytest.raises(UsageError, match="exists already; move it away"):
        SigningKey.generate().save(path)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_a_key_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the key: No such file"):
        SigningKey.generate().save(tmp_path / "missing" / "key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o666])
def test_a_private_key_that_others_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    SigningKey.generate().save(path)
    path.chmod(mode)
    with pytest.raises(UsageError, match=f"chmod 600 '{path}'"):
        SigningKey.load(path)


def _pem(key: object, *, private: bool, password: bytes | None = None) -> bytes:
    if private:
        encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if password:
            encryption = serialization.BestAvailableEncryption(password)
        return key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


BAD_PRIVATE = {
    "empty": (b"", "not a private key"),
    "noise": (os.urandom(200), "not a private key"),
    "public": (_pem(Ed25519PrivateKey.generate(), private=False), "not a private key"),
    "P-256": (_pem(ec.generate_private_key(ec.SECP256R1()), private=True), "not an Ed25519 key"),
    "X25519": (_pem(x25519.X25519PrivateKey.generate(), private=True), "not an Ed25519 key"),
    "password": (
        _pem(Ed25519PrivateKey.generate(), private=True, password=b"secret"),
        "without a password",
    ),
    "cut": (_pem(Ed25519PrivateKey.generate(), private=True)[:60], "not a private key"),
    "large": (b"#" * 5000, "larger than any key"),
}


@pytest.mark.parametrize("name", BAD_PRIVATE)
def test_a_bad_private_key_file_is_a_clear_error(tmp_path: Path, name: str) -> None:
    data, message = BAD_PRIVATE[name]
    path = tmp_path / "key"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(UsageError, match=message) as refused:
        SigningKey.load(path)
    assert refused.value.__cause__ is None  # a parser's message could quote the secret


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a public key"),
        (_pem(Ed25519PrivateKey.generate(), private=True), "not a public key"),
        (_pem(ec.generate_private_key(ec.SECP256R1()), private=False), "not an Ed25519 key"),
    ],
)
def test_a_bad_public_key_file_is_a_clear_error(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "key.pub").write_bytes(data)
    with pytest.raises(UsageError, match=message):
        PublicKey.load(tmp_path / "key.pub")


def test_what_is_no_file_is_no_key(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a regular file"):
        PublicKey.load(tmp_path / "pipe")
    with pytest.raises(UsageError, match="Is a directory"):
        PublicKey.load(tmp_path)
    with pytest.raises(UsageError, match="cannot read the key"):
        PublicKey.load(tmp_path / "missing")


def test_nothing_shows_the_secret() -> None:
    key = _key(RFC8032[0][0])
    shown = f"{key!r} {key} {KeyRing.of({'a': key.public})!r}"
    assert RFC8032[0][0] not in shown
    assert repr(bytes.fromhex(RFC8032[0][0]))[2:10] not in shown
    assert "Private" not in shown


def test_a_ring_knows_whose_key_it_is() -> None:
    one, two, other = (SigningKey.generate() for _ in range(3))
    ring = KeyRing.of({"one": one.public, "two": two.public}, "control")
    assert ring.get(two.key_id) == ("two", two.public)
    with pytest.raises(SignatureInvalid, match="not pinned as a control key") as refused:
        ring.get(other.key_id)
    assert refused.value.reason == "unknown_key"


def test_two_names_cannot_share_a_key() -> None:
    key = SigningKey.generate().public
    with pytest.raises(UsageError, match="one and two have the same key"):
        KeyRing.of({"one": key, "two": key})


def test_public_keys_are_equal_by_value() -> None:
    raw = bytes.fromhex(RFC8032[0][1])
    same = [PublicKey(Ed25519PublicKey.from_public_bytes(raw)) for _ in range(2)]
    assert same[0] == same[1] != SigningKey.generate().public


def test_create_file_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    create_file(tmp_path / "file", b"first", 0o640)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "file", b"second", 0o640)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]
