"""What is left of a network's peak when twice and four times as much is asked of it.

    python benchmarks/overload.py [--model smollm2-135m] [--dtype fp32] [--stages 2]
                                  [--replicas 1] [--tokens 16] [--seconds 10] [--rounds 2]
                                  [--slo-factor 5] [--factors 2,4] [--answers 60]
                                  [--qos interactive] [--workers 1,2,4,8,16,32]
                                  [--parts overload,refusals,fairness] [--streams 8,1]

An answer counts if it is complete within the SLO: ``slo-factor`` times what it takes alone,
measured in the same run. First the peak: closed loops of 1, 2, 4, … workers until it falls.
Then, round after round, the best of them again (the peak to compare with) and open loops whose
arrivals do not wait for answers, at each factor of that peak. Goodput at a factor is compared
with the mean of the peaks measured just before and after. Windows are as long as the peak takes for
``answers`` good answers, ``seconds`` at least.

The client library is the load; it makes no attempt of its own after an error, and its share of the
processor, which the network has to do without, is in each row, and how late its event loop comes.
A refusal is timed where it is made (``load_runs.py``): in the client, by a stage as the client sees
it, and on the stage's own event loop, which each node's status tells. A process of its own that is
not busy, but of the same client, asks a few times a second, in a run that counts for nothing else.

Last, the fairness of it: two clients with so many streams each, first alone and then together. What
each gets is shown as a part of what it has alone. Prints one JSON object.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from load_runs import REFUSED_REST_S, WARM_UP_S, Bench, Load, refusals

from plait.client import AsyncClient
from plait.heap import freeze_heap
from plait.identity import load_or_create_key
from plait.node.control import ask
from plait.testing.testnets import Testnet, running_testnet
from plait.testnet.folder import NODES_DIR

WINDOW_S_MAX = 120.0
PROBE_PERIOD_S = 0.2
FIRST, SECOND = "client", "second"
CREDIT = 10_000_000_000
ResultT = TypeVar("ResultT")
NODE_FIGURES = ("loop_late_ms_p50", "loop_late_ms_p99")
NODE_REFUSALS = ("refusals", "refusal_ms_p50", "refusal_ms_p99")


def give_account(net: Testnet) -> None:
    """Make the second client's keys, and give it credit."""
    (net.directory / SECOND).mkdir(mode=0o700)
    peer = load_or_create_key(net.directory / SECOND / "identity.key").peer_id
    net.plait("ledger", "issue", peer, str(CREDIT), "--network", str(net.network))


async def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The parts that are asked for, one after the other."""
    async with AsyncClient(directory / "network.toml", account=directory / FIRST) as client:
        bench = Bench(client, options)
        await bench.ask(Load())  # loads what a client needs
        freeze_heap()  # as a gateway does
        bench.slo_s = await bench.alone() * options.slo_factor
        report: dict[str, Any] = {"slo_s": round(bench.slo_s, 3)}
        if {"overload", "refusals"} & set(options.parts):
            search = await search_peak(bench)
            best = max(search, key=lambda run: run["goodput"])
            needed_s = options.answers / max(best["goodput"], 0.01)
            options.seconds = round(min(max(options.seconds, needed_s), WINDOW_S_MAX), 1)
            report |= {"window_s": options.seconds, "search": search}
        if "overload" in options.parts:
            report |= await overloaded(bench, best["workers"])
        if "refusals" in options.parts:
            rate = max(options.factors) * best["goodput"]
            report["refusals"] = await refused(bench, directory, rate)
        if "fairness" in options.parts:
            report["fairness"] = await fair(bench, directory)
    return report


async def search_peak(bench: Bench) -> list[dict[str, Any]]:
    """Closed loops of ever more workers, until ever less comes of it."""
    search: list[dict[str, Any]] = []
    for workers in bench.options.workers:
        search.append(await bench.closed(workers))
        tell("search", search[-1])
        if search[-1]["goodput"] < 0.7 * max(run["goodput"] for run in search):
            break
    return search


async def overloaded(bench: Bench, workers: int) -> dict[str, Any]:
    """The peak, then each round's overloads and peaks."""
    options = bench.options
    peaks, overloads = [await bench.closed(workers)], list[dict[str, Any]]()
    tell("peak", peaks[-1])
    for _ in range(options.rounds):
        for factor in options.factors:
            rate = factor * peaks[-1]["goodput"]
            overload = {"factor": factor, **await bench.open(rate)}
            peaks.append(await bench.closed(workers))
            around = statistics.mean([peaks[-2]["goodput"], peaks[-1]["goodput"]])
            overload["share_of_peak"] = round(overload["goodput"] / around, 3)
            overloads.append(overload)
            tell("overload", overload)
            tell("peak", peaks[-1])
    return {
        "shares": {
            str(factor): [run["share_of_peak"] for run in overloads if run["factor"] == factor]
            for factor in options.factors
        },
        "good_answers_min": round(
            min(run["goodput"] for run in (*peaks, *overloads)) * options.seconds
        ),
        "peaks": peaks,
        "overloads": overloads,
    }


async def refused(bench: Bench, directory: Path, rate: float) -> dict[str, Any]:
    """Refusals at this rate: at the load, at a process that is not busy, and at the stages.

    A run of its own: what the second process is given is taken from the others.
    """
    async with SecondClient(directory, FIRST, bench.options) as second:
        run, asked = await asyncio.gather(bench.open(rate), second.probe(bench.options.seconds))
    names = ("rate", "goodput", "client_loop_late_p99_ms", "arrival_late_p99_ms")
    load = {name: run[name] for name in (*names, *refusals(Load()))}
    nodes = []
    for folder in sorted((directory / NODES_DIR).glob("node-*")):
        told = await asyncio.to_thread(ask, folder, "status")
        nodes.append({name: told[name] for name in (*NODE_FIGURES, *NODE_REFUSALS)})
    report = {"load": load, "second_process": asked, "nodes": nodes}
    tell("refusals", report)
    return report


