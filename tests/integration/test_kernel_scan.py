"""Scanning a real guest by the package of its kernel, through the command line.

What the scan says is held against the guest's own account of itself. The tests share one
guest, and each leaves it as it was.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from operator_shell import Operator

from pyscan.approved import LinuxApproved, load_approved, save_linux
from pyscan.digest import open_digester
from pyscan.errors import SourceUnavailable
from pyscan.keys import KeyRing, PublicKey, SigningKey
from pyscan.lab.guest import Guest, GuestOptions, TamperKind
from pyscan.lab.process import RunDirectory
from pyscan.policy import judge
from pyscan.records import PAGE_SIZE, FindingKind, PageStatus, VerdictState
from pyscan.scanner import SweepResult, open_scanner
from pyscan.sources import build_uri, open_source
from pyscan.sources.layers import FaultSource

pytestmark = pytest.mark.guest

FOREIGN = SigningKey.generate()
TRACING = "/sys/kernel/tracing"
SCHEDSTATS = "/proc/sys/kernel/sched_schedstats"
#: Of arch/x86/entry/syscalls/syscall_64.tbl; this guest has no accounting, so nobody calls it.
ACCT = 163


@pytest.fixture(scope="module")
def guest(guest_dir: Path) -> Iterator[Guest]:
    options = GuestOptions(guest_dir, initrd="initrd-matrix.gz")
    with RunDirectory() as run, Guest(options, run) as guest:
        guest.wait_ready()
        yield guest


@pytest.fixture(scope="module")
def kernel(operator: Operator) -> LinuxApproved:
    ring = KeyRing.of({"approver": PublicKey.load(operator.public_key)})
    approved, _ = load_approved(operator.approved, ring)
    assert isinstance(approved, LinuxApproved)
    return approved


@pytest.fixture(scope="module")
def foreign(operator: Operator, kernel: LinuxApproved) -> Path:
    """An approved configuration of a kernel whose code is other than the guest's."""
    first, *others = kernel.anchors
    changed = [replace(anchor, data=bytes(byte ^ 1 for byte in anchor.data)) for anchor in others]
    other = replace(kernel, release="6.1.0-99-other", anchors=(first, *changed), modules={})
    path = operator.approved.parent / "other.approved"
    save_linux(other, path, FOREIGN)
    FOREIGN.public.save(path.with_suffix(".pub"))
    return path


class Scanned:
    """Scans of one guest by an operator."""

    def __init__(self, operator: Operator, guest: Guest) -> None:
        self.operator = operator
        self.guest = guest
        self.uri = build_uri("qemu", guest.monitor_qmp)

    def scan(self, expected: int, *more: object, uri: str = "") -> dict[str, Any]:
        """The document of a scan that must end with this status."""
        files = more or ("--approved", self.operator.approved)
        done = self.operator.run("scan", uri or self.uri, *files, "--json")
        document: dict[str, Any] = json.loads(done.stdout)
        assert done.stderr == ""
        verdict = {0: "approved", 1: "unapproved", 3: "undecided"}[expected]
        assert (done.returncode, document["verdict"]) == (expected, verdict), document["reason"]
        pages = document["pages"]
        counted = pages["ok"] + pages["mismatched"] + pages["unreadable"]
        assert pages["watched"] == counted
        assert (pages["watched"] == pages["ok"] > 5000) or expected
        assert (document["findings_total"] > 0) == (expected == 1)
        return document

    def physical(self, address: int) -> int:
        """Where a byte of the kernel's image lies, as the guest says."""
        code = int(self.guest.shell("grep 'Kernel code' /proc/iomem").split("-")[0], 16)
        return code + address - self.guest.symbol("_text")


@pytest.fixture
def scanned(operator: Operator, guest: Guest) -> Scanned:
    return Scanned(operator, guest)


def test_the_package_is_approved(operator: Operator, guest_dir: Path) -> None:
    done = operator.run("approve", "show", operator.approved, "--json")
    document = json.loads(done.stdout)
    release = json.loads((guest_dir / "guest.json").read_text())["kernel_release"]
    assert (done.returncode, document["kind"], document["release"]) == (0, "linux", release)
    assert document["units"] == 1 + len(document["modules"]) > 1000
    assert {"virtio_net", "nf_tables", "btrfs"} <= set(document["modules"])
    assert "tamper" not in document["modules"]
    (provenance,) = document["provenance"]
    assert provenance["package"] == f"linux-image-{release}"


