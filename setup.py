"""Build hook for the native modules; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=["native/build_core.py:ffibuilder", "native/xdma/build.py:ffibuilder"],
)
