"""Kernel packages: Debian's own, hand-made ones, unpacked ones, and hostile ones."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from package_files import (
    CONTROL,
    RELEASE,
    compress,
    edited,
    kernel_files,
    make_ar,
    make_deb,
    make_module,
    make_tar,
    one_line,
)

from pyscan.errors import PackageError
from pyscan.package import deb
from pyscan.package.bzimage import kernel_payload
from pyscan.package.deb import KernelPackage, ModuleFile, open_package
from pyscan.package.elf import Elf

EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4)
FOLDER = f"lib/modules/{RELEASE}/kernel"


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def unpack(root: Path, files: list[tuple[str, bytes]]) -> Path:
    for name, data in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def debian(guest_dir: Path) -> KernelPackage:
    guest = json.loads((guest_dir / "guest.json").read_text())
    return open_package(guest_dir / guest["package_file"])


def test_debian_package(debian: KernelPackage, guest_dir: Path) -> None:
    guest = json.loads((guest_dir / "guest.json").read_text())
    assert debian.name == guest["package"]
    assert debian.version == guest["package_version"]
    assert debian.architecture == "amd64"
    assert debian.release == guest["kernel_release"]
    assert debian.sha256 == guest["files"][guest["package_file"]]
    assert debian.vmlinuz == (guest_dir / "vmlinuz").read_bytes()
    assert len(kernel_payload(debian.vmlinuz)) > 30 << 20


def test_debian_modules(debian: KernelPackage, guest_dir: Path) -> None:
    """The same names as the system's dpkg lists, each an ELF file of its own."""
    guest = json.loads((guest_dir / "guest.json").read_text())
    listing = subprocess.run(
        ["dpkg-deb", "--contents", guest_dir / guest["package_file"]],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    listed = [line.split()[-1].removeprefix("./") for line in listing.splitlines()]
    seen = []
    for module in debian.modules():
        seen.append(module.path)
        elf = Elf(module.data, module.path)
        assert elf.section(".gnu.linkonce.this_module") is not None
    assert seen == [path for path in listed if path.endswith(".ko")]
    assert len(seen) > 500


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_every_compression(tmp_path: Path, suffix: str) -> None:
    data = make_deb(make_tar(*kernel_files()), suffix)
    package = open_package(write(tmp_path / "a.deb", data))
    assert (package.name, package.version) == ("linux-image-test", "6.1.9-1")
    assert package.architecture == "amd64"
    assert package.release == RELEASE
    assert package.vmlinuz == b"boot image"
    assert package.sha256 == hashlib.sha256(data).hexdigest()
    assert list(package.modules()) == [
        ModuleFile(f"{FOLDER}/fs/one-two.ko", make_module()),
        ModuleFile(f"{FOLDER}/net/three.ko", make_module()),
    ]
    assert [module.name for module in package.modules()] == ["one_two", "three"]


def test_modules_below_usr_and_no_image(tmp_path: Path) -> None:
    files = [(f"./usr/lib/modules/{RELEASE}/kernel/a.ko", make_module())]
    package = open_package(write(tmp_path / "a.deb", make_deb(make_tar(*files))))
    assert package.vmlinuz is None
    assert package.release == RELEASE
    assert [path for path, _ in package.modules()] == [files[0][0][2:]]


def test_progress(tmp_path: Path) -> None:
    package = open_package(write(tmp_path / "a.deb", make_deb(make_tar(*kernel_files()))))
    seen: list[tuple[int, int]] = []
    list(package.modules(lambda done, total: seen.append((done, total))))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] > 0


def test_modules_that_are_not_read_are_skipped(tmp_path: Path) -> None:
    """Asking for the next file takes the stream past this one."""
    package = open_package(write(tmp_path / "a.deb", make_deb(make_tar(*kernel_files()))))
    modules = package.modules()
    next(modules)
    assert next(modules).name == "three"


def test_a_long_path(tmp_path: Path) -> None:
    path = f"{FOLDER}/{'d' * 90}/{'e' * 90}/a.ko"
    data = make_deb(make_tar(*kernel_files(), (path, make_module())))
    assert [m.path for m in open_package(write(tmp_path / "a", data)).modules()][-1] == path


def test_an_unpacked_package(tmp_path: Path) -> None:
    files = kernel_files()
    package = open_package(unpack(tmp_path / "unpacked", files))
    assert (package.name, package.version, package.architecture) == ("unpacked", "", "")
    assert package.release == RELEASE
    assert package.vmlinuz == b"boot image"
    lines = sorted(f"{hashlib.sha256(data).hexdigest()}  {name[2:]}\n" for name, data in files[:3])
    assert package.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert [module.name for module in package.modules()] == ["one_two", "three"]
    assert {module.data for module in package.modules()} == {make_module()}


