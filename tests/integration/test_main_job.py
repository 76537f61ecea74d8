"""The whole chain on a real guest, with parts of it killed in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyscan.demo.appliance import IDENTITIES, OBSERVER, Appliance, Wiring
from pyscan.demo.observer import Observer
from pyscan.evidence import verify_directory
from pyscan.keys import KeyRing
from pyscan.lab.broker import Broker
from pyscan.lab.guest import Guest
from pyscan.lab.process import RunDirectory
from pyscan.records import Action, Command, Report, ReportState, Verdict, VerdictState
from pyscan.transport import LinkSettings

pytestmark = pytest.mark.guest

TIMEOUT_S = 30


@dataclass
class Site:
    """A watched guest, its appliance, and a witness."""

    guest: Guest
    broker: Broker
    appliance: Appliance
    observer: Observer
    directory: Path

    def wait_verdict(self, state: VerdictState) -> Verdict:
        def look() -> Verdict | None:
            self.appliance.check_alive()
            found = self.observer.first(Verdict, lambda verdict: verdict.state is state)
            return found and found.content

        return self.observer.wait(look, TIMEOUT_S, f"verdict {state}")

    def wait_success(self) -> Report:
        def look() -> Report | None:
            self.appliance.check_alive()
            found = self.observer.first(Report, lambda r: r.state is ReportState.SUCCEEDED)
            return found and found.content

        return self.observer.wait(look, TIMEOUT_S, "report of success")

    def assert_frozen_once(self) -> None:
        self.appliance.stop()
        self.observer.close()
        assert self.guest.status() == "paused"
        assert len(self.observer.stops_ns) == 1
        ring = KeyRing.of(self.appliance.writers(), "evidence")
        verify_directory(self.directory, ring)  # raises when anything is missing or open


@pytest.fixture
def site(boot_guest: Callable[..., Guest], run_directory: RunDirectory) -> Iterator[Site]:
    guest = boot_guest()
    with ExitStack() as stack:
        broker = stack.enter_context(Broker(run_directory, IDENTITIES))
        directory = run_directory.path / "appliance"
        directory.mkdir()
        source = f"qemu:{guest.monitor_qmp}"
        wiring = Wiring(source, guest.agent_qmp, guest.pid_file, Action.FREEZE)
        appliance = stack.enter_context(Appliance(directory, broker, wiring))
        appliance.enrol()
        password = broker.password_file(OBSERVER).read_text().strip()
        settings = LinkSettings("127.0.0.1", broker.port, OBSERVER, OBSERVER, password)
        observer = stack.enter_context(
            Observer(settings, appliance.rings(), guest.lab_qmp, guest.pid)
        )
        observer.wait_online(TIMEOUT_S)
        yield Site(guest, broker, appliance, observer, directory)


def test_a_broker_that_is_down_while_the_guest_is_tampered_with_loses_nothing(site: Site) -> None:
    site.appliance.start()
    site.wait_verdict(VerdictState.APPROVED)
    site.broker.kill()
    with site.guest.ram.watch(site.guest.text_physical()) as watch:
        site.guest.ram.flip(site.guest.text_physical(), 0x01)
        watch.wait(TIMEOUT_S)
    site.appliance.wait_logged("monitor", "verdict=unapproved", TIMEOUT_S)
    site.broker.start()
    site.wait_verdict(VerdictState.UNAPPROVED)
    report = site.wait_success()
    assert report.vm_state == "paused"
    command = site.observer.first(Command, lambda command: command.id == report.command)
    assert command is not None
    # The monitor says it again with a new id when a killed broker has lost the first one.
    cause = command.content.cause.verdict
    verdict = site.observer.first(Verdict, lambda verdict: verdict.id == cause)
    assert verdict is not None
    assert verdict.content.state is VerdictState.UNAPPROVED
    site.assert_frozen_once()


def test_programs_that_are_killed_and_started_again_finish_the_job(site: Site) -> None:
    site.appliance.start()
    site.wait_verdict(VerdictState.APPROVED)
    for program in ("control", "agent"):
        site.appliance.kill(program)
    site.guest.ram.flip(site.guest.text_physical(), 0x01)
    site.appliance.wait_logged("monitor", "verdict=unapproved", TIMEOUT_S)
    site.appliance.kill("monitor")
    for program in ("monitor", "control", "agent"):
        site.appliance.start_program(program)
    report = site.wait_success()
    assert report.vm_state == "paused"
    site.assert_frozen_once()


def test_a_guest_that_is_only_watched_stays_approved_while_it_works(site: Site) -> None:
    """Disk, network and shells run in the guest during a few hundred sweeps."""
    site.appliance.start()
    site.wait_verdict(VerdictState.APPROVED)
    site.guest.shell("for i in 1 2 3 4 5 6 7 8; do ls -lR /sys/class >/dev/null; done")
    site.guest.shell("dd if=/dev/vda of=/dev/null bs=64k iflag=direct; ping -c 2 10.0.2.2; true")

    def swept() -> bool | None:
        statistics = site.observer.sweeps()
        return (bool(statistics) and statistics[-1]["targets"][0]["sweeps"] >= 200) or None

    site.observer.wait(swept, TIMEOUT_S, "200 sweeps")
    bad = site.observer.first(Verdict, lambda verdict: verdict.state is not VerdictState.APPROVED)
    assert bad is None
    assert site.observer.stops_ns == ()
