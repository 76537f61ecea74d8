"""Readers of a distribution's formats: the package, the boot image and ELF files.

Everything in here parses bytes that somebody else wrote. Whatever they hold, the outcome is
a result or a PackageError, in bounded time and memory.
"""
