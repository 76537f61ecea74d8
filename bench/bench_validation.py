"""What knowing a kernel by its package costs: loading, attaching, validating, and a page again.

On a real guest with about a hundred modules, stopped, so that all rounds see the same memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pyscan.approved import LinuxApproved, load_approved, save_linux
from pyscan.compile import compile_packages
from pyscan.digest import open_digester
from pyscan.keys import KeyRing, SigningKey
from pyscan.lab.guest import Guest, GuestOptions
from pyscan.lab.process import RunDirectory
from pyscan.package.deb import open_package
from pyscan.qmp import query
from pyscan.sources import Source, build_uri, open_source
from pyscan.validate import Attached, Validation, attach, baseline, settle, validate

ROOT = Path(__file__).parents[1]
GUEST = ROOT / "build/guest"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, KeyRing]:
    """The guest's kernel, compiled and signed; and who signed it."""
    (package,) = GUEST.glob("linux-image-*.deb")
    key = SigningKey.generate()
    path = tmp_path_factory.mktemp("approved") / "kernel.approved"
    approved = compile_packages([open_package(package)], lambda _step, _done, _total: None)
    save_linux(approved, path, key)
    return path, KeyRing.of({"bench": key.public})


@pytest.fixture(scope="module")
def approved(stored: tuple[Path, KeyRing]) -> LinuxApproved:
    """The same, loaded."""
    content, _ = load_approved(*stored)
    assert isinstance(content, LinuxApproved)
    return content


@pytest.fixture(scope="module")
def source() -> Iterator[Source]:
    """The memory of a stopped guest with all modules of the matrix loaded."""
    sys.path.insert(0, str(ROOT / "tests"))
    from matrix.scenario import Scenario, enter  # noqa: PLC0415 (needs the path above)

    with (
        RunDirectory() as run,
        Guest(GuestOptions(GUEST, initrd="initrd-matrix.gz"), run) as guest,
    ):
        guest.wait_ready()
        enter(guest, [Scenario.MODULES])
        query(guest.lab_qmp, [("stop", None)])
        with open_source(build_uri("qemu", guest.monitor_qmp)) as opened:
            yield opened


@pytest.fixture(scope="module")
def attached(source: Source, approved: LinuxApproved) -> Attached:
    """The guest's kernel."""
    return attach(source, [approved])


def bench_load(benchmark: BenchmarkFixture, stored: tuple[Path, KeyRing]) -> None:
    """Read and verify the file: manifest and vmlinux; modules follow when they are used."""
    benchmark.group = "kernel"
    content, _ = benchmark(load_approved, *stored)
    assert isinstance(content, LinuxApproved)


def bench_attach(benchmark: BenchmarkFixture, source: Source, approved: LinuxApproved) -> None:
    """Find the kernel in 512 MiB, and the approved configuration that fits."""
    benchmark.group = "kernel"
    assert benchmark(attach, source, [approved]).approved is approved


def bench_attach_known(
    benchmark: BenchmarkFixture, attached: Attached, approved: LinuxApproved
) -> None:
    """The same, where it was before."""
    benchmark.group = "kernel"
    found = benchmark(attach, attached.source, [approved], attached.kernel)
    assert found.kernel == attached.kernel


def bench_validate(benchmark: BenchmarkFixture, attached: Attached) -> None:
    """All bytes and structures of vmlinux and the modules."""
    benchmark.group = "kernel"
    found: Validation = benchmark(validate, attached)
    assert found.clean
    benchmark.extra_info["modules"] = len(found.units.modules)


@pytest.mark.parametrize("pages", [1, 64])
def bench_validate_again(benchmark: BenchmarkFixture, attached: Attached, pages: int) -> None:
    """Pages of text that differ from their digest, under the state of the moment."""
    benchmark.group = "kernel"
    found = validate(attached)
    wanted = [("vmlinux", 4096 * (17 * page)) for page in range(pages)]
    assert not benchmark(settle, found, wanted).differences


def bench_baseline(benchmark: BenchmarkFixture, attached: Attached) -> None:
    """From a validation to the digests that sweeps compare."""
    benchmark.group = "kernel"
    found = validate(attached)
    assert benchmark(baseline, found, open_digester(), 0).pages > 7000
