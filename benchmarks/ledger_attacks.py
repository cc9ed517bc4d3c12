"""All 28 attacks on money, encodings and log at random among honest work.

``python benchmarks/ledger_attacks.py [--operations N] [--jobs N] [--first SEED]``

Plays so many operations (a million) in worlds of 1,000, each from a seed of its own: the
seeds, with the commit, repeat the run. After each operation the books must balance, nobody
may be below the limit, and nobody be paid beyond what was promised and reserved; each attack
asserts that it was refused or proven. Progress on stderr; prints one JSON object. Exit code 1
if anything was violated.
"""

import argparse
import json
import os
import sys
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from time import monotonic

from plait.testing.ledger_attacks import play
from plait.testing.ledger_attacks_log import LogWorld

WORLD_OPERATIONS = 1_000


def world(seed: int) -> tuple[int, Counter[str], str]:
    """One world: its seed, how often each kind of operation was played, and a violation."""
    subject = LogWorld(seed)
    try:
        play(subject, WORLD_OPERATIONS)
    except Exception:  # noqa: BLE001 - a worker's boundary: reported with its seed
        return seed, subject.played, traceback.format_exc(limit=-4)
    return seed, subject.played, ""


def main() -> None:
    """Play and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--first", type=int, default=0, help="The first world's seed.")
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + -(-arguments.operations // WORLD_OPERATIONS))
    played: Counter[str] = Counter()
    violations: list[dict[str, object]] = []
    start = monotonic()
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for number, (seed, counts, violation) in enumerate(pool.map(world, seeds), 1):
            played += counts
            if violation:
                violations.append({"seed": seed, "violation": violation})
                print(f"seed {seed}: {violation}", file=sys.stderr)
            if number % 10 == 0:
                print(f"{number} of {len(seeds)} worlds", file=sys.stderr, flush=True)
    by_attack: Counter[str] = Counter()
    for name, count in played.items():
        by_attack[name[7:9] if name.startswith("attack_") else "honest"] += count
    result = {
        "operations": played.total(),
        "worlds": len(seeds),
        "first_seed": arguments.first,
        "operations_by_attack": dict(sorted(by_attack.items())),
        "violations": violations,
        "seconds": round(monotonic() - start, 1),
    }
    print(json.dumps(result, indent=2))
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
