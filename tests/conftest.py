"""What every test starts from."""

import signal

# A shell that starts the tests in the background leaves SIGINT ignored, and every process that
# a test starts and then interrupts would inherit that and go on.
signal.signal(signal.SIGINT, signal.default_int_handler)
