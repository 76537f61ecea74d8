"""The monitor program on a real guest that is known by its package and is rebooted."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from operator_shell import Operator
from site_parts import DEADLINE_S, HOST, MONITOR, VM, Site

from pyscan.approved import LinuxApproved, load_approved, save_linux
from pyscan.evidence import verify_directory
from pyscan.keys import KeyRing, PublicKey, SigningKey
from pyscan.lab.broker import Broker
from pyscan.lab.guest import Guest, TamperKind
from pyscan.lab.process import RunDirectory
from pyscan.qmp import query
from pyscan.sources import build_uri

pytestmark = pytest.mark.guest

BootGuest = Callable[..., Guest]
#: The monitor's words, in the order in which it said them.
WORDS = re.compile(r"verdict=(\w+)|base=(0x[0-9a-f]+)")


class Watched(Site):
    """A site whose monitor watches one guest; two kernels are approved, the guest's second."""

    def __init__(self, run: RunDirectory, broker: Broker, guest: Guest, files: list[Path]) -> None:
        super().__init__(run, broker)
        self.guest = guest
        approved = ", ".join(f'"{path}"' for path in files)
        self.config = self.write(
            "monitor",
            MONITOR,
            f"""
[trust]
approvers = ["{files[0].with_suffix(".pub")}", "{files[1].with_suffix(".pub")}"]
[sweep]
interval_ms = 50
[[target]]
name = "web-1"
host = "{HOST}"
vm = "{VM}"
source = "{build_uri("qemu", guest.monitor_qmp)}"
approved = [{approved}]
""",
        )

    def said(self) -> list[str]:
        """Verdicts and kernels' bases from the monitor's log."""
        return [word or base for word, base in WORDS.findall(self.log("monitor").read_text())]

    def wait_said(self, *words: str, after: int = 0) -> int:
        """Wait until all words are said after the first `after`; returns how many are."""
        self.wait(lambda: set(words) <= set(self.said()[after:]), f"{words} from the monitor")
        return len(self.said())

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition that no event tells."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline_s, f"{what} did not happen"
            time.sleep(0.02)

    @property
    def verdict(self) -> str:
        """The last verdict."""
        return [word for word in self.said() if not word.startswith("0x")][-1]


@pytest.fixture
def site(
    operator: Operator, run_directory: RunDirectory, broker: Broker, boot_guest: BootGuest
) -> Iterator[Watched]:
    key = SigningKey.generate()
    ring = KeyRing.of({"approver": PublicKey.load(operator.public_key)})
    kernel, _ = load_approved(operator.approved, ring)
    assert isinstance(kernel, LinuxApproved)
    anchors = [replace(anchor, data=b"\0" * len(anchor.data)) for anchor in kernel.anchors]
    other = run_directory.path / "other.approved"
    save_linux(replace(kernel, release="other", anchors=tuple(anchors), modules={}), other, key)
    key.public.save(other.with_suffix(".pub"))
    operator.approved.with_suffix(".pub").write_bytes(operator.public_key.read_bytes())
    guest = boot_guest(extra=("-action", "reboot=reset"))
    site = Watched(run_directory, broker, guest, [other, operator.approved])
    yield site
    print(site.log("monitor").read_text())  # shown on failure


def reboot(guest: Guest) -> int:
    """Reset the guest until the kernel has another base; returns it."""
    before = guest.symbol("_text")
    while True:
        query(guest.lab_qmp, [("system_reset", None)])
        guest.wait_ready()
        if (base := guest.symbol("_text")) != before:
            return base


def test_a_guest_that_reboots_and_is_tampered_with(site: Watched) -> None:
    guest = site.guest
    with site.start("monitor", site.config) as monitor:
        seen = site.wait_said("approved", f"{guest.symbol('_text'):#x}")
        base = reboot(guest)
        site.wait_said(f"{base:#x}", after=seen)
        # Neither what is left of the old kernel nor a starting one is taken for an attack.
        assert "unapproved" not in site.said()
        # The new kernel is approved by itself: had it not been, it would have been said.
        site.wait(lambda: site.verdict == "approved", "approval of the new kernel")
        seen = len(site.said())

        guest.load_tamper(TamperKind.TEXT)
        seen = site.wait_said("unapproved", after=seen)
        guest.fire()
        log = site.log("monitor")
        site.wait(lambda: "machine_real_restart+" in log.read_text(), "finding of the change")
        guest.restore()
        guest.shell("rmmod tamper")
        seen = site.wait_said("approved", after=seen)

        guest.close()
        site.wait_said("undecided", after=seen)
        assert site.verdict == "undecided"
        assert monitor.stop() == 0, monitor.failure("did not stop cleanly")
    ring = KeyRing.of({MONITOR: site.keys[MONITOR].public})
    assert verify_directory(site.path / "monitor" / "evidence", ring).messages_unverified == 0
