"""What fp32 sessions in one batch gain over one by one with transformers' modules.

One process, one thread, all layers, engines in turns; CPU milliseconds of a decode step, which
other work on the machine changes less than the clock's. Prints one JSON object.

    python benchmarks/fp32_batch.py [--model NAME] [--rounds N]
"""

import argparse
import json
import sys
import time
from statistics import median

import torch

from plait.compute.hf import load_span
from plait.compute.load import load_stage
from plait.compute.port import Work
from plait.compute.stage import TorchStage
from plait.model import catalog
from plait.model.gguf_reader import GgufFile
from plait.model.local import LocalModel
from plait.model.weights import Weights
from plait.types import Sampling, SessionId, Span

BATCHES = (1, 4, 16)
PROMPT_ROWS = 24
KV_TOKENS = 4096


def engines(local: LocalModel) -> dict[str, TorchStage]:
    """fp32 one by one, fp32 together, and int4, each with all layers."""
    span = Span(0, local.manifest.layers)
    with GgufFile.open(local.weights_path) as gguf:
        modules = load_span(Weights(gguf, local.manifest), span, lambda done, total: None)
    single = TorchStage(modules, local.manifest.shape, kv_tokens_max=KV_TOKENS, threads=1)
    return {
        "transformers": single,
        "fp32": load_stage(local, span, kv_tokens_max=KV_TOKENS),
        "int4": load_stage(local, span, "int4", kv_tokens_max=KV_TOKENS),
    }


def main() -> None:
    """Measure in rounds and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sessions = [SessionId(index.to_bytes(16, "big")) for index in range(max(BATCHES))]
    stages = engines(catalog.pull(options.model))
    for stage in stages.values():
        for session in sessions:
            stage.reserve(session, PROMPT_ROWS + options.rounds, Sampling())
            stage.step([Work(session, 0, tuple(range(PROMPT_ROWS)), None)])
    cpu_ms: dict[str, list[float]] = {}
    for turn in range(options.rounds):
        for batch in BATCHES:
            for name, stage in stages.items():
                works = [
                    Work(one, PROMPT_ROWS + turn, (turn,), None, sample=True)
                    for one in sessions[:batch]
                ]
                started = time.thread_time()
                stage.step(works)
                taken = (time.thread_time() - started) * 1e3
                cpu_ms.setdefault(f"{name} {batch}", []).append(taken)
        print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
    print(json.dumps({name: round(median(times), 1) for name, times in cpu_ms.items()}, indent=2))


if __name__ == "__main__":
    main()
