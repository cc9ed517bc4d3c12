"""Kill a ledger at every write call of its life: ``python benchmarks/ledger_crash.py``.

Needs strace. Prints one JSON object: how often it was killed at which system call, and
what did not hold afterwards; exit code 1 if anything did not.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from plait.testing.ledger_crash import WRITE_CALLS, find_strace, kill_sweep


def main() -> int:
    """Sweep and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=2, help="Of one life.")
    arguments = parser.parse_args()
    strace = find_strace()
    if strace is None:
        parser.error("strace is not installed, or may not trace")
    with tempfile.TemporaryDirectory() as scratch:
        sweeps = [
            kill_sweep(strace, Path(scratch), call, arguments.sessions) for call in WRITE_CALLS
        ]
    json.dump([asdict(sweep) for sweep in sweeps], sys.stdout, indent=2)
    print()
    return int(any(sweep.violations for sweep in sweeps))


if __name__ == "__main__":
    sys.exit(main())
