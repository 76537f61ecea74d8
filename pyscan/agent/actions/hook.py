"""Revoking a machine's credentials: a program of the site's own, never a shell."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import Final

from pyscan.agent.actions.base import Means

#: All that the program finds in its environment.
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


async def revoke(means: Means, vm: str) -> str:
    """Run the configured program with the machine's name; what went wrong, or nothing.

    It runs in a session of its own, so that what it started ends with it when time is up.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *means.revoke,
            vm,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=_ENVIRONMENT,
            start_new_session=True,
        )
    except OSError as error:
        return f"{means.revoke[0]}: {error.strerror}"
    try:
        async with asyncio.timeout(means.revoke_timeout_s):
            status = await process.wait()
    except TimeoutError:
        return f"{means.revoke[0]}: not done after {means.revoke_timeout_s} s"
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return f"{means.revoke[0]}: exit status {status}" if status else ""
