"""TLS with certificates on both sides: who gets in, who does not, and what the link says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from pyscan import protocol
from pyscan.errors import TransportError
from pyscan.lab.broker import ADDRESS, Broker, Role
from pyscan.lab.process import RunDirectory
from pyscan.transport import Link, LinkSettings, LinkState, Publication
from pyscan.trust.authority import Authority

IDENTITIES = {"control-1": Role.CONTROL, "host-1": Role.AGENT}
TOPIC = protocol.command_topic("host-1", "web-1")
DEADLINE_S = 15


@pytest.fixture
def broker(run_directory: RunDirectory) -> Iterator[Broker]:
    with Broker(run_directory, IDENTITIES, tls=True) as running:
        yield running


def settings(broker: Broker, name: str, **changes: Path | None) -> LinkSettings:
    mutual = LinkSettings(
        ADDRESS,
        broker.port,
        f"test-{name}",
        ca=broker.authority.path("ca.pem"),
        crl=broker.authority.path("crl.pem"),
        certificate=broker.certificate(name),
        key=broker.certificate_key(name),
    )
    return replace(mutual, **changes)  # type: ignore[arg-type]


class Running:
    """A link's task; `settled` waits until it is online or has failed an attempt."""

    def __init__(self, link: Link) -> None:
        self.link = link

    async def __aenter__(self) -> Link:
        self._task = asyncio.create_task(self.link.run())
        async with asyncio.timeout(DEADLINE_S):
            while self.link.state is not LinkState.ONLINE and not self.link.problem:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return self.link

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


async def test_programs_with_certificates_reach_each_other(broker: Broker) -> None:
    commands = protocol.subscription(protocol.TopicKind.COMMAND, "host-1")
    async with (
        Running(Link(settings(broker, "host-1"), [commands])) as agent,
        Running(Link(settings(broker, "control-1"))) as control,
    ):
        assert (agent.problem, control.problem) == ("", "")
        await control.publish(Publication(TOPIC, b"order"))
        async with asyncio.timeout(DEADLINE_S):
            assert (await anext(agent.messages)).payload == b"order"
        # The common name is the user name, so the access list holds.
        with pytest.raises(TransportError, match="check its access list"):
            await agent.publish(Publication(TOPIC, b"forged"))


async def test_strangers_stay_out(broker: Broker, tmp_path: Path) -> None:
    """No certificate, one of another authority, one that was revoked."""
    foreign = Authority.create(tmp_path / "root", "foreign").issue(Role.AGENT, "host-1", tmp_path)
    async with Running(Link(settings(broker, "host-1"))) as link:
        assert link.problem == ""
    broker.authority.revoke("host-1")
    broker.stop()
    broker.start()
    nobody = Link(settings(broker, "host-1", certificate=None, key=None))
    stranger = Link(
        settings(broker, "host-1", certificate=foreign.certificate, key=foreign.tls_key)
    )
    revoked = Link(settings(broker, "host-1"))
    known = Link(settings(broker, "control-1"))
    running = [Running(link) for link in (nobody, stranger, revoked, known)]
    await asyncio.gather(*(each.__aenter__() for each in running))
    try:
        assert known.problem == ""
        for link in (nobody, stranger, revoked):
            assert link.state is not LinkState.ONLINE
    finally:
        await asyncio.gather(*(each.__aexit__() for each in running))


async def test_a_broker_of_another_authority_is_not_spoken_to(
    broker: Broker, tmp_path: Path
) -> None:
    foreign = Authority.create(tmp_path / "root", "foreign")
    ca, crl = foreign.path("ca.pem"), foreign.path("crl.pem")
    async with Running(Link(settings(broker, "host-1", ca=ca, crl=crl))) as link:
        assert "its certificate is refused" in link.problem
        assert "check [mqtt] host, ca and crl" in link.problem


async def test_a_client_certificate_is_no_broker(run_directory: RunDirectory) -> None:
    """Who stole an agent's certificate cannot stand in for the broker with it."""
    with Broker(run_directory, IDENTITIES, tls=True) as broker:
        broker.stop()
        for end in ("pem", "tls.key"):
            stolen = broker.certificate("host-1").with_suffix("." + end).read_bytes()
            (run_directory.path / "broker" / f"broker.{end}").write_bytes(stolen)
        broker.start()
        async with Running(Link(settings(broker, "control-1"))) as link:
            assert "its certificate is refused" in link.problem


async def test_a_revoked_broker_is_not_spoken_to(broker: Broker) -> None:
    broker.authority.revoke("broker")
    async with Running(Link(settings(broker, "host-1"))) as link:
        assert "certificate revoked" in link.problem


async def test_a_rotated_certificate_is_used_from_the_next_connection_on(
    broker: Broker, tmp_path: Path
) -> None:
    """Replacing the files is enough: nothing has to be restarted."""
    link = Link(settings(broker, "host-1"))
    async with Running(link):
        bundle = broker.authority.rotate("host-1", tmp_path, overlap_days=0)
        assert bundle.certificate is not None
        assert bundle.tls_key is not None
        bundle.certificate.replace(broker.certificate("host-1"))
        bundle.tls_key.replace(broker.certificate_key("host-1"))
        broker.authority.publish()  # from now on the old certificate is on the list
        broker.stop()
        broker.start()
        async with asyncio.timeout(DEADLINE_S):
            while link.state is LinkState.ONLINE:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await link.wait_online()
