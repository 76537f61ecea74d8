"""The demonstration: the main job on a real guest, in one command."""

from pyscan.demo.story import DemoOptions, run_demo

__all__ = ["DemoOptions", "run_demo"]
