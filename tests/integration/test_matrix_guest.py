"""Scenarios and attacks do in a real guest what they say, and the product sees them so.

`make matrix` examines all boots and all attacks; here a few stand for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from matrix import examine as product
from matrix.attacks import ATTACKS, Attack, Struck, strike
from matrix.configurations import BOOTS
from matrix.run import INITRD, run_boot
from matrix.scenario import Scenario, enter

from pyscan.lab.guest import Guest, GuestOptions
from pyscan.lab.process import RunDirectory

pytestmark = pytest.mark.guest

BootGuest = Callable[..., Guest]

PARAMETERS = "/sys/module/probes/parameters"
MODULES_MIN = 50


@pytest.fixture(scope="module")
def used_guest(guest_dir: Path) -> Iterator[Guest]:
    """A guest that goes from one scenario to the next."""
    options = GuestOptions(guest_dir, initrd=INITRD)
    with RunDirectory() as run, Guest(options, run) as guest:
        guest.wait_ready()
        yield guest


def site(guest: Guest, symbol: str, length: int = 5) -> bytes:
    """Bytes at a symbol of the kernel, from outside."""
    code = int(guest.shell("grep 'Kernel code' /proc/iomem").split("-")[0], 16)
    return guest.ram.read(code + guest.symbol(symbol) - guest.symbol("_text"), length)


def test_modules_are_loaded_with_what_they_need(used_guest: Guest) -> None:
    refused = enter(used_guest, [Scenario.MODULES])
    assert refused == ()
    assert len(used_guest.shell("cat /proc/modules").splitlines()) >= MODULES_MIN


def test_probes_have_the_form_they_are_named_for(used_guest: Guest) -> None:
    nop = bytes.fromhex("0f1f440000")
    places = ("vfs_getattr", "vfs_statx", "vfs_open", "vfs_read")
    assert [site(used_guest, name) for name in places] == [nop] * 4
    enter(
        used_guest,
        [
            *(Scenario.INT3_PROBE, Scenario.JUMP_PROBE),
            *(Scenario.FTRACE_PROBE, Scenario.RETURN_PROBE),
        ],
    )
    int3, jump = (site(used_guest, name, 6) for name in places[:2])
    assert (int3[5], jump[5]) == (0xCC, 0xE9)
    assert [site(used_guest, name)[0] for name in places[2:]] == [0xE8, 0xE8]
    before = int(used_guest.shell(f"cat {PARAMETERS}/hits"))
    used_guest.shell("ls -l /bin")
    assert int(used_guest.shell(f"cat {PARAMETERS}/hits")) > before
    used_guest.shell(f"echo all >{PARAMETERS}/remove")
    assert [site(used_guest, name) for name in places] == [nop] * 4


def test_key_and_call_are_flipped_and_put_back(used_guest: Guest) -> None:
    used_guest.shell(f"echo 0 >{PARAMETERS}/key; echo 0 >{PARAMETERS}/call")
    assert used_guest.shell(f"cat {PARAMETERS}/answer").strip() == "0x0"
    enter(used_guest, [Scenario.KEY_AND_CALL])
    assert used_guest.shell(f"cat {PARAMETERS}/answer").strip() == "0x1f"


def test_filter_tracers_and_tracepoints(used_guest: Guest) -> None:
    enter(used_guest, [Scenario.FILTER, Scenario.TRACEPOINTS])
    assert "bpf_prog_" in used_guest.shell("grep -m 1 bpf_prog_ /proc/kallsyms")
    used_guest.shell("echo 0 >/sys/kernel/tracing/events/enable", 60)
    enter(used_guest, [Scenario.FUNCTION_GRAPH])
    assert site(used_guest, "vfs_open")[0] == 0xE8
    used_guest.shell("echo nop >/sys/kernel/tracing/current_tracer", 120)
    assert site(used_guest, "vfs_open") == bytes.fromhex("0f1f440000")


def test_load_goes_round(used_guest: Guest) -> None:
    enter(used_guest, [Scenario.LOAD])
    first = int(used_guest.shell("cat /tmp/rounds"))
    used_guest.shell(f"while test $(cat /tmp/rounds) -le {first}; do usleep 100000; done", 120)


def assert_struck(guest: Guest, attack: Attack, struck: Struck) -> None:
    """The guest lives, and its memory holds what the attack says that it wrote."""
    assert guest.shell("echo lives").strip() == "lives"
    assert (struck.old != struck.new) == (attack.name not in {"none", "text-alias"})
    if struck.address:
        content = int.from_bytes(guest.ram.read(struck.physical, 8), "little")
        length = max(1, (max(struck.old, struck.new).bit_length() + 7) // 8)
        assert content & ((1 << 8 * length) - 1) == struck.new


def test_attacks_that_outlive_their_module(boot_guest: BootGuest) -> None:
    guest = boot_guest(initrd=INITRD, cpus=2)
    # Backwards: a list that was emptied has no hook to change.
    for attack in (attack for attack in reversed(ATTACKS) if not attack.stays):
        struck = strike(guest, attack)
        assert struck.address, attack.name
        assert_struck(guest, attack, struck)
        assert not guest.shell("cat /proc/modules").startswith("attack "), attack.name


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("none", True),
        ("idt-gate", True),
        ("ftrace-ops", True),
        ("module-hidden", False),
        ("modules-hidden-from-proc", False),
    ],
)
def test_attacks_that_need_their_module(boot_guest: BootGuest, name: str, listed: bool) -> None:
    guest = boot_guest(initrd=INITRD, memory_mib=256)
    (attack,) = (attack for attack in ATTACKS if attack.name == name)
    struck = strike(guest, attack)
    assert_struck(guest, attack, struck)
    assert guest.shell("cat /proc/modules").startswith("attack ") == listed
    assert guest.shell("test -d /sys/module/attack && echo loaded").strip() == "loaded"


def test_attack_changes_nothing_else(boot_guest: BootGuest) -> None:
    """The hook of one site leaves every other byte of the kernel's text as it was."""
    guest = boot_guest(initrd=INITRD)
    begin, end = guest.symbol("_text"), guest.symbol("_etext")
    code = int(guest.shell("grep 'Kernel code' /proc/iomem").split("-")[0], 16)
    before = np.frombuffer(guest.ram.read(code, end - begin), np.uint8)
    (attack,) = (attack for attack in ATTACKS if attack.name == "ftrace-site-into-kernel")
    struck = strike(guest, attack)
    after = np.frombuffer(guest.ram.read(code, end - begin), np.uint8)
    changed = np.flatnonzero(before != after)
    assert len(changed)
    assert begin + int(changed[0]) >= struck.address
    assert begin + int(changed[-1]) < struck.address + 5


