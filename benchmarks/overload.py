"""What is left of a network's peak when twice and four times as much is asked of it.

    python benchmarks/overload.py [--model smollm2-135m] [--dtype fp32] [--stages 2]
                                  [--replicas 1] [--tokens 16] [--seconds 10] [--rounds 2]
                                  [--slo-factor 5] [--factors 2,4] [--answers 60]
                                  [--qos interactive] [--workers 1,2,4,8,16,32]

An answer counts if it is complete within the SLO: ``slo-factor`` times what it takes alone,
measured in the same run. First the peak: closed loops of 1, 2, 4, … workers until it falls.
Then, round after round, the best of them again (the peak to compare with) and open loops whose
arrivals do not wait for answers, at each factor of that peak. Goodput at a factor is compared
with the mean of the peaks measured just before and after. Windows are as long as the peak takes for
``answers`` good answers, ``seconds`` at least.

The client library is the load; it makes no attempt of its own after an error, and its share of the
processor, which the network has to do without, is in each row. A refusal is timed three times: by
the load from a request's arrival (its own queue included), by a second client in a process of its
own that asks a few times a second (in a run that counts for nothing else), and for each ``Open``
that a stage refused, from the call to its answer. Last, the fairness of it: a client with one
stream beside one with eight, tokens of each. Prints one JSON object.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.client import AsyncClient, Options
from plait.errors import PlaitError
from plait.heap import freeze_heap
from plait.identity import load_or_create_key
from plait.testing.testnets import Testnet, running_testnet
from plait.testnet.load import PROMPTS
from plait.v1 import stage_pb2_grpc

WARM_UP_S = 2.0
"""Of each run: not counted."""
WINDOW_S_MAX = 120.0
DRAIN_S = 60.0
PROBE_PERIOD_S = 0.2
FAIR_STREAMS = 8
SECOND = "second"
CREDIT = 10_000_000_000
REFUSED_REST_S = 0.1
"""Of a worker of a closed loop that was refused."""


@dataclass(slots=True)
class Request:
    """One request: ``code`` is the error's, empty if it was answered."""

    started_s: float
    ended_s: float = 0.0
    code: str = ""
    reason: str = ""

    @property
    def took_s(self) -> float:
        """From its arrival to its end."""
        return self.ended_s - self.started_s


@dataclass(slots=True)
class Load:
    """Requests of one run, the Opens they cost, and how busy the generator itself was."""

    requests: list[Request] = field(default_factory=list)
    opens_s: list[float] = field(default_factory=list)
    refused_opens_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    cpu_share: float = 0.0


def give_account(net: Testnet) -> None:
    """Make the second client's keys, and give it credit."""
    (net.directory / SECOND).mkdir(mode=0o700)
    peer = load_or_create_key(net.directory / SECOND / "identity.key").peer_id
    net.plait("ledger", "issue", peer, str(CREDIT), "--network", str(net.network))


