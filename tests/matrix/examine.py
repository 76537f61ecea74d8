"""Examine a guest of the matrix with the product: compile, attach, validate, sweep.

    PYTHONPATH=tests .venv/bin/python -m matrix.examine [options of matrix.run]

The guest runs while it is swept. A boot passes when every sweep of it was approved. An attack
passes when it is found, by who has watched the guest before it and by who comes after it; the
control, which attacks nothing, when nothing is found.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Final

import numpy as np

from matrix.attacks import Attack, strike
from matrix.configurations import Boot
from matrix.run import GUEST_DIR, Row, main
from matrix.scenario import Scenario
from pyscan.approved import LinuxApproved, load_approved, save_linux
from pyscan.compile import compile_packages
from pyscan.digest import DigestKey, open_digester
from pyscan.keys import KeyRing, SigningKey
from pyscan.lab.guest import Guest
from pyscan.package.deb import open_package
from pyscan.policy import judge
from pyscan.records import VerdictState
from pyscan.scanner import Sweeper, SweepOptions, SweepResult, open_scanner
from pyscan.sources import Source, build_uri, open_source
from pyscan.validate import StateRules
from pyscan.validate.rules import Rule

#: Sweeps of a guest at rest, and of one that patches itself all the time.
SWEEPS: Final = 20
LOAD_SWEEPS: Final = 1000
#: Rules of an operator on whose machines nothing traces: a registered tracer of an approved
#: module is a legal state, and found by rules alone.
HUNT_RULES: Final = StateRules(ftrace=Rule.FORBID, kprobe=Rule.FORBID)
#: The laboratory's own modules: approved like a package's, so that what they do is judged.
OWN_MODULES: Final = ("probes.ko", "attack.ko", "tamper.ko")


def package_files() -> tuple[Path, ...]:
    """What the approved configuration is compiled from."""
    (package,) = GUEST_DIR.glob("linux-image-*.deb")
    return package, *(GUEST_DIR / name for name in OWN_MODULES)


@cache
def approved_kernel() -> LinuxApproved:
    """The guest's kernel and the laboratory's modules, compiled once for these very files."""
    digest = hashlib.sha256()
    for path in package_files():
        digest.update(path.read_bytes())
    for path in sorted(Path(__file__).parents[2].glob("pyscan/[ackp]*/**/*.py")):
        digest.update(path.read_bytes())
    key = SigningKey.generate()
    with tempfile.TemporaryDirectory() as scratch:
        stored = Path(scratch) / f"{digest.hexdigest()[:16]}.approved"
        save_linux(_compile(Path(scratch)), stored, key)
        approved, _ = load_approved(stored, KeyRing.of({"laboratory": key.public}))
    if not isinstance(approved, LinuxApproved):
        raise TypeError("kind linux was saved, another kind came back")
    return approved


def _compile(scratch: Path) -> LinuxApproved:
    package, *own = package_files()
    release = json.loads((GUEST_DIR / "guest.json").read_text())["kernel_release"]
    folder = scratch / "laboratory"
    modules = folder / "lib/modules" / release / "extra"
    modules.mkdir(parents=True)
    for path in own:
        shutil.copy(path, modules)
    return compile_packages(
        [open_package(package), open_package(folder)], lambda _step, _done, _total: None
    )


def examine(uri: str, boot: Boot) -> Row:
    """Sweep a running guest of the matrix."""
    return sweep_guest(uri, boot, approved_kernel(), LOAD_SWEEPS)


def sweep_guest(uri: str, boot: Boot, approved: LinuxApproved, load_sweeps: int) -> Row:
    """Sweep a running guest and say what was found, as columns of a row."""
    sweeps = load_sweeps if Scenario.LOAD in boot.scenarios else SWEEPS
    bad: list[str] = []
    times, transient, pages = [], 0, 0
    with (
        DigestKey.generate("nh4aes") as key,
        open_source(uri) as source,
        open_scanner(
            source,
            [approved],
            open_digester("native"),
            target=boot.name,
            keyed=open_digester("native", "nh4aes", key),
        ) as scanner,
    ):
        for number in range(sweeps):
            begin = monotonic()
            result = scanner.sweep(walk_tables=number % 20 == 0)
            times.append(1e3 * (monotonic() - begin))
            transient += result.sweep.transient
            pages = result.sweep.watched
            state, reason = judge(result.sweep)
            if state is not VerdictState.APPROVED:
                bad.append(f"sweep {number}: {state}: {reason}")
                bad += [
                    f"  {finding.kind} {finding.place}: {finding.expected} | {finding.actual}"
                    for finding in result.sweep.findings[:4]
                ]
        report = scanner.report
    row: dict[str, object] = {
        "pages": pages,
        "sweeps": sweeps,
        "not approved": sum(text.startswith("sweep") for text in bad),
        "transient": transient,
        "first_ms": round(times[0]),
        "median_ms": round(float(np.median(times[1:])), 1),
        "max_ms": round(max(times[1:])),
    }
    if report is not None:
        row["modules"] = len(report.validation.units.modules)
        row["state"] = str(report.vector)
        row["unverified"] = " ".join(
            f"{kind}={size}" for kind, size in report.validation.unverified.items() if size
        )
    if bad:
        row["failed"] = "\n".join(bad[:20])
    return row


def hunt(guest: Guest, attack: Attack) -> Row:
    """Sweep a running guest, attack it, and say what is found then, as columns of a row."""
    uri = build_uri("qemu", guest.monitor_qmp)
    with open_source(uri) as source:
        with _open_scanner(source) as scanner:
            before = _judged(scanner.sweep())
            struck = strike(guest, attack)
            begin = monotonic()
            watched = _judged(scanner.sweep())
            spent_ms = 1e3 * (monotonic() - begin)
            again = _judged(scanner.sweep())
        with _open_scanner(source) as scanner:
            result = scanner.sweep()
    after = _judged(result)
    expected = VerdictState.APPROVED if attack.kind == "none" else VerdictState.UNAPPROVED
    finding = result.sweep.findings[0] if result.sweep.findings else None
    row: dict[str, object] = {
        "struck": f"{struck.address:#x}",
        "found": "yes" if after[0] is VerdictState.UNAPPROVED else "no",
        "sweep_ms": round(spent_ms),
        "kind": str(finding.kind) if finding else "",
        "place": finding.place if finding else "",
        "reason": after[1],
    }
    steps = {"before it": before, "while watched": watched, "again": again, "after it": after}
    wrong = [
        f"{step}: {state}: {reason}"
        for step, (state, reason) in steps.items()
        if state is not (VerdictState.APPROVED if step == "before it" else expected)
    ]
    if wrong:
        row["failed"] = "\n".join(wrong)
    return row


def _open_scanner(source: Source) -> Sweeper:
    return open_scanner(
        source,
        [approved_kernel()],
        open_digester("native"),
        target="attacked",
        options=SweepOptions(rules=HUNT_RULES),
    )


def _judged(result: SweepResult) -> tuple[VerdictState, str]:
    return judge(result.sweep)


def run(arguments: Sequence[str]) -> int:
    """The command of `make matrix`."""
    approved_kernel()
    return main(arguments, examine, hunt)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
