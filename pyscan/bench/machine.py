"""What machine the figures come from."""

from __future__ import annotations

import os
import platform
import ssl
from importlib import metadata
from pathlib import Path
from typing import Final

from pyscan import __version__
from pyscan.bench.document import Machine
from pyscan.bench.memory import huge_page_settings, last_level_cache_bytes

#: Instruction sets that one contender or another uses, as /proc/cpuinfo names them.
_FLAGS: Final = (
    *("sse2", "avx2", "avx512f", "avx512vl", "avx512ifma", "aes", "vaes", "pclmulqdq"),
    *("vpclmulqdq", "sha_ni", "gfni", "asimd", "pmull", "sha2"),
)
_PACKAGES: Final = ("numpy", "cffi", "numba", "blake3", "xxhash", "leechcorepyc")
_CPU: Final = Path("/proc/cpuinfo")
_GOVERNOR: Final = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_HYPERVISOR: Final = Path("/sys/hypervisor/type")


def describe() -> Machine:
    """This machine, as far as it can be told."""
    cpu = _cpuinfo()
    present = set(cpu.get("flags", cpu.get("Features", "")).split())
    huge = huge_page_settings()
    return Machine(
        cpu=cpu.get("model name", platform.machine())
        + (f" (family {cpu['cpu family']}, model {cpu['model']})" if "model" in cpu else ""),
        flags=[flag for flag in _FLAGS if flag in present],
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        cache_bytes=last_level_cache_bytes(),
        kernel=platform.release(),
        hypervisor=_text(_HYPERVISOR) or ("yes" if "hypervisor" in cpu.get("flags", "") else ""),
        governor=_text(_GOVERNOR),
        huge_pages=", ".join(f"{backing} {setting}" for backing, setting in huge.items()),
        python=platform.python_version(),
        versions={"pyscan": __version__, "openssl": ssl.OPENSSL_VERSION, **_versions()},
        load=round(os.getloadavg()[0], 2),
    )


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    first = _text(_CPU).split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
