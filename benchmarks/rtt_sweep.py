"""Time per token against distance, without drafts: three stages, round trips of 0 to 100 ms.

    python benchmarks/rtt_sweep.py [--model smollm2-135m] [--rounds 3] [--tokens 48]
                                   [--rtts 5,20,100]

One testnet whose WAN is changed live. In each round every distance is measured between two answers
without any delay, so that what a busy machine does to one it does to the other. The floor of a
traversal is its hops' one-way delays and the work:

    floor = (S + 1) * (r - r0) / 2 + TPOT at r0

where r is the round trip *measured* over the route's hops (TCP handshakes), r0 the one measured
when none is configured, and TPOT at r0 the mean of the answers just before and just after. Prints
one JSON object.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.client import Answer, Client, Options
from plait.testing.testnets import running_testnet
from plait.testnet.control import request
from plait.testnet.load import PROMPTS
from plait.testnet.rtt import measure_links
from plait.testnet.wan import CLIENT_LEG

STAGES = 3


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


@dataclass(frozen=True, slots=True)
class Point:
    """One answer: the round trip of its hops, and its time per token."""

    rtt_ms: float
    tpot_ms: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer at a distance, and those without one before and after it."""

    far: Point
    before: Point
    after: Point

    @property
    def floor_ms(self) -> float:
        """What a token takes at least."""
        near_rtt_ms = (self.before.rtt_ms + self.after.rtt_ms) / 2
        work_ms = (self.before.tpot_ms + self.after.tpot_ms) / 2
        return (STAGES + 1) * (self.far.rtt_ms - near_rtt_ms) / 2 + work_ms


def row(rtt: float, samples: list[Sample]) -> dict[str, Any]:
    """One distance: medians of its rounds."""
    ratios = [sample.far.tpot_ms / sample.floor_ms for sample in samples]
    return {
        "configured_rtt_ms": rtt,
        "measured_rtt_ms": round(statistics.median(one.far.rtt_ms for one in samples), 2),
        "tpot_ms": round(statistics.median(one.far.tpot_ms for one in samples), 2),
        "floor_ms": round(statistics.median(one.floor_ms for one in samples), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "near_tpot_ms": [
            [round(one.before.tpot_ms, 2), round(one.after.tpot_ms, 2)] for one in samples
        ],
    }


class Sweep:
    """The answers on one testnet."""

    def __init__(self, directory: Path, model: str, tokens: int) -> None:
        self.directory = directory
        self.model = model
        self.options = Options(max_tokens=tokens, drafts=False)
        self.answers = set[tuple[int, ...]]()

    def point(self, rtt: float) -> Point:
        """An answer at a configured distance, with a client that has just come."""
        request(self.directory, "shape", change={"delay_s": rtt / 2000})
        with Client(self.directory / "network.toml") as client:
            client.generate(self.model, PROMPTS[0], Options(max_tokens=4))
            answer = client.generate(self.model, PROMPTS[0], self.options)
        self.answers.add(answer.token_ids)
        point = Point(round_trip_ms(self.directory, answer), answer.tpot_s * 1000)
        print(rtt, point, file=sys.stderr, flush=True)
        return point

    def round(self, rtts: list[float]) -> dict[float, Sample]:
        """Every distance once."""
        samples, before = {}, self.point(0.0)
        for rtt in rtts:
            far, after = self.point(rtt), self.point(0.0)
            samples[rtt] = Sample(far, before, after)
            before = after
        return samples


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rtts", default="5,20,100", help="Milliseconds.")
    arguments = parser.parse_args()
    rtts = [float(text) for text in arguments.rtts.split(",")]
    rounds = list[dict[float, Sample]]()
    shape = ("--stages", str(STAGES), "--replicas", "1", "--wan", "lan")
    with running_testnet(arguments.model, *shape, "--dtype", arguments.dtype) as net:
        backend = request(net.directory, "status")["wan"]["backend"]
        measure_links(net.directory)  # meanwhile the nodes get to know each other
        sweep = Sweep(net.directory, arguments.model, arguments.tokens)
        for _ in range(arguments.rounds):
            rounds.append(sweep.round(rtts))
    report = {
        "benchmark": "rtt_sweep",
        "model": arguments.model,
        "dtype": arguments.dtype,
        "backend": backend,
        "stages": STAGES,
        "rounds": arguments.rounds,
        "tokens": arguments.tokens,
        "same_tokens": len(sweep.answers) == 1,
        "load": os.getloadavg(),
        "distances": [row(rtt, [samples[rtt] for samples in rounds]) for rtt in rtts],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
