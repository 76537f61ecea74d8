"""The signed key set, how programs follow it, and the root that makes it."""

from __future__ import annotations

import logging
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyscan.cose import encode_cbor, sign1
from pyscan.errors import FileFormatError, SignatureInvalid, UsageError
from pyscan.keys import PublicKey, SigningKey
from pyscan.trust import Keeper, KeyEntry, KeySet, Role, SetFiles, decode_key_set, encode_key_set
from pyscan.trust.authority import DAY_S, Authority
from pyscan.trust.keyset import CONTENT_TYPE, EXTERNAL_AAD, check_successor

NOW_S = 1_800_000_000
ROOT, OTHER_ROOT, ALPHA, BETA, GAMMA = (SigningKey.generate() for _ in range(5))


def entry(name: str, key: SigningKey, role: Role = Role.CONTROL, until_s: int = DAY_S) -> KeyEntry:
    return KeyEntry(role, name, key.public, NOW_S - 10, NOW_S + until_s)


SET = KeySet(5, NOW_S - 10, NOW_S + 2 * DAY_S, (entry("alpha", ALPHA), entry("beta", BETA)))


class Site:
    """A program's files, and a clock."""

    def __init__(self, directory: Path) -> None:
        self.now_s = float(NOW_S)
        self.files = SetFiles(ROOT.public, directory / "trust.cose", directory / "copy.cose")

    def put(self, key_set: KeySet, root: SigningKey = ROOT) -> None:
        self.files.file.write_bytes(encode_key_set(key_set, root))

    def keeper(self, pinned: dict[Role, dict[str, PublicKey]] | None = None) -> Keeper:
        return Keeper(pinned or {}, self.files, lambda: self.now_s)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path)
    site.put(SET)
    return site


# --- the set ----------------------------------------------------------------------------


def test_a_set_survives_its_bytes() -> None:
    key_set = replace(SET, revoked=frozenset({GAMMA.key_id}))
    assert decode_key_set(encode_key_set(key_set, ROOT), ROOT.public) == key_set


def test_only_the_root_signs_a_set() -> None:
    with pytest.raises(FileFormatError, match="not pinned as a root key"):
        decode_key_set(encode_key_set(SET, OTHER_ROOT), ROOT.public)


@given(st.integers(min_value=0), st.integers(min_value=0, max_value=7))
def test_an_edited_set_is_refused(at: int, bit: int) -> None:
    data = bytearray(encode_key_set(SET, ROOT))
    data[at % len(data)] ^= 1 << bit
    with pytest.raises(FileFormatError):
        decode_key_set(bytes(data), ROOT.public)


@given(st.binary(max_size=400))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(FileFormatError):
        decode_key_set(data, ROOT.public)


ENTRY = {"role": "agent", "name": "a", "key": bytes(32), "iat": 0, "exp": 1}
WIRE = {"format": "pyscan-trust", "version": 1, "serial": 1, "iat": 0, "exp": 9, "keys": []}


@pytest.mark.parametrize(
    "changes",
    [
        {},  # `revoked` is missing
        {"revoked": [b"short"]},
        {"revoked": [], "serial": 0},
        {"revoked": [], "version": 2},
        {"revoked": [], "format": "other"},
        {"revoked": [], "more": 1},
        {"revoked": [], "keys": [{"role": "king", "name": "a", "key": b"", "iat": 0, "exp": 1}]},
        {
            "revoked": [],
            "keys": [{"role": "agent", "name": "a/b", "key": bytes(32), "iat": 0, "exp": 1}],
        },
    ],
)
def test_a_signed_set_of_another_form_is_refused(changes: dict[str, object]) -> None:
    data = sign1(encode_cbor(WIRE | changes), ROOT, CONTENT_TYPE, EXTERNAL_AAD)
    with pytest.raises(FileFormatError, match="no key set of this root"):
        decode_key_set(data, ROOT.public)


