"""The compute oracle: is a split model, token for token and bit for bit, the unsplit one?

Runs prompts through 1, 2, 3 and 4 stages in this process and compares the greedy tokens
with transformers' ``generate`` on the unsplit model, every activation that crosses a boundary
with transformers' own hidden states (they agree to rounding), and with the same activation
of the other splits (they agree to the bit). Prints one JSON object.

    python benchmarks/oracle.py [--model NAME] [--tokens N] [--prompts N] [--from-pretrained]

``--from-pretrained`` also compares every weight with transformers' own GGUF loader; that
needs the packages ``gguf`` and ``accelerate``, 20 s and 1.2 GB.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from plait.compute.load import load_stage
from plait.model import catalog
from plait.model.catalog import LocalModel
from plait.model.tokenizer import Tokenizer
from plait.testing.reference import (
    PipelineRun,
    boundary_error,
    equal_spans,
    reference_model,
    reference_run,
    run_pipeline,
    unequal_boundaries,
)
from plait.types import Span

PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that reverses a string.",
    "Explain why the sky is blue in two sentences.",
    "List five fruits and their colours.",
    "Translate 'good morning' into Spanish and German.",
    "What is 17 times 23? Think step by step.",
    "Write a short poem about autumn leaves.",
    "Summarise: The quick brown fox jumps over the lazy dog. The dog sleeps on.",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet, and when was it first performed?",
)
STAGE_COUNTS = (1, 2, 3, 4)


def main() -> int:
    """Run what the flags ask for; exit code 1 on any difference."""
    parser = argparse.ArgumentParser(description="Compare split with unsplit models.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--from-pretrained", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(1)
    local = catalog.pull(options.model)
    reference = reference_model(local)
    tokenizer = Tokenizer.load(local)
    prompts = [
        tokenizer.chat([{"role": "user", "content": text}]) for text in PROMPTS[: options.prompts]
    ]
    report: dict[str, object] = {
        "model": local.name,
        "digest": local.manifest.digest.hex(),
        "prompts": len(prompts),
        "tokens": options.tokens,
        "torch": torch.__version__,
    }
    if options.from_pretrained:
        report["weights"] = compare_weights(local, reference)
    report |= compare_stages(local, reference, prompts, options.tokens)
    print(json.dumps(report, indent=2))
    return 0 if passed(report) else 1


def compare_stages(
    local: LocalModel,
    reference: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    count: int,
) -> dict[str, object]:
    """Tokens and boundary activations of every number of stages against the reference."""
    wanted = []
    started = time.perf_counter()
    for ids in prompts:
        wanted.append(reference_run(reference, ids, count))
        print(f"reference {len(wanted)}/{len(prompts)}", file=sys.stderr)
    results: dict[str, object] = {"reference_s": round(time.perf_counter() - started, 1)}
    split: list[tuple[list[Span], list[PipelineRun]]] = []
    for stages in STAGE_COUNTS:
        spans = equal_spans(local.manifest.layers, stages)
        loaded = [load_stage(local, span) for span in spans]
        started = time.perf_counter()
        runs = [run_pipeline(loaded, ids, count) for ids in prompts]
        seconds = time.perf_counter() - started
        results[f"stages_{stages}"] = {
            "spans": [str(span) for span in spans],
            "token_mismatches": sum(
                drawn != expected
                for run, expected_run in zip(runs, wanted, strict=True)
                for drawn, expected in zip(run.tokens, expected_run.tokens, strict=True)
            ),
            "payloads": sum(len(payloads) for run in runs for payloads in run.boundaries),
            "error_max": max(map(boundary_error, runs, [spans] * len(runs), wanted)),
            "payloads_of_splits_not_bitwise_equal": sum(
                unequal_boundaries(run, spans, other, other_spans)
                for other_spans, others in split
                for run, other in zip(runs, others, strict=True)
            ),
            "tokens_per_s": round(len(prompts) * count / seconds, 1),
        }
        split.append((spans, runs))
        print(f"{stages} stages: {results[f'stages_{stages}']}", file=sys.stderr)
    return results


def compare_weights(local: LocalModel, reference: LlamaForCausalLM) -> dict[str, int]:
    """Every parameter against transformers' own loading of the same file."""
    theirs = AutoModelForCausalLM.from_pretrained(
        local.weights_path.parent, gguf_file=local.weights_path.name, dtype=torch.float32
    ).state_dict()
    ours = reference.state_dict()
    different = sum(not torch.equal(ours[name], weight) for name, weight in theirs.items())
    return {"tensors": len(theirs), "not_bitwise_equal": different}


def passed(report: dict[str, object]) -> bool:
    """Whether no comparison found a difference."""
    return not any(
        value
        for result in report.values()
        if isinstance(result, dict)
        for name, value in result.items()
        if name.endswith(("mismatches", "not_bitwise_equal"))
    )


if __name__ == "__main__":
    sys.exit(main())
