"""The QMP helper against a real QEMU without a machine (it starts in a tenth of a second)."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyscan.errors import DriverError
from pyscan.lab.process import Child
from pyscan.qmp import EVENTS_MAX, QmpSession, query

STATUS = ("query-status", None)


Qemu = tuple[Path, Child]


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Qemu]:
    path = tmp_path / "qmp.sock"
    # fmt: off
    command = ["qemu-system-x86_64", "-M", "none", "-S", "-display", "none", "-nodefaults",
               "-qmp", f"unix:{path},server=on,wait=off"]
    # fmt: on
    with Child("QEMU", command, tmp_path / "qemu.log") as child:
        child.wait_until(lambda: listens(path), timeout_s=20, what="its QMP socket")
        yield path, child


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


async def test_commands_and_peer(qemu: Qemu) -> None:
    path, process = qemu
    async with QmpSession(path) as session:
        assert session.peer_pid == process.pid
        status = await session.execute("query-status")
        assert isinstance(status, dict)
        assert status["status"] == "prelaunch"
        with pytest.raises(DriverError, match="not been found") as caught:
            await session.execute("no-such-command")
        assert caught.value.reason == "refused"
        assert await session.execute("qom-get", {"path": "/machine", "property": "type"})


async def test_events(qemu: Qemu) -> None:
    async with QmpSession(qemu[0]) as session:
        events = session.events("STOP", "RESUME")
        everything = session.events()
        await session.execute("cont")
        await session.execute("stop")
        assert [(await anext(events))["event"] for _ in range(2)] == ["RESUME", "STOP"]
        assert (await anext(everything))["event"] == "RESUME"


async def test_an_unread_event_queue_is_bounded(
    qemu: Qemu,
) -> None:
    async with QmpSession(qemu[0]) as session:
        events = session.events("STOP", "RESUME")
        for _ in range(EVENTS_MAX // 2 + 10):
            await session.execute("cont")
            await session.execute("stop")
        await session.execute("quit")
        names = [(await anext(events))["event"] for _ in range(EVENTS_MAX)]
        assert names == ["RESUME", "STOP"] * (EVENTS_MAX // 2)
        with pytest.raises(DriverError):
            await anext(events)


async def test_a_process_that_dies(qemu: Qemu) -> None:
    path, process = qemu
    async with QmpSession(path) as session:
        events = session.events("STOP")
        waiting = asyncio.ensure_future(anext(events))
        process.kill()
        with pytest.raises(DriverError, match="connection lost") as caught:
            await waiting
        assert caught.value.reason == "unreachable"
        with pytest.raises(DriverError) as caught:
            await session.execute("query-status")
        assert caught.value.reason == "unreachable"


async def test_a_stopped_process_times_out(qemu: Qemu) -> None:
    path, process = qemu
    async with QmpSession(path, timeout_s=0.3) as session:
        process.signal(signal.SIGSTOP)
        try:
            with pytest.raises(DriverError, match="no answer to query-status") as caught:
                await session.execute("query-status")
            assert caught.value.reason == "timeout"
        finally:
            process.signal(signal.SIGCONT)
        # The late answer belongs to nobody and confuses nobody.
        status = await session.execute("query-status", timeout_s=5)
        assert isinstance(status, dict)


async def test_a_second_client_times_out(qemu: Qemu) -> None:
    async with QmpSession(qemu[0]):
        with pytest.raises(DriverError, match="did not greet") as caught:
            async with QmpSession(qemu[0], timeout_s=0.2):
                pass
        assert caught.value.reason == "timeout"
    async with QmpSession(qemu[0]) as session:
        assert await session.execute("query-status")


def test_query(qemu: Qemu) -> None:
    answers = query(qemu[0], [STATUS, ("query-version", None)])
    assert len(answers) == 2
    with pytest.raises(DriverError) as caught:
        query(qemu[0], [STATUS, ("no-such-command", {"a": 1})])
    assert caught.value.reason == "refused"


async def test_query_from_a_thread_beside_a_loop(
    qemu: Qemu,
) -> None:
    (answer,) = await asyncio.to_thread(query, qemu[0], [STATUS])
    assert isinstance(answer, dict)


def unreachable_socket(kind: str, folder: Path) -> Path:
    path = folder / "qmp.sock"
    if kind == "dead":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "file":
        path.write_text("not a socket")
    elif kind == "long":
        path = folder / ("x" * 200)
    return path


@pytest.mark.parametrize("kind", ["missing", "dead", "file", "long"])
def test_no_socket(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DriverError, match="cannot reach QEMU") as caught:
        query(unreachable_socket(kind, tmp_path), [STATUS])
    assert caught.value.reason == "unreachable"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "greeting",
    [b"", b"\x00\xff not json\n", b"[1]\n", b'{"QMP": 1}\n', b"x" * (2 << 20) + b"\n"],
    ids=["closes", "noise", "list", "foreign", "endless"],
)
def test_a_peer_that_is_not_qemu(tmp_path: Path, greeting: bytes) -> None:
    path = tmp_path / "qmp.sock"
    with socket.create_server(str(path), family=socket.AF_UNIX) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                try:
                    client.sendall(greeting)
                except OSError:
                    return  # it hung up on us, as it should

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(DriverError) as caught:
            query(path, [STATUS], timeout_s=5)
        thread.join()
    assert caught.value.reason == "unreachable"