@pytest.mark.parametrize(
    ("entries", "revoked", "message"),
    [
        ((entry("a", ALPHA), entry("a", BETA, Role.MONITOR)), (), "two roles"),
        ((entry("a", ALPHA), entry("b", ALPHA)), (), "stands twice"),
        ((entry("a", ALPHA),), (ALPHA.key_id,), "revoked"),
    ],
)
def test_a_key_has_one_owner_and_a_name_one_role(
    entries: tuple[KeyEntry, ...], revoked: tuple[bytes, ...], message: str
) -> None:
    with pytest.raises(FileFormatError, match=message):
        encode_key_set(replace(SET, entries=entries, revoked=frozenset(revoked)), ROOT)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (replace(SET, serial=4), "older than 5"),
        (replace(SET, until_s=NOW_S + 5), "a second set with serial 5"),
        (replace(SET, serial=6, from_s=NOW_S + 60), "valid in 60 s only"),
        (replace(SET, serial=6, until_s=NOW_S), "expired 0 s ago"),
    ],
)
def test_what_may_not_follow(new: KeySet, message: str) -> None:
    check_successor(SET, SET, NOW_S)
    check_successor(replace(SET, serial=6), SET, NOW_S)
    with pytest.raises(FileFormatError, match=message):
        check_successor(new, SET, NOW_S)


# --- what a program believes --------------------------------------------------------------


def refused(keeper: Keeper, key: SigningKey, *roles: Role) -> bool:
    try:
        keeper.ring(*roles).get(key.key_id)
    except SignatureInvalid:
        return True
    return False


def test_roles_are_apart(site: Site) -> None:
    site.put(replace(SET, entries=(entry("alpha", ALPHA), entry("beta", BETA, Role.OPERATOR))))
    keeper = site.keeper()
    assert keeper.ring(Role.CONTROL).get(ALPHA.key_id) == ("alpha", ALPHA.public)
    assert refused(keeper, BETA, Role.CONTROL)
    assert refused(keeper, ALPHA, Role.MONITOR)
    assert keeper.ring(Role.CONTROL, Role.OPERATOR).get(BETA.key_id)[0] == "beta"


def test_rotation_has_no_gap(site: Site) -> None:
    """Old key only, both, new key only: by the clock, without a new set."""
    old = KeyEntry(Role.AGENT, "host-1", ALPHA.public, NOW_S - 10, NOW_S + 100)
    new = KeyEntry(Role.AGENT, "host-1", BETA.public, NOW_S + 50, NOW_S + 1000)
    site.put(replace(SET, entries=(old, new)))
    keeper = site.keeper()
    seen = []
    for site.now_s in (NOW_S, NOW_S + 49, NOW_S + 50, NOW_S + 99, NOW_S + 100, NOW_S + 1000, NOW_S):
        seen.append([not refused(keeper, key, Role.AGENT) for key in (ALPHA, BETA)])
    assert seen == [[1, 0], [1, 0], [1, 1], [1, 1], [0, 1], [0, 0], [1, 0]]


