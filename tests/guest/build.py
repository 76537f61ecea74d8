#!/usr/bin/env python3
"""Build the test guest: Debian's own cloud kernel and two initramfs, into one directory.

    tests/guest/build.py build/guest

The kernel is the distribution's package, unmodified. Nothing is installed: packages are
unpacked in a temporary directory, also because kbuild takes no path with a space in it.
Standard library only.

Result: the image package (.deb), `vmlinuz`, `initrd.gz`, the laboratory's own modules (`*.ko`),
and `guest.json` with the kernel's release, the package's version and the hash of every file.
`initrd-matrix.gz` is the larger one of the matrix of boots (tests/matrix): the same, with many
more modules of the package, which are loaded on demand, and a program that holds a filter.
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


#: Modules for the matrix of boots; they work without hardware. What they need comes with them,
#: as the package's modules say of themselves. Some refuse processors that lack a feature.
MATRIX_MODULES = (
    *("fs/btrfs/btrfs", "fs/xfs/xfs", "fs/squashfs/squashfs", "fs/overlayfs/overlay"),
    *("fs/fuse/fuse", "fs/fat/vfat", "fs/isofs/isofs", "fs/nls/nls_utf8", "fs/nfs/nfs"),
    *("net/netfilter/nft_ct", "net/netfilter/nft_masq", "net/netfilter/nft_chain_nat"),
    *("net/netfilter/nft_compat", "net/netfilter/xt_tcpudp", "net/netfilter/xt_conntrack"),
    *("net/ipv4/netfilter/iptable_nat", "net/bridge/br_netfilter", "net/8021q/8021q"),
    *("net/sctp/sctp", "net/tls/tls", "net/ipv4/tcp_bbr", "net/sched/sch_fq", "net/sched/cls_bpf"),
    *("drivers/net/tun", "drivers/net/veth", "drivers/net/dummy", "drivers/net/vrf"),
    *("drivers/net/wireguard/wireguard", "net/ipv4/ip_gre"),
    *("drivers/md/dm-crypt", "drivers/md/dm-thin-pool", "drivers/md/raid1", "drivers/md/raid456"),
    *("drivers/block/loop", "drivers/block/nbd", "drivers/block/brd", "drivers/block/zram/zram"),
    *("crypto/algif_skcipher", "crypto/algif_hash", "crypto/ccm", "crypto/gcm", "crypto/essiv"),
    *("arch/x86/crypto/aesni-intel", "arch/x86/crypto/sha256-ssse3"),
    *("arch/x86/crypto/ghash-clmulni-intel", "arch/x86/crypto/serpent-sse2-x86_64"),
    *("arch/x86/kvm/kvm", "arch/x86/kvm/kvm-amd"),
)

#: The laboratory's own modules, each in a directory of this name.
OWN_MODULES = ("tamper", "probes", "attack")

#: `depends=` of a module's .modinfo: strings with a NUL behind each (linux/moduleinfo).
DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


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


def build_modules(headers: Path, scratch: Path) -> tuple[Path, ...]:
    """Compile the laboratory's own modules against the headers."""
    source = scratch / "modules"
    for name in OWN_MODULES:
        shutil.copytree(HERE / name, source / name)
    (source / "Kbuild").write_text("".join(f"obj-m += {name}/\n" for name in OWN_MODULES))
    run("make", "-s", "-C", headers, f"M={source}", "modules")
    return tuple(source / name / f"{name}.ko" for name in OWN_MODULES)


def build_filter(scratch: Path) -> Path:
    """Compile the program that holds a socket filter; there is no C library in the guest."""
    program = scratch / "filter"
    run("gcc", "-static", "-O1", "-s", "-Wall", "-o", program, HERE / "filter/filter.c")
    return program


def with_dependencies(modules: Path, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """`wanted`, each module after the ones that it needs, as .modinfo says."""
    files = {path.stem.replace("-", "_"): path for path in sorted(modules.rglob("*.ko"))}
    ordered: dict[str, None] = {}

    def add(path: Path) -> None:
        name = str(path.relative_to(modules).with_suffix(""))
        found = DEPENDS.search(path.read_bytes())
        if found is None:
            raise SystemExit(f"{path.name} does not say what it depends on: not a kernel module?")
        for needed in filter(None, found[1].decode().split(",")):
            add(files[needed.replace("-", "_")])
        ordered[name] = None

    for module in wanted:
        add(modules / f"{module}.ko")
    return tuple(ordered)


def base_tree(root: Path, busybox: Path, modules: Path, own: tuple[Path, ...]) -> None:
    """Fill `root` with what every initramfs has: busybox, init, modules for disk and network."""
    (root / "lib/modules").mkdir(parents=True)
    (root / "bin").mkdir()
    shutil.copy(busybox, root / "bin/busybox")
    shutil.copy(HERE / "init", root / "init")
    (root / "init").chmod(0o755)
    for module in own:
        shutil.copy(module, root / "lib")
    add_modules(root, modules, MODULES, "order")


def add_modules(root: Path, modules: Path, names: tuple[str, ...], order: str) -> None:
    """Copy modules of the package and list them, in loading order, in lib/modules/`order`."""
    library = root / "lib/modules"
    for name in names:
        shutil.copy(modules / f"{name}.ko", library)
    (library / order).write_text("".join(f"{Path(name).name}\n" for name in names))


def pack(root: Path) -> bytes:
    """Pack a directory as an initramfs: cpio (newc), gzip."""
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    archive = subprocess.run(
        ("cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0", "--reproducible"),
        cwd=root,
        check=True,
        input="\n".join(names).encode(),
        stdout=subprocess.PIPE,
    ).stdout
    return gzip.compress(archive, compresslevel=6, mtime=0)


def build_initrds(modules: Path, own: tuple[Path, ...], scratch: Path, out: Path) -> None:
    """Write both initramfs; the matrix's one has everything that the other has."""
    busybox = scratch / "busybox"
    run("dpkg-deb", "--extract", download("busybox-static", scratch / "busybox-deb"), busybox)
    small, matrix = scratch / "initrd", scratch / "initrd-matrix"
    base_tree(small, busybox / "bin/busybox", modules, own[:1])
    (out / "initrd.gz").write_bytes(pack(small))
    base_tree(matrix, busybox / "bin/busybox", modules, own)
    more = with_dependencies(modules, MATRIX_MODULES)
    loaded = set(MODULES)
    add_modules(matrix, modules, tuple(name for name in more if name not in loaded), "matrix")
    shutil.copy(build_filter(scratch), matrix / "bin/filter")
    (out / "initrd-matrix.gz").write_bytes(pack(matrix))


def build(scratch: Path, out: Path) -> None:
    """Fill the directory `out`; packages are unpacked in `scratch`."""
    image = download(newest_image_package(), scratch / "image")
    release = field(image, "Package").removeprefix("linux-image-")
    version = field(image, "Version")
    unpacked = scratch / "kernel"
    run("dpkg-deb", "--extract", image, unpacked)
    own = build_modules(unpack_headers(release, version, scratch), scratch)
    build_initrds(unpacked / f"lib/modules/{release}/kernel", own, scratch, out)
    shutil.copy(unpacked / f"boot/vmlinuz-{release}", out / "vmlinuz")
    for module in own:
        shutil.copy(module, out / module.name)
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
