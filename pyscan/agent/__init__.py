"""The execution environment's side: carries signed commands out on a host's virtual machines.

It believes nobody but the pinned control keys, decides nothing, and tells what it did.
"""

from pyscan.agent.program import run_program

__all__ = ["run_program"]