def test_an_expired_set_is_not_believed(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    keeper = site.keeper({Role.CONTROL: {"pinned": GAMMA.public}})
    site.now_s = SET.until_s
    assert refused(keeper, ALPHA, Role.CONTROL)
    assert keeper.ring(Role.CONTROL).get(GAMMA.key_id)[0] == "pinned"
    assert "key set expired" in caplog.text
    with pytest.raises(FileFormatError, match="expired 0 s ago"):
        site.keeper()


def test_a_revoked_key_is_not_believed_even_if_pinned(site: Site) -> None:
    keeper = site.keeper({Role.CONTROL: {"pinned": GAMMA.public}})
    assert not refused(keeper, GAMMA, Role.CONTROL)
    site.put(replace(SET, serial=6, revoked=frozenset({GAMMA.key_id})))
    assert keeper.look()
    assert refused(keeper, GAMMA, Role.CONTROL)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda site: site.put(replace(SET, serial=4)), "older than 5"),
        (lambda site: site.put(replace(SET, serial=6), OTHER_ROOT), "not pinned as a root key"),
        (lambda site: site.put(replace(SET, serial=6, until_s=NOW_S - 1)), "expired"),
        (lambda site: site.files.file.write_bytes(b"noise"), "tag 18"),
        (lambda site: site.files.file.write_bytes(bytes(5 << 20)), "larger than any key set"),
        (lambda site: site.files.file.unlink(), "cannot be read"),
    ],
)
def test_a_bad_set_is_refused_and_the_old_one_stays(
    site: Site,
    spoil: Callable[[Site], None],
    problem: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    keeper = site.keeper()
    keeper.keep()
    spoil(site)
    for _ in range(3):  # once refused, it is not looked at again until it changes
        assert not keeper.look()
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(lines) == 1
    assert problem in lines[0]
    assert (keeper.serial, refused(keeper, ALPHA, Role.CONTROL)) == (5, False)
    # Over a restart, too: the old set cannot be slipped in, nor a bad one.
    again = site.keeper()
    assert (again.serial, refused(again, ALPHA, Role.CONTROL)) == (5, False)


def test_a_program_without_any_valid_set_does_not_start(site: Site) -> None:
    site.put(SET, OTHER_ROOT)
    with pytest.raises(FileFormatError, match=r"trust\.cose: no key set of this root"):
        site.keeper()
    assert not site.files.copy.exists()


# --- the root -----------------------------------------------------------------------------


def test_issue_rotate_revoke(tmp_path: Path) -> None:
    now_s = float(NOW_S)
    authority = Authority.create(tmp_path / "root", "test", lambda: now_s)
    first = authority.issue(Role.AGENT, "host-1", tmp_path / "one")
    assert first.public_key is not None
    with pytest.raises(UsageError, match="was issued before"):
        authority.issue(Role.AGENT, "host-1", tmp_path / "two")
    second = authority.rotate("host-1", tmp_path / "two", overlap_days=2)
    assert second.public_key is not None
    files = SetFiles(authority.root, authority.path("trust.cose"), tmp_path / "copy")
    keeper = Keeper({}, files, lambda: now_s)
    old, new = (PublicKey.load(path.public_key) for path in (first, second))  # type: ignore[arg-type]
    ring = keeper.ring(Role.AGENT)
    assert [ring.get(key.key_id)[0] for key in (old, new)] == ["host-1", "host-1"]
    now_s += 2 * DAY_S
    with pytest.raises(SignatureInvalid):
        keeper.ring(Role.AGENT).get(old.key_id)
    assert keeper.ring(Role.AGENT).get(new.key_id)[0] == "host-1"
    assert authority.revoke("host-1") == 2
    assert keeper.look()
    with pytest.raises(SignatureInvalid):
        keeper.ring(Role.AGENT).get(new.key_id)
    with pytest.raises(UsageError, match="nothing that could be revoked"):
        authority.revoke("host-1")
    with pytest.raises(UsageError, match="no key to replace"):
        authority.rotate("host-1", tmp_path / "three")


def _openssl(*arguments: object) -> str:
    done = subprocess.run(
        ["openssl", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return f"{done.returncode} {done.stdout} {done.stderr}"


def test_openssl_agrees_about_certificates(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "root", "test")
    good = authority.issue(Role.CONTROL, "control-1", tmp_path / "out")
    bad = authority.issue(Role.AGENT, "host-1", tmp_path / "out")
    broker = authority.issue_broker("broker", tmp_path / "out", ["localhost", "127.0.0.1"])
    authority.revoke("host-1")
    verify = ["verify", "-x509_strict", "-crl_check", "-CRLfile", authority.path("crl.pem")]
    verify += ["-CAfile", authority.path("ca.pem")]
    assert _openssl(*verify, "-purpose", "sslclient", good.certificate).startswith("0")
    assert _openssl(*verify, "-purpose", "sslserver", broker.certificate).startswith("0")
    assert "unsuitable" in _openssl(*verify, "-purpose", "sslserver", good.certificate)
    assert "unsuitable" in _openssl(*verify, "-purpose", "sslclient", broker.certificate)
    assert "revoked" in _openssl(*verify, bad.certificate)
    text = _openssl(
        "x509", "-in", broker.certificate, "-noout", "-subject", "-ext", "subjectAltName"
    )
    assert "CN = broker" in text
    assert "DNS:localhost, IP Address:127.0.0.1" in text


def test_secrets_are_private(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "root", "test")
    bundle = authority.issue(Role.CONTROL, "control-1", tmp_path / "out")
    secret = [
        bundle.private_key,
        bundle.tls_key,
        *(authority.path(f"{n}.key") for n in ("root", "ca")),
    ]
    for path in secret:
        assert path is not None
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "root").stat().st_mode) == 0o700
    authority.path("ca.key").chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        Authority(tmp_path / "root")
