"""What the three programs share: logging, signals, exit status, a clean stop.

A program is a coroutine that wires its stages in one TaskGroup and runs until it is
cancelled. SIGTERM and SIGINT cancel it; it closes its files in `finally` and that is a
clean stop with exit status 0. Expected failures (`PyscanError`) become one line each.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sqlite3
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import TypeVar

from pyscan.errors import ExitStatus, PyscanError

log = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")
ResultT = TypeVar("ResultT")


class ProgramState(StrEnum):
    """Where a program is in its life; each change is one log line."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"


class _LineFormatter(logging.Formatter):
    """`time level logger message` on one line; UTC, milliseconds.

    Control characters are escaped: names and reasons may come from hostile messages and
    must not be able to forge a line or drive a terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = f"{moment} {record.levelname.lower()} {record.name} {record.getMessage()}"
        if record.exc_info:
            line += " " + self.formatException(record.exc_info)
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def configure_logging(level: int = logging.INFO) -> None:
    """Single-line logs to stderr, for the whole process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)


def note_state(name: str, state: ProgramState) -> None:
    """One log line for a program's change of state."""
    log.info("program=%s state=%s", name, state.value)


class RateBound:
    """A token bucket: `burst` at once, `per_s` in the long run. Counts what it held back.

    What a stranger can cause (rejections, evidence about them) must not fill a disk.
    """

    def __init__(self, burst: int, per_s: float) -> None:
        self._burst = burst
        self._per_s = per_s
        self._tokens = float(burst)
        self._at_s = monotonic()
        self.held_back = 0

    def allow(self) -> bool:
        """Take a token, or count one more that was held back."""
        now_s = monotonic()
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._tokens < 1:
            self.held_back += 1
            return False
        self._tokens -= 1
        return True


def run_program(
    name: str,
    path: Path,
    load: Callable[[Path], ConfigT],
    run: Callable[[ConfigT], Coroutine[None, None, None]],
    *,
    check_only: bool = False,
) -> int:
    """Load the configuration and run the program until a signal; returns the exit status.

    `load` does every check that needs no broker and no hypervisor: with `check_only`
    nothing more happens.
    """
    try:
        config = load(path)
        if check_only:
            sys.stdout.write(f"{path}: ok\n")
            return ExitStatus.APPROVED
        configure_logging()
        note_state(name, ProgramState.STARTING)
        asyncio.run(_until_signal(name, run(config)))
    except ExceptionGroup as group:
        expected, unexpected = group.split((PyscanError, OSError, sqlite3.Error))
        if unexpected is not None or expected is None:
            raise
        return _complain(name, list(_leaves(expected)))
    except (PyscanError, OSError, sqlite3.Error) as error:
        return _complain(name, [error])
    note_state(name, ProgramState.STOPPED)
    return ExitStatus.APPROVED


async def in_thread(call: Callable[[], ResultT]) -> ResultT:
    """Run a blocking call in a thread. Cancelled, it first waits for the call to end.

    A thread cannot be cancelled: what the call uses (a mapping, a key) must not be released
    under it.
    """
    task = asyncio.create_task(asyncio.to_thread(call))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


async def _until_signal(name: str, program: Coroutine[None, None, None]) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(program, name=name)
    stopped_by_signal = False

    def stop() -> None:
        nonlocal stopped_by_signal
        if not stopped_by_signal:
            stopped_by_signal = True
            note_state(name, ProgramState.STOPPING)
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not stopped_by_signal:
            raise


def _complain(name: str, errors: Sequence[Exception]) -> int:
    """Print every failure on one line; the first one gives the exit status."""
    for error in errors:
        advice = "" if isinstance(error, PyscanError) else "; check disk space and permissions"
        sys.stderr.write(f"pyscan {name}: {error}{advice}\n")
    first = errors[0]
    return first.exit_status if isinstance(first, PyscanError) else ExitStatus.FAILED


def _leaves(group: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for error in group.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
