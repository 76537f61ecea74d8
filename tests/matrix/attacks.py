"""What a rootkit does to a guest of the matrix: the attack module's repertoire, as data.

The module (tests/guest/attack) is in no package, so that it is a finding by itself; a `hook`
leads into it. Where `into` names a function of the kernel instead, the module is taken out
after its deed, and only the deed is left to be found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pyscan.lab.guest import Guest

_PARAMETERS = "/sys/module/attack/parameters"

#: A function that "succeeds" and does nothing (security/commoncap.c).
_HARMLESS: Final = "cap_mmap_file"


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack. Empty texts and 0 stand for what the module does by itself."""

    name: str
    kind: str
    symbol: str = ""
    number: int = 0
    into: str = ""
    of_process: bool = False  # `number` is a process started for it
    stays: bool = True  # the module stays loaded


@dataclass(frozen=True, slots=True)
class Struck:
    """What an attack changed: the first 8 bytes, or fewer where fewer were written."""

    address: int  # virtual; 0 when nothing was changed
    physical: int
    old: int
    new: int


ATTACKS = (
    Attack("none", "none"),
    Attack("syscall-code", "syscall-code"),
    Attack("syscall-table", "pointer", "sys_call_table", number=163),
    Attack("idt-gate", "idt", number=4),
    Attack("lsm-hook", "lsm-hook"),
    Attack("lsm-emptied", "lsm-empty", stays=False),
    Attack("lsm-removed", "lsm-remove", stays=False),
    Attack("ftrace-site", "ftrace-call"),
    Attack("ftrace-ops", "ftrace-ops"),
    Attack("inline-hook", "inline"),
    Attack("static-call-site", "static-call"),
    Attack("static-call-trampoline", "trampoline"),
    Attack("modules-hidden-from-proc", "pointer", "modules_op", number=3),
    Attack("module-text-writable", "writable", "virtblk_probe", stays=False),
    Attack("rodata-executable", "executable", "__start_rodata", stays=False),
    Attack("text-alias", "alias", stays=False),
    Attack("ownerless-code", "code", stays=False),
    Attack("module-hidden", "hide"),
    Attack("process-tables", "top-level", of_process=True, stays=False),
    # The same hooks into the kernel's own code, with the module gone.
    Attack("syscall-code-into-kernel", "syscall-code", into=_HARMLESS, stays=False),
    Attack("syscall-table-into-kernel", "pointer", "sys_call_table", 163, _HARMLESS, stays=False),
    Attack("idt-gate-into-kernel", "idt", number=4, into=_HARMLESS, stays=False),
    Attack("lsm-hook-into-kernel", "lsm-hook", into=_HARMLESS, stays=False),
    Attack("ftrace-site-into-kernel", "ftrace-call", into=_HARMLESS, stays=False),
    Attack("static-call-into-kernel", "static-call", into=_HARMLESS, stays=False),
    Attack("trampoline-into-kernel", "trampoline", into=_HARMLESS, stays=False),
    Attack("inline-into-kernel", "inline", into=_HARMLESS, stays=False),
)


def strike(guest: Guest, attack: Attack) -> Struck:
    """Make `attack` on a settled guest of `initrd-matrix.gz`. Raises LabError.

    One guest bears one attack: nothing is put back.
    """
    number = attack.number
    if attack.of_process:
        number = int(guest.shell("sleep 100000 </dev/null >/dev/null 2>&1 & echo $!"))
    parameters = f"attack={attack.kind} number={number}"
    if attack.symbol:
        parameters += f" symbol={attack.symbol}"
    if attack.into:
        parameters += f" into={attack.into}"
    guest.shell(f"insmod /lib/attack.ko {parameters}")
    results = guest.shell(f"cd {_PARAMETERS} && cat address physical old new").split()
    if not attack.stays:
        guest.shell("rmmod attack")
    return Struck(*map(int, results))