def test_an_unpacked_package_with_its_control_file(tmp_path: Path) -> None:
    root = unpack(tmp_path / "unpacked", [*kernel_files(), ("DEBIAN/control", CONTROL)])
    package = open_package(root)
    assert (package.name, package.version) == ("linux-image-test", "6.1.9-1")


def test_a_merged_usr(tmp_path: Path) -> None:
    files = [(name.replace("lib/", "usr/lib/"), data) for name, data in kernel_files()]
    root = unpack(tmp_path / "root", files)
    (root / "lib").symlink_to("usr/lib")
    paths = [module.path for module in open_package(root).modules()]
    assert paths == [f"usr/{FOLDER}/fs/one-two.ko", f"usr/{FOLDER}/net/three.ko"]


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    root = unpack(tmp_path / "root", kernel_files())
    package = open_package(root)
    (root / FOLDER / "fs/one-two.ko").write_bytes(make_module() + b"x")
    with pytest.raises(PackageError, match="changed while it was read"):
        list(package.modules())
    (root / FOLDER / "fs/one-two.ko").unlink()
    with pytest.raises(PackageError, match="cannot be read"):
        list(package.modules())


def test_no_links_out_of_a_directory(tmp_path: Path) -> None:
    root = unpack(tmp_path / "root", kernel_files())
    (tmp_path / "other.ko").write_bytes(make_module())
    (root / FOLDER / "other.ko").symlink_to(tmp_path / "other.ko")
    with pytest.raises(PackageError, match="cannot be read"):
        open_package(root)


def test_no_package(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").mkdir()
    for name, reason in (
        ("absent", "cannot be read: No such file"),
        ("fifo", "not a regular file"),
        ("empty", "take the package of the kernel image"),
    ):
        with pytest.raises(PackageError, match=reason):
            open_package(tmp_path / name)


TAR = make_tar(*kernel_files())
DATA = compress(TAR, ".xz")
FIRST = ("debian-binary", b"2.0\n")
SECOND = ("control.tar.xz", compress(make_tar(("./control", CONTROL)), ".xz"))
THIRD = ("data.tar.xz", DATA)


def test_other_members_between_and_behind(tmp_path: Path) -> None:
    data = make_ar(FIRST, ("_note", b"x"), SECOND, THIRD, ("_gpgorigin", b"y"))
    assert open_package(write(tmp_path / "a.deb", data)).release == RELEASE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"!<arch>\n",
        b"MZ" * 1000,
        make_ar(),
        make_ar(FIRST),
        make_ar(FIRST, SECOND),
        make_ar(FIRST, THIRD, SECOND),
        make_ar(SECOND, THIRD),
        make_ar(("debian-binary", b"3.0\n"), SECOND, THIRD),
        make_ar(FIRST, SECOND, SECOND, THIRD),
        make_ar(FIRST, FIRST, SECOND, THIRD),
        make_ar(FIRST, SECOND, ("data.tar.bz2", compress(TAR, ".bz2"))),
        make_ar(FIRST, SECOND, ("data.tar.gz", DATA)),
        make_ar(FIRST, ("control.tar.xz", DATA), THIRD),
        make_ar(FIRST, *(("_x", b"") for _ in range(20)), SECOND, THIRD),
        make_ar(FIRST, SECOND, THIRD)[:-100],
        make_ar(FIRST, SECOND, ("data.tar.xz", DATA[:-40])),
        make_ar(FIRST, SECOND, ("data.tar.xz", DATA + b"more")),
        make_ar(FIRST, SECOND, ("data.tar.xz", compress(TAR[:-10240], ".xz"))),
        make_ar(FIRST, SECOND, ("data.tar.xz", compress(TAR[:700], ".xz"))),
        make_ar(FIRST, SECOND, ("data.tar.xz", compress(b"", ".xz"))),
        make_ar(FIRST, SECOND, ("data.tar.xz", compress(make_tar(("./usr/x", b"x")), ".xz"))),
    ],
)
def test_damaged_archives(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(PackageError) as caught:
        list(open_package(write(tmp_path / "a.deb", data)).modules())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([(f"./{FOLDER}/other/one_two.ko", b"")], "more than one module like"),
        ([("./boot/vmlinuz-6.1.0-10-test", b"")], "more than one boot image"),
        ([("./lib/modules/6.1.0-10-test/kernel/a.ko", b"")], "is not of 6.1.0-9-test"),
        ([(f"./{FOLDER}/fs/one-two.ko", b"")], "more than once"),
        ([(f"{FOLDER}/../../a.ko", b"")], "is no path of a package"),
        ([("/etc/passwd", b"")], "is no path of a package"),
        ([("./a//b", b"")], "is no path of a package"),
        ([("./a\x1b[2Jb", b"")], "is no path of a package"),
        ([("./a\nb", b"")], "is no path of a package"),
        ([(f"./{FOLDER}/a.ko.xz", b"no xz")], "data are damaged"),
    ],
)
def test_hostile_content(tmp_path: Path, files: list[tuple[str, bytes]], reason: str) -> None:
    data = make_deb(make_tar(*kernel_files(), *files))
    with pytest.raises(PackageError, match=reason):
        list(open_package(write(tmp_path / "a.deb", data)).modules())


