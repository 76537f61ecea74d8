"""`pyscan keys`: the commands of the root."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Pyscan


@pytest.fixture
def pyscan(capsys: pytest.CaptureFixture[str]) -> Pyscan:
    return Pyscan(capsys)


def test_commands_of_the_root(tmp_path: Path, pyscan: Pyscan) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    assert pyscan("keys", "root", root).status == 0
    made = pyscan("keys", "issue", "host-1", "--role", "agent", "--root", root, "--out", out)
    assert made.facts["certificate"] == str(out / "host-1.pem")
    assert (
        pyscan(
            "keys", "issue", "mq", "--role", "broker", "--host", "::1", "--root", root, "--out", out
        ).status
        == 0
    )
    assert pyscan("keys", "rotate", "host-1", "--root", root, "--out", tmp_path / "new").status == 0
    shown = pyscan("keys", "show", root / "trust.cose", "--root-key", root / "root.pub")
    assert shown.facts["serial"] == "4"
    assert shown.out.count("host-1") == 2
    assert pyscan("keys", "revoke", "host-1", "--root", root).status == 0
    assert pyscan("keys", "trust", "--root", root, "--days", "9").facts["serial"] == "6"
    shown = pyscan("keys", "show", root / "trust.cose", "--root-key", root / "root.pub")
    assert (shown.out.count("host-1"), shown.out.count("revoked")) == (0, 2)
    for name, kind in {
        "root.pub": "public key, Ed25519",
        "root.key": "private key, Ed25519",
        "ca.pem": "certificate",
        "crl.pem": "revocation list",
    }.items():
        assert pyscan("keys", "show", root / name).facts["kind"] == kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["issue", "a b", "--role", "agent"], "is no name"),
        (["issue", "mq", "--role", "broker"], "needs --host"),
        (["issue", "a", "--role", "agent", "--host", "x"], "nobody else has one"),
        (["rotate", "nobody"], "no key to replace"),
    ],
)
def test_wrong_use_of_the_root(
    tmp_path: Path, pyscan: Pyscan, arguments: list[str], message: str
) -> None:
    pyscan("keys", "root", tmp_path / "root")
    before = (tmp_path / "root" / "register.json").read_bytes()
    wrong = pyscan("keys", *arguments, "--root", tmp_path / "root", "--out", tmp_path / "out")
    assert (wrong.status, message in wrong.error) == (2, True)
    assert (tmp_path / "root" / "register.json").read_bytes() == before


def test_a_root_is_never_made_over_something(tmp_path: Path, pyscan: Pyscan) -> None:
    (tmp_path / "file").touch()
    wrong = pyscan("keys", "root", tmp_path)
    assert (wrong.status, "not empty" in wrong.error) == (2, True)
    nothing = pyscan("keys", "trust", "--root", tmp_path / "none")
    assert (nothing.status, "cannot read the key" in nothing.error) == (2, True)
    unverified = pyscan("keys", "show", tmp_path / "file")
    assert (unverified.status, "--root-key" in unverified.error) == (2, True)
