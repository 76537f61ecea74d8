"""`pyscan keys`: key pairs, and the root that says whose they are."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pyscan import render
from pyscan.cli.base import add_command, add_group
from pyscan.cli.keys_show import run_show
from pyscan.errors import ExitStatus, UsageError
from pyscan.keys import SigningKey
from pyscan.trust import Role
from pyscan.trust.authority import BROKER, KEY_DAYS, OVERLAP_DAYS, SET_DAYS, Authority, Bundle

if TYPE_CHECKING:
    from pyscan.cli.base import Commands

DAYS_MAX = 3650
DAYS_HELP = "valid for so many days; default %(default)s"


def add(commands: Commands) -> None:
    """Declare the commands."""
    group = add_group(commands, "keys", "make keys and certificates, and say whose they are")
    create = add_command(
        group,
        "create",
        run_create,
        "make an Ed25519 key pair: PATH (private, mode 0600) and PATH.pub",
        "pyscan keys create /etc/pyscan/monitor.key",
    )
    create.add_argument("path", metavar="PATH", type=Path, help="private key file to make")
    root = add_command(
        group,
        "root",
        run_root,
        "make the offline root of an installation: it signs key sets and certificates",
        "pyscan keys root /media/offline/root",
    )
    root.add_argument("root", metavar="DIR", type=Path, help="new directory; keep it offline")
    root.add_argument("--name", default="root", help="name in the authority's certificate")
    _add_issue(group)
    rotate = add_command(
        group,
        "rotate",
        run_rotate,
        "give an identity a new key and certificate; the old key stays valid for a while",
        "pyscan keys rotate host-1 --root root --out new",
    )
    _add_name_and_root(rotate)
    _add_out(rotate)
    rotate.add_argument(
        "--overlap-days", type=_days, default=OVERLAP_DAYS, help="default %(default)s"
    )
    revoke = add_command(
        group,
        "revoke",
        run_revoke,
        "take back all keys and certificates of an identity",
        "pyscan keys revoke host-1 --root root",
    )
    _add_name_and_root(revoke)
    trust = add_command(
        group,
        "trust",
        run_trust,
        "sign the key set and the revocation list anew, before they expire",
        "pyscan keys trust --root root --days 90",
    )
    _add_root(trust)
    trust.add_argument(
        "--days", type=_days, default=SET_DAYS, help="valid for; default %(default)s"
    )
    show = add_command(
        group,
        "show",
        run_show,
        "tell what a key, certificate, revocation list or key set is",
        "pyscan keys show trust.cose --root-key root.pub",
    )
    show.add_argument("path", metavar="FILE", type=Path)
    show.add_argument("--root-key", metavar="PUB", type=Path, help="verify a key set with it")


def _add_issue(group: Commands) -> None:
    issue = add_command(
        group,
        "issue",
        run_issue,
        "make key and certificate of a program, person or broker",
        "pyscan keys issue host-1 --role agent --root root --out host-1",
    )
    _add_name_and_root(issue)
    _add_out(issue)
    issue.add_argument("--role", required=True, choices=[*(role.value for role in Role), BROKER])
    issue.add_argument(
        "--host",
        metavar="NAME",
        action="append",
        default=[],
        help="host name or address of a broker; may be given several times",
    )


def _add_name_and_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="who: as in [identity] name")
    _add_root(parser)


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", metavar="DIR", type=Path, required=True, help="made by `pyscan keys root`"
    )


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="where the new files go"
    )
    parser.add_argument("--days", type=_days, default=KEY_DAYS, help=DAYS_HELP)


def _days(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= DAYS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days from 1 to {DAYS_MAX}")
    return int(text)


def run_create(options: argparse.Namespace) -> ExitStatus:
    """Make both files or none; an existing file is never overwritten."""
    private: Path = options.path
    if not private.name:
        raise UsageError(f"{private}: not a file name")
    key = SigningKey.generate()
    public = private.with_name(private.name + ".pub")
    key.save(private)
    try:
        key.public.save(public)
    except UsageError:
        private.unlink()
        raise
    render.print_facts(
        render.console(),
        [("private", str(private)), ("public", str(public)), ("key id", key.key_id.hex())],
    )
    return ExitStatus.APPROVED


def run_root(options: argparse.Namespace) -> ExitStatus:
    """Make the root's directory."""
    authority = Authority.create(options.root, options.name)
    _print(
        ("root key id", authority.root.key_id.hex()),
        ("pin at programs", str(authority.path("root.pub"))),
        ("trust at broker", str(authority.path("ca.pem"))),
        ("key set", str(authority.path("trust.cose"))),
        ("revocation list", str(authority.path("crl.pem"))),
    )
    return ExitStatus.APPROVED


def run_issue(options: argparse.Namespace) -> ExitStatus:
    """Make the files of one identity."""
    authority = Authority(options.root)
    if (options.role == BROKER) != bool(options.host):
        raise UsageError("a broker needs --host, and nobody else has one")
    if options.role == BROKER:
        bundle = authority.issue_broker(options.name, options.out, options.host, days=options.days)
    else:
        role = Role(options.role)
        bundle = authority.issue(role, options.name, options.out, days=options.days)
    _print_bundle(authority, bundle)
    return ExitStatus.APPROVED


def run_rotate(options: argparse.Namespace) -> ExitStatus:
    """Make new files; the set has both keys from now on."""
    authority = Authority(options.root)
    bundle = authority.rotate(
        options.name, options.out, days=options.days, overlap_days=options.overlap_days
    )
    _print_bundle(authority, bundle)
    return ExitStatus.APPROVED


def run_revoke(options: argparse.Namespace) -> ExitStatus:
    """Take back what was issued."""
    authority = Authority(options.root)
    _print(
        ("revoked", f"{options.name}: {authority.revoke(options.name)} issued"), *_new(authority)
    )
    return ExitStatus.APPROVED


def run_trust(options: argparse.Namespace) -> ExitStatus:
    """Sign again."""
    authority = Authority(options.root)
    key_set = authority.publish(options.days)
    _print(("serial", str(key_set.serial)), ("keys", str(len(key_set.entries))), *_new(authority))
    return ExitStatus.APPROVED


def _print_bundle(authority: Authority, bundle: Bundle) -> None:
    files = [
        ("private key", bundle.private_key),
        ("public key", bundle.public_key),
        ("certificate", bundle.certificate),
        ("its private key", bundle.tls_key),
    ]
    _print(*((name, str(path)) for name, path in files if path), *_new(authority))


def _new(authority: Authority) -> list[tuple[str, str]]:
    """What has to be taken to programs and broker after a change."""
    return [
        ("new key set", str(authority.path("trust.cose"))),
        ("new revocations", str(authority.path("crl.pem"))),
    ]


def _print(*facts: tuple[str, str]) -> None:
    render.print_facts(render.console(), list(facts))