def test_a_running_guest_is_approved_and_known(scanned: Scanned) -> None:
    guest = scanned.guest
    document = scanned.scan(0)
    kernel, state = document["kernel"], document["state"]
    modules = [line.split()[0] for line in guest.shell("cat /proc/modules").splitlines()]
    assert kernel["release"] == guest.shell("uname -r").strip()
    assert kernel["build"] == guest.shell("cat /proc/version").strip()
    assert int(kernel["virtual_base"], 16) == guest.symbol("_text")
    assert int(kernel["physical_base"], 16) == scanned.physical(guest.symbol("_text"))
    flags = guest.shell("grep -m 1 ^flags /proc/cpuinfo").split()
    assert kernel["paging_levels"] == (5 if "la57" in flags else 4)
    assert sorted(kernel["modules"]) == sorted(modules) == state["modules"]
    assert kernel["unknown_modules"] == state["unknown_modules"] == []
    # Features by their numbers in arch/x86/include/asm/cpufeatures.h.
    features = int(state["features"], 16)
    numbers = {"fpu": 0, "lm": 32 + 29, "avx2": 9 * 32 + 5, "smap": 9 * 32 + 20}
    assert {name: features >> bit & 1 for name, bit in numbers.items()} == {
        name: int(name in flags) for name in numbers
    }
    assert state["uniprocessor"] is True
    assert (state["ftrace"], state["kprobes"]) == ([], [])
    assert state["static_keys"]["sched_schedstats"] is False
    assert document["findings"] == document["state_changes"] == []
    text = guest.symbol("_etext") - guest.symbol("_text")
    coverage = document["coverage_bytes"]
    assert coverage["text"] >= text
    assert coverage["rodata"] >= guest.symbol("__end_rodata") - guest.symbol("__start_rodata") >> 1
    assert document["not_judged"][:3] == ["registers", "caches", "writable data"]

    done = scanned.operator.run("scan", scanned.uri, "--approved", scanned.operator.approved)
    assert done.returncode == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert kernel["release"] in lines["kernel"]
    assert f"virtual {kernel['virtual_base']}" in lines["bases"]
    assert lines["modules"].split()[1] == f"{len(modules)}:"


def test_one_bit_of_text(scanned: Scanned) -> None:
    guest = scanned.guest
    physical = guest.text_physical()
    address = guest.symbol("machine_real_restart") + 0x10
    old = guest.ram.read(physical, 1)[0]
    guest.ram.flip(physical, 0x01)
    document = scanned.scan(1)
    guest.ram.flip(physical, 0x01)
    (finding,) = document["findings"]
    assert (finding["kind"], finding["status"]) == ("code", "ok")
    assert int(finding["address"], 16) == address
    # The place is that of the instruction that holds the byte.
    place = re.fullmatch(
        r"machine_real_restart\+(0x[0-9a-f]+) \(\.text, kernel code\)", finding["place"]
    )
    assert place is not None
    start = guest.symbol("machine_real_restart") + int(place[1], 16)
    assert start <= address < start + 15
    assert int(finding["physical_frame"], 16) == physical // PAGE_SIZE
    expected, actual = (finding[name].split(" | ") for name in ("expected", "actual"))
    contents = [bytes.fromhex(code) for code, _instruction in (expected, actual)]
    assert [content[address - start] for content in contents] == [old, old ^ 0x01]
    here = guest.ram.read(scanned.physical(start), len(contents[0]))
    assert here == contents[0]
    assert expected[1].split()[0].isalpha()
    assert expected[1] != actual[1]
    assert document["pages"]["mismatched"] == 1
    assert finding["place"] in document["reason"]
    scanned.scan(0)


def test_an_entry_of_the_system_call_table(scanned: Scanned) -> None:
    guest = scanned.guest
    address = guest.symbol("sys_call_table") + 8 * ACCT
    guest.ram.flip(scanned.physical(address), 0x40)
    done = scanned.operator.run("scan", scanned.uri, "--approved", scanned.operator.approved)
    document = scanned.scan(1)
    guest.ram.flip(scanned.physical(address), 0x40)
    (finding,) = document["findings"]
    assert int(finding["address"], 16) == address
    assert finding["place"] == f"sys_call_table+{8 * ACCT:#x} (.rodata, read-only data)"
    word, name = finding["expected"].split(" | ")
    entry = int.from_bytes(bytes.fromhex(word), "little")
    assert (entry, name) == (guest.symbol("__x64_sys_acct"), "__x64_sys_acct")
    assert (
        int.from_bytes(bytes.fromhex(finding["actual"].split(" | ")[0]), "little") == entry ^ 0x40
    )
    assert done.returncode == 1
    assert f"finding  code  {finding['place']}" in done.stdout
    scanned.scan(0)


def test_what_a_kernel_may_do_is_no_finding(scanned: Scanned) -> None:
    guest = scanned.guest
    before = scanned.scan(0)
    guest.shell(f"echo 1 >{SCHEDSTATS}")
    guest.shell(f"cd {TRACING} && echo 0 >tracing_on && echo 'vfs_*' >set_ftrace_filter")
    guest.shell(f"cd {TRACING} && echo function >current_tracer", 60)
    guest.shell("insmod /lib/modules/dummy.ko")
    during = scanned.scan(0)
    guest.shell(f"cd {TRACING} && echo nop >current_tracer && echo >set_ftrace_filter", 60)
    guest.shell(f"rmmod dummy && echo 0 >{SCHEDSTATS}")
    after = scanned.scan(0)
    assert during["state"]["static_keys"]["sched_schedstats"] is True
    assert during["state"]["ftrace"] != []
    assert set(during["kernel"]["modules"]) - set(before["kernel"]["modules"]) == {"dummy"}
    assert during["pages"]["watched"] > before["pages"]["watched"]
    for name in ("ftrace", "modules", "features", "return_thunk"):
        assert after["state"][name] == before["state"][name]
    assert after["state"]["static_keys"]["sched_schedstats"] is False


