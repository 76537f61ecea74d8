"""Fixtures that start real parts: a guest in QEMU and a private broker."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pyscan.approved import LinuxApproved
from pyscan.lab.broker import Broker, Role
from pyscan.lab.guest import Guest, GuestOptions
from pyscan.lab.process import RunDirectory, unwind_on

BootGuest = Callable[..., Guest]

#: One identity for each role.
IDENTITIES = {
    "card-1": Role.MONITOR,
    "control-1": Role.CONTROL,
    "host-1": Role.AGENT,
    "observer-1": Role.OBSERVER,
}


@pytest.fixture(scope="session", autouse=True)
def _children_hear_sigint() -> None:
    """A suite that runs in the background ignores SIGINT, and its children would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _clean_on_sigterm() -> Iterator[None]:
    """A test run that is told to stop removes its guests and RAM files, too."""
    with unwind_on(signal.SIGTERM):
        yield


@pytest.fixture(scope="session")
def guest_dir() -> Path:
    """Where set-up put the guest's kernel and initramfs."""
    path = Path(__file__).parents[1] / "build/guest"
    if not (path / "guest.json").is_file():
        pytest.fail(f"{path} has no test guest: run `make setup`")
    return path


@pytest.fixture(scope="session")
def approved_linux(guest_dir: Path) -> LinuxApproved:
    """The guest's kernel, compiled from its package once for all tests."""
    del guest_dir  # what is compiled lies there
    from matrix.examine import approved_kernel

    return approved_kernel()


@pytest.fixture
def run_directory() -> Iterator[RunDirectory]:
    """A private directory for sockets, and RAM files; gone after the test."""
    with RunDirectory() as run:
        yield run


@pytest.fixture
def boot_guest(guest_dir: Path) -> Iterator[BootGuest]:
    """Boot a guest of one's own and wait until it has settled: boot_guest(machine=Machine.PC)."""
    with ExitStack() as stack:

        def boot(**options: Any) -> Guest:
            run = stack.enter_context(RunDirectory())
            guest = stack.enter_context(Guest(GuestOptions(guest_dir, **options), run))
            guest.wait_ready()
            return guest

        yield boot


@pytest.fixture(scope="session")
def shared_guest(guest_dir: Path) -> Iterator[Guest]:
    """A settled guest for tests that neither write its memory nor pause it."""
    with RunDirectory() as run, Guest(GuestOptions(guest_dir), run) as guest:
        guest.wait_ready()
        yield guest


@pytest.fixture
def broker(run_directory: RunDirectory) -> Iterator[Broker]:
    """A broker of one's own that knows IDENTITIES."""
    with Broker(run_directory, IDENTITIES) as running:
        yield running
