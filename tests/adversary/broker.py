"""The broker: it accepts everybody, keeps everything, and delivers what the test says."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from adversary import packets
from adversary.packets import Published
from pyscan.lab.broker import ADDRESS

DEADLINE_S = 30.0
WINDOW = 64  # the programs' ReceiveMaximum


class Client:
    """One connection of a program."""

    def __init__(self, name: str, writer: asyncio.StreamWriter) -> None:
        self.name = name
        self.subscribed = asyncio.Event()
        self.gone = asyncio.Event()
        self.acknowledged = 0
        self._writer = writer
        self._packet_id = 0
        self._window = asyncio.Semaphore(WINDOW)

    async def deliver(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        dup: bool = False,
        properties: bytes = b"",
    ) -> None:
        """One PUBLISH, as soon as the client's window has room."""
        if qos == 1:
            await self._window.acquire()
        self._packet_id = self._packet_id % 65535 + 1
        await self.send(
            packets.publish(
                topic.encode(),
                payload,
                self._packet_id,
                qos=qos,
                retain=retain,
                dup=dup,
                properties=properties,
            )
        )

    async def send(self, data: bytes) -> None:
        """Any bytes at all."""
        if not self.gone.is_set():
            with suppress(ConnectionError):
                self._writer.write(data)
                await self._writer.drain()

    def took_one(self) -> None:
        self.acknowledged += 1
        self._window.release()

    def close(self) -> None:
        self._writer.close()
        self.gone.set()
        for _ in range(WINDOW):  # whoever waits for room in a dead window
            self._window.release()


class HostileBroker:
    """Runs in the test's own loop; `serve()` gives the port."""

    def __init__(self) -> None:
        self.port = 0
        self.by_topic: defaultdict[str, list[Published]] = defaultdict(list)
        self.connections = 0
        self.confirm: Callable[[Published], bool] = lambda _: True
        self.forward: Callable[[Published], None] = lambda _: None
        self._clients: dict[str, Client] = {}
        self._arrived = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[HostileBroker]:
        server = await asyncio.start_server(self._accept, ADDRESS, 0)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield self
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def client(self, part: str) -> Client:
        """The live connection whose client id contains `part`, subscribed."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                self._arrived.clear()
                for name, client in self._clients.items():
                    if part in name and not client.gone.is_set():
                        await client.subscribed.wait()
                        return client
                await self._arrived.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client: Client | None = None
        try:
            name = packets.client_id(await packets.read(reader))
            client = self._clients[name] = Client(name, writer)
            self.connections += 1
            await client.send(packets.packet(packets.CONNACK, b"\0\0\0"))
            while True:
                await self._handle(client, await packets.read(reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            if client is not None:
                client.close()

    async def _handle(self, client: Client, packet: packets.Packet) -> None:
        if packet.kind == packets.SUBSCRIBE:
            granted = bytes([1]) * packets.subscriptions(packet)
            await client.send(packets.packet(packets.SUBACK, packet.body[:2] + b"\0" + granted))
            client.subscribed.set()
            self._arrived.set()
        elif packet.kind == packets.PUBLISH:
            said = packets.published(packet)
            if self.confirm(said):
                self.by_topic[said.topic].append(said)
                await client.send(packets.packet(packets.PUBACK, said.packet_id.to_bytes(2)))
                self.forward(said)
        elif packet.kind == packets.PUBACK:
            client.took_one()
        elif packet.kind == packets.PINGREQ:
            await client.send(packets.packet(packets.PINGRESP, b""))
