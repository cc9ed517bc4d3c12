"""What n-gram drafts gain on one stage with all layers: `plait bench draft --json`.

python benchmarks/draft.py [--model smollm2-135m] [--dtype int4] [--rounds 5]
"""

import argparse
import dataclasses
import json
import sys

from plait.compute.draft_benchmark import measure_drafts
from plait.model import catalog


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="int4")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    figures = measure_drafts(
        catalog.pull(arguments.model),
        arguments.dtype,
        112,
        arguments.rounds,
        lambda done, total: print(f"round {done}/{total}", file=sys.stderr),
    )
    report = {"benchmark": "draft", "model": arguments.model, "dtype": arguments.dtype}
    print(json.dumps(report | {"tasks": [dataclasses.asdict(figure) for figure in figures]}))


if __name__ == "__main__":
    main()