def quantile(values: list[float], share: float) -> float | None:
    """In milliseconds; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000, 1)


class Timed:
    """Times every ``Open`` that the client library makes; ``into`` is where they are noted."""

    def __init__(self) -> None:
        self.into = Load()
        plain: Callable[[Any], Any] = stage_pb2_grpc.StageServiceStub

        def stub(channel: Any) -> Any:
            made = plain(channel)
            inner = made.Open

            async def timed_open(request: Any, timeout: float) -> Any:
                load, started_s = self.into, time.monotonic()
                response = await inner(request, timeout=timeout)
                took_s = time.monotonic() - started_s
                load.opens_s.append(took_s)
                if response.HasField("refusal"):
                    load.refused_opens_s.append(took_s)
                return response

            made.Open = timed_open
            return made

        stage_pb2_grpc.StageServiceStub = stub  # type: ignore[assignment,misc]


class Bench:
    """The runs on one testnet."""

    def __init__(self, client: AsyncClient, options: argparse.Namespace) -> None:
        self.client = client
        self.options = options
        self.timed = Timed()
        self.draw = random.Random(options.seed)
        self.slo_s = 0.0
        self.number = 0

    async def ask(self, load: Load) -> Request:
        """One request from arrival to end."""
        self.number += 1
        request = Request(time.monotonic())
        asked = Options(
            max_tokens=self.options.tokens,
            seed=self.number,
            temperature=0.8,
            qos=self.options.qos,
        )
        prompt = PROMPTS[self.number % len(PROMPTS)]
        try:
            async with asyncio.timeout(DRAIN_S):
                await self.client.generate(self.options.model, prompt, asked)
        except TimeoutError:
            request.code = "timeout"
        except PlaitError as error:
            request.code, request.reason = error.code, str(error)
        request.ended_s = time.monotonic()
        load.requests.append(request)
        return request

    async def alone(self) -> float:
        """The median time of an answer when nothing else runs; warms everything up first."""
        warming, load = Load(), Load()
        for _ in range(4):
            await self.ask(warming)
        for _ in range(6):
            await self.ask(load)
        failed = [request.reason for request in load.requests if request.code]
        if failed:
            raise SystemExit(f"not even one at a time: {failed[0]}")
        return statistics.median(request.took_s for request in load.requests)

    async def closed(self, workers: int) -> dict[str, Any]:
        """``workers`` who each ask again as soon as they are answered."""

        async def work(load: Load, until_s: float) -> None:
            while time.monotonic() < until_s:
                if (await self.ask(load)).code:
                    await asyncio.sleep(REFUSED_REST_S)

        async def loop(load: Load, until_s: float) -> None:
            await asyncio.gather(*(work(load, until_s) for _ in range(workers)))

        return {"workers": workers, **await self.run(loop)}

    async def open(self, rate: float) -> dict[str, Any]:
        """Arrivals at a fixed rate, whatever comes of them, spaced as a Poisson process is."""

        async def loop(load: Load, until_s: float) -> None:
            due_s = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                while due_s < until_s:
                    await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                    load.late_s.append(time.monotonic() - due_s)
                    tasks.create_task(self.ask(load))
                    due_s += self.draw.expovariate(rate)

        return {"rate": round(rate, 2), **await self.run(loop)}

    async def run(self, loop: Callable[[Load, float], Awaitable[None]]) -> dict[str, Any]:
        """One run; what ends between the warm-up and its last second counts."""
        load = Load()
        self.timed.into = load
        cpu_s, started_s = time.process_time(), time.monotonic()
        from_s, until_s = started_s + WARM_UP_S, started_s + WARM_UP_S + self.options.seconds

        async def share() -> None:
            await asyncio.sleep(until_s - started_s)
            load.cpu_share = (time.process_time() - cpu_s) / (until_s - started_s)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(share())
            await loop(load, until_s)
        await asyncio.sleep(0.3)
        return self.figures(load, from_s, until_s)

    def figures(self, load: Load, from_s: float, until_s: float) -> dict[str, Any]:
        """What one run came to."""
        answered = [request for request in load.requests if not request.code]
        ended = [request for request in answered if from_s <= request.ended_s < until_s]
        good = [request for request in ended if request.took_s <= self.slo_s]
        refused = [request.took_s for request in load.requests if request.code == "capacity"]
        return {
            "goodput": round(len(good) / (until_s - from_s), 3),
            "throughput": round(len(ended) / (until_s - from_s), 3),
            "requests": len(load.requests),
            "answered": len(answered),
            "answered_within_slo": sum(request.took_s <= self.slo_s for request in answered),
            "answer_p50_ms": quantile([request.took_s for request in answered], 0.5),
            "answer_p99_ms": quantile([request.took_s for request in answered], 0.99),
            "errors": dict(Counter(request.code for request in load.requests if request.code)),
            "reasons": dict(Counter(_kind(request.reason) for request in load.requests)),
            "refused_p50_ms": quantile(refused, 0.5),
            "refused_p99_ms": quantile(refused, 0.99),
            "opens_per_request": round(len(load.opens_s) / max(1, len(load.requests)), 3),
            "open_refused_p50_ms": quantile(load.refused_opens_s, 0.5),
            "open_refused_p99_ms": quantile(load.refused_opens_s, 0.99),
            "generator_cpu_share": round(load.cpu_share, 3),
            "arrival_late_p99_ms": quantile(load.late_s, 0.99),
        }


def _kind(reason: str) -> str:
    """A reason without its numbers and names."""
    words = [word for word in reason.split() if not any(ch.isdigit() for ch in word)]
    return " ".join(words)[:120]


async def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The peak, then each round's peaks and overloads."""
    async with (
        AsyncClient(directory / "network.toml", account=directory / "client") as client,
        SecondClient(directory, options) as second,
    ):
        bench = Bench(client, options)
        await bench.ask(Load())  # loads what a client needs
        freeze_heap()  # as a gateway does
        alone_s = await bench.alone()
        bench.slo_s = alone_s * options.slo_factor
        search: list[dict[str, Any]] = []
        for workers in options.workers:
            search.append(await bench.closed(workers))
            tell("search", search[-1])
            best = max(search, key=lambda run: run["goodput"])
            if search[-1]["goodput"] < 0.7 * best["goodput"]:
                break
        needed_s = options.answers / max(best["goodput"], 0.01)
        options.seconds = round(min(max(options.seconds, needed_s), WINDOW_S_MAX), 1)
        peaks, overloads = [await bench.closed(best["workers"])], list[dict[str, Any]]()
        tell("peak", peaks[-1])
        for _ in range(options.rounds):
            for factor in options.factors:
                rate = factor * peaks[-1]["goodput"]
                overload = {"factor": factor, **await bench.open(rate)}
                peaks.append(await bench.closed(best["workers"]))
                around = statistics.mean([peaks[-2]["goodput"], peaks[-1]["goodput"]])
                overload["share_of_peak"] = round(overload["goodput"] / around, 3)
                overloads.append(overload)
                tell("overload", overload)
                tell("peak", peaks[-1])
        refusals = await probed(bench, second, max(options.factors) * peaks[-1]["goodput"])
        tell("refusals", refusals)
        fairness = await fair(bench, second)
        tell("fairness", fairness)
    return {
        "alone_s": round(alone_s, 3),
        "slo_s": round(bench.slo_s, 3),
        "shares": {
            str(factor): [run["share_of_peak"] for run in overloads if run["factor"] == factor]
            for factor in options.factors
        },
        "window_s": options.seconds,
        "good_answers_min": round(
            min(run["goodput"] for run in (*peaks, *overloads)) * options.seconds
        ),
        "refused_p99_ms": max((run["refused_p99_ms"] or 0.0 for run in overloads), default=None),
        "refusals": refusals,
        "fairness": fairness,
        "search": search,
        "peaks": peaks,
        "overloads": overloads,
    }


