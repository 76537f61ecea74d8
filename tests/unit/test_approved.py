"""Approved configurations: what is enrolled, what a file holds, what is refused."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enrolled import APPROVER, CREATED_NS, Target, Wrapped
from hypothesis import given
from hypothesis import strategies as st
from tables import PRESENT, WRITE

from pyscan.approved import Snapshot, enrol, envelope, file, load_approved, save_approved
from pyscan.approved.snapshot import PAGES_MAX, REGIONS_MAX, SETTLE_TRIES
from pyscan.cose import encode_cbor, sign1
from pyscan.digest import open_digester
from pyscan.errors import (
    ApprovedFileError,
    KernelNotFound,
    SourceUnavailable,
    TargetUnavailable,
)
from pyscan.kernel import EXECUTABLE, KernelImage
from pyscan.keys import KeyRing, SigningKey
from pyscan.records import PAGE_SIZE, MemoryMap, MemoryRegion, PageStatus, RegionKind
from pyscan.sources.base import Frames, Pages
from pyscan.sources.layers import FaultSource

RING = KeyRing.of({"approver": APPROVER.public}, "approver")

SMALL = Snapshot(
    created_ns=CREATED_NS,
    source="file:/ram",
    memory_map=MemoryMap.of(
        [MemoryRegion(0, 0xC3000), MemoryRegion(0xC3000, 0x25000, RegionKind.ROM)]
    ),
    kernel=KernelImage(0x181_0000, 4, 0xFFFF_FFFF_9A00_0000, 0x100_0000, 6 << 20),
    addresses=np.array([0xFFFF_FFFF_9A00_0000, 0xFFFF_FFFF_9A00_1000], dtype=np.uint64),
    frames=np.array([0x1000, (1 << 64) - 1], dtype=np.uint64),
    flags=np.array([EXECUTABLE, 0], dtype=np.uint8),
    digests=np.arange(64, dtype=np.uint8).reshape(2, 32),
)
HEADER = {"format": "pyscan-approved", "version": 1, "kind": "snapshot"}


def write(path: Path, payload: object, key: SigningKey = APPROVER) -> Path:
    """Sign anything as if it were an approved configuration."""
    path.write_bytes(sign1(encode_cbor(payload), key, envelope.CONTENT_TYPE, envelope.EXTERNAL_AAD))
    return path


def assert_refused(path: Path, match: str | None = None) -> None:
    with pytest.raises(ApprovedFileError, match=match) as caught:
        load_approved(path, RING)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


# --- the file -------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    size = save_approved(SMALL, path, APPROVER)
    loaded, approver = load_approved(path, RING)
    assert approver == "approver"
    assert size == path.stat().st_size
    assert (loaded.memory_map, loaded.kernel) == (SMALL.memory_map, SMALL.kernel)
    assert (loaded.created_ns, loaded.source) == (SMALL.created_ns, SMALL.source)
    for column in ("addresses", "frames", "flags", "digests"):
        mine, other = getattr(SMALL, column), getattr(loaded, column)
        assert (mine.dtype, mine.tolist()) == (other.dtype, other.tolist())


def test_same_content_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    save_approved(SMALL, first, APPROVER)
    save_approved(load_approved(first, RING)[0], second, APPROVER)
    assert first.read_bytes() == second.read_bytes()


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "flipped"
    save_approved(SMALL, path, APPROVER)
    message = path.read_bytes()
    for at in range(len(message)):
        for mask in (0x01, 0x80, 0xFF):
            path.write_bytes(message[:at] + bytes([message[at] ^ mask]) + message[at + 1 :])
            assert_refused(path)


def test_every_cut_and_every_addition_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    save_approved(SMALL, path, APPROVER)
    message = path.read_bytes()
    for length in range(len(message)):
        path.write_bytes(message[:length])
        assert_refused(path)
    for more in (b"\0", b"\xf6", message):
        path.write_bytes(message + more)
        assert_refused(path)


def test_a_foreign_signer(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    save_approved(SMALL, path, SigningKey.generate())
    assert_refused(path, "is not pinned")


@pytest.mark.parametrize(
    ("content_type", "aad"),
    [
        ("application/vnd.pyscan.command+cbor", envelope.EXTERNAL_AAD),
        (envelope.CONTENT_TYPE, b"other"),
    ],
)
def test_a_signature_for_another_purpose(tmp_path: Path, content_type: str, aad: bytes) -> None:
    path = tmp_path / "other"
    payload = encode_cbor(HEADER | SMALL.to_payload())
    path.write_bytes(sign1(payload, APPROVER, content_type, aad))
    assert_refused(path, "not a valid approved configuration")


def kernel_with(**fields: object) -> dict[str, object]:
    kernel = SMALL.to_payload()["kernel"]
    assert isinstance(kernel, dict)
    return {"kernel": kernel | fields}


def words(*values: int) -> bytes:
    return np.array(values, dtype="<u8").tobytes()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": "pyscan-evidence"}, "not an approved configuration"),
        ({"format": None}, "not an approved configuration"),
        ({"version": 2}, "version 2.*reads version 1"),
        ({"version": True}, "version True"),
        ({"version": "1"}, "version '1'"),
        ({"kind": "baseline"}, "kind 'baseline'"),
        ({"kind": ["snapshot"]}, "kind"),
        ({"digest": "sha1"}, "unknown digest 'sha1'"),
        ({"digest": None}, "unknown digest"),
        ({"created_ns": True}, "created_ns"),
        ({"created_ns": -1}, "unsigned 64-bit"),
        ({"created_ns": 1 << 64}, "tag"),
        ({"created_ns": "now"}, "created_ns"),
        ({"source": b"file:/ram"}, "source"),
        ({"addresses": words(0x2000, 0x1000)}, "ascending"),
        ({"addresses": words(0x1000, 0x1000)}, "unique"),
        ({"addresses": words(0x1000, 0x2001)}, "aligned"),
        ({"addresses": words(0x1000, 0x2000)[:-1]}, "list of 64-bit values"),
        ({"addresses": [0x1000, 0x2000]}, "addresses"),
        ({"addresses": words(0x1000)}, "differ in length"),
        ({"addresses": b"", "frames": b"", "flags": b"", "digests": b""}, "0 pages listed"),
        ({"addresses": bytes(8 * (PAGES_MAX + 1))}, f"{PAGES_MAX + 1} pages listed"),
        ({"frames": words(1)}, "differ in length"),
        ({"frames": words(1, 2, 3)}, "differ in length"),
        ({"frames": None}, "frames"),
        ({"flags": b"\0"}, "differ in length"),
        ({"flags": b"\0\2"}, "unknown flags"),
        ({"flags": [0, 1]}, "flags"),
        ({"digests": bytes(63)}, "differ in length"),
        ({"digests": bytes(96)}, "differ in length"),
        ({"regions": {}}, "regions"),
        ({"regions": [0]}, "not a region"),
        ({"regions": [[0, 4096]]}, "not a region"),
        ({"regions": [[0, 4096, "flash"]]}, "flash"),
        ({"regions": [[0, 4096, []]]}, "memory map"),
        ({"regions": [[False, 4096, "ram"]]}, "not a region"),
        ({"regions": [[0, True, "ram"]]}, "not a region"),
        ({"regions": [["0", 4096, "ram"]]}, "not a region"),
        ({"regions": [[-4096, 4096, "ram"]]}, "memory map"),
        ({"regions": [[0, 0, "ram"]]}, "empty"),
        ({"regions": [[0, 4095, "ram"]]}, "aligned"),
        ({"regions": [[0, 8192, "ram"], [4096, 4096, "rom"]]}, "overlaps"),
        ({"regions": [[(1 << 64) - 4096, 8192, "ram"]]}, "not a region"),
        ({"regions": [[n << 12, 4096, "ram"] for n in range(REGIONS_MAX + 1)]}, "4097 memory"),
        ({"kernel": None}, "kernel"),
        ({"kernel": {}}, "levels"),
        (kernel_with(levels=3), "3 paging levels"),
        (kernel_with(levels=True), "levels"),
        (kernel_with(root=-1), "unsigned 64-bit"),
        (kernel_with(virtual_base="0"), "virtual_base"),
        (kernel_with(physical_base=False), "physical_base"),
        (kernel_with(bytes=None), "bytes"),
    ],
)
def test_signed_nonsense(tmp_path: Path, changes: dict[str, object], match: str) -> None:
    assert_refused(write(tmp_path / "bad", HEADER | SMALL.to_payload() | changes), match)


@pytest.mark.parametrize("payload", [[], None, 0, "pyscan-approved", {}, {1: 2}])
def test_signed_something_else(tmp_path: Path, payload: object) -> None:
    assert_refused(write(tmp_path / "bad", payload), "not an approved configuration")


@pytest.mark.parametrize("field", sorted(HEADER | SMALL.to_payload()))
def test_every_field_is_needed(tmp_path: Path, field: str) -> None:
    payload = HEADER | SMALL.to_payload()
    del payload[field]
    assert_refused(write(tmp_path / "bad", payload))


plain: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 64), (1 << 64) - 1)
    | st.binary(max_size=70)
    | st.text(max_size=5)
    | st.sampled_from(["ram", "rom", 4096, 8192, words(0x1000, 0x2000), bytes(64), bytes(2)]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["root", "levels", "bytes", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(field=st.sampled_from(sorted(HEADER | SMALL.to_payload())), value=plain)
def test_what_loads_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: object
) -> None:
    payload = HEADER | SMALL.to_payload() | {field: value}
    path = write(tmp_path_factory.mktemp("any") / "file", payload)
    try:
        loaded, _ = load_approved(path, RING)
    except ApprovedFileError:
        return
    written = encode_cbor(payload)
    assert encode_cbor(HEADER | loaded.to_payload()) == written or field == "regions"


def test_regions_may_come_in_any_order(tmp_path: Path) -> None:
    rows = [[8192, 4096, "ram"], [0, 4096, "rom"]]
    path = write(tmp_path / "regions", HEADER | SMALL.to_payload() | {"regions": rows})
    assert load_approved(path, RING)[0].to_payload()["regions"] == rows[::-1]


# --- the file system ------------------------------------------------------------------


def test_oversize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large"
    size = save_approved(SMALL, path, APPROVER)
    monkeypatch.setattr(file, "FILE_BYTES_MAX", size)
    load_approved(path, RING)
    monkeypatch.setattr(file, "FILE_BYTES_MAX", size - 1)
    assert_refused(path, f"larger than {size - 1}")


def missing(path: Path) -> None:
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (missing, "cannot be read: No such file"),
        (Path.mkdir, "cannot be read: Is a directory"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels"),
        (Path.touch, "not a valid approved configuration"),
    ],
)
def test_no_file_to_read(tmp_path: Path, make: Callable[[Path], object], match: str) -> None:
    path = tmp_path / "file"
    make(path)
    assert_refused(path, match)


@pytest.mark.parametrize(
    "name", ["missing/file", "file/inside", ".", "directory", "x" * 254, "x" * 300, "dangling/x"]
)
def test_nowhere_to_write(tmp_path: Path, name: str) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ApprovedFileError, match="cannot be written") as caught:
        save_approved(SMALL, tmp_path / name, APPROVER)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@contextmanager
def full_disk(length: int) -> Iterator[None]:
    """No file may become longer than `length`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_cannot_be_written_to_the_end_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_approved(SMALL, path, APPROVER)
    before = path.read_bytes()
    with (
        full_disk(len(before) // 2),
        pytest.raises(ApprovedFileError, match="cannot be written: File too large"),
    ):
        save_approved(replace(SMALL, created_ns=1), path, APPROVER)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


def test_an_old_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_approved(SMALL, path, APPROVER)
    before = path.read_bytes()
    with path.open("rb") as reader:
        save_approved(replace(SMALL, created_ns=1), path, APPROVER)
        assert reader.read() == before  # whoever reads at that moment has the old one
    assert load_approved(path, RING)[0].created_ns == 1
    assert os.listdir(tmp_path) == ["file"]


# --- enrolment ------------------------------------------------------------------------


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target.make(tmp_path / "ram")


@pytest.mark.parametrize("levels", [4, 5])
def test_enrolled_pages(tmp_path: Path, levels: int) -> None:
    target = Target.make(tmp_path / "ram", levels)
    steps: list[tuple[str, int, int]] = []
    with target.open() as source:
        snapshot = enrol(source, open_digester(), CREATED_NS, lambda *step: steps.append(step))
        assert snapshot.memory_map == source.regions()
        assert snapshot.source == source.uri
    assert snapshot.kernel == target.kernel.image
    assert snapshot.created_ns == CREATED_NS
    assert snapshot.pages == 1024
    assert snapshot.addresses.tolist() == [target.address(page) for page in range(1024)]
    assert snapshot.frames.tolist() == [target.frame(page) for page in range(1024)]
    assert snapshot.flags.tolist() == [EXECUTABLE] * 512 + [0] * 512
    digests, _ = open_digester().hash_pages(target.content(0, 1024))
    assert snapshot.digests.tolist() == digests.tolist()
    assert steps[0] == ("find kernel", 0, 1)
    assert steps[-1] == ("verify", 1024, 1024)


def test_enrolled_content_fits_a_file(target: Target, tmp_path: Path) -> None:
    snapshot = target.enrol()
    save_approved(snapshot, tmp_path / "file", APPROVER)
    loaded, _ = load_approved(tmp_path / "file", RING)
    assert loaded.to_payload() == snapshot.to_payload()


def test_no_kernel(target: Target) -> None:
    target.memory.write(target.kernel.root, bytes(PAGE_SIZE))
    with pytest.raises(KernelNotFound):
        target.enrol()


@pytest.mark.parametrize("status", [s for s in PageStatus if s is not PageStatus.OK])
def test_a_page_that_cannot_be_read(target: Target, status: PageStatus) -> None:
    frame = target.frame(700)
    with (
        FaultSource(target.open(), {frame: status}) as source,
        pytest.raises(SourceUnavailable, match=rf"frame {frame:#x} .*{status.name}"),
    ):
        enrol(source, open_digester(), CREATED_NS)


def test_a_kernel_with_anomalies_is_not_good(target: Target) -> None:
    target.map(3, target.gpa(3), PRESENT | WRITE)
    with pytest.raises(TargetUnavailable, match=r"1 anomalies.*writable-executable"):
        target.enrol()


class Restless:
    """Changes one page at every read of it, `times` times."""

    def __init__(self, frame: int, times: int) -> None:
        self.frame = np.uint64(frame)
        self.times = times
        self.reads = 0

    def __call__(self, frames: Frames, pages: Pages) -> None:
        rows = np.flatnonzero(frames == self.frame)
        if len(rows) and self.reads < self.times:
            self.reads += 1
            pages[rows, 17] ^= np.uint8(self.reads)


def test_a_target_that_does_not_settle(target: Target) -> None:
    steps: list[str] = []
    with (
        Wrapped(target.open(), after=Restless(target.frame(9), 1000)) as source,
        pytest.raises(SourceUnavailable, match=rf"1 kernel pages.*after {SETTLE_TRIES} tries"),
    ):
        enrol(source, open_digester(), CREATED_NS, lambda step, done, total: steps.append(step))
    assert steps.count("verify") == 2 * SETTLE_TRIES  # in two parts each


def test_a_target_that_settles(target: Target) -> None:
    restless = Restless(target.frame(600), 5)
    with Wrapped(target.open(), after=restless) as source:
        snapshot = enrol(source, open_digester(), CREATED_NS)
    assert restless.reads == 5
    assert snapshot.digests.tolist() == target.enrol().digests.tolist()
