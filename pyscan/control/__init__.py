"""The configuration environment: answers verdicts by policy and commands the agents."""

from pyscan.control.program import run_program

__all__ = ["run_program"]
