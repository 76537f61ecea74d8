"""The command line: exit status, text, JSON, and one line for everything that is wrong."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from commands import Pyscan
from enrolled import APPROVER, Target, Wrapped
from fake_kernel import MIB
from tables import PRESENT

from pyscan import cli
from pyscan.approved import load_approved, save_approved
from pyscan.cli import scan
from pyscan.errors import SourceUnavailable
from pyscan.evidence import EvidenceLog
from pyscan.keys import KeyRing, PublicKey, SigningKey
from pyscan.records import PAGE_SIZE, Action, PageStatus
from pyscan.sources import BACKENDS, leechcore
from pyscan.sources.layers import FaultSource
from pyscan.sources.probe import probe_qemu

COMMANDS = [
    ("demo",),
    ("approve", "snapshot"),
    ("approve", "linux"),
    ("approve", "show"),
    ("approve", "diff"),
    ("scan",),
    ("bench",),
    ("monitor",),
    ("control",),
    ("agent",),
    *(("vm", name) for name in ("list", "approve", *Action)),
    ("incidents",),
    ("incidents", "show"),
    ("incidents", "release"),
    ("incidents", "resume"),
    ("events",),
    ("policy", "check"),
    ("policy", "simulate"),
    ("evidence", "verify"),
    ("evidence", "show"),
    ("evidence", "export"),
    ("keys", "create"),
    ("keys", "root"),
    ("keys", "issue"),
    ("keys", "rotate"),
    ("keys", "revoke"),
    ("keys", "trust"),
    ("keys", "show"),
    ("sources",),
    ("card", "status"),
    ("card", "log"),
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keys of an operator of one's own; HOME must not be touched."""
    path = tmp_path / "pyscan-home"
    monkeypatch.setenv("PYSCAN_HOME", str(path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("PYSCAN_TRACEBACK", raising=False)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target.make(tmp_path / "ram")


@pytest.fixture
def pyscan(capsys: pytest.CaptureFixture[str]) -> Pyscan:
    return Pyscan(capsys)


@pytest.fixture
def approved(target: Target, tmp_path: Path, pyscan: Pyscan) -> Path:
    path = tmp_path / "web-1.approved"
    assert pyscan("approve", "snapshot", target.uri, "--out", path).status == 0
    return path


# --- help -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(pyscan: Pyscan, command: tuple[str, ...]) -> None:
    output = pyscan(*command, "--help")
    assert (output.status, output.err) == (0, "")
    example = output.out[output.out.index("example:") :]
    assert f"\n  pyscan {' '.join(command)}" in example


def test_the_list_of_commands_is_whole(pyscan: Pyscan) -> None:
    output = pyscan("--help")
    listed = re.findall(r"^    ([a-z]+)(?:  |$)", output.out, re.MULTILINE)
    assert sorted(listed) == sorted({command[0] for command in COMMANDS})
    assert "Exit status" in output.out


def test_version(pyscan: Pyscan) -> None:
    assert re.fullmatch(r"pyscan \d+\.\d+\.\d+\n", pyscan("--version").out)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("scan",),
        ("scan", "file:/ram"),
        ("approve",),
        ("approve", "snapshot", "file:/ram"),
        ("scan", "file:/ram", "--approved", "x", "--no-such-option"),
        ("monitor",),
    ],
)
def test_wrong_arguments(pyscan: Pyscan, arguments: tuple[str, ...]) -> None:
    output = pyscan(*arguments)
    assert (output.status, output.out) == (2, "")
    assert output.err.startswith("usage: pyscan")


# --- approve --------------------------------------------------------------------------


