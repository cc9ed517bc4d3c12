"""A pytest plugin, named in pyproject.toml: tests that interrupt processes work in the background.

A shell that starts the tests in the background leaves SIGINT ignored, and every process that a
test starts and then interrupts would inherit that and go on.
"""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
