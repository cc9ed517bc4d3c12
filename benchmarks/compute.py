"""One stage with all layers: decode and prefill by dtype, threads and sessions at once.

    python benchmarks/compute.py [--model smollm2-135m] [--rounds 5]

The same as `plait bench compute --json`, plus ratios to fp32 (and to llama.cpp where the
package `llama_cpp` is installed). Prints one JSON object.
"""

import argparse
import dataclasses
import json
import sys

from plait.compute.benchmark import LLAMA_CPP, BenchPlan, ComputeFigures, measure_compute
from plait.model import catalog


def ratios(figures: ComputeFigures, baseline: str) -> dict[str, float]:
    """Tokens per second over those of ``baseline``, where that was measured."""
    base = {
        (figure.threads, figure.batch): figure.tokens_per_s
        for figure in figures.decode
        if figure.dtype == baseline
    }
    return {
        f"{figure.dtype} t{figure.threads} b{figure.batch}": round(
            figure.tokens_per_s / base[figure.threads, figure.batch], 2
        )
        for figure in figures.decode
        if figure.dtype != baseline and (figure.threads, figure.batch) in base
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    figures = measure_compute(
        catalog.pull(arguments.model),
        BenchPlan(rounds=arguments.rounds),
        lambda done, total: print(f"round {done}/{total}", file=sys.stderr),
    )
    report = {"benchmark": "compute", **dataclasses.asdict(figures)}
    report["decode_over_fp32"] = ratios(figures, "fp32")
    report["decode_over_llama_cpp"] = ratios(figures, LLAMA_CPP) or None
    print(json.dumps(report))


if __name__ == "__main__":
    main()
