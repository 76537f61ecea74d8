"""Sweeps of a synthetic kernel: what is found, what is not blamed, what is bounded.

The same expectations hold with a zero-copy view and with pages that are copied in.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from enrolled import SIZE, Target, Wrapped
from fake_kernel import MIB, TRAMPOLINE, FakeKernel
from tables import NX, PRESENT, TABLE, WRITE

from pyscan.approved import Snapshot
from pyscan.digest import open_digester
from pyscan.errors import SourceUnavailable
from pyscan.kernel.layout import MODULES
from pyscan.policy import judge
from pyscan.records import PAGE_SIZE, Finding, FindingKind, PageStatus, VerdictState
from pyscan.scanner import Scanner, SweepResult, compare
from pyscan.scanner.mapping import FINDINGS_MAX, TABLES_PLACE
from pyscan.sources import Source
from pyscan.sources.base import Frames
from pyscan.sources.file import Access
from pyscan.sources.layers import FaultSource

APPROVED, UNAPPROVED, UNDECIDED = (
    VerdictState.APPROVED,
    VerdictState.UNAPPROVED,
    VerdictState.UNDECIDED,
)
DIGEST, MAPPING, UNREADABLE, ATTACH = (
    FindingKind.DIGEST,
    FindingKind.MAPPING,
    FindingKind.UNREADABLE,
    FindingKind.ATTACH,
)
FAULTS = [status for status in PageStatus if status is not PageStatus.OK]


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target.make(tmp_path / "ram")


@pytest.fixture
def snapshot(target: Target) -> Snapshot:
    return target.enrol()


@pytest.fixture(params=list(Access))
def access(request: pytest.FixtureRequest) -> Access:
    return Access(request.param)


def scan(
    source: Source, snapshot: Snapshot, *, walk_tables: bool = True, rereads: int = 3
) -> SweepResult:
    """One sweep, after which the counts must add up."""
    with source:
        scanner = Scanner(source, snapshot, open_digester(), target="t", rereads=rereads)
        result = scanner.sweep(walk_tables=walk_tables)
    found = result.sweep
    assert found.watched == found.ok + found.mismatched + found.unreadable == snapshot.pages
    assert found.transient <= found.ok
    assert len(found.findings) == min(found.findings_total, FINDINGS_MAX)
    assert {finding.sweep for finding in found.findings} <= {found.id}
    assert {s.finding for s in result.suspects} == {
        f.id for f in found.findings if f.kind is DIGEST
    }
    return result


def kinds(result: SweepResult) -> set[FindingKind]:
    return {finding.kind for finding in result.sweep.findings}


def state(result: SweepResult) -> VerdictState:
    return judge(result.sweep)[0]


# --- pages ----------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("walk_tables", [True, False])
def test_untouched(tmp_path: Path, access: Access, levels: int, walk_tables: bool) -> None:
    target = Target.make(tmp_path / "ram", levels)
    snapshot = target.enrol()
    result = scan(target.open(access), snapshot, walk_tables=walk_tables)
    assert state(result) is APPROVED
    assert (result.sweep.ok, result.sweep.findings_total) == (1024, 0)
    assert result.walked_tables == walk_tables
    assert result.unlisted_executable == (0 if walk_tables else None)


@pytest.mark.parametrize(
    ("page", "place"),
    [
        (0, "kernel text +0x0"),
        (300, "kernel text +0x12c000"),
        (511, "kernel text +0x1ff000"),
        (512, "kernel rodata +0x200000"),
        (1023, "kernel rodata +0x3ff000"),
    ],
)
def test_one_bit(target: Target, snapshot: Snapshot, access: Access, page: int, place: str) -> None:
    before = snapshot.digests[page].tobytes().hex()
    target.flip(page)
    content = target.content(page)
    result = scan(target.open(access), snapshot, walk_tables=False)
    (finding,) = result.sweep.findings
    assert finding == Finding(
        id=finding.id,
        sweep=result.sweep.id,
        kind=DIGEST,
        status=PageStatus.OK,
        address=target.address(page),
        frame=target.frame(page),
        place=place,
        expected=before,
        actual=open_digester().hash_pages(content)[0].tobytes().hex(),
    )
    assert result.walked_tables  # as with every difference
    assert (result.sweep.mismatched, result.sweep.findings_total) == (1, 1)
    (suspect,) = result.suspects
    assert (suspect.frame, suspect.data) == (target.frame(page), content)
    assert state(result) is UNAPPROVED
    target.flip(page)
    assert state(scan(target.open(access), snapshot)) is APPROVED


def test_every_page_is_compared(target: Target, snapshot: Snapshot, access: Access) -> None:
    with target.open(access) as source:
        scanner = Scanner(source, snapshot, open_digester(), target="t")
        for page in range(0, 1024, 37):
            target.flip(page, offset=page % PAGE_SIZE)
            found = scanner.sweep(walk_tables=False).sweep
            assert [finding.frame for finding in found.findings] == [target.frame(page)]
            target.flip(page, offset=page % PAGE_SIZE)


def test_data_may_change(target: Target, snapshot: Snapshot, access: Access) -> None:
    target.memory.write(target.kernel.data + 0x80_000, b"anything" * 512)
    assert state(scan(target.open(access), snapshot)) is APPROVED


class Rereads:
    """Does something before the first reads of one page alone."""

    def __init__(self, frame: int, act: Callable[[], object], *, times: int) -> None:
        self.frame = frame
        self.act = act
        self.times = times

    def __call__(self, frames: Frames) -> None:
        if self.times and frames.tolist() == [self.frame]:
            self.times -= 1
            self.act()


def test_a_transient(target: Target, snapshot: Snapshot, access: Access) -> None:
    """Different when compared, and as approved when read again."""
    target.flip(77)
    rereads = Rereads(target.frame(77), lambda: target.flip(77), times=1)
    source = Wrapped(target.open(access), before=rereads)
    result = scan(source, snapshot, walk_tables=False)
    assert state(result) is APPROVED
    assert (result.sweep.transient, result.sweep.ok) == (1, 1024)
    assert (result.sweep.findings, result.walked_tables) == ((), False)
    assert rereads.times == 0


@pytest.mark.parametrize(("rereads", "reads"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_what_stays_different_is_no_transient(
    target: Target, snapshot: Snapshot, rereads: int, reads: int
) -> None:
    target.flip(77)
    frame, read = [target.frame(77)], []
    source = Wrapped(target.open(), before=lambda frames: read.append(frames.tolist()))
    result = scan(source, snapshot, rereads=rereads)
    (finding,) = result.sweep.findings
    assert (finding.kind, finding.status) == (DIGEST, PageStatus.OK)
    assert state(result) is UNAPPROVED
    assert read.count(frame) == reads


def test_torn(target: Target, snapshot: Snapshot, access: Access) -> None:
    """Other content at every read, and never the approved one."""
    target.flip(77)
    offsets = iter(range(100, 4000))
    rereads = Rereads(target.frame(77), lambda: target.flip(77, next(offsets)), times=3)
    result = scan(Wrapped(target.open(access), before=rereads), snapshot)
    (finding,) = result.sweep.findings
    assert (finding.kind, finding.status) == (DIGEST, PageStatus.TORN)
    assert open_digester().hash_pages(result.suspects[0].data)[0].tobytes().hex() == finding.actual
    assert state(result) is UNAPPROVED


@pytest.mark.parametrize("status", FAULTS)
def test_pages_that_cannot_be_read(target: Target, snapshot: Snapshot, status: PageStatus) -> None:
    pages = (0, 255, 256, 700, 1023)
    faults = {target.frame(page): status for page in pages}
    result = scan(FaultSource(target.open(), faults), snapshot)
    assert state(result) is UNDECIDED
    assert (result.sweep.unreadable, result.sweep.mismatched) == (5, 0)
    assert [(f.kind, f.status, f.frame, f.actual) for f in result.sweep.findings] == [
        (UNREADABLE, status, target.frame(page), "") for page in pages
    ]


@pytest.mark.parametrize("status", FAULTS)
def test_nothing_can_be_read(target: Target, snapshot: Snapshot, status: PageStatus) -> None:
    result = scan(FaultSource(target.open(), status), snapshot)
    assert (result.sweep.unreadable, result.suspects) == (1024, ())
    assert state(result) is UNDECIDED


def test_a_page_that_is_lost_between_two_reads(
    target: Target, snapshot: Snapshot, access: Access
) -> None:
    """Compared and different, but gone when read again: unreadable, not blamed."""
    target.flip(1023)
    end = target.gpa(1023)
    rereads = Rereads(target.frame(1023), lambda: os.truncate(target.path, end), times=1)
    result = scan(Wrapped(target.open(access), before=rereads), snapshot)
    assert (result.sweep.ok, result.sweep.unreadable) == (1023, 1)
    (lost,) = [f for f in result.sweep.findings if f.address == target.address(1023)]
    assert (lost.kind, lost.status) == (UNREADABLE, PageStatus.LINK_DOWN)
    assert state(result) is UNDECIDED


@pytest.mark.parametrize("page", [0, 256, 800])
def test_a_file_that_is_truncated(
    target: Target, snapshot: Snapshot, access: Access, page: int
) -> None:
    with target.open(access) as source:
        os.truncate(target.path, target.gpa(page) + 17)
        result = scan(source, snapshot)
    assert (result.sweep.ok, result.sweep.unreadable) == (page, 1024 - page)
    assert state(result) is UNDECIDED


def test_a_file_that_is_truncated_while_it_is_scanned(target: Target, snapshot: Snapshot) -> None:
    parts = []

    def cut(frames: Frames) -> None:
        parts.append(len(frames))
        if len(parts) == 3:
            os.truncate(target.path, target.gpa(600))

    result = scan(Wrapped(target.open(Access.PREAD), before=cut), snapshot)
    assert (result.sweep.ok, result.sweep.unreadable) == (600, 424)
    assert state(result) is UNDECIDED


def test_frames_that_are_no_ram(target: Target, snapshot: Snapshot, access: Access) -> None:
    """An approved frame may lie anywhere; a frame that is no memory is not looked up."""
    frames = snapshot.frames.copy()
    frames[[3, 4, 5]] = [SIZE // PAGE_SIZE, 1 << 40, (1 << 64) - 1]
    result = scan(target.open(access), replace(snapshot, frames=frames), walk_tables=False)
    assert (result.sweep.ok, result.sweep.unreadable) == (1021, 3)
    held = [f for f in result.sweep.findings if f.kind is UNREADABLE]
    assert {finding.status for finding in held} == {PageStatus.HOLE}


def test_a_source_that_is_gone(target: Target, snapshot: Snapshot, access: Access) -> None:
    source = target.open(access)
    scanner = Scanner(source, snapshot, open_digester(), target="t")
    source.close()
    with pytest.raises(SourceUnavailable):
        scanner.sweep()


def test_sweeps_are_numbered(target: Target, snapshot: Snapshot) -> None:
    with target.open() as source:
        scanner = Scanner(source, snapshot, open_digester(), target="t")
        sweeps = [scanner.sweep(walk_tables=False).sweep for _ in range(3)]
    assert [found.number for found in sweeps] == [1, 2, 3]
    assert len({found.id for found in sweeps}) == 3
    assert {found.target for found in sweeps} == {"t"}


# --- bounds ---------------------------------------------------------------------------


def test_more_differences_than_are_listed(
    target: Target, snapshot: Snapshot, access: Access
) -> None:
    for page in range(200, 200 + 3 * FINDINGS_MAX):
        target.flip(page)
    result = scan(target.open(access), snapshot)
    assert result.sweep.findings_total == result.sweep.mismatched == 3 * FINDINGS_MAX
    assert [f.frame for f in result.sweep.findings] == [
        target.frame(page) for page in range(200, 200 + FINDINGS_MAX)
    ]
    assert len(result.suspects) == FINDINGS_MAX
    assert state(result) is UNAPPROVED


def test_more_differences_than_are_read_again(
    target: Target, snapshot: Snapshot, access: Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "LISTED_MAX", 50)
    target.memory.write(target.gpa(0), bytes(2 * MIB))
    watched = {(target.frame(page),) for page in range(512)}
    read = []
    source = Wrapped(target.open(access), before=lambda frames: read.append(tuple(frames)))
    result = scan(source, snapshot, rereads=1)
    assert result.sweep.mismatched == result.sweep.findings_total == 512
    assert sum(frames in watched for frames in read) == 50
    assert state(result) is UNAPPROVED


def test_a_difference_is_not_hidden_behind_pages_that_cannot_be_read(
    target: Target, snapshot: Snapshot
) -> None:
    faults = {target.frame(page): PageStatus.TIMEOUT for page in range(2 * FINDINGS_MAX)}
    target.flip(1000)
    result = scan(FaultSource(target.open(), faults), snapshot)
    assert result.sweep.findings_total == 2 * FINDINGS_MAX + 1
    assert result.sweep.findings[0].frame == target.frame(1000)
    assert [suspect.frame for suspect in result.suspects] == [target.frame(1000)]
    assert state(result) is UNAPPROVED


def test_neither_differences_nor_mappings_hide_each_other(
    target: Target, snapshot: Snapshot, access: Access
) -> None:
    for page in range(100, 100 + 2 * FINDINGS_MAX):
        target.flip(page)
        target.map(page, 40 * MIB, PRESENT)
    result = scan(target.open(access), snapshot)
    listed = [finding.kind for finding in result.sweep.findings]
    assert (listed.count(DIGEST), listed.count(MAPPING)) == (FINDINGS_MAX // 2, FINDINGS_MAX // 2)
    assert result.sweep.findings_total == 4 * FINDINGS_MAX


# --- mappings -------------------------------------------------------------------------


def module(kernel: FakeKernel, page: int, gpa: int, bits: int) -> None:
    address = MODULES.first + page * PAGE_SIZE
    kernel.memory.map(kernel.form, kernel.root, address, gpa, bits)


def led_elsewhere(target: Target) -> None:
    target.map(9, 40 * MIB, PRESENT)


def led_to_device_memory(target: Target) -> None:
    target.map(9, 0xFEE0_0000, PRESENT)


def led_to_another_approved_page(target: Target) -> None:
    target.map(9, target.gpa(10), PRESENT)


def text_made_writable(target: Target) -> None:
    target.map(9, target.gpa(9), PRESENT | WRITE)


def text_made_data(target: Target) -> None:
    target.map(9, target.gpa(9), PRESENT | NX)


def unmapped(target: Target) -> None:
    target.map(9, target.gpa(9), 0)


def rodata_made_writable(target: Target) -> None:
    kernel = target.kernel
    address, bits = kernel.address(kernel.rodata), PRESENT | WRITE | NX
    kernel.memory.map(kernel.form, kernel.root, address, kernel.rodata, bits, shift=21)


def rodata_made_executable(target: Target) -> None:
    kernel = target.kernel
    address = kernel.address(kernel.rodata)
    kernel.memory.map(kernel.form, kernel.root, address, kernel.rodata, PRESENT, shift=21)


def data_made_executable(target: Target) -> None:
    kernel = target.kernel
    address, bits = kernel.address(kernel.data), PRESENT | WRITE
    kernel.memory.map(kernel.form, kernel.root, address, kernel.data, bits, shift=21)


def writable_and_executable_module(target: Target) -> None:
    module(target.kernel, 5, 40 * MIB, PRESENT | WRITE)


def a_table_that_is_its_own_leaf(target: Target) -> None:
    target.memory.set_entry(target.kernel.level2, 300, target.kernel.level2 | TABLE)


def a_table_full_of_itself(target: Target) -> None:
    """It maps itself 512 times for each of the entries of the module range."""
    table = target.memory.table()
    target.memory.write(table, np.full(512, table | TABLE, dtype="<u8").tobytes())
    target.memory.set_entry(target.kernel.level3, 511, table | TABLE)


def table_outside_ram(target: Target) -> None:
    target.memory.set_entry(target.kernel.level3, 511, 0x3F_0000_0000 | TABLE)


def reserved_bits(target: Target) -> None:
    target.memory.set_entry(target.kernel.level2, 300, 0x1000 | PRESENT | 1 << 7 | 1 << 13)


Attack = Callable[[Target], None]
ELSEWHERE = "frame 0x2800 executable"


@pytest.mark.parametrize(
    ("attack", "total", "actual"),
    [
        (led_elsewhere, 1, ELSEWHERE),
        (led_to_device_memory, 1, "frame 0xfee00 executable"),
        (led_to_another_approved_page, 1, "frame 0x100a executable"),
        (text_made_writable, 2, "executable writable"),
        (text_made_data, 1, "read-only"),
        (unmapped, 1, "not mapped"),
        (rodata_made_writable, 512, "not mapped as executable or read-only"),
        (rodata_made_executable, 512, "frame 0x1200 executable"),
        (data_made_executable, 1, "writable-executable"),
        (writable_and_executable_module, 1, "writable-executable"),
        (a_table_that_is_its_own_leaf, 2, "writable-executable"),
        (a_table_full_of_itself, 504 * 512, "writable-executable"),
        (table_outside_ram, 1, "table-outside-ram"),
        (reserved_bits, 1, "reserved-bit"),
    ],
)
def test_tables_that_were_tampered_with(
    target: Target, access: Access, attack: Attack, total: int, actual: str
) -> None:
    snapshot = target.enrol()
    attack(target)
    result = scan(target.open(access), snapshot)
    assert result.sweep.ok == 1024  # the frames that were approved are what they were
    assert kinds(result) == {MAPPING}
    assert result.sweep.findings_total == total
    assert any(actual in finding.actual for finding in result.sweep.findings)
    assert state(result) is UNAPPROVED
    # A sweep that does not walk the tables does not see it, so a monitor walks often.
    assert state(scan(target.open(access), snapshot, walk_tables=False)) is APPROVED


def test_where_an_approved_address_leads(target: Target, snapshot: Snapshot) -> None:
    led_elsewhere(target)
    result = scan(target.open(), snapshot)
    (finding,) = result.sweep.findings
    assert (finding.address, finding.frame) == (target.address(9), target.frame(9))
    assert (finding.expected, finding.actual) == ("frame 0x1009 executable", ELSEWHERE)
    assert finding.place == "kernel text +0x9000"


def test_a_wrong_table_is_named(target: Target, snapshot: Snapshot) -> None:
    table_outside_ram(target)
    (finding,) = scan(target.open(), snapshot).sweep.findings
    assert (finding.place, finding.actual) == (TABLES_PLACE, "table-outside-ram")
    assert (finding.address, finding.frame) == (0xFFFF_FFFF_C000_0000, 0x3F_0000_0)


def all_led_to_copies(target: Target) -> None:
    """Every page of text and most of the others lead to perfect copies."""
    target.memory.write(32 * MIB, target.content(0, 1024))
    kernel = target.kernel
    for gpa, bits in ((kernel.text, PRESENT), (kernel.rodata, PRESENT | NX)):
        copy = 32 * MIB + gpa - kernel.text
        kernel.memory.map(kernel.form, kernel.root, kernel.address(gpa), copy, bits, shift=21)


def test_most_of_a_kernel_led_to_copies_is_no_reboot(
    target: Target, snapshot: Snapshot, access: Access
) -> None:
    all_led_to_copies(target)
    result = scan(target.open(access), snapshot)
    assert result.sweep.ok == 1024
    assert kinds(result) == {ATTACH, MAPPING}
    assert state(result) is UNAPPROVED


def wipe_root(target: Target) -> None:
    target.memory.write(target.kernel.root, bytes(PAGE_SIZE))


def wipe_image_table(target: Target) -> None:
    target.memory.write(target.kernel.level2, bytes(PAGE_SIZE))


def boot_another_kernel(target: Target) -> None:
    """It lies elsewhere, and leaves the old one as it was."""
    target.memory.next_table = 60 * MIB
    FakeKernel(target.memory, virtual=0xFFFF_FFFF_8120_0000, physical=32 * MIB)


def forget_trampoline(target: Target) -> None:
    target.memory.write(TRAMPOLINE, bytes(PAGE_SIZE))


@pytest.mark.parametrize(
    ("lose", "why"),
    [
        (wipe_root, "1024 of them lead elsewhere or nowhere"),
        (wipe_image_table, "1024 of them lead elsewhere or nowhere"),
        (boot_another_kernel, "trampoline does not belong to it"),
        (forget_trampoline, "trampoline does not belong to it"),
    ],
)
def test_another_kernel_runs(
    target: Target, snapshot: Snapshot, access: Access, lose: Attack, why: str
) -> None:
    lose(target)
    result = scan(target.open(access), snapshot)
    (finding,) = result.sweep.findings
    assert (finding.kind, finding.frame) == (ATTACH, target.kernel.root // PAGE_SIZE)
    assert why in finding.actual
    assert result.sweep.ok == 1024
    assert state(result) is UNDECIDED
    target.flip(0)  # a difference is a fact, whoever runs
    assert state(scan(target.open(access), snapshot)) is UNAPPROVED


def test_a_reboot_that_leaves_nothing(target: Target, snapshot: Snapshot, access: Access) -> None:
    """Other pages everywhere, and other tables: nothing is known of this boot."""
    wipe_root(target)
    target.memory.write(target.gpa(0), os.urandom(4 * MIB))
    result = scan(target.open(access), snapshot)
    assert result.sweep.mismatched == 1024
    assert result.sweep.findings[0].kind is ATTACH
    assert state(result) is UNDECIDED


@pytest.mark.parametrize("status", FAULTS)
@pytest.mark.parametrize("table", ["root", "level3", "level2", "text_table"])
def test_a_table_that_cannot_be_read(
    target: Target, snapshot: Snapshot, table: str, status: PageStatus
) -> None:
    """What hangs below it is unknown, not gone."""
    owner = target if table == "text_table" else target.kernel
    frame = getattr(owner, table) // PAGE_SIZE
    result = scan(FaultSource(target.open(), {frame: status}), snapshot)
    assert result.sweep.ok == 1024
    assert kinds(result) == {UNREADABLE, ATTACH}
    assert state(result) is UNDECIDED


def test_a_wrong_table_is_not_hidden_behind_tables_that_cannot_be_read(
    target: Target, snapshot: Snapshot
) -> None:
    faults = {}
    for number in range(FINDINGS_MAX + 8):
        table = target.memory.table()
        target.memory.set_entry(target.kernel.level2, 400 + number, table | TABLE)
        faults[table // PAGE_SIZE] = PageStatus.TIMEOUT
    module(target.kernel, 5, 40 * MIB, PRESENT | WRITE)
    result = scan(FaultSource(target.open(), faults), snapshot)
    assert "writable-executable" in {finding.actual for finding in result.sweep.findings}
    assert state(result) is UNAPPROVED


def test_executable_pages_that_are_not_listed_are_counted(
    target: Target, snapshot: Snapshot
) -> None:
    for page in range(7):
        module(target.kernel, page, 40 * MIB, PRESENT)
    module(target.kernel, 7, 41 * MIB, PRESENT | NX)
    result = scan(target.open(), snapshot)
    assert result.unlisted_executable == 7
    assert state(result) is APPROVED


@pytest.mark.parametrize("seed", range(8))
def test_tables_of_noise(target: Target, snapshot: Snapshot, seed: int) -> None:
    """Whatever the tables hold, a sweep ends, is bounded, and is not approved."""
    noise = np.random.default_rng(seed).integers(0, 1 << 64, 512, dtype=np.uint64)
    noise &= np.uint64(0x8000_0000_03FF_F067)
    noise |= np.uint64(PRESENT)
    table = (target.kernel.level2, target.kernel.level3)[seed % 2]
    target.memory.write(table, noise.tobytes())
    assert state(scan(target.open(), snapshot)) is not APPROVED