def test_approve_snapshot(target: Target, tmp_path: Path, home: Path, pyscan: Pyscan) -> None:
    path = tmp_path / "a.approved"
    output = pyscan("approve", "snapshot", target.uri, "--out", path)
    assert output.status == 0
    assert output.err == f"pyscan: made a key to sign with: {home / 'approver.key'}\n"
    assert output.facts["pages"].startswith("1024 executable or read-only kernel pages")
    assert str(path) in output.facts["approved"]
    assert hex(target.kernel.root) in output.facts["kernel"]
    ring = KeyRing.of({"approver": PublicKey.load(home / "approver.pub")})
    snapshot, _ = load_approved(path, ring)
    assert (snapshot.pages, snapshot.source) == (1024, target.uri)
    again = pyscan("approve", "snapshot", target.uri, "--out", path)  # with the same key
    assert (again.status, again.err) == (0, "")
    assert not (tmp_path / "home").exists()


def test_approve_with_another_key(
    target: Target, tmp_path: Path, home: Path, pyscan: Pyscan
) -> None:
    APPROVER.save(tmp_path / "key")
    path = tmp_path / "a.approved"
    output = pyscan("approve", "snapshot", target.uri, "--out", path, "--sign", tmp_path / "key")
    assert (output.status, output.err) == (0, "")
    assert not home.exists()
    load_approved(path, KeyRing.of({"a": APPROVER.public}))


