"""One kernel's packages, compiled together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from pyscan.approved.linux import Anchor, LinuxApproved, Provenance
from pyscan.approved.unit import Unit
from pyscan.compile.module import compile_module
from pyscan.compile.vmlinux import CompiledKernel, compile_vmlinux
from pyscan.errors import PackageError
from pyscan.kernel.series import TYPE_PATHS
from pyscan.kernel.types import Types
from pyscan.package.bzimage import kernel_payload
from pyscan.package.deb import KernelPackage
from pyscan.validate.objects import PATHS

MODULES_MAX: Final = 20_000
#: Bytes of each anchor: few enough that one flipped byte seldom hits, many enough to be unique.
_ANCHOR_BYTES: Final = 64

Progress = Callable[[str, int, int], None]


def compile_packages(packages: Sequence[KernelPackage], progress: Progress) -> LinuxApproved:
    """Compile the kernel of one of `packages` and the modules of all.

    The same packages give the same result on every machine. `progress` gets (step, done,
    total). Raises PackageError: no or several kernels, modules of another release, or what
    cannot be understood.
    """
    kernels = [package for package in packages if package.vmlinuz is not None]
    if len(kernels) != 1:
        raise PackageError(
            f"{len(kernels)} packages with a kernel image; give exactly one, and modules' "
            "packages for it"
        )
    (main,) = kernels
    for package in packages:
        if package.release != main.release:
            raise PackageError(
                f"{package.name} is for kernel {package.release}, not {main.release}; "
                "compile one kernel at a time"
            )
    progress("kernel", 0, 1)
    kernel = compile_vmlinux(kernel_payload(main.vmlinuz or b""))
    progress("kernel", 1, 1)
    modules = _modules(packages, kernel, progress)
    return LinuxApproved(
        release=main.release,
        banner=kernel.banner,
        series=kernel.series.name,
        provenance=tuple(
            Provenance(package.name, package.version, package.architecture, package.sha256)
            for package in packages
        ),
        anchors=_anchors(kernel),
        offsets=_type_offsets(kernel),
        vmlinux=kernel.unit,
        modules=modules,
    )


def _modules(
    packages: Sequence[KernelPackage], kernel: CompiledKernel, progress: Progress
) -> dict[str, Unit]:
    units: dict[str, Unit] = {}
    for package in packages:
        for file in package.modules(lambda done, total: progress("modules", done, total)):
            if file.name in units:
                raise PackageError(f"two modules are named {file.name}; the second is {file.path}")
            if len(units) == MODULES_MAX:
                raise PackageError(f"more than {MODULES_MAX} modules")
            units[file.name] = compile_module(file.name, file.data, kernel.series)
    return dict(sorted(units.items()))


def _anchors(kernel: CompiledKernel) -> tuple[Anchor, ...]:
    """linux_banner, and both ends of the type information: nothing ever writes them."""
    unit = kernel.unit
    places = []
    banner = kernel.symbols.find("linux_banner")
    if banner is not None:
        places.append(("linux_banner", banner - unit.link_address))
    for section in unit.sections:
        if section.name == ".BTF":
            places.append(("start of .BTF", section.offset))
            places.append(("end of .BTF", section.offset + section.length - _ANCHOR_BYTES))
    return tuple(
        Anchor(name, offset, unit.image[offset : offset + _ANCHOR_BYTES].tobytes())
        for name, offset in places
    )


def _type_offsets(kernel: CompiledKernel) -> dict[str, int]:
    """Offsets and sizes by path. Raises PackageError when one is missing."""
    types = Types(kernel.btf)
    found = {}
    for path in sorted({*PATHS, *TYPE_PATHS}):
        found[path] = types.offset(path) if "." in path else types.size(path)
    return found
