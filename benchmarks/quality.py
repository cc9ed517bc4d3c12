"""How far bf16, int4 and int8 are from fp32: divergence over teacher-forced real text.

    python benchmarks/quality.py [--model smollm2-135m] [--tokens 2048] [--dtypes bf16,int4,int8]

Prints one JSON object.
"""

import argparse
import dataclasses
import json
import sys

from plait.compute.quality import measure_quality
from plait.model import catalog


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtypes", default="bf16,int4,int8", help="with commas between")
    arguments = parser.parse_args()
    figures = measure_quality(
        catalog.pull(arguments.model),
        arguments.dtypes.split(","),
        arguments.tokens,
        progress=lambda done, total: print(f"window {done}/{total}", file=sys.stderr),
    )
    report = {"benchmark": "quality", "model": arguments.model}
    print(json.dumps(report | {"figures": [dataclasses.asdict(figure) for figure in figures]}))


if __name__ == "__main__":
    main()
