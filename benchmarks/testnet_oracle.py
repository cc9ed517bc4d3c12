"""The oracle over the wire: `plait run` on real testnets of 1 to 4 stages against transformers.

    python benchmarks/testnet_oracle.py [--model smollm2-135m] [--tokens 64] [--prompts 10]

Each prompt goes through the real command, four testnets of separate processes, and
transformers' ``generate`` on the unsplit model from the same file. Prints one JSON object.
"""

import argparse
import json
import sys
from typing import Any

import torch
from oracle import PROMPTS, STAGE_COUNTS

from plait.model import catalog
from plait.model.tokenizer import Tokenizer
from plait.testing.reference import reference_model, reference_run
from plait.testing.testnets import running_testnet


def answers(model: str, stages: int, prompts: tuple[str, ...], tokens: int) -> list[dict[str, Any]]:
    """The prompts through `plait run --json` on a testnet of that many stages."""
    with running_testnet(model, "--stages", str(stages)) as net:
        return [net.run(prompt, "--max-tokens", str(tokens)) for prompt in prompts]


def expected(tokens: list[int], end_ids: tuple[int, ...]) -> list[int]:
    """The oracle's tokens up to an end token."""
    for index, token in enumerate(tokens):
        if token in end_ids:
            return tokens[:index]
    return tokens


def main() -> int:
    """Compare; exit code 1 on any difference."""
    parser = argparse.ArgumentParser(description="Compare testnets with the unsplit model.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    local = catalog.pull(options.model)
    tokenizer, reference = Tokenizer.load(local), reference_model(local)
    prompts = PROMPTS[: options.prompts]
    wanted = []
    for prompt in prompts:
        ids = tokenizer.chat([{"role": "user", "content": prompt}])
        tokens = reference_run(reference, ids, options.tokens).tokens
        wanted.append(expected(tokens, tokenizer.end_ids))
    report: dict[str, Any] = {
        "benchmark": "testnet_oracle",
        "model": options.model,
        "prompts": len(prompts),
        "tokens": options.tokens,
    }
    for stages in STAGE_COUNTS:
        got = answers(options.model, stages, prompts, options.tokens)
        report[f"stages_{stages}"] = {
            "answers_that_differ": sum(
                answer["token_ids"] != tokens for answer, tokens in zip(got, wanted, strict=True)
            ),
            "stages_used": sorted({len(answer["route"]) for answer in got}),
            "receipts_verified": sum(answer["receipts_verified"] for answer in got),
        }
        print(stages, report[f"stages_{stages}"], file=sys.stderr)
    print(json.dumps(report))
    failed = any(report[f"stages_{stages}"]["answers_that_differ"] for stages in STAGE_COUNTS)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