def test_a_module_that_is_a_link(tmp_path: Path) -> None:
    tar = make_tar(*kernel_files(), links=((f"./{FOLDER}/a.ko", "/etc/passwd"),))
    with pytest.raises(PackageError, match="is a link or a directory"):
        list(open_package(write(tmp_path / "a.deb", make_deb(tar))).modules())


def test_other_links_are_left_alone(tmp_path: Path) -> None:
    tar = make_tar(*kernel_files(), links=((f"./lib/modules/{RELEASE}/build", "/usr/src"),))
    assert len(list(open_package(write(tmp_path / "a.deb", make_deb(tar))).modules())) == 2


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, size
    return entry.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "extra",
    [
        header(tarfile.GNUTYPE_LONGNAME, 1 << 32),
        header(tarfile.XHDTYPE, 100) + b"20 path=abc\n".ljust(512, b"\0"),
        header(tarfile.XGLTYPE, 1 << 33),
        header(tarfile.GNUTYPE_SPARSE, 0),
        header(tarfile.CHRTYPE, 0),
        header(tarfile.FIFOTYPE, 0),
        header(b"Z", 0),
        b"\xff" * 512,
        header(tarfile.REGTYPE, 1 << 40),
        header(tarfile.REGTYPE, 0)[:100].ljust(512, b"\0"),
    ],
)
def test_headers_that_no_package_has(tmp_path: Path, extra: bytes) -> None:
    """At any place, and with more headers behind: never the quiet end of the archive."""
    for tar in (extra + TAR, TAR[:1024] + extra + TAR[1024:]):
        data = make_deb(tar, ".gz")
        with pytest.raises(PackageError, match="the archive inside"):
            list(open_package(write(tmp_path / "a.deb", data)).modules())


def test_a_negative_size(tmp_path: Path) -> None:
    block = bytearray(header(tarfile.REGTYPE, 0))
    block[124:136] = b"\xff" * 11 + b"\x00"  # base 256, negative
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    with pytest.raises(PackageError, match="what no package holds"):
        open_package(write(tmp_path / "a.deb", make_deb(bytes(block) + TAR, ".gz")))


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.deb", make_deb(TAR, ".gz"))
    for name, value, reason in (
        ("PACKAGE_BYTES_MAX", 100, "larger than 100 bytes"),
        ("UNPACKED_BYTES_MAX", 1000, "more than 1000 bytes"),
        ("VMLINUZ_BYTES_MAX", 9, "at most 9 allowed"),
        ("MODULE_BYTES_MAX", 99, "at most 99 allowed"),
        ("FILES_MAX", 3, "too many files"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(deb, name, value)
            with pytest.raises(PackageError, match=reason):
                list(open_package(path).modules())
    assert len(list(open_package(path).modules())) == 2


@pytest.mark.parametrize(
    ("control", "reason"),
    [
        (b"", "lacks"),
        (b"Package: a\xff\n", "Package in its control file is damaged"),
        (CONTROL + b"Version: 2\n", "Version in its control file is damaged"),
        (CONTROL.replace(b"6.1.9-1", b"6\x1b[0m"), "Version in its control file is damaged"),
        (CONTROL.replace(b"amd64", b""), "Architecture in its control file is damaged"),
        (CONTROL.replace(b"Version", b"Wersion"), "lacks Version"),
    ],
)
def test_damaged_control_files(tmp_path: Path, control: bytes, reason: str) -> None:
    data = make_deb(TAR, ".gz", control)
    with pytest.raises(PackageError, match=reason):
        open_package(write(tmp_path / "a.deb", data))


@settings(max_examples=200, deadline=None)
@given(edits=EDITS, cut=st.floats(0.2, 1), suffix=st.sampled_from(["", ".gz", ".zst"]))
def test_any_damage(
    tmp_path_factory: pytest.TempPathFactory,
    edits: list[tuple[float, bytes]],
    cut: float,
    suffix: str,
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.deb"
    path.write_bytes(edited(make_deb(TAR, suffix), edits, cut))
    try:
        list(open_package(path).modules())
    except PackageError as error:
        one_line(error)


@settings(max_examples=200, deadline=None)
@given(edits=EDITS, cut=st.floats(0, 1))
def test_any_damage_of_the_archive_inside(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[float, bytes]], cut: float
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.deb"
    path.write_bytes(make_deb(edited(TAR, edits, cut), ".gz"))
    try:
        list(open_package(path).modules())
    except PackageError as error:
        one_line(error)
