"""What happens inside a guest of the matrix before and while it is looked at.

Each scenario is a list of shell commands for a guest of `initrd-matrix.gz`; a command that
fails fails the boot, so the commands also check that they had their effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final

from pyscan.lab.guest import Guest

#: Commands patch some 47,000 places one after the other, in an emulator.
COMMAND_TIMEOUT_S: Final = 180.0

_TRACING = "cd /sys/kernel/tracing"
_PROBES = "/sys/module/probes/parameters"
_LIST = "/sys/kernel/debug/kprobes/list"

#: Modules that refused to load, one a line.
_REFUSED = "/tmp/refused"


class Scenario(StrEnum):
    """What a guest is brought to do."""

    MODULES = "modules"  # all modules of the initramfs
    FUNCTION = "function"  # function tracer on all functions
    FUNCTION_GRAPH = "function-graph"
    TRACEPOINTS = "tracepoints"
    INT3_PROBE = "int3-probe"
    JUMP_PROBE = "jump-probe"
    FTRACE_PROBE = "ftrace-probe"
    RETURN_PROBE = "return-probe"
    KEY_AND_CALL = "key-and-call"  # a module's static keys and static call, flipped
    FILTER = "filter"  # a socket filter, compiled by the kernel
    LOAD = "load"  # switches all the time, from here on


def _probe(kind: str, symbol: str, form: str) -> tuple[str, ...]:
    """A probe of the module, checked in the kernel's list of probes."""
    return (
        "test -d /sys/module/probes || insmod /lib/probes.ko",
        f"echo {kind} >{_PROBES}/add",
        # A jump replaces the breakpoint a little later (optimize_kprobe, kernel/kprobes.c).
        "ls -lR /bin >/dev/null; i=0; "
        f"while ! grep -E ' +{symbol}\\+.*{form}' {_LIST}; do "
        f"i=$((i+1)); test $i -lt 100 || {{ cat {_LIST}; exit 1; }}; usleep 100000; done",
    )


#: Traced, but not recorded: the patched places are the same, and the emulator stays usable.
def _tracer(name: str) -> tuple[str, ...]:
    return (
        f"{_TRACING} && echo 0 >tracing_on && echo {name} >current_tracer",
        f"{_TRACING} && test $(cat current_tracer) = {name} && test $(wc -l <enabled_functions) "
        "-gt 10000",
    )


#: Switches things on and off until the guest ends: tracer, tracepoints, static keys of the
#: kernel and of a module, static calls, probes of every kind. Each round ends as it began.
_LOAD = (
    "test -d /sys/module/probes || insmod /lib/probes.ko",
    "(" + _TRACING + "; echo 0 >tracing_on; echo 'vfs_*' >set_ftrace_filter; "
    "round=0; while :; do "
    "echo function >current_tracer; usleep 20000; echo nop >current_tracer; "
    "echo 1 >events/sched/enable; usleep 20000; echo 0 >events/sched/enable; "
    "echo 1 >/proc/sys/kernel/sched_schedstats; echo 0 >/proc/sys/kernel/sched_schedstats; "
    "echo 1 >/sys/class/net/lo/queues/rx-0/rps_cpus; "
    "echo 0 >/sys/class/net/lo/queues/rx-0/rps_cpus; "
    f"echo 1 >{_PROBES}/key; echo 1 >{_PROBES}/call; cat {_PROBES}/answer; usleep 20000; "
    f"echo 0 >{_PROBES}/key; echo 0 >{_PROBES}/call; "
    f"for kind in int3 jump ftrace return; do echo $kind >{_PROBES}/add; done; "
    f"ls -l /bin; usleep 100000; echo all >{_PROBES}/remove; "
    "round=$((round+1)); echo $round >/tmp/rounds; "
    "done) </dev/null >/dev/null 2>&1 &",
    "i=0; while ! test -s /tmp/rounds; do i=$((i+1)); test $i -lt 300 || exit 1; "
    "usleep 100000; done",
)

COMMANDS: Mapping[Scenario, tuple[str, ...]] = {
    Scenario.MODULES: (
        f"rm -f {_REFUSED}; while read -r module; do "
        f"insmod /lib/modules/$module.ko || echo $module >>{_REFUSED}; "
        "done </lib/modules/matrix",
        "test $(wc -l </proc/modules) -ge 50",
    ),
    Scenario.FUNCTION: _tracer("function"),
    Scenario.FUNCTION_GRAPH: _tracer("function_graph"),
    Scenario.TRACEPOINTS: (
        f"{_TRACING} && echo 1 >events/sched/enable && echo 1 >events/syscalls/enable && "
        "echo 1 >events/irq/enable",
    ),
    Scenario.INT3_PROBE: _probe("int3", "vfs_getattr", ""),
    Scenario.JUMP_PROBE: _probe("jump", "vfs_statx", r"\[OPTIMIZED\]"),
    Scenario.FTRACE_PROBE: _probe("ftrace", "vfs_open", r"\[FTRACE\]"),
    Scenario.RETURN_PROBE: _probe("return", "vfs_read", r"\[FTRACE\]"),
    Scenario.KEY_AND_CALL: (
        "test -d /sys/module/probes || insmod /lib/probes.ko",
        f"echo 1 >{_PROBES}/key; echo 1 >{_PROBES}/call; test $(cat {_PROBES}/answer) = 0x1f",
        "echo 1 >/proc/sys/kernel/sched_schedstats",
    ),
    Scenario.FILTER: (
        "filter </dev/null >/tmp/filter 2>&1 & i=0; while ! grep -q attached /tmp/filter; do "
        "i=$((i+1)); test $i -lt 100 || exit 1; usleep 100000; done",
    ),
    Scenario.LOAD: _LOAD,
}


def enter(guest: Guest, scenarios: Iterable[Scenario]) -> tuple[str, ...]:
    """Bring a settled guest into `scenarios`; returns modules that refused this processor.

    Raises LabError when a command fails in the guest.
    """
    for scenario in scenarios:
        for command in COMMANDS[scenario]:
            guest.shell(command, COMMAND_TIMEOUT_S)
    # The kernel patches some places as deferred work, milliseconds after what asked for it.
    guest.shell("usleep 500000", COMMAND_TIMEOUT_S)
    refused = guest.shell(f"cat {_REFUSED} 2>/dev/null; true", COMMAND_TIMEOUT_S)
    return tuple(refused.split())
