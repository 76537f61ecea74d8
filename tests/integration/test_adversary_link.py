"""The link against a broker that breaks the protocol: it comes back, and stays small."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator

import pytest
from adversary.arena import memory_kib
from adversary.broken import TOPIC, by_chance, by_hand, unasked
from adversary.broker import HostileBroker

from pyscan import transport
from pyscan.lab.broker import ADDRESS
from pyscan.transport import Link, LinkSettings

NAME = "under-attack"
DEADLINE_S = 15.0
GROWTH_KIB_MAX = 32 << 10


@pytest.fixture
async def broker() -> AsyncIterator[HostileBroker]:
    async with HostileBroker().serve() as running:
        yield running


@pytest.fixture
async def link(broker: HostileBroker, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Link]:
    monkeypatch.setattr(transport, "BACKOFF_MAX_S", 0.01)  # hundreds of connections
    link = Link(LinkSettings(ADDRESS, broker.port, NAME), [TOPIC.decode()])
    task = asyncio.create_task(link.run())
    yield link
    assert not task.done(), "the link gave up"
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


async def usable(broker: HostileBroker, link: Link) -> None:
    """A message still arrives, and can be acknowledged."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            client = await broker.client(NAME)
            await link.wait_online()
            await client.deliver(TOPIC.decode(), b"good")
            while not client.gone.is_set() and not client.acknowledged:
                try:
                    async with asyncio.timeout(0.2):
                        message = await anext(link.messages)
                except TimeoutError:
                    continue
                message.acknowledge()
                if message.payload == b"good":
                    return


async def test_broken_packets(
    broker: HostileBroker, link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    memory = memory_kib(os.getpid())
    tries = [*by_hand(), *by_chance(250, random.Random(1729))]
    for data in tries:
        client = await broker.client(NAME)
        await client.send(data)
        await asyncio.sleep(0.005)
        client.close()
        await asyncio.wait_for(client.gone.wait(), DEADLINE_S)
    await usable(broker, link)
    assert broker.connections > len(tries)
    assert memory_kib(os.getpid()) - memory < GROWTH_KIB_MAX
    assert [record for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize("name", unasked())
async def test_what_would_cost_memory_ends_the_connection(
    broker: HostileBroker, link: Link, name: str
) -> None:
    client = await broker.client(NAME)
    data = unasked()[name]
    memory = memory_kib(os.getpid())
    sending = asyncio.create_task(client.send(data))
    async with asyncio.timeout(DEADLINE_S):
        await client.gone.wait()
    await asyncio.wait({sending})
    assert memory_kib(os.getpid()) - memory < GROWTH_KIB_MAX
    await usable(broker, link)


async def test_a_broker_that_throws_us_out_does_not_set_the_pace(
    broker: HostileBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accepted and thrown out again: each attempt is one more that failed."""
    attempts: list[int] = []

    def at_once(attempt: int) -> float:
        attempts.append(attempt)
        return 0.0

    monkeypatch.setattr(transport, "backoff_s", at_once)
    link = Link(LinkSettings(ADDRESS, broker.port, NAME), [TOPIC.decode()])
    task = asyncio.create_task(link.run())
    for _ in range(5):
        client = await broker.client(NAME)
        await link.wait_online()
        client.close()
    await usable(broker, link)
    task.cancel()
    await asyncio.wait({task})
    assert attempts[:5] == [1, 2, 3, 4, 5]
