"""A bundle of 10,000 tokens verified where there is no network at all.

``python benchmarks/verify_offline.py [--tokens N] [--rounds N]``

Runs ``plait verify`` in a network namespace of its own (``unshare --net``, Linux; not even a
loopback is up) and prints wall and processor seconds of the whole command, its start included,
as one JSON object. Exit code 1 if the bundle is not verified.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from plait.testing.accounting import key_of, paper_network
from plait.testing.bundle_benchmark import make_bundle


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    data, _ = make_bundle(arguments.tokens)
    walls, processor = [], []
    with tempfile.TemporaryDirectory() as scratch:
        bundle, network = Path(scratch) / "bundle.json", Path(scratch) / "network.toml"
        bundle.write_bytes(data)
        paper_network().save(network, key_of("founder"))
        verify = [sys.executable, "-m", "plait", "verify", str(bundle), "--network", str(network)]
        for number in range(arguments.rounds):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
            done = subprocess.run(
                ["unshare", "--net", "--map-root-user", *verify], capture_output=True, text=True
            )
            walls.append(perf_counter() - start)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            processor.append(used)
            print(f"round {number + 1}: exit {done.returncode}", file=sys.stderr)
            if done.returncode != 0:
                sys.exit(f"not verified: {done.stdout}{done.stderr}")
    result = {
        "tokens": arguments.tokens,
        "bundle_bytes": len(data),
        "wall_s": [round(one, 3) for one in walls],
        "cpu_s": [round(one, 3) for one in processor],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
