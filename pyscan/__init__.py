"""Out-of-band memory integrity for servers and virtual machines, with an automatic answer."""

from importlib.metadata import version

__version__ = version("pyscan")
