"""What the operator's commands share: the configuration, and a connection to the broker."""

from __future__ import annotations

import argparse
import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pyscan.cli.base import operator_file
from pyscan.config import OperatorConfig, load_operator
from pyscan.config.base import NAME_PATTERN
from pyscan.errors import TransportError
from pyscan.transport import Link

CONNECT_TIMEOUT_S: Final = 10.0
_NAME: Final = re.compile(NAME_PATTERN)


def add_config(parser: argparse.ArgumentParser, **more: Any) -> None:
    """`--config`."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="operator's configuration (operator.toml where your keys are)",
        **more,
    )


def operator_config(options: argparse.Namespace) -> OperatorConfig:
    """The operator's configuration. Raises ConfigError."""
    return load_operator(options.config or operator_file())


def machine(text: str) -> tuple[str, str]:
    """HOST/VM as an argument. Raises argparse.ArgumentTypeError."""
    host, slash, vm = text.partition("/")
    if not (slash and _NAME.fullmatch(host) and _NAME.fullmatch(vm)):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST/VM, both of {NAME_PATTERN}")
    return host, vm


@asynccontextmanager
async def connected(
    config: OperatorConfig, subscriptions: Sequence[str] = ()
) -> AsyncIterator[Link]:
    """A connection of this command's own, which the broker forgets. Raises TransportError."""
    settings = config.link_settings("operator")
    identity = f"{settings.identity}-{secrets.token_hex(8)}"
    link = Link(replace(settings, identity=identity, durable=False), subscriptions)
    running = asyncio.create_task(link.run(), name="link")
    try:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await link.wait_online()
        except TimeoutError:
            raise TransportError(
                link.problem or f"broker {settings.host}:{settings.port} does not answer"
            ) from None
        yield link
    finally:
        running.cancel()
        await asyncio.wait({running})
