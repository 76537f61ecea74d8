"""`pyscan approve linux`, `show` and `diff` with configurations of kind linux."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Pyscan
from enrolled import APPROVER, Target
from package_files import kernel_files, make_deb, make_tar
from units import build_linux, build_sites, build_symbols, build_unit, offsets

import pyscan.compile
from pyscan.approved import LinuxApproved, save_approved, save_linux
from pyscan.approved.linux import Anchor, Provenance
from pyscan.approved.unit import Section, Unit
from pyscan.errors import PackageError

Compile = Callable[[Sequence[Any], Callable[[str, int, int], None]], LinuxApproved]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keys of an operator of one's own; HOME must not be touched."""
    path = tmp_path / "pyscan-home"
    path.mkdir(mode=0o700)
    APPROVER.save(path / "approver.key")
    APPROVER.public.save(path / "approver.pub")
    monkeypatch.setenv("PYSCAN_HOME", str(path))
    monkeypatch.delenv("PYSCAN_TRACEBACK", raising=False)
    return path


@pytest.fixture
def pyscan_(capsys: pytest.CaptureFixture[str]) -> Pyscan:
    return Pyscan(capsys)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "linux-image-test.deb"
    path.write_bytes(make_deb(make_tar(*kernel_files())))
    return path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compiling gives a small configuration; names the packages that it was given."""
    names: list[str] = []

    def compile_packages(
        packages: Sequence[Any], progress: Callable[[str, int, int], None]
    ) -> LinuxApproved:
        names.extend(package.name for package in packages)
        progress("kernel", 1, 1)
        progress("modules", 1, 2)
        return build_linux()

    monkeypatch.setattr(pyscan.compile, "compile_packages", compile_packages)
    return names


def saved(path: Path, approved: LinuxApproved) -> Path:
    save_linux(approved, path, APPROVER)
    return path


# --- linux ----------------------------------------------------------------------------


def test_approve_linux(package: Path, tmp_path: Path, compiled: list[str], pyscan_: Pyscan) -> None:
    path = tmp_path / "cloud.approved"
    output = pyscan_("approve", "linux", package, package, "--out", path)
    assert (output.status, output.err) == (0, "")
    assert compiled == ["linux-image-test"] * 2
    assert output.facts["approved"].startswith(f"{path} ({path.stat().st_size} bytes")
    assert APPROVER.key_id.hex() in output.facts["approved"]
    assert output.facts["release"] == "6.1.0-0-test"
    assert output.facts["provenance"].startswith("linux-image-6.1.0-0-test  6.1.1-1  amd64  ")
    assert output.facts["units"] == "3"
    assert output.facts["protected bytes"] == (
        "total 36864  text 12288  rodata 12288  ro after init 12288"
    )
    sites = output.facts["patch sites"]
    assert sites.startswith("total 57  mcount 6  returns 6  locks 6  retpolines 6  paravirt 6  ")
    assert "alternatives 9  jump_labels" in sites.replace("jump labels", "jump_labels")
    assert re.fullmatch(r"\d+\.\d", output.facts["seconds"])
    assert path.read_bytes() == saved(tmp_path / "same", build_linux()).read_bytes()


def test_approve_linux_with_another_key(
    package: Path, tmp_path: Path, compiled: list[str], home: Path, pyscan_: Pyscan
) -> None:
    assert pyscan_("keys", "create", tmp_path / "other").status == 0
    path = tmp_path / "cloud.approved"
    command = ("approve", "linux", package, "--out", path, "--sign", tmp_path / "other")
    assert pyscan_(*command).status == 0
    refused = pyscan_("approve", "show", path)
    assert (refused.status, "not pinned" in refused.error) == (2, True)
    trust = ("--trust", tmp_path / "other.pub")
    assert pyscan_("approve", "show", path, *trust).facts["approver"] == "other"


@pytest.mark.parametrize("name", ["missing.deb", "pyscan-home", "pyscan-home/approver.key"])
def test_what_is_no_package(tmp_path: Path, pyscan_: Pyscan, name: str) -> None:
    out = tmp_path / "a.approved"
    output = pyscan_("approve", "linux", tmp_path / name, "--out", out)
    assert (output.status, bool(output.error)) == (2, True)
    assert not out.exists()


def test_a_package_whose_kernel_is_none(package: Path, tmp_path: Path, pyscan_: Pyscan) -> None:
    out = tmp_path / "a.approved"
    output = pyscan_("approve", "linux", package, "--out", out)
    assert (output.status, bool(output.error)) == (2, True)
    assert not out.exists()


def test_a_package_that_cannot_be_compiled(
    package: Path, tmp_path: Path, pyscan_: Pyscan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> LinuxApproved:
        raise PackageError("module loop: unknown relocation type 99")

    monkeypatch.setattr(pyscan.compile, "compile_packages", refuse)
    output = pyscan_("approve", "linux", package, "--out", tmp_path / "a")
    assert (output.status, "unknown relocation type 99" in output.error) == (2, True)


@pytest.mark.parametrize("name", ["missing/a", "linux-image-test.deb/a", ".", "x" * 300])
def test_nowhere_to_write(
    package: Path, tmp_path: Path, compiled: list[str], pyscan_: Pyscan, name: str
) -> None:
    output = pyscan_("approve", "linux", package, "--out", tmp_path / name)
    assert (output.status, "cannot be written" in output.error) == (2, True)


def test_no_package(tmp_path: Path, pyscan_: Pyscan) -> None:
    output = pyscan_("approve", "linux", "--out", tmp_path / "a")
    assert (output.status, output.out) == (2, "")
    assert "PACKAGE" in output.err


# --- show -----------------------------------------------------------------------------


def test_show(tmp_path: Path, pyscan_: Pyscan) -> None:
    path = saved(tmp_path / "a", build_linux())
    text = pyscan_("approve", "show", path)
    assert (text.status, text.err) == (0, "")
    assert (text.facts["kind"], text.facts["approver"]) == ("linux", "approver")
    assert "nf_tables" not in text.out
    document = pyscan_("approve", "show", path, "--json").json()
    assert document["modules"] == ["loop", "nf_tables"]
    assert document["units"] == 3
    assert document["provenance"][0]["version"] == "6.1.1-1"
    assert document["protected_bytes"]["total"] == 3 * 0x3000
    assert document["patch_sites"]["alternatives"] == 9
    assert "alternative_runs" not in document["patch_sites"]
    assert document["patch_sites"]["total"] == 57
    assert document["anchors"][0] == {"name": "linux_banner", "offset": "0x1200", "bytes": 64}
    assert (document["symbols"], document["exports"], document["types"]) == (18, 6, 3)


@pytest.mark.parametrize("at", [0, 8, 70, 20_000, -5])
def test_show_of_a_damaged_file(tmp_path: Path, pyscan_: Pyscan, at: int) -> None:
    path = saved(tmp_path / "a", build_linux())
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)
    output = pyscan_("approve", "show", path)
    assert (output.status, str(path) in output.error) == (2, True)


def test_a_scan_with_the_package_of_another_kernel(tmp_path: Path, pyscan_: Pyscan) -> None:
    path = saved(tmp_path / "a", build_linux())
    target = Target.make(tmp_path / "ram")
    output = pyscan_("scan", target.uri, "--approved", path)
    assert output.status == 3
    assert "the running kernel is none of the approved ones" in output.facts["verdict"]


def test_a_snapshot_is_given_alone(tmp_path: Path, pyscan_: Pyscan) -> None:
    target = Target.make(tmp_path / "ram")
    snapshot = tmp_path / "snapshot"
    save_approved(target.enrol(), snapshot, APPROVER)
    path = saved(tmp_path / "a", build_linux())
    output = pyscan_("scan", target.uri, "--approved", path, "--approved", snapshot)
    assert (output.status, "kind linux" in output.error) == (2, True)


# --- diff -----------------------------------------------------------------------------


def changed_image(unit: Unit, at: int) -> Unit:
    image = unit.image.copy()
    image[at] ^= 1
    return replace(unit, image=image)


def test_diff_of_equals(tmp_path: Path, pyscan_: Pyscan) -> None:
    first, second = (saved(tmp_path / name, build_linux()) for name in "ab")
    output = pyscan_("approve", "diff", first, second)
    assert (output.status, output.facts) == (0, {"equal": "both allow the same"})
    output = pyscan_("approve", "diff", first, second, "--json")
    assert (output.status, output.json()) == (
        0,
        {"equal": True, "fields": {}, "modules_added": [], "modules_removed": [], "changed": {}},
    )


def test_diff(tmp_path: Path, pyscan_: Pyscan) -> None:
    first = saved(tmp_path / "a", build_linux(["loop", "tun", "nf_tables"]))
    package = Provenance("linux-image-6.1.0-1-test", "6.1.2-1", "amd64", "ab" * 32)
    loop = changed_image(build_unit("loop"), 0x1001)
    other = build_linux(
        [],
        release="6.1.0-1-test",
        provenance=(package,),
        modules={"nf_tables": build_unit("nf_tables"), "loop": loop, "xfs": build_unit("xfs")},
    )
    second = saved(tmp_path / "b", other)
    output = pyscan_("approve", "diff", first, second, "--json")
    document = output.json()
    assert (output.status, document["equal"]) == (1, False)
    assert document["fields"]["release"] == {"first": "6.1.0-0-test", "second": "6.1.0-1-test"}
    assert "6.1.2-1" in document["fields"]["provenance"]["second"]
    assert (document["modules_added"], document["modules_removed"]) == (["xfs"], ["tun"])
    assert document["changed"] == {"loop": ["section .rodata differs, 2048 -> 2048 bytes"]}
    text = pyscan_("approve", "diff", first, second)
    assert text.status == 1
    assert text.facts["added"] == "xfs"
    assert text.facts["removed"] == "tun"
    assert text.facts["loop"] == "section .rodata differs, 2048 -> 2048 bytes"
    assert text.facts["release"] == "- 6.1.0-0-test"


BASE = build_unit("loop")


@pytest.mark.parametrize(
    ("unit", "part"),
    [
        (changed_image(BASE, 0x1900), "image 12288 -> 12288 bytes, between its sections"),
        (changed_image(BASE, 0x10), "section .text differs, 4096 -> 4096 bytes"),
        (
            replace(BASE, sites=build_sites(returns=offsets(1, 8, 16))),
            "returns 2 -> 3",
        ),
        (replace(BASE, sites=build_sites(mcount=offsets(1, 8))), "mcount 2 -> 2"),
        (replace(BASE, symbols=build_symbols([(0, 1, "only")])), "symbols 6 -> 1"),
        (replace(BASE, exports=()), "exports 2 -> 0"),
        (replace(BASE, sections=(*BASE.sections, Section(".x", 0, 1))), "sections 3 -> 4"),
        (replace(BASE, length=0x5000), "length 16384 -> 20480"),
        (replace(BASE, init_function=None), "init function 16 -> None"),
        (
            replace(BASE, relocations32=BASE.relocations32[:1]),
            "relocations32 2 -> 1",
        ),
    ],
)
def test_diff_of_a_unit(tmp_path: Path, pyscan_: Pyscan, unit: Unit, part: str) -> None:
    first = saved(tmp_path / "a", build_linux([], modules={"loop": BASE}))
    second = saved(tmp_path / "b", build_linux([], modules={"loop": unit}))
    output = pyscan_("approve", "diff", first, second, "--json")
    assert (output.status, output.json()["changed"]) == (1, {"loop": [part]})


def test_diff_of_the_kernel_and_layouts(tmp_path: Path, pyscan_: Pyscan) -> None:
    first = saved(tmp_path / "a", build_linux([]))
    anchor = Anchor("linux_banner", 0x10, np.arange(8, dtype=np.uint8).tobytes())
    other = build_linux(
        [],
        vmlinux=changed_image(build_unit(), 0x2000),
        anchors=(anchor,),
        offsets={"module": 900, "module.name": 24, "extra": 1},
    )
    document = pyscan_("approve", "diff", first, saved(tmp_path / "b", other), "--json").json()
    assert document["changed"] == {
        "vmlinux": ["section .data..ro_after_init differs, 4096 -> 4096 bytes"]
    }
    assert document["fields"]["offsets"] == {
        "first": "extra none, module 896, task_struct.mm 2336",
        "second": "extra 1, module 900, task_struct.mm none",
    }
    assert document["fields"]["anchors"]["second"] == "linux_banner at 0x10 0001020304050607"


def test_diff_needs_two_of_kind_linux(tmp_path: Path, pyscan_: Pyscan) -> None:
    linux = saved(tmp_path / "a", build_linux([]))
    snapshot = tmp_path / "snapshot"
    save_approved(Target.make(tmp_path / "ram").enrol(), snapshot, APPROVER)
    for pair in ((linux, snapshot), (snapshot, linux)):
        output = pyscan_("approve", "diff", *pair)
        assert (output.status, "kind snapshot" in output.error) == (2, True)
    assert json.loads(pyscan_("approve", "show", snapshot, "--json").out)["kind"] == "snapshot"