async def probed(bench: Bench, second: "SecondClient", rate: float) -> dict[str, Any]:
    """Refusals at this rate, at the load and at a second client that is not busy.

    A run of its own: what the second client is given is taken from the others.
    """
    run, asked = await asyncio.gather(bench.open(rate), second.probe(bench.options.seconds))
    names = ("rate", "refused_p50_ms", "refused_p99_ms", "open_refused_p50_ms")
    load = {name: run[name] for name in (*names, "open_refused_p99_ms", "arrival_late_p99_ms")}
    return {"load": load, "second_client": asked}


async def fair(bench: Bench, second: "SecondClient") -> dict[str, Any]:
    """Tokens per second of a client with many streams and of one with a single one beside it."""
    seconds = bench.options.seconds
    many, one = await asyncio.gather(bench.closed(FAIR_STREAMS), second.stream(seconds))
    tokens = bench.options.tokens
    return {
        "streams": [FAIR_STREAMS, 1],
        "tokens_per_s": [round(many["throughput"] * tokens, 2), round(one["tokens_per_s"], 2)],
        "refused": [many["errors"].get("capacity", 0), one["refused"]],
    }


class SecondClient:
    """Another client in a process of its own, which does what it is told on its standard input."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        # An identity of its own: to the stages it is somebody else.
        self._command = [sys.executable, __file__, "--second", str(directory)]
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
        return await self._tell(f"probe {seconds + WARM_UP_S}")

    async def stream(self, seconds: float) -> dict[str, Any]:
        """One answer after the other."""
        return await self._tell(f"stream {seconds + WARM_UP_S}")

    async def _tell(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        return await self._read()

    async def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return dict(json.loads(await self._process.stdout.readline()))


async def be_second(directory: Path, options: argparse.Namespace) -> None:
    """The second client's process."""
    async with AsyncClient(directory / "network.toml", account=directory / SECOND) as client:
        await client.wait_ready(options.model)
        freeze_heap()
        bench, tokens = Bench(client, options), options.tokens
        print("{}", flush=True)
        while words := (await asyncio.to_thread(sys.stdin.readline)).split():
            options.tokens = 1 if words[0] == "probe" else tokens
            rest_s = PROBE_PERIOD_S if words[0] == "probe" else 0.0
            load = bench.timed.into = Load()
            started_s = time.monotonic()
            while time.monotonic() < started_s + float(words[1]):
                failed = (await bench.ask(load)).code
                await asyncio.sleep(REFUSED_REST_S if failed else rest_s)
            print(json.dumps(_seconds(load, time.monotonic() - started_s, tokens)), flush=True)


def _seconds(load: Load, lasted_s: float, tokens: int) -> dict[str, Any]:
    refused = [request.took_s for request in load.requests if request.code == "capacity"]
    answered = sum(not request.code for request in load.requests)
    return {
        "requests": len(load.requests),
        "refused": len(refused),
        "refused_p50_ms": quantile(refused, 0.5),
        "refused_p99_ms": quantile(refused, 0.99),
        "open_refused_p50_ms": quantile(load.refused_opens_s, 0.5),
        "open_refused_p99_ms": quantile(load.refused_opens_s, 0.99),
        "opens_refused": len(load.refused_opens_s),
        "tokens_per_s": answered * tokens / lasted_s,
        "errors": dict(Counter(request.code for request in load.requests if request.code)),
    }


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
    parser.add_argument("--second", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.second:
        asyncio.run(be_second(options.second, options))
        return 0
    shape = ("--stages", str(options.stages), "--replicas", str(options.replicas))
    with running_testnet(options.model, *shape, "--dtype", options.dtype) as net:
        give_account(net)
        report = asyncio.run(measure(net.directory, options))
    names = ("model", "dtype", "stages", "replicas", "tokens", "qos", "slo_factor", "seed")
    shown = {name: getattr(options, name) for name in names}
    print(json.dumps({"benchmark": "overload", "cores": os.cpu_count(), **shown, **report}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