async def fair(bench: Bench, directory: Path) -> dict[str, Any]:
    """Tokens per second of two clients with so many streams each, alone and together."""
    options = bench.options
    streams, tokens = options.streams, options.tokens
    async with SecondClient(directory, SECOND, options) as second:
        first_alone = await bench.closed(streams[0])
        second_alone = await second.stream(options.seconds, streams[1])
        first, other = await asyncio.gather(
            bench.closed(streams[0]), second.stream(options.seconds, streams[1])
        )
    alone = [first_alone["throughput"] * tokens, second_alone["tokens_per_s"]]
    together = [first["throughput"] * tokens, other["tokens_per_s"]]
    report = {
        "streams": streams,
        "alone_tokens_per_s": [round(rate, 2) for rate in alone],
        "tokens_per_s": [round(rate, 2) for rate in together],
        "part_of_alone": [
            round(rate / max(one, 1e-9), 3) for rate, one in zip(together, alone, strict=True)
        ],
        "refused": [first["refused"], other["refused"]],
    }
    tell("fairness", report)
    return report


class SecondClient:
    """Another process, with the keys in a folder, which does what its standard input says."""

    def __init__(self, directory: Path, account: str, options: argparse.Namespace) -> None:
        self._command = [sys.executable, __file__, "--second", str(directory / account)]
        self._command += ["--model", options.model, "--tokens", str(options.tokens)]
        self._command += ["--qos", options.qos]

    async def __aenter__(self) -> "SecondClient":
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe
        )
        await self._read()
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def probe(self, seconds: float) -> dict[str, Any]:
        """Ask for one token now and then; only refusals are of interest."""
        return await self._tell(f"probe {seconds + WARM_UP_S} 1")

    async def stream(self, seconds: float, streams: int) -> dict[str, Any]:
        """So many at once, one answer after the other."""
        return await self._tell(f"stream {seconds + WARM_UP_S} {streams}")

    async def _tell(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        return await self._read()

    async def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return dict(json.loads(await self._process.stdout.readline()))


async def be_second(account: Path, options: argparse.Namespace) -> None:
    """The second process."""
    async with AsyncClient(account.parent / "network.toml", account=account) as client:
        await client.wait_ready(options.model)
        freeze_heap()
        bench, tokens = Bench(client, options), options.tokens
        print("{}", flush=True)
        while words := (await asyncio.to_thread(sys.stdin.readline)).split():
            options.tokens = 1 if words[0] == "probe" else tokens
            rest_s = PROBE_PERIOD_S if words[0] == "probe" else 0.0
            load = bench.timed.into = Load()
            started_s = time.monotonic()
            until_s = started_s + float(words[1])
            await asyncio.gather(
                *(one_stream(bench, load, until_s, rest_s) for _ in range(int(words[2])))
            )
            print(json.dumps(_seconds(load, time.monotonic() - started_s, tokens)), flush=True)


async def one_stream(bench: Bench, load: Load, until_s: float, rest_s: float) -> None:
    """Ask again and again."""
    while time.monotonic() < until_s:
        failed = (await bench.ask(load)).code
        await asyncio.sleep(REFUSED_REST_S if failed else rest_s)


def _seconds(load: Load, lasted_s: float, tokens: int) -> dict[str, Any]:
    answered = sum(not request.code for request in load.requests)
    return {
        "requests": len(load.requests),
        **refusals(load),
        "tokens_per_s": answered * tokens / lasted_s,
        "errors": dict(Counter(request.code for request in load.requests if request.code)),
    }


def run(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """As the gateway and the blocking client do, on uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def tell(what: str, run: dict[str, Any]) -> None:
    """Progress, for whoever watches."""
    print(what, json.dumps(run), file=sys.stderr, flush=True)


def main() -> int:
    """Start the testnet, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--answers", type=int, default=60, help="Good ones per window.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--factors", type=lambda text: [float(f) for f in text.split(",")],
                        default=[2.0, 4.0])  # fmt: skip
    parser.add_argument("--slo-factor", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--qos", default="interactive")
    parser.add_argument("--workers", type=lambda text: [int(f) for f in text.split(",")],
                        default=[1, 2, 4, 8, 16, 32])  # fmt: skip
    parser.add_argument("--parts", type=lambda text: text.split(","),
                        default=["overload", "refusals", "fairness"])  # fmt: skip
    parser.add_argument("--streams", type=lambda text: [int(f) for f in text.split(",")],
                        default=[8, 1], help="Of the two clients.")  # fmt: skip
    parser.add_argument("--second", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.second:
        run(be_second(options.second, options))
        return 0
    shape = ("--stages", str(options.stages), "--replicas", str(options.replicas))
    with running_testnet(options.model, *shape, "--dtype", options.dtype) as net:
        give_account(net)
        report = run(measure(net.directory, options))
    names = ("model", "dtype", "stages", "replicas", "tokens", "qos", "slo_factor", "seed")
    shown = {name: getattr(options, name) for name in names}
    print(json.dumps({"benchmark": "overload", "cores": os.cpu_count(), **shown, **report}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
