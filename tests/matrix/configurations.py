"""The boots of the matrix, as data.

A kernel's bytes in memory follow from the processor's features (alternatives, return thunks,
retpolines), the number of processors (lock prefixes), the command line (static keys, static
calls), the place in memory (KASLR, paging levels), and from what is used (tracing, probes,
modules). Each of these varies here; not every combination is made.

Processor models are QEMU's. The emulator lacks some of their features, so that a model stands
for its vendor, family and model number, by which the kernel chooses mitigations
(arch/x86/kernel/cpu/common.c, cpu_vuln_blacklist), and for the features that remain.
"""

from __future__ import annotations

from dataclasses import dataclass

from matrix.scenario import Scenario
from pyscan.lab.ram import Machine


@dataclass(frozen=True, slots=True)
class Boot:
    """One boot. `append` goes to the kernel's command line; scenarios are entered in order."""

    name: str
    cpu_model: str = "max"
    cpus: int = 1
    memory_mib: int = 512
    machine: Machine = Machine.Q35
    append: str = ""
    scenarios: tuple[Scenario, ...] = ()


#: The kernel takes a jump to a return thunk for an indirect jump, so that it never replaces a
#: breakpoint by a jump where return thunks are in use (insn_is_indirect_jump,
#: arch/x86/kernel/kprobes/opt.c): jump probes need a processor without.
THUNK_PROBES = (Scenario.INT3_PROBE, Scenario.FTRACE_PROBE, Scenario.RETURN_PROBE)
PROBES = (*THUNK_PROBES, Scenario.JUMP_PROBE)

#: A processor that needs thunks of its own for indirect branches (arch/x86/kernel/cpu/common.c,
#: ITS) and has IBRS, without which the kernel would use retpolines. The emulator says that it
#: has it, and ignores the register.
ITS_MODEL = (
    "max,x-force-features=on,vendor=GenuineIntel,family=6,model=106,stepping=6,"
    "spec-ctrl=on,arch-capabilities=on"
)

BOOTS = (
    # Processors.
    Boot("max"),
    Boot("max-la57-off", "max,la57=off", memory_mib=384),
    Boot("qemu64", "qemu64", machine=Machine.PC),
    Boot("westmere", "Westmere", cpus=2, machine=Machine.PC),
    Boot("haswell", "Haswell", cpus=2),
    Boot("skylake-server", "Skylake-Server", cpus=4, memory_mib=1024),
    Boot("icelake-server", "Icelake-Server", cpus=2),
    Boot("epyc", "EPYC", cpus=2),
    Boot("epyc-rome", "EPYC-Rome", cpus=4, memory_mib=3072),
    Boot("epyc-milan", "EPYC-Milan", cpus=1, machine=Machine.PC),
    Boot("no-avx-no-smap", "max,avx=off,smap=off,smep=off,erms=off", memory_mib=384),
    # Memory and place.
    Boot("max-6-gib", memory_mib=6144, cpus=2),
    Boot("pc-5-gib", "max,la57=off", memory_mib=5120, machine=Machine.PC),
    Boot("nokaslr", "Skylake-Server", append="nokaslr"),
    Boot("pti", "qemu64", append="pti=on", memory_mib=384),
    # Mitigations and lock prefixes.
    Boot("mitigations-off", "qemu64", machine=Machine.PC, append="mitigations=off nokaslr"),
    Boot("mitigations-off-rome", "EPYC-Rome", cpus=2, append="mitigations=off"),
    Boot("retpoline", "Icelake-Server", append="spectre_v2=retpoline"),
    Boot("retpoline-lfence", "EPYC", cpus=2, append="spectre_v2=retpoline,lfence"),
    Boot("retbleed-off", "EPYC-Rome", append="retbleed=off spectre_v2=retpoline"),
    Boot("untrained-return", "EPYC-Rome", append="spec_rstack_overflow=off"),
    Boot("srso-off", "EPYC-Milan", cpus=2, append="spec_rstack_overflow=off"),
    Boot("its-off", "Skylake-Server", append="indirect_target_selection=off"),
    Boot("its-thunks", ITS_MODEL, append="spectre_v2=ibrs", scenarios=(Scenario.MODULES,)),
    Boot("noreplace-smp", append="noreplace-smp", memory_mib=384),
    Boot("nosmp-of-2", cpus=2, append="nosmp"),
    # Static calls and static keys.
    Boot("preempt-full", cpus=2, append="preempt=full"),
    Boot("preempt-none", "EPYC-Milan", cpus=2, append="preempt=none"),
    # Locked down: it refuses the laboratory's own modules, so that it bears no attack.
    Boot(
        "hardened",
        "Icelake-Server",
        append="init_on_alloc=1 init_on_free=1 randomize_kstack_offset=on threadirqs "
        "slab_nomerge debugfs=off vsyscall=none lockdown=integrity",
        memory_mib=384,
    ),
    Boot("selinux", append="security=selinux selinux=1 lsm=landlock,yama,selinux,bpf"),
    # What runs.
    Boot("modules", scenarios=(Scenario.MODULES,)),
    Boot("modules-skylake", "Skylake-Server", cpus=2, scenarios=(Scenario.MODULES,)),
    Boot("modules-rome", "EPYC-Rome", scenarios=(Scenario.MODULES, Scenario.KEY_AND_CALL)),
    Boot("function", cpus=2, scenarios=(Scenario.FUNCTION,)),
    Boot(
        "function-graph-probes",
        "EPYC-Rome",
        cpus=2,
        scenarios=(*THUNK_PROBES, Scenario.FUNCTION_GRAPH),
    ),
    Boot("tracepoints", "Haswell", scenarios=(Scenario.TRACEPOINTS,)),
    Boot("probes", "Skylake-Server", scenarios=PROBES),
    Boot("filter", "EPYC", scenarios=(Scenario.FILTER,)),
    Boot(
        "all",
        "Icelake-Server",
        cpus=2,
        scenarios=(
            *(Scenario.MODULES, *PROBES, Scenario.KEY_AND_CALL, Scenario.TRACEPOINTS),
            *(Scenario.FILTER, Scenario.FUNCTION),
        ),
    ),
    # Patching while it is looked at.
    Boot("load", cpus=2, scenarios=(Scenario.MODULES, Scenario.LOAD)),
    Boot("load-qemu64", "qemu64", machine=Machine.PC, scenarios=(Scenario.LOAD,)),
)
