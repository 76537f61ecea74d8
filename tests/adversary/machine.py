"""A hypervisor that is none: it speaks QMP on a socket and counts what is done to it.

On every connection the machine runs anew, so each time that a command is carried out shows:
a machine that is paused already would hide a second `stop`.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

EFFECTS = frozenset({"stop", "cont", "quit", "set_link", "system_reset", "dump-guest-memory"})
GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}}


class Machine:
    """Serves any number of QMP clients at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.effects: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Machine]:
        server = await asyncio.start_unix_server(self._accept, self.path)
        async with server:
            yield self
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running = True
        text = ""
        with suppress(ConnectionError):
            writer.write(json.dumps(GREETING).encode() + b"\r\n")
            while data := await reader.read(65536):
                text += data.decode()
                while text := text.lstrip():
                    try:
                        request, end = json.JSONDecoder().raw_decode(text)
                    except json.JSONDecodeError:
                        break
                    text = text[end:]
                    name = request.get("execute")
                    if name in EFFECTS:
                        self.effects[name] += 1
                    running = {"stop": False, "cont": True}.get(name, running)
                    answer = {**_answer(name, running), "id": request.get("id")}
                    writer.write(json.dumps(answer).encode() + b"\r\n")
                    await writer.drain()
                    if name == "quit":
                        return
        writer.close()


def _answer(name: str, running: bool) -> dict[str, object]:
    if name == "query-status":
        status = "running" if running else "paused"
        return {"return": {"running": running, "status": status, "singlestep": False}}
    if name in EFFECTS or name == "qmp_capabilities":
        return {"return": {}}
    if name == "qom-list":
        return {"return": []}
    return {"error": {"class": "CommandNotFound", "desc": f"no {name} here"}}
