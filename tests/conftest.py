"""Settings of the whole suite."""

from hypothesis import settings

# How long an example takes is no property of the code: machines are shared and noisy.
settings.register_profile("plait", deadline=None)
settings.load_profile("plait")
