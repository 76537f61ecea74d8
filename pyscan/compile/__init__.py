"""From a distribution's kernel package to an approved configuration, offline and repeatable."""

from pyscan.compile.packages import compile_packages

__all__ = ["compile_packages"]
