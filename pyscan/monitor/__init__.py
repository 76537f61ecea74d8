"""The monitoring environment: reads targets' memory, judges it, publishes signed verdicts.

It never acts on a virtual machine and cannot write a target's memory.
"""

from pyscan.monitor.program import run_program

__all__ = ["run_program"]
