"""Configuration files of the three programs: TOML, validated, errors with file and line.

Each program has one loader that returns frozen structs in which everything is usable:
paths are absolute (relative ones are taken from the configuration file's directory), keys
and passwords are loaded, names are safe as an MQTT topic level. Unknown keys are errors.

    [identity]                          all programs
    name = "host-1"                     topic level and MQTT client id; the agent's host name
    key = "host-1.key"                  Ed25519 private key, PEM, mode 0600

    [mqtt]                              all programs
    host = "127.0.0.1"                  port = 1883
    username = "host-1"                 password_file = "host-1.password" (mode 0600)
    ca, crl, certificate, key           PEM files: TLS; a client certificate if both are given

    [state]                             all programs
    directory = "/var/lib/pyscan"       database and evidence; made when it is not there

    [trust]                             public keys by name and role; a role that the program
    monitors.mon-1 = "mon-1.pub"        does not hear may stay empty
    controls.ctl-1 = "ctl-1.pub"
    operators.ann = "ann.pub"
    agents.host-1 = "host-1.pub"
    approvers = ["approver.pub"]
    root = "root.pub"                   besides, or instead: a key set that this root signed,
    set = "trust.cose"                  read again when it changes and on SIGHUP

The remaining tables are described at the structs of their program, one file each.
"""

from __future__ import annotations

from pyscan.config.agent import AgentConfig, Limits, Vm, load_agent
from pyscan.config.control import ControlConfig, PolicyTable, load_control, load_policy
from pyscan.config.monitor import (
    KernelStateTable,
    MonitorConfig,
    StateRule,
    SweepTable,
    Target,
    load_monitor,
)
from pyscan.config.operator import OperatorConfig, load_operator

__all__ = [
    "AgentConfig",
    "ControlConfig",
    "KernelStateTable",
    "Limits",
    "MonitorConfig",
    "OperatorConfig",
    "PolicyTable",
    "StateRule",
    "SweepTable",
    "Target",
    "Vm",
    "load_agent",
    "load_control",
    "load_monitor",
    "load_operator",
    "load_policy",
]
