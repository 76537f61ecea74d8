#!/usr/bin/env python3
"""Build the test guest: Debian's own cloud kernel and a small initramfs, into one directory.

    tests/guest/build.py build/guest

The kernel is the distribution's package, unmodified. Nothing is installed: packages are
unpacked in a temporary directory, also because kbuild takes no path with a space in it.
Standard library only.

Result: the image package (.deb), `vmlinuz`, `initrd.gz`, `tamper.ko`, and `guest.json` with
the kernel's release, the package's version and the hash of every file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
META_PACKAGE = "linux-image-cloud-amd64"

#: Modules of the package that the guest loads, each after the ones it needs.
MODULES = (
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "drivers/block/virtio_blk",
)


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a program; its messages go to stderr. Returns its standard output."""
    print("+", *command, file=sys.stderr, flush=True)
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def newest_image_package() -> str:
    """Name of the image package that the distribution's meta package stands for."""
    depends = run("apt-cache", "depends", META_PACKAGE)
    found = re.search(r"Depends: (linux-image-(\S+)-cloud-amd64)$", depends, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{META_PACKAGE} is not in the package lists: run `apt-get update`")
    return found[1]


def download(package: str, folder: Path) -> Path:
    """Fetch one .deb without installing it."""
    folder.mkdir()
    run("apt-get", "-q", "download", package, cwd=folder)
    (deb,) = folder.glob("*.deb")
    return deb


def field(deb: Path, name: str) -> str:
    """One field of a package's control file."""
    return run("dpkg-deb", "--field", deb, name).strip()


def unpack_headers(release: str, version: str, scratch: Path) -> Path:
    """Unpack what kbuild needs for `release`; returns the build directory."""
    abi = release.removesuffix("-cloud-amd64")
    series = ".".join(abi.split(".")[:2])
    root = scratch / "headers"
    packages = (
        f"linux-headers-{release}",
        f"linux-headers-{abi}-common",
        f"linux-kbuild-{series}",
    )
    for package in packages:
        deb = download(f"{package}={version}", scratch / package)
        run("dpkg-deb", "--extract", deb, root)
    build = root / "usr/src" / packages[0]
    # The package's Makefile names its sibling by the path where it would be installed.
    makefile = build / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{root}/usr/src/"))
    return build


def build_tamper(headers: Path, scratch: Path) -> Path:
    """Compile the tamper module against the headers."""
    source = scratch / "tamper"
    shutil.copytree(HERE / "tamper", source)
    run("make", "-s", "-C", headers, f"M={source}", "modules")
    return source / "tamper.ko"


def build_initrd(modules: Path, tamper: Path, scratch: Path) -> bytes:
    """Pack a static busybox, the init script and the modules: cpio (newc), gzip."""
    busybox = scratch / "busybox"
    run("dpkg-deb", "--extract", download("busybox-static", scratch / "busybox-deb"), busybox)
    root = scratch / "initrd"
    library = root / "lib/modules"
    library.mkdir(parents=True)
    (root / "bin").mkdir()
    shutil.copy(busybox / "bin/busybox", root / "bin/busybox")
    shutil.copy(HERE / "init", root / "init")
    (root / "init").chmod(0o755)
    shutil.copy(tamper, root / "lib/tamper.ko")
    for module in MODULES:
        shutil.copy(modules / f"{module}.ko", library)
    (library / "order").write_text("".join(f"{Path(module).name}\n" for module in MODULES))
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    archive = subprocess.run(
        ("cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0", "--reproducible"),
        cwd=root,
        check=True,
        input="\n".join(names).encode(),
        stdout=subprocess.PIPE,
    ).stdout
    return gzip.compress(archive, compresslevel=6, mtime=0)


def build(scratch: Path, out: Path) -> None:
    """Fill the directory `out`; packages are unpacked in `scratch`."""
    image = download(newest_image_package(), scratch / "image")
    release = field(image, "Package").removeprefix("linux-image-")
    version = field(image, "Version")
    unpacked = scratch / "kernel"
    run("dpkg-deb", "--extract", image, unpacked)
    tamper = build_tamper(unpack_headers(release, version, scratch), scratch)
    modules = unpacked / f"lib/modules/{release}/kernel"
    (out / "initrd.gz").write_bytes(build_initrd(modules, tamper, scratch))
    shutil.copy(unpacked / f"boot/vmlinuz-{release}", out / "vmlinuz")
    shutil.copy(tamper, out / "tamper.ko")
    shutil.copy(image, out / image.name)
    document = {
        "kernel_release": release,
        "package": f"linux-image-{release}",
        "package_version": version,
        "package_file": image.name,
        "files": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.iterdir())
        },
    }
    (out / "guest.json").write_text(json.dumps(document, indent=2) + "\n")


def main(out: Path) -> None:
    """Build a guest beside `out` and put it in its place only when it is complete."""
    fresh = out.with_name(f"{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="pyscan-guest-", dir="/tmp") as scratch:
        build(Path(scratch), fresh)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: tests/guest/build.py OUTPUT_DIRECTORY")
    main(Path(sys.argv[1]))
