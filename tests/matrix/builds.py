"""Other builds of the kernel: compile what the distribution offers now, boot it, sweep it.

    PYTHONPATH=tests .venv/bin/python -m matrix.builds [--only RELEASE ...] [--keep DIR]

The newest generic and real-time package and the oldest one for the cloud, of each supported
series, are downloaded, compiled with `pyscan approve linux`, booted on several processors with
more than a hundred of their modules, and swept while they run. One package of each other series
must be refused in one line. The exit status is 1 when a build failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from time import monotonic
from typing import Final

from guest import build
from rich.console import Console

from matrix.configurations import Boot
from matrix.examine import sweep_guest
from matrix.run import INITRD, Row, print_table, run_boot
from matrix.scenario import Scenario
from pyscan.approved import LinuxApproved, load_approved
from pyscan.errors import ExitStatus, PyscanError
from pyscan.kernel.series import SERIES
from pyscan.keys import KeyRing, SigningKey
from pyscan.lab.process import unwind_on

#: Image packages that are signed, and not debug symbols: release, series, version, flavour.
_PACKAGE: Final = re.compile(
    r"^linux-image-((\d+\.\d+)([0-9.+a-z-]*?)-((?:cloud-|rt-)?amd64)) ", re.MULTILINE
)

#: ABI and flavour of a release.
_RELEASE: Final = re.compile(r"(.+?)-((?:cloud-|rt-)?)amd64")

#: Sweeps of a guest that patches itself all the time.
LOAD_SWEEPS: Final = 200

#: What each build is booted on. The larger memory is for the initramfs.
BOOTS: Final = (
    Boot("max", memory_mib=1024, scenarios=(Scenario.MODULES,)),
    Boot(
        "epyc-rome",
        "EPYC-Rome",
        cpus=2,
        memory_mib=1024,
        scenarios=(Scenario.MODULES, Scenario.FILTER, Scenario.TRACEPOINTS, Scenario.FUNCTION),
    ),
    Boot(
        "skylake-load",
        "Skylake-Server",
        cpus=2,
        memory_mib=1024,
        scenarios=(Scenario.MODULES, Scenario.LOAD),
    ),
)


#: Columns too wide, or too many, for a table; every row is also told when it is there.
_NOT_SHOWN: Final = {"release", "state", "unverified", "scenario_s", "examine_s", "max_ms"}


def offered() -> tuple[list[str], list[str]]:
    """Releases to boot, and releases to be refused, by what the package lists have."""
    groups: dict[tuple[str, str], list[tuple[list[int], str]]] = {}
    for release, series, version, flavour in _PACKAGE.findall(
        build.run("apt-cache", "search", "--names-only", "^linux-image-[0-9]")
    ):
        numbers = [int(number) for number in re.findall(r"\d+", version)]
        if numbers:  # others are meta packages
            groups.setdefault((series, flavour), []).append((numbers, release))
    known, unknown = [], []
    for (series, flavour), rows in sorted(groups.items()):
        cloud = flavour == "cloud-amd64"
        if series in SERIES:
            # The newest one for the cloud is the kernel of the whole matrix.
            known.append((min if cloud else max)(rows)[1])
        elif cloud:
            unknown.append(max(rows)[1])
    return known, unknown


def approve(packages: Sequence[Path], out: Path, key: Path) -> tuple[int, str, Row]:
    """Run `pyscan approve linux`: its exit status, what it said, and what it took."""
    begin = monotonic()
    command = [sys.executable, "-m", "pyscan", "approve", "linux", *packages]
    command += ["--out", out, "--sign", key]
    with Popen(command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, text=True) as process:
        said = process.stderr.read() if process.stderr else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    row: Row = {
        "compile_s": round(monotonic() - begin, 1),
        "peak_mib": usage.ru_maxrss // 1024,
        "file_mb": round(out.stat().st_size / 1e6) if out.exists() else "",
    }
    return process.returncode, said.strip(), row


def build_own(release: str, version: str, scratch: Path) -> Path:
    """Compile the laboratory's modules for a build; returns a directory like a package's."""
    found = _RELEASE.fullmatch(release)
    if found is None:
        raise SystemExit(f"{release} is not the name of a release")
    abi, flavour = found.groups()
    root = scratch / "headers"
    headers = f"linux-headers-{release}"
    for package in (
        f"{headers}={version}",
        f"linux-headers-{abi}-common{'-rt' if flavour == 'rt-' else ''}={version}",
        # Only the newest version is kept: tools that serve the whole series.
        f"linux-kbuild-{'.'.join(abi.split('.')[:2])}",
    ):
        unpacked = build.download(package, scratch / package.split("=")[0])
        build.run("dpkg-deb", "--extract", unpacked, root)
    makefile = root / "usr/src" / headers / "Makefile"
    # It names its sibling by the path where it would be installed.
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{root}/usr/src/"))
    folder = scratch / "laboratory"
    modules = folder / "lib/modules" / release / "extra"
    modules.mkdir(parents=True)
    for path in build.build_modules(makefile.parent, scratch):
        shutil.copy(path, modules)
    return folder


def build_guest(deb: Path, release: str, own: Path, scratch: Path, out: Path) -> None:
    """Fill `out` with the build's kernel and an initramfs of its own modules."""
    unpacked = scratch / "kernel"
    build.run("dpkg-deb", "--extract", deb, unpacked)
    busybox = scratch / "busybox"
    packed = build.download("busybox-static", scratch / "busybox-deb")
    build.run("dpkg-deb", "--extract", packed, busybox)
    out.mkdir()
    (out / "vmlinuz").write_bytes((unpacked / f"boot/vmlinuz-{release}").read_bytes())
    modules = unpacked / f"lib/modules/{release}/kernel"
    root = scratch / "initrd"
    build.base_tree(root, busybox / "bin/busybox", modules, tuple(sorted(own.rglob("*.ko"))))
    (root / "bin/filter").write_bytes(build.build_filter(scratch).read_bytes())
    (root / "bin/filter").chmod(0o755)
    wanted = ("crypto/crc32c_generic", *build.MATRIX_MODULES)
    # What a flavour has inside its kernel is no module of it.
    there = tuple(name for name in wanted if (modules / f"{name}.ko").exists())
    more = build.with_dependencies(modules, there)
    build.add_modules(
        root, modules, tuple(name for name in more if name not in build.MODULES), "matrix"
    )
    (out / INITRD).write_bytes(build.pack(root))
    (out / "guest.json").write_text(json.dumps({"kernel_release": release}) + "\n")


