"""Settings of the pure tests."""

from hypothesis import settings

# A busy machine is no failure: no test asserts a time.
settings.register_profile("pyscan", deadline=None)
settings.load_profile("pyscan")
