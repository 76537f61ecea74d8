"""Comparing a running kernel with what its package allows.

    attached = attach(source, [approved])     # the running kernel, and which package it is of
    validation = validate(attached)           # every protected byte, every structure, once
    snapshot = baseline(validation, ...)      # what sweeps compare from then on

Bytes are predicted and then compared: the kernel's own patching is replayed on the package's
bytes under the state that the target is in (docs/adr/predict-then-compare.md).
"""

from pyscan.validate.attach import Attached, attach
from pyscan.validate.baseline import baseline
from pyscan.validate.code import Difference
from pyscan.validate.describe import count_findings, findings
from pyscan.validate.memory import AccessFailed
from pyscan.validate.recheck import recheck
from pyscan.validate.rules import Judged, StateFinding, StateRules, judge_state
from pyscan.validate.settle import Page, Settled, pages_of, settle, take_over
from pyscan.validate.starting import is_starting
from pyscan.validate.validation import Validation, validate
from pyscan.validate.vector import StateChange, StateVector, state_vector

__all__ = [
    "AccessFailed",
    "Attached",
    "Difference",
    "Judged",
    "Page",
    "Settled",
    "StateChange",
    "StateFinding",
    "StateRules",
    "StateVector",
    "Validation",
    "attach",
    "baseline",
    "count_findings",
    "findings",
    "is_starting",
    "judge_state",
    "pages_of",
    "recheck",
    "settle",
    "state_vector",
    "take_over",
    "validate",
]
