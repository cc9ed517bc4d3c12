"""What accounting costs: ``python benchmarks/ledger.py [--settlements N] [--tokens N]``.

The figures of ``plait bench ledger``, and the time that the second verifier, in JavaScript,
takes for the same bundle where node is installed. Prints one JSON object.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from plait.ledger.service.benchmark import measure_ledger
from plait.testing.accounting import paper_network
from plait.testing.bundle_benchmark import make_bundle, measure_bundle

VERIFY_BUNDLES = """
const { verifyBundle, parseNetworkFile } = require(process.argv[1]);
const fs = require("node:fs");
const [, , bundle, network] = process.argv;
verifyBundle(fs.readFileSync(bundle), parseNetworkFile(fs.readFileSync(network, "utf8"))).then(
  (report) => console.log(report.outcome),
);
"""


def javascript_s(node: str, data: bytes, folder: Path) -> float:
    """Seconds of ``node`` for a bundle, its start included."""
    script = Path(__file__).parents[1] / "docs" / "verify.js"
    bundle, network = folder / "bundle.json", folder / "network.toml"
    bundle.write_bytes(data)
    network.write_text(paper_network().to_toml())
    start = perf_counter()
    shown = subprocess.run(
        [node, "--no-warnings", "-e", VERIFY_BUNDLES, str(script), str(bundle), str(network)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert shown.strip() == "verified", shown
    return round(perf_counter() - start, 3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settlements", type=int, default=2_000)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--dir", type=Path, help="A folder on the disk to measure.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as scratch:
        folder = Path(scratch)
        figures: dict[str, Any] = asdict(measure_ledger(folder, arguments.settlements))
        figures |= asdict(measure_bundle(arguments.tokens))
        node = shutil.which("node")
        if node is not None:
            data, _ = make_bundle(arguments.tokens)
            figures["verify_javascript_s"] = javascript_s(node, data, folder)
    json.dump(figures, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
