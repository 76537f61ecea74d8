"""What all commands share: how one is declared, and which keys an operator has."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pyscan.errors import ExitStatus, UsageError
from pyscan.keys import KeyRing, PublicKey, SigningKey

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

Command: TypeAlias = Callable[[argparse.Namespace], ExitStatus]

SOURCE_HELP = (
    "a source URI: file:/path/ram.img?machine=q35&size=512M, qemu:/path/qmp.sock, ... "
    "('pyscan sources' lists them)"
)


def add_command(
    commands: Commands, name: str, function: Command, text: str, example: str
) -> argparse.ArgumentParser:
    """Declare a command; `text` is its one line in the list and starts its own help."""
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=function)
    return parser


def add_group(commands: Commands, name: str, text: str) -> Commands:
    """Declare a command that has commands of its own."""
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def add_source(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that reads a target."""
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument(
        "--backend",
        metavar="BACKEND",
        default="native",
        help="digest backend: native (default) or numba",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_trust(parser: argparse.ArgumentParser, whose: str) -> None:
    """`--trust`, which may be given several times."""
    parser.add_argument(
        "--trust",
        metavar="PUB",
        type=Path,
        action="append",
        default=[],
        help=f"public key of {whose}; may be given several times",
    )


def own_key() -> SigningKey:
    """The operator's own approver key, made at the first use."""
    path = _home() / "approver.key"
    if path.exists():
        return SigningKey.load(path)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{path.parent}: cannot hold your key: {error.strerror}; set PYSCAN_HOME, or pass "
            "a key with --sign"
        ) from error
    key = SigningKey.generate()
    key.save(path)
    key.public.save(path.with_name("approver.pub"))
    print(f"pyscan: made a key to sign with: {path}", file=sys.stderr)
    return key


def approvers(trusted: Sequence[Path]) -> KeyRing:
    """The keys given with --trust, else the operator's own. Raises UsageError if none."""
    if trusted:
        return key_ring(trusted)
    path = _home() / "approver.pub"
    if not path.exists():
        raise UsageError(
            f"no approver is trusted: {path} does not exist; pass the public key with --trust"
        )
    return key_ring([path])


def key_ring(paths: Sequence[Path]) -> KeyRing:
    """A ring of public key files, each named by its file. Raises UsageError."""
    named: dict[str, Path] = {}
    for path in paths:
        # The name tells whose key it is: one of two namesakes must not silently win.
        if named.setdefault(path.stem, path) != path:
            raise UsageError(f"{named[path.stem]} and {path}: two keys of one name; rename a file")
    return KeyRing.of({name: PublicKey.load(path) for name, path in named.items()})


def operator_file() -> Path:
    """Where an operator's configuration is, unless a command is told otherwise."""
    return _home() / "operator.toml"


def _home() -> Path:
    """PYSCAN_HOME, else XDG_CONFIG_HOME/pyscan, else ~/.config/pyscan."""
    if home := os.environ.get("PYSCAN_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "pyscan"
