"""Capture: the machine's memory, device state and screen as signed evidence."""

from __future__ import annotations

import shutil
from pathlib import Path

from pyscan import protocol
from pyscan.agent.actions.base import (
    Outcome,
    Situation,
    VmState,
    attempt,
    failed,
    make_directory,
    not_there,
)
from pyscan.agent.drivers.base import Machine
from pyscan.evidence import CaptureWriter, finished_capture, message_body
from pyscan.records import Command
from pyscan.runtime import in_thread


async def capture(situation: Situation) -> Outcome:
    """Write the parts into a directory of the command's own, with a signed manifest.

    Memory is what the action is for; the other parts are taken as far as they can be. A
    capture that a crash interrupted is begun afresh, a finished one is left as it is. The
    machine goes on as it was; memory and devices are of one moment only if it was frozen.
    """
    machine, command = situation.machine, situation.command
    if machine is None or command is None:
        return not_there(situation)
    directory = situation.means.captures / command.id
    manifest = finished_capture(directory)
    if manifest is not None:
        return Outcome(
            situation.before.vm_state,
            f"captured already: {manifest}",
            containment=situation.containment,
        )
    # Beside the capture, so that files are moved and not copied.
    scratch = directory.with_name(f"{command.id}.parts")
    try:
        await in_thread(lambda: shutil.rmtree(scratch, ignore_errors=True))
        make_directory(scratch, situation.before.process)
        undone = await _take(situation, machine, scratch)
        state = VmState.RUNNING if await machine.running() else VmState.PAUSED
        manifest = await _sign(situation, command, state, directory)
    except OSError as error:
        return failed(
            situation, "refused", f"{directory}: {error.strerror}; check space and permissions"
        )
    finally:
        await in_thread(lambda: shutil.rmtree(scratch, ignore_errors=True))
    rest = f"; not done: {'; '.join(undone)}" if undone else ""
    return Outcome(state, f"captured: {manifest}{rest}", containment=situation.containment)


async def _take(situation: Situation, machine: Machine, scratch: Path) -> list[str]:
    """Write all parts into `scratch`; returns what failed."""
    undone = []

    def note(what: str, problem: str) -> None:
        situation.step(f"{what}: {problem or 'written'}")
        if problem:
            undone.append(f"{what}: {problem}")

    if situation.arguments.memory:
        await machine.dump_memory(scratch / "memory.elf")
        note("memory", "")
    if situation.arguments.screenshot:
        note("screen", await attempt(machine.screenshot(scratch / "screen.image")))
    note("devices", await attempt(_describe(machine, scratch)))
    return undone


async def _describe(machine: Machine, scratch: Path) -> None:
    for name, content in (await machine.describe(scratch)).items():
        (scratch / name).write_bytes(content)


async def _sign(situation: Situation, command: Command, state: VmState, directory: Path) -> Path:
    means, scratch = situation.means, directory.with_name(f"{command.id}.parts")
    facts: dict[str, str | int] = {
        "host": means.host,
        "vm": situation.vm,
        "vm_state": state.value,
        "command": command.id,
        "incident": command.cause.incident,
        "verdict": command.cause.verdict,
    }
    topic = protocol.command_topic(command.audience, command.vm)
    quoted = message_body(command.id, topic, means.envelope(command.id))

    def write() -> Path:
        writer = CaptureWriter(directory, facts)
        for file in sorted(scratch.iterdir()):
            writer.add_file(file.name, file)
        writer.add_message("command", quoted)
        return writer.finish(means.key, means.host, means.evidence)

    return await in_thread(write)
