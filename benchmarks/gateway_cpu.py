"""CPU time of the gateway's process, per token and per request; one JSON object on stdout.

    python benchmarks/gateway_cpu.py [--streams 50] [--rounds 5] [--against SRC]

The engine gives a token every 20 ms on each stream, so that tokens come one by one as they do
from a network, and its own cost (the arm "direct") is part of every figure. Each measurement
is a process of its own: answers of two lengths are timed, their difference is the cost per
token, and what is left the cost per request. CPU time, not lag: it says little less on a
busy machine. ``--against`` measures another source tree (its ``src``) in the same rounds.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHORT, LONG = 20, 120
INTERVAL_S = 0.02
HERE = Path(__file__).resolve()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="a source tree to compare with")
    parser.add_argument("--arm", choices=("direct", "gateway"), help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help="with --arm: print a profile")
    options = parser.parse_args()
    if options.arm:
        arm(options)
        return
    ours = HERE.parents[1] / "src"
    arms = {"direct": ("direct", ours), "gateway": ("gateway", ours)}
    if options.against:
        arms["against"] = ("gateway", options.against.resolve())
    found = {name: [] for name in arms}
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        for name, (which, source) in arms.items():
            found[name].append(measure(which, source, options.streams))
    figures = {name: _medians(rows) for name, rows in found.items()}
    shape = {"streams": options.streams, "rounds": options.rounds, "load": os.getloadavg()[0]}
    print(json.dumps({"benchmark": "gateway_cpu"} | shape | {"cpu_us": figures}))


def measure(which: str, source: Path, streams: int) -> dict:
    """One process of one arm."""
    command = [sys.executable, str(HERE), "--arm", which, "--streams", str(streams)]
    environment = os.environ | {"PYTHONPATH": str(source)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout)


def _medians(rows: list[dict]) -> dict:
    return {
        name: {
            "median": round(statistics.median(row[name] for row in rows), 1),
            "min": round(min(row[name] for row in rows), 1),
        }
        for name in rows[0]
    }


def arm(options: argparse.Namespace) -> None:
    """Time one arm in this process and print microseconds."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        run = direct if options.arm == "direct" else gateway
        short, long = runner.run(run(options))
    per_token = (long - short) / (LONG - SHORT) / options.streams
    per_request = short / options.streams - per_token * SHORT
    print(json.dumps({"per_token": per_token * 1e6, "per_request": per_request * 1e6}))


def _upstream():
    from plait.testing.upstream import FakeUpstream

    return FakeUpstream(pieces=("The", " sky", " is"), endless=True, interval_s=INTERVAL_S)


async def direct(options: argparse.Namespace) -> tuple[float, float]:
    """CPU seconds of the engine alone, for both lengths."""
    from plait.client import Options
    from plait.gateway.port import Ask
    from plait.types import Sampling

    upstream = _upstream()

    async def one(tokens: int) -> None:
        limits = Options(max_tokens=tokens)
        ask = Ask(model="tiny-random", prompt_ids=(1,), sampling=Sampling(), options=limits)
        async for _ in upstream.stream(ask):
            pass

    async def load(tokens: int) -> float:
        started_s = time.process_time()
        await asyncio.gather(*(_after(k, options, one, tokens) for k in range(options.streams)))
        return time.process_time() - started_s

    await load(1)
    return await load(SHORT), await load(LONG)


async def _after(number, options, one, *arguments) -> None:
    # No two streams in step, and no burst of starts.
    await asyncio.sleep(number / options.streams * SHORT * INTERVAL_S)
    await one(*arguments)


async def gateway(options: argparse.Namespace) -> tuple[float, float]:
    """The same through HTTP, asked by another process, whose time is not counted."""
    import uvicorn

    from plait.gateway.app import Gateway
    from plait.gateway.config import GatewayConfig
    from plait.gateway.server import listen, server_config

    app = Gateway(_upstream(), "benchmark", GatewayConfig()).app()
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(server_config(app))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    async with asyncio.TaskGroup() as group:
        group.create_task(server.serve(sockets=[listener]))

        async def load(tokens: int) -> float:
            started_s = time.process_time()
            context = multiprocessing.get_context("spawn")
            child = context.Process(target=_ask_all, args=(url, options.streams, tokens))
            child.start()
            while child.exitcode is None:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.1)
            if child.exitcode:
                raise SystemExit("the load process failed")
            return time.process_time() - started_s

        await load(1)
        short = await load(SHORT)
        with _profiled() if options.profile else contextlib.nullcontext():
            long = await load(LONG)
        server.should_exit = True
    return short, long


def _ask_all(url: str, streams: int, tokens: int) -> None:
    from plait.gateway.benchmark import MODEL, connected

    async def one(number: int) -> None:
        await asyncio.sleep(number / streams * SHORT * INTERVAL_S)
        async with connected(url) as ask:
            await ask(MODEL, tokens)

    async def load() -> None:
        await asyncio.gather(*(one(number) for number in range(streams)))

    asyncio.run(load())


@contextlib.contextmanager
def _profiled():
    import cProfile
    import pstats

    profile = cProfile.Profile()
    with profile:
        yield
    pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