def test_home_of_keys(
    target: Target, tmp_path: Path, pyscan: Pyscan, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.approved"
    monkeypatch.delenv("PYSCAN_HOME")
    assert pyscan("approve", "snapshot", target.uri, "--out", path).status == 0
    assert (tmp_path / "home/.config/pyscan/approver.key").is_file()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert pyscan("approve", "show", path).status == 2
    assert pyscan("approve", "snapshot", target.uri, "--out", path).status == 0
    key = tmp_path / "xdg/pyscan/approver.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert pyscan("approve", "show", path).status == 0


def test_a_home_that_cannot_be_made(
    target: Target, tmp_path: Path, home: Path, pyscan: Pyscan
) -> None:
    home.touch()
    output = pyscan("approve", "snapshot", target.uri, "--out", tmp_path / "a")
    assert (output.status, "PYSCAN_HOME" in output.error) == (2, True)


def test_no_kernel_in_memory(target: Target, tmp_path: Path, pyscan: Pyscan) -> None:
    target.memory.write(target.kernel.root, bytes(PAGE_SIZE))
    APPROVER.save(tmp_path / "key")
    out = tmp_path / "a.approved"
    output = pyscan("approve", "snapshot", target.uri, "--out", out, "--sign", tmp_path / "key")
    assert (output.status, "no Linux kernel" in output.error) == (3, True)
    assert not out.exists()


def test_a_page_that_cannot_be_read_is_not_approved(
    target: Target, tmp_path: Path, pyscan: Pyscan, monkeypatch: pytest.MonkeyPatch
) -> None:
    APPROVER.save(tmp_path / "key")
    faults = {target.frame(7): PageStatus.TIMEOUT}
    monkeypatch.setattr(cli.approve, "open_source", lambda _uri: FaultSource(target.open(), faults))
    out = tmp_path / "a.approved"
    output = pyscan("approve", "snapshot", target.uri, "--out", out, "--sign", tmp_path / "key")
    assert (output.status, "TIMEOUT" in output.error) == (3, True)
    assert not out.exists()


@pytest.mark.parametrize("name", ["missing/a", "ram/a", ".", "x" * 300])
def test_nowhere_to_write(target: Target, tmp_path: Path, pyscan: Pyscan, name: str) -> None:
    APPROVER.save(tmp_path / "key")
    out = tmp_path / name
    output = pyscan("approve", "snapshot", target.uri, "--out", out, "--sign", tmp_path / "key")
    assert (output.status, "cannot be written" in output.error) == (2, True)


def test_approve_show(target: Target, approved: Path, pyscan: Pyscan) -> None:
    text = pyscan("approve", "show", approved)
    assert text.status == 0
    assert text.facts["approver"] == "approver"
    assert text.facts["pages"] == "total 1024  executable 512  read only 512"
    document = pyscan("approve", "show", approved, "--json").json()
    assert document["kind"] == "snapshot"
    assert document["source"] == target.uri
    assert document["pages"] == {"total": 1024, "executable": 512, "read_only": 512}
    assert document["kernel"] == {
        "virtual_base": hex(target.kernel.virtual),
        "physical_base": hex(target.kernel.physical),
        "paging_levels": 4,
        "page_table_root": hex(target.kernel.root),
    }
    assert document["memory"][0] == {"gpa": "0x0", "length": "0xc3000", "kind": "ram"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", document["created"])


# --- scan -----------------------------------------------------------------------------


def test_scan_of_an_untouched_target(target: Target, approved: Path, pyscan: Pyscan) -> None:
    output = pyscan("scan", target.uri, "--approved", approved)
    assert (output.status, output.err) == (0, "")
    assert output.facts["verdict"] == "approved  all 1024 pages are as approved"
    assert output.facts["source"] == target.uri
    assert output.facts["pages"] == "watched 1024  ok 1024  unreadable 0"
    assert "1024 pages, by approver" in output.facts["approved"]
    assert "registers" in output.facts["not judged"]
    assert "finding" not in output.out


def test_scan_of_an_untouched_target_in_json(
    target: Target, approved: Path, pyscan: Pyscan
) -> None:
    output = pyscan("scan", target.uri, "--approved", approved, "--json")
    document = output.json()
    assert (output.status, output.err) == (0, "")
    assert set(document["timings_ms"]) == {"load", "open", "sweep", "total"}
    assert all(value >= 0 for value in document.pop("timings_ms").values())
    assert document == {
        "verdict": "approved",
        "reason": "all 1024 pages are as approved",
        "source": target.uri,
        "approved": [str(approved)],
        "pages": {
            "watched": 1024,
            "ok": 1024,
            "mismatched": 0,
            "unreadable": 0,
            "transient": 0,
            "unlisted_executable": 0,
        },
        "findings": [],
        "findings_total": 0,
        "not_judged": ["registers", "caches", "writable data"],
    }


def test_scan_finds_one_bit(target: Target, approved: Path, pyscan: Pyscan) -> None:
    target.flip(300)
    text = pyscan("scan", target.uri, "--approved", approved)
    assert text.status == 1
    assert text.facts["verdict"].startswith("unapproved")
    assert text.facts["finding"] == "digest  kernel text +0x12c000"
    assert text.facts["address"] == hex(target.address(300))
    output = pyscan("scan", target.uri, "--approved", approved, "--json")
    document = output.json()
    assert (output.status, document["verdict"]) == (1, "unapproved")
    assert document["pages"]["mismatched"] == document["findings_total"] == 1
    (finding,) = document["findings"]
    assert (finding["address"], finding["physical_frame"]) == (
        hex(target.address(300)),
        hex(target.frame(300)),
    )
    assert (finding["kind"], finding["status"]) == ("digest", "ok")
    assert re.fullmatch("[0-9a-f]{64}", finding["expected"])
    assert re.fullmatch("[0-9a-f]{64}", finding["actual"])
    assert finding["expected"] != finding["actual"]
    target.flip(300)
    assert pyscan("scan", target.uri, "--approved", approved).status == 0


def test_scan_finds_an_address_that_leads_elsewhere(
    target: Target, approved: Path, pyscan: Pyscan
) -> None:
    target.map(9, 40 * MIB, PRESENT)
    output = pyscan("scan", target.uri, "--approved", approved, "--json")
    assert output.status == 1
    (finding,) = output.json()["findings"]
    assert (finding["kind"], finding["actual"]) == ("mapping", "frame 0x2800 executable")


def test_scan_lists_a_bounded_number_of_findings(
    target: Target, approved: Path, pyscan: Pyscan
) -> None:
    for page in range(100, 150):
        target.flip(page)
    output = pyscan("scan", target.uri, "--approved", approved)
    assert (output.status, output.out.count("\nfinding")) == (1, 32)
    assert output.out.endswith("\n18 more findings are not listed\n")


def test_scan_tells_of_pages_that_are_not_listed(
    target: Target, approved: Path, pyscan: Pyscan
) -> None:
    kernel = target.kernel
    kernel.memory.map(kernel.form, kernel.root, 0xFFFF_FFFF_C000_0000, 40 * MIB, PRESENT)
    output = pyscan("scan", target.uri, "--approved", approved)
    assert (output.status, "1 executable pages" in output.facts["not judged"]) == (0, True)


def test_scan_of_another_boot(target: Target, approved: Path, pyscan: Pyscan) -> None:
    target.memory.write(target.kernel.root, bytes(PAGE_SIZE))
    output = pyscan("scan", target.uri, "--approved", approved, "--json")
    assert (output.status, output.json()["verdict"]) == (3, "undecided")
    assert output.json()["findings"][0]["kind"] == "attach"


def test_scan_of_pages_that_cannot_be_read(
    target: Target, approved: Path, pyscan: Pyscan, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {target.frame(7): PageStatus.BLOCKED}
    monkeypatch.setattr(scan, "open_source", lambda _uri: FaultSource(target.open(), faults))
    output = pyscan("scan", target.uri, "--approved", approved, "--json")
    document = output.json()
    assert (output.status, document["verdict"]) == (3, "undecided")
    assert document["pages"]["unreadable"] == 1
    (finding,) = document["findings"]
    assert (finding["kind"], finding["status"], finding["actual"]) == ("unreadable", "blocked", "")


@pytest.mark.parametrize("as_json", [True, False])
def test_scan_of_a_dead_socket(
    tmp_path: Path, approved: Path, pyscan: Pyscan, as_json: bool
) -> None:
    uri = f"qemu:{tmp_path / 'dead.qmp'}"
    output = pyscan("scan", uri, "--approved", approved, *(["--json"] if as_json else []))
    assert (output.status, output.err) == (3, "")
    if as_json:
        document = output.json()
        assert (document["verdict"], document["findings"]) == ("undecided", [])
        assert "dead.qmp" in document["reason"]
        assert set(document["timings_ms"]) == {"load", "total"}
    else:
        assert output.facts["verdict"].startswith("undecided")
        assert "dead.qmp" in output.facts["verdict"]


def test_scan_of_a_file_that_is_gone(target: Target, approved: Path, pyscan: Pyscan) -> None:
    target.path.unlink()
    output = pyscan("scan", target.uri, "--approved", approved, "--json")
    assert (output.status, output.json()["verdict"]) == (3, "undecided")


def test_scan_of_a_target_that_goes_meanwhile(
    target: Target, approved: Path, pyscan: Pyscan, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(Wrapped):
        def regions(self) -> Any:
            raise SourceUnavailable("the virtual machine ended")

    monkeypatch.setattr(scan, "open_source", lambda _uri: Gone(target.open()))
    output = pyscan("scan", target.uri, "--approved", approved)
    assert output.status == 3
    assert output.facts["verdict"] == "undecided  the virtual machine ended"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("machine=q35", "machine=pdp11"), "pdp11"),
        (("size=67108864", "size=128M"), "ram"),
        (("size=67108864", "size=lots"), "lots"),
        (("&size=67108864", ""), "size="),
        (("file:", "tape:"), "tape"),
        (("file:", ""), "source"),
        (("machine=q35", "machine=q35&access=magic"), "access"),
    ],
)
def test_scan_of_a_wrong_source(
    target: Target, approved: Path, pyscan: Pyscan, change: tuple[str, str], says: str
) -> None:
    uri = target.uri.replace(*change)
    assert uri != target.uri
    output = pyscan("scan", uri, "--approved", approved, "--json")
    assert (output.status, says in output.error) == (2, True)


def test_scan_of_a_file_shorter_than_its_map(
    target: Target, approved: Path, pyscan: Pyscan
) -> None:
    os.truncate(target.path, 63 * MIB)
    output = pyscan("scan", target.uri, "--approved", approved)
    assert (output.status, str(target.path) in output.error) == (2, True)


@pytest.mark.parametrize("command", ["scan", "show"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: b"",
        lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
        lambda data: data + b"\n",
        lambda data: b"not CBOR at all",
    ],
    ids=["cut", "cut-short", "empty", "edited", "longer", "text"],
)
def test_a_damaged_approved_file(
    target: Target, approved: Path, pyscan: Pyscan, command: str, damage: Any
) -> None:
    approved.write_bytes(damage(approved.read_bytes()))
    if command == "scan":
        output = pyscan("scan", target.uri, "--approved", approved, "--json")
    else:
        output = pyscan("approve", "show", approved)
    assert output.status == 2
    assert output.error.startswith(f"pyscan: {approved}: not a valid approved configuration")


def test_whom_a_scan_trusts(
    target: Target, approved: Path, tmp_path: Path, home: Path, pyscan: Pyscan
) -> None:
    APPROVER.public.save(tmp_path / "other.pub")
    only_other = pyscan(
        "scan", target.uri, "--approved", approved, "--trust", tmp_path / "other.pub"
    )
    assert (only_other.status, "not pinned" in only_other.error) == (2, True)
    own = home / "approver.pub"
    both = ("--trust", tmp_path / "other.pub", "--trust", own)
    assert pyscan("scan", target.uri, "--approved", approved, *both).status == 0
    assert pyscan("scan", target.uri, "--approved", approved, "--trust", own).status == 0
    foreign = tmp_path / "foreign.approved"
    save_approved(target.enrol(), foreign, APPROVER)
    output = pyscan("scan", target.uri, "--approved", foreign)
    assert (output.status, "not pinned" in output.error) == (2, True)
    output = pyscan("scan", target.uri, "--approved", foreign, *both)
    assert (output.status, "by other" in output.facts["approved"]) == (0, True)


def test_two_keys_of_one_name(
    target: Target, approved: Path, tmp_path: Path, home: Path, pyscan: Pyscan
) -> None:
    (tmp_path / "b").mkdir()
    APPROVER.public.save(tmp_path / "b" / "approver.pub")
    trust = ("--trust", home / "approver.pub", "--trust", tmp_path / "b" / "approver.pub")
    output = pyscan("scan", target.uri, "--approved", approved, *trust)
    assert (output.status, "two keys of one name" in output.error) == (2, True)


def test_nobody_is_trusted(target: Target, tmp_path: Path, home: Path, pyscan: Pyscan) -> None:
    path = tmp_path / "a.approved"
    save_approved(target.enrol(), path, APPROVER)
    for command in (("scan", target.uri, "--approved", path), ("approve", "show", path)):
        output = pyscan(*command)
        assert (output.status, "--trust" in output.error) == (2, True)
    assert not home.exists()


@pytest.mark.parametrize("name", ["missing.pub", "ram", "pyscan-home/approver.key"])
def test_trusting_what_is_no_public_key(
    target: Target, approved: Path, tmp_path: Path, pyscan: Pyscan, name: str
) -> None:
    output = pyscan("scan", target.uri, "--approved", approved, "--trust", tmp_path / name)
    assert (output.status, name in output.error) == (2, True)


def test_digest_backends(target: Target, approved: Path, tmp_path: Path, pyscan: Pyscan) -> None:
    unknown = pyscan("scan", target.uri, "--approved", approved, "--backend", "md5")
    assert (unknown.status, "md5" in unknown.error) == (2, True)
    numba = ("--backend", "numba")
    out = tmp_path / "numba.approved"
    assert pyscan("approve", "snapshot", target.uri, "--out", out, *numba).status == 0
    assert pyscan("scan", target.uri, "--approved", out).status == 0
    assert pyscan("scan", target.uri, "--approved", approved, *numba).status == 0
    target.flip(3)
    assert pyscan("scan", target.uri, "--approved", approved, *numba).status == 1


# --- keys, evidence, sources ------------------------------------------------------------


def test_keys_create(tmp_path: Path, pyscan: Pyscan) -> None:
    path = tmp_path / "monitor.key"
    output = pyscan("keys", "create", path)
    key = SigningKey.load(path)
    assert output.status == 0
    assert output.facts == {
        "private": str(path),
        "public": f"{path}.pub",
        "key id": key.key_id.hex(),
    }
    assert PublicKey.load(tmp_path / "monitor.key.pub") == key.public
    before = path.read_bytes()
    again = pyscan("keys", "create", path)
    assert (again.status, "exists already" in again.error) == (2, True)
    assert path.read_bytes() == before


def test_keys_create_makes_both_or_none(tmp_path: Path, pyscan: Pyscan) -> None:
    (tmp_path / "k.pub").write_text("somebody else's")
    output = pyscan("keys", "create", tmp_path / "k")
    assert (output.status, "k.pub" in output.error) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.pub"]


@pytest.mark.parametrize("name", ["missing/key", ".", "..", "", "/"])
def test_keys_create_nowhere(
    tmp_path: Path, pyscan: Pyscan, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = pyscan("keys", "create", name)
    assert (output.status, bool(output.error)) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    directory = tmp_path / "evidence"
    with EvidenceLog.open(directory, APPROVER, "card-1") as log:
        log.append("note", {"text": "something happened", "page": log.attach(bytes(PAGE_SIZE))})
    return directory


def test_evidence_verify(evidence: Path, tmp_path: Path, pyscan: Pyscan) -> None:
    APPROVER.public.save(tmp_path / "card-1.pub")
    for trust in ((), ("--trust", tmp_path / "card-1.pub")):
        output = pyscan("evidence", "verify", evidence, *trust)
        assert (output.status, output.err) == (0, "")
        assert "card-1" in output.facts["logs"]
        document = pyscan("evidence", "verify", evidence, *trust, "--json").json()
        assert document["blobs"] == 1
        assert document["logs"][0]["key_id"] == APPROVER.key_id.hex()


def test_evidence_that_does_not_verify(evidence: Path, tmp_path: Path, pyscan: Pyscan) -> None:
    SigningKey.generate().public.save(tmp_path / "other.pub")
    foreign = pyscan("evidence", "verify", evidence, "--trust", tmp_path / "other.pub")
    assert (foreign.status, "writer.pub" in foreign.error) == (2, True)
    log = evidence / "log.cborseq"
    content = log.read_bytes()
    log.write_bytes(content.replace(b"something", b"SOMETHING"))
    edited = pyscan("evidence", "verify", evidence)
    assert (edited.status, str(log) in edited.error) == (2, True)
    log.unlink()
    assert pyscan("evidence", "verify", evidence).status == 2
    assert pyscan("evidence", "verify", tmp_path / "nothing").status == 2


def test_sources(pyscan: Pyscan) -> None:
    output = pyscan("sources")
    assert output.status == 0
    schemes = [backend.scheme for backend in BACKENDS]
    assert {"file", "qemu", "nvme-dma", "edu", "card", "xdma", "leechcore"} == set(schemes)
    assert set(schemes) <= set(output.facts)
    document = pyscan("sources", "--json").json()
    assert [backend["scheme"] for backend in document] == schemes
    assert all(set(b) == {"scheme", "form", "summary", "requires", "found"} for b in document)
    found = {backend["scheme"]: backend["found"] for backend in document}
    assert "QEMU emulator version" in found["qemu"]
    assert found["leechcore"].startswith("leechcorepyc ")


def test_sources_on_a_machine_that_has_nothing(
    pyscan: Pyscan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(leechcore, "PACKAGE", "leechcorepyc_that_is_not_there")
    probe_qemu.cache_clear()
    try:
        document = pyscan("sources", "--json").json()
        broken = tmp_path / "qemu-system-x86_64"
        broken.write_text("#!/nowhere\n")
        broken.chmod(0o755)
        probe_qemu.cache_clear()
        assert "does not run" in probe_qemu()
    finally:
        probe_qemu.cache_clear()
    found = {backend["scheme"]: backend["found"] for backend in document}
    assert found["qemu"].startswith("no qemu-system-x86_64 on PATH")
    assert found["leechcore"].startswith("leechcorepyc_that_is_not_there is not installed")
    assert all("\n" not in line for line in found.values())
