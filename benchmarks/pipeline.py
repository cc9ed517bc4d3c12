"""Pipeline tax and memory: three stages against one, one compute thread per node, interleaved.

    python benchmarks/pipeline.py [--model smollm2-135m] [--rounds 5] [--tokens 64]

Starts two testnets side by side (1 and 3 stages), asks each in turn for the same tokens, and
prints one JSON object: median time per token of each, their paired difference, and the
memory of each process. Compare figures within one run only: machines are noisy.
"""

import argparse
import json
import statistics
from contextlib import ExitStack

import psutil

from plait.client import Client, Options
from plait.testing.testnets import Testnet, running_testnet

PROMPT = "Explain in a few sentences why the sky is blue and sunsets are red."


def memory_mb(net: Testnet) -> dict[str, dict[str, float]]:
    """Resident and unique (unshared) megabytes of each stage's process."""
    figures = {}
    for node in net.nodes().values():
        if node["span"]:
            info = psutil.Process(node["pid"]).memory_full_info()
            figures[f"{node['span'][0]}:{node['span'][1]}"] = {
                "rss": round(info.rss / 1e6, 1),
                "unique": round(info.uss / 1e6, 1),
            }
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    options = Options(max_tokens=arguments.tokens)
    tpot_ms: dict[int, list[float]] = {1: [], 3: []}
    answers = set()
    with ExitStack() as stack:
        nets, clients = {}, {}
        for stages in tpot_ms:
            shape = ("--stages", str(stages), "--replicas", "1")
            nets[stages] = stack.enter_context(running_testnet(arguments.model, *shape))
            clients[stages] = stack.enter_context(Client(nets[stages].network))
            clients[stages].generate(arguments.model, PROMPT, Options(max_tokens=4))
        for _ in range(arguments.rounds):
            for stages, client in clients.items():
                answer = client.generate(arguments.model, PROMPT, options)
                tpot_ms[stages].append(answer.tpot_s * 1000)
                answers.add(answer.token_ids)
        memory = {stages: memory_mb(net) for stages, net in nets.items()}
    taxes = [three - one for one, three in zip(tpot_ms[1], tpot_ms[3], strict=True)]
    report = {
        "benchmark": "pipeline",
        "model": arguments.model,
        "rounds": arguments.rounds,
        "tokens": arguments.tokens,
        "tpot_ms_1_stage": [round(value, 2) for value in tpot_ms[1]],
        "tpot_ms_3_stages": [round(value, 2) for value in tpot_ms[3]],
        "tax_ms_median": round(statistics.median(taxes), 2),
        "tax_ms_of_minima": round(min(tpot_ms[3]) - min(tpot_ms[1]), 2),
        "same_tokens": len(answers) == 1,
        "memory_mb_1_stage": memory[1],
        "memory_mb_3_stages": memory[3],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