@pytest.mark.parametrize("name", ["max", "function-graph-probes", "icelake-server", "load-qemu64"])
def test_a_boot_is_approved_in_every_sweep(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "LOAD_SWEEPS", 60)
    (boot,) = (boot for boot in BOOTS if boot.name == name)
    row = run_boot(boot, product.examine)
    assert row.get("failed", "") == ""
    assert row["not approved"] == 0
    assert row["sweeps"] == (60 if Scenario.LOAD in boot.scenarios else product.SWEEPS)


@pytest.mark.parametrize(
    ("name", "kind", "place"),
    [
        ("ftrace-site-into-kernel", "code", "__x64_sys_acct (.text, ftrace call)"),
        ("idt-gate", "structure", "idt_table (interrupt table)"),
        ("ownerless-code", "code", "(hidden code)"),
        ("process-tables", "mapping", "(page table)"),
        ("ftrace-ops", "state", "attack:tracing (function tracer, forbidden)"),
    ],
)
def test_an_attack_is_found_for_what_it_is(name: str, kind: str, place: str) -> None:
    (boot,) = (boot for boot in BOOTS if boot.name == "max")
    (attack,) = (attack for attack in ATTACKS if attack.name == name)
    row = run_boot(boot, product.examine, attack=attack, hunt=product.hunt)
    assert row.get("failed", "") == ""
    assert (row["found"], row["kind"]) == ("yes", kind)
    assert str(row["place"]).endswith(place)
