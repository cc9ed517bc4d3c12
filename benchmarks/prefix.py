"""Prefix reuse: time to first token of a second request with the same prefix, and disk.

    python benchmarks/prefix.py [--model smollm2-135m] [--dtypes int4 fp32] [--rounds 5]

For each dtype it starts a testnet of three stages, one compute thread each. A round asks
twice with one fresh prefix of --tokens random ids and two short endings. Then one process
publishes a prefix to be kept, parks it on disk, gives its memory to another session, and
takes it back (the page cache of the system is warm, as it is for what was written lately).
Prints one JSON object. Compare figures within one run only: machines are noisy.
"""

import argparse
import json
import random
import statistics
import sys
import time
from typing import Any

from plait.client import Client, Options
from plait.testing.testnets import running_testnet

ENDING_TOKENS = 8
VOCABULARY = 250
"""Ids of every model's vocabulary."""


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


def random_ids(count: int) -> list[int]:
    """A text that nobody has asked about."""
    chance = random.SystemRandom()
    return [chance.randrange(3, VOCABULARY) for _ in range(count)]


def first_tokens(client: Client, model: str, rounds: int, tokens: int) -> dict[str, Any]:
    """Time to first token, in each round of a first and a second request."""
    options = Options(max_tokens=4, raw=True, drafts=False)
    firsts, seconds, cached = [], [], []
    for number in range(rounds):
        prefix = random_ids(tokens)
        first = client.generate(model, prefix + random_ids(ENDING_TOKENS), options)
        second = client.generate(model, prefix + random_ids(ENDING_TOKENS), options)
        if first.cached_tokens:
            raise SystemExit("a fresh prefix was cached")
        firsts.append(first.ttft_s)
        seconds.append(second.ttft_s)
        cached.append(second.cached_tokens)
        say(f"round {number}: {first.ttft_s:.3f} s, then {second.ttft_s:.3f} s")
    return {
        "prefix_tokens": tokens,
        "cached_tokens": cached,
        "ttft_first_s": [round(value, 4) for value in firsts],
        "ttft_second_s": [round(value, 4) for value in seconds],
        "ratio_median": round(
            statistics.median(b / a for a, b in zip(firsts, seconds, strict=True)), 4
        ),
    }


def testnet(model: str, dtype: str, rounds: int, tokens: int) -> dict[str, Any]:
    """The same on a testnet of three stages."""
    with (
        running_testnet(model, "--stages", "3", "--dtype", dtype) as net,
        Client(net.network, account=net.account) as client,
    ):
        client.generate(model, random_ids(64), Options(max_tokens=8, raw=True))
        return first_tokens(client, model, rounds, tokens)


def resumed_ms(model: str, dtype: str, layers: str, rounds: int, tokens: int) -> list[float]:
    """Milliseconds to take a prefix back from disk, on a stage of these layers."""
    from plait.compute.load import load_stage
    from plait.compute.pages import prefix_hashes
    from plait.compute.port import Work
    from plait.model import catalog
    from plait.types import Sampling, SessionId, Span

    room = -(-tokens // 16) * 16 + 16
    stage = load_stage(catalog.load(model), Span.parse(layers), dtype, kv_tokens_max=room)
    one, two = SessionId(b"1" * 16), SessionId(b"2" * 16)
    found = []
    for _ in range(rounds):
        ids = tuple(random_ids(tokens))
        names = prefix_hashes(ids)
        stage.reserve(one, room, Sampling())
        for start in range(0, tokens, 256):
            part = ids[start : start + 256]
            (done,) = stage.step([Work(one, start, part, None)])
            if done.error is not None:
                raise done.error
        stage.publish_prefix(one, "tenant", names, keep_ms=600_000)
        stage.free(one)
        stage.park_prefixes()
        stage.reserve(two, room, Sampling())  # takes all the memory
        stage.free(two)
        if stage.prefixes.cached_tokens:
            raise SystemExit("the prefix is still in memory")
        began_s = time.perf_counter()
        stage.reserve(one, room, Sampling())
        cached = stage.adopt_prefix(one, "tenant", names)
        stage._kv.make_writable(stage._kv._known(one), cached, cached + 1)
        found.append((time.perf_counter() - began_s) * 1000)
        if cached != len(names) * 16:
            raise SystemExit(f"only {cached} tokens came back")
        stage.free(one)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtypes", nargs="+", default=["int4", "fp32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--layers", nargs="+", default=["0:10", "0:30"])
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"model": arguments.model, "rounds": arguments.rounds}
    for dtype in arguments.dtypes:
        say(f"three stages in {dtype}")
        figures[dtype] = testnet(arguments.model, dtype, arguments.rounds, arguments.tokens)
    figures["resume_from_disk_ms"] = {}
    for layers in arguments.layers:
        say(f"layers {layers} from disk")
        times = resumed_ms(
            arguments.model, arguments.dtypes[0], layers, arguments.rounds, arguments.tokens
        )
        figures["resume_from_disk_ms"][layers] = [round(value, 2) for value in times]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
