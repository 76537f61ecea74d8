"""`pyscan monitor`: how it sweeps, what it watches, and which states it allows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from pyscan.config.base import InputFile, Name, Program, Table, load_config, refuse_duplicates
from pyscan.digest import BACKENDS, DIGESTS, THREADS_MAX
from pyscan.trust import Role
from pyscan.validate.rules import (
    DEFAULT_OVERRIDES,
    PATTERN_CHARACTERS_MAX,
    Override,
    Rule,
    StateRules,
)
from pyscan.validate.vector import StateClass

RULES_MAX = 1000  # with the built-in ones no more than pyscan.validate.rules.OVERRIDES_MAX


class SweepTable(Table, frozen=True, kw_only=True):
    """How a monitor sweeps."""

    interval_ms: Annotated[int, msgspec.Meta(ge=1, le=3_600_000)] = 1000
    rereads: Annotated[int, msgspec.Meta(ge=0, le=16)] = 2  # of a page, before it is a finding
    backend: str = "native"  # what computes digests: native or numba
    digest: str = "nh4aes"  # of pages that were validated; a name of pyscan.digest.DIGESTS
    threads: Annotated[int, msgspec.Meta(ge=1, le=THREADS_MAX)] = 1  # that share a sweep
    audit_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 1.0  # by SHA-256, every sweep
    heartbeat_ms: Annotated[int, msgspec.Meta(ge=100, le=3_600_000)] = 5000

    def __post_init__(self) -> None:
        for key, value, known in (
            ("backend", self.backend, BACKENDS),
            ("digest", self.digest, tuple(DIGESTS)),
        ):
            if value not in known:
                raise ValueError(f"[sweep] {key} {value!r} is unknown; use {' or '.join(known)}")


_DEFAULT_RULES = StateRules()


class StateRule(Table, frozen=True, kw_only=True):
    """A rule for names, a `[[kernel_state.rule]]`; the first that matches is taken."""

    kind: StateClass = msgspec.field(name="class")  # as the keys of the table, with hyphens
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=PATTERN_CHARACTERS_MAX)]  # pattern
    rule: Rule

    def __post_init__(self) -> None:
        if self.kind is StateClass.UNKNOWN_MODULE:
            raise ValueError("an unknown module is always a finding; approve its package instead")


class KernelStateTable(Table, frozen=True, kw_only=True):
    """What may become of a kernel's state: a rule for each class, see `StateRules`.

    Each is "pin", "allow", "report" or "forbid". For kernels that are approved by package.
    """

    features: Rule = _DEFAULT_RULES.features
    static_key: Rule = _DEFAULT_RULES.static_key
    static_call: Rule = _DEFAULT_RULES.static_call
    ftrace: Rule = _DEFAULT_RULES.ftrace
    kprobe: Rule = _DEFAULT_RULES.kprobe
    module: Rule = _DEFAULT_RULES.module
    bpf: Rule = _DEFAULT_RULES.bpf
    rule: Annotated[tuple[StateRule, ...], msgspec.Meta(max_length=RULES_MAX)] = ()

    def rules(self) -> StateRules:
        """The rules that a scanner takes; the built-in ones for names come last."""
        own = tuple(Override(rule.kind, rule.name, rule.rule) for rule in self.rule)
        return StateRules(
            features=self.features,
            static_key=self.static_key,
            static_call=self.static_call,
            ftrace=self.ftrace,
            kprobe=self.kprobe,
            module=self.module,
            bpf=self.bpf,
            overrides=own + DEFAULT_OVERRIDES,
        )


class Target(Table, frozen=True, kw_only=True):
    """One watched machine, a `[[target]]`."""

    name: Name
    host: Name  # host name of the agent that answers for it
    vm: Name  # as in the agent's [[vm]] id
    source: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]  # URI
    #: One file, or several of kind linux: the one that fits the running kernel is used.
    approved: Annotated[tuple[InputFile, ...], msgspec.Meta(min_length=1, max_length=16)]


class MonitorConfig(Program, frozen=True, kw_only=True):
    """`pyscan monitor`: the common tables, [sweep], [kernel_state] and at least one [[target]]."""

    sweep: SweepTable = SweepTable()
    kernel_state: KernelStateTable = KernelStateTable()
    target: Annotated[tuple[Target, ...], msgspec.Meta(min_length=1, max_length=1024)]

    def __post_init__(self) -> None:
        refuse_duplicates("target name", [target.name for target in self.target])
        if not self.trust.hears(Role.APPROVER):
            raise ValueError("[trust] approvers is empty: no approved configuration can be trusted")


def load_monitor(path: Path) -> MonitorConfig:
    """Read a monitor's configuration. Raises ConfigError."""
    return load_config(path, MonitorConfig)
