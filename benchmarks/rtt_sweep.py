"""Time per token against distance, without drafts: three stages, round trips of 0 to 100 ms.

    python benchmarks/rtt_sweep.py [--model smollm2-135m] [--rounds 3] [--tokens 48]
                                   [--rtts 0,5,20,100]

One testnet whose WAN is changed live, so that every distance is measured in every round of the
same run. The floor of a traversal is its hops' one-way delays and the work:

    floor = (S + 1) * (r - r0) / 2 + TPOT at r0

where r is the round trip *measured* over the route's hops (TCP handshakes) and r0 the one
measured when none is configured. Prints one JSON object.
"""

import argparse
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from plait.client import Answer, Client, Options
from plait.testnet.control import request
from plait.testnet.load import PROMPTS
from plait.testnet.rtt import measure_links
from plait.testnet.wan import CLIENT_LEG

STAGES = 3


def plait(*arguments: str) -> str:
    """Run a plait command and return its standard output."""
    command = [sys.executable, "-m", "plait", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def round_trip_ms(directory: Path, answer: Answer) -> float:
    """The mean round trip over the hops that a traversal of this answer's route made."""
    nodes = request(directory, "status")["nodes"]
    names = {node["peer"]: node["name"] for node in nodes}
    ends = [CLIENT_LEG, *(names[step.peer] for step in answer.route)]
    # The last hop leads back to the client: it is the client who opened that connection.
    hops = [*itertools.pairwise(ends), (CLIENT_LEG, ends[-1])]
    rtt_ms: dict[tuple[str, str], float] = {
        (row["source"], row["target"]): row["rtt_ms"] for row in measure_links(directory)
    }
    return statistics.mean([rtt_ms[hop] for hop in hops])


def row(
    rtt: float,
    none: float,
    measured_ms: dict[float, list[float]],
    tpot_ms: dict[float, list[float]],
) -> dict[str, Any]:
    """One distance: medians, and the ratio to the floor of each round, which drifts less."""
    floors_ms = [
        (STAGES + 1) * (r_ms - r0_ms) / 2 + base_ms
        for r_ms, r0_ms, base_ms in zip(
            measured_ms[rtt], measured_ms[none], tpot_ms[none], strict=True
        )
    ]
    ratios = [took / floor for took, floor in zip(tpot_ms[rtt], floors_ms, strict=True)]
    return {
        "configured_rtt_ms": rtt,
        "measured_rtt_ms": round(statistics.median(measured_ms[rtt]), 2),
        "tpot_ms": round(statistics.median(tpot_ms[rtt]), 2),
        "floor_ms": round(statistics.median(floors_ms), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rtts", default="0,5,20,100", help="Milliseconds; the first must be 0.")
    arguments = parser.parse_args()
    rtts = [float(text) for text in arguments.rtts.split(",")]
    options = Options(max_tokens=arguments.tokens, drafts=False)
    tpot_ms: dict[float, list[float]] = {rtt: [] for rtt in rtts}
    measured_ms: dict[float, list[float]] = {rtt: [] for rtt in rtts}
    answers = set()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the testnet ends with us
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "net"
        where = ("--dir", str(directory))
        shape = ("--stages", str(STAGES), "--replicas", "1", "--wan", "lan")
        named = ("--model", arguments.model, "--dtype", arguments.dtype)
        plait("testnet", "up", "--detach", *named, *shape, *where)
        try:
            backend = request(directory, "status")["wan"]["backend"]
            measure_links(directory)  # meanwhile the nodes get to know each other
            for _ in range(arguments.rounds):
                for rtt in rtts:
                    request(directory, "shape", change={"delay_s": rtt / 2000})
                    with Client(directory / "network.toml") as client:
                        client.generate(arguments.model, PROMPTS[0], Options(max_tokens=4))
                        answer = client.generate(arguments.model, PROMPTS[0], options)
                    answers.add(answer.token_ids)
                    tpot_ms[rtt].append(answer.tpot_s * 1000)
                    measured_ms[rtt].append(round_trip_ms(directory, answer))
                    print(rtt, measured_ms[rtt][-1], tpot_ms[rtt][-1], file=sys.stderr)
        finally:
            plait("testnet", "down", *where)
    rows = [row(rtt, rtts[0], measured_ms, tpot_ms) for rtt in rtts]
    report = {
        "benchmark": "rtt_sweep",
        "model": arguments.model,
        "dtype": arguments.dtype,
        "backend": backend,
        "stages": STAGES,
        "rounds": arguments.rounds,
        "tokens": arguments.tokens,
        "same_tokens": len(answers) == 1,
        "distances": rows,
        "tpot_ms_all": {str(rtt): [round(v, 2) for v in tpot_ms[rtt]] for rtt in rtts},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