def test_a_module_of_no_package_and_what_it_does(scanned: Scanned) -> None:
    guest = scanned.guest
    target = guest.load_tamper(TamperKind.TEXT)
    document = scanned.scan(1)
    places = {finding["place"]: finding for finding in document["findings"]}
    finding = places["tamper (module of no approved package)"]
    assert (finding["kind"], finding["expected"], finding["actual"]) == (
        "state",
        "absent",
        "present",
    )
    # It holds its target by a second, writable mapping.
    kinds = {finding["kind"] for finding in document["findings"]}
    assert kinds == {"state", "mapping"}
    assert document["pages"]["mismatched"] == 0
    guest.fire()
    guest.shell("true")
    document = scanned.scan(1)
    first = document["findings"][0]
    assert first["kind"] == "code"
    assert first["place"].startswith("machine_real_restart+")
    assert target.new in bytes.fromhex(first["actual"].split(" | ")[0])
    guest.restore()
    guest.shell("rmmod tamper")
    scanned.scan(0)


def test_of_two_approved_kernels_the_running_one_is_used(scanned: Scanned, foreign: Path) -> None:
    operator = scanned.operator
    trust = ("--trust", operator.public_key, "--trust", foreign.with_suffix(".pub"))
    both = ("--approved", foreign, "--approved", operator.approved, *trust)
    assert scanned.scan(0, *both)["kernel"]["release"] == scanned.guest.shell("uname -r").strip()
    done = operator.run("scan", scanned.uri, *both)
    used = [line for line in done.stdout.splitlines() if line.startswith("approved")]
    assert (done.returncode, len(used)) == (0, 1)
    assert str(operator.approved) in used[0]
    assert str(foreign) not in done.stdout


def test_a_kernel_of_no_approved_package_is_undecided(scanned: Scanned, foreign: Path) -> None:
    document = scanned.scan(3, "--approved", foreign, "--trust", foreign.with_suffix(".pub"))
    assert "none of the approved ones (6.1.0-99-other)" in document["reason"]
    assert document["pages"]["watched"] == 0
    assert "kernel" not in document


def test_a_memory_file_that_ends_early_is_undecided(scanned: Scanned, tmp_path: Path) -> None:
    size = scanned.guest.options.memory_mib
    image = tmp_path / "ram.img"
    shutil.copyfile(scanned.guest.ram_file, image)
    uri = build_uri("file", image, machine="q35", size=f"{size}M")
    scanned.scan(0, uri=uri)
    with image.open("r+b") as file:
        file.truncate(16 << 20)
    done = scanned.operator.run("scan", uri, "--approved", scanned.operator.approved)
    assert done.returncode in {2, 3}
    assert "verdict   approved" not in done.stdout


def sweep_with(
    scanned: Scanned, kernel: LinuxApproved, faults: dict[int, PageStatus] | PageStatus
) -> SweepResult:
    """Sweep twice: the faults must not wear off."""
    with (
        open_source(scanned.uri) as source,
        open_scanner(
            FaultSource(source, faults), [kernel], open_digester("native"), target="guest"
        ) as scanner,
    ):
        first = scanner.sweep()
        second = scanner.sweep()
    assert judge(first.sweep)[0] is judge(second.sweep)[0] is VerdictState.UNDECIDED
    assert first.sweep.unreadable == second.sweep.unreadable
    for sweep in (first.sweep, second.sweep):
        assert sweep.watched == sweep.ok + sweep.mismatched + sweep.unreadable
    return second


def test_pages_that_cannot_be_read_are_undecided(scanned: Scanned, kernel: LinuxApproved) -> None:
    guest = scanned.guest
    text = scanned.physical(guest.symbol("vfs_read")) // PAGE_SIZE
    data = scanned.physical(guest.symbol("sys_call_table")) // PAGE_SIZE
    for frames in ([text], [text, data]):
        result = sweep_with(scanned, kernel, dict.fromkeys(frames, PageStatus.BLOCKED))
        assert result.sweep.unreadable == len(frames)
        assert {finding.kind for finding in result.sweep.findings} == {FindingKind.UNREADABLE}


def test_a_state_that_cannot_be_read_is_undecided(scanned: Scanned, kernel: LinuxApproved) -> None:
    frame = scanned.physical(scanned.guest.symbol("boot_cpu_data")) // PAGE_SIZE
    with open_source(scanned.uri) as source:
        blind = FaultSource(source, {frame: PageStatus.LINK_DOWN})
        with (
            open_scanner(blind, [kernel], open_digester("native"), target="guest") as scanner,
            pytest.raises(SourceUnavailable, match="state cannot be read"),
        ):
            scanner.sweep()
