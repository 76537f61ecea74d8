"""Kill: the machine's process is gone, and the kernel of the host says so."""

from __future__ import annotations

from typing import Final

from pyscan.agent.actions.base import Outcome, Situation, VmState, failed
from pyscan.agent.drivers.base import Driver, Machine
from pyscan.agent.process import ProcessHandle
from pyscan.errors import DriverError

#: How long a machine may take to end after being asked to, and after SIGKILL.
QUIT_WAIT_S: Final = 2.0
KILL_WAIT_S: Final = 5.0


async def kill(situation: Situation) -> Outcome:
    """End the machine: by its hypervisor, and by SIGKILL if that does not help."""
    machine, process = situation.machine, situation.before.process
    if situation.before.vm_state is VmState.GONE:
        return _gone(situation, "its process was gone already")
    if process is None:
        if machine is not None and await _try_quit(machine) and await _is_gone(situation.driver):
            return _gone(situation, "ended by its hypervisor")
        return failed(
            situation, "unreachable", "its process is not known, so its end is not sure; "
            "set [[vm]] pidfile", VmState.UNKNOWN
        )  # fmt: skip
    with ProcessHandle(process) as handle:
        if machine is not None and await _try_quit(machine) and await handle.wait_gone(QUIT_WAIT_S):
            return _gone(situation, f"process {process.pid} ended by quit")
        handle.kill()
        if await handle.wait_gone(KILL_WAIT_S):
            return _gone(situation, f"process {process.pid} ended by SIGKILL")
    return failed(
        situation,
        "timeout",
        f"process {process.pid} still there {KILL_WAIT_S:g} s after SIGKILL; "
        "the host's kernel holds it",
        VmState.UNKNOWN,
    )


def _gone(situation: Situation, detail: str) -> Outcome:
    owed = situation.containment
    files = [layer.file for layer in owed.layers.values()] if owed else []
    kept = f"; what it wrote last is in {', '.join(files)}" if files else ""
    return Outcome(VmState.GONE, f"{detail}{kept}")


async def _try_quit(machine: Machine) -> bool:
    """Whether the request was accepted; the connection may well break before the answer."""
    try:
        await machine.quit()
    except DriverError as error:
        return error.reason in {"unreachable", "gone"}
    return True


async def _is_gone(driver: Driver) -> bool:
    """Whether the hypervisor itself says that there is no such machine any more."""
    try:
        async with driver.attach():
            return False
    except DriverError as error:
        return error.reason == "gone"