@contextmanager
def _folder(keep: Path | None, name: str) -> Iterator[Path]:
    """A directory that is removed afterwards, or `keep`/`name`."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="pyscan-build-", dir="/tmp") as scratch:
            yield Path(scratch)
    else:
        (keep / name).mkdir(parents=True, exist_ok=True)
        yield keep / name


def examine_build(release: str, scratch: Path, boots: Sequence[Boot]) -> Iterator[Row]:
    """A row for each boot of one build. Raises pyscan's errors."""
    deb = build.download(f"linux-image-{release}", scratch / "image")
    key, out, guest_dir = scratch / "key", scratch / "approved", scratch / "guest"
    signing = SigningKey.generate()
    signing.save(key)
    version = build.field(deb, "Version")
    own = build_own(release, version, scratch)
    status, said, took = approve([deb, own], out, key)
    if status != ExitStatus.APPROVED:
        yield {"name": release, "release": release, **took, "failed": said}
        return
    approved, _ = load_approved(out, KeyRing.of({"builds": signing.public}))
    if not isinstance(approved, LinuxApproved):
        raise TypeError("kind linux was saved, another kind came back")
    took = {**took, "package": version, "units": 1 + len(approved.modules)}
    build_guest(deb, release, own, scratch, guest_dir)
    for boot in boots:
        row: Row
        try:
            row = run_boot(
                boot,
                lambda uri, boot: sweep_guest(uri, boot, approved, LOAD_SWEEPS),
                guest_dir=guest_dir,
            )
        except PyscanError as error:
            row = {"name": boot.name, "failed": str(error)}
        named = {"name": f"{release} {row['name']}"}
        yield {**named, "release": release, **took, **row, **named}


def examine_refused(release: str, scratch: Path) -> Row:
    """A row that failed unless the build is refused in one line that names its series."""
    deb = build.download(f"linux-image-{release}", scratch / "image")
    SigningKey.generate().save(scratch / "key")
    status, said, took = approve([deb], scratch / "approved", scratch / "key")
    series = ".".join(release.split(".")[:2])
    row = {"name": release, "release": release, **took, "refused": said}
    legal = status not in (ExitStatus.APPROVED, 1) and f"series {series} " in said
    if not legal or len(said.splitlines()) != 1 or (scratch / "approved").exists():
        row["failed"] = f"not refused as it should be, status {status}: {said}"
    return row


def main(arguments: Sequence[str]) -> int:
    """Examine what the arguments ask for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="matrix.builds", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="RELEASE")
    parser.add_argument("--boot", action="append", default=[], metavar="NAME")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep packages and guests there")
    options = parser.parse_args(arguments)
    known, unknown = offered()
    boots = [boot for boot in BOOTS if not options.boot or boot.name in options.boot]
    console = Console(stderr=True)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        console.print(" ".join(f"{k}={v}" for k, v in row.items()), markup=False)

    with unwind_on(signal.SIGTERM):
        for release in known + unknown:
            if options.only and release not in options.only:
                continue
            with _folder(options.keep, release) as scratch:
                if release in unknown:
                    keep(examine_refused(release, scratch))
                    continue
                for row in examine_build(release, scratch, boots):
                    keep(row)
    print_table([{k: v for k, v in row.items() if k not in _NOT_SHOWN} for row in rows])
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
