"""A stage that is slow, and one that hangs as a prompt comes: what does the user notice?

    python benchmarks/slow_stage.py [--model smollm2-135m] [--rounds 3] [--tokens 96] [--factor 10]

Three stages of two hosts each. In each round a node of the route gets a ``1/factor`` share of a
core at a token (a CPU quota, or stopped most of the time where that is not allowed): after how many
tokens and seconds does the session move, what is the time per token before, while it is slow and
after, and is the answer the undisturbed one? Then the first stage of the route is stopped just
before a prompt is sent: when does the first token come, without and with a hedge? Prints one JSON
object; exit code 1 if an answer failed or changed, or if no session moved.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from failover import ANSWER_TIMEOUT_S, REPLICAS, STAGES, usable
from leaving import node_names

from plait.client import Answer, AsyncClient, Options
from plait.errors import PlaitError
from plait.task_scope import TaskScope
from plait.testing.testnets import running_testnet
from plait.testnet.chaos_plan import Fault
from plait.testnet.chaos_report import distribution
from plait.testnet.control import request
from plait.testnet.faults import Injector
from plait.testnet.load import PROMPTS

AT_TOKEN = 20
"""By then the client knows what is usual."""


@dataclass(slots=True)
class Slow:
    """An answer with a stage that became slow; times count from then on."""

    node: str
    how: str = ""
    ok: bool = False
    same: bool = False
    epochs: int = 0
    tokens_slow: int | None = None
    moved_s: float | None = None
    pause_s: float | None = None
    before_ms: float | None = None
    slow_ms: float | None = None
    after_ms: float | None = None
    failure: str = ""
    load: float = 0.0
    arrivals_s: list[float] = field(default_factory=list, repr=False)


@dataclass(slots=True)
class Hung:
    """A prompt whose first stage does not answer."""

    node: str
    hedged: bool
    ok: bool = False
    same: bool = False
    first_token_s: float | None = None
    failure: str = ""
    load: float = 0.0


def gaps_ms(arrivals_s: Sequence[float]) -> float | None:
    """The median pause between tokens; None for fewer than two."""
    gaps = [b - a for a, b in itertools.pairwise(arrivals_s)]
    return round(statistics.median(gaps) * 1000, 1) if gaps else None


class Bench:
    """The rounds on one testnet."""

    def __init__(self, directory: Path, client: AsyncClient, options: argparse.Namespace) -> None:
        self.directory = directory
        self.client = client
        self.model: str = options.model
        self.factor: float = options.factor
        self.asked = Options(max_tokens=options.tokens, drafts=False)
        self.names = node_names(directory)
        self.wanted: Answer

    async def prepare(self) -> None:
        """The undisturbed answer."""
        await usable(self.client, self.names)
        self.wanted = await self.client.generate(self.model, PROMPTS[0], self.asked)

    def planned(self, stage: int) -> str:
        """The node that will run a stage."""
        plan = self.client.plan(self.model, self.wanted.prompt_tokens, self.asked)
        return self.names[plan.stages[stage].offer.peer]

    async def slow(self, stage: int) -> Slow:
        """One answer, one stage of which becomes slow."""
        row, slowed_s = Slow(self.planned(stage)), 0.0
        async with TaskScope() as tasks:
            injector = Injector(self.directory, tasks)
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    async for item in self.client.stream(self.model, PROMPTS[0], self.asked):
                        if isinstance(item, Answer):
                            row.ok, row.epochs = True, item.epochs
                            row.same = item.token_ids == self.wanted.token_ids
                        elif item.token_ids:
                            row.arrivals_s.append(time.monotonic())
                            if len(row.arrivals_s) == AT_TOKEN:
                                fault = Fault(0.0, "slow", row.node, factor=self.factor)
                                row.how = await injector.apply(fault)
                                slowed_s = time.monotonic()
            except (PlaitError, TimeoutError) as error:
                row.failure = f"{type(error).__name__}: {error}"
            await injector.apply(Fault(0.0, "heal", row.node))
        self.judge(row, slowed_s)
        return row

    def judge(self, row: Slow, slowed_s: float) -> None:
        """Where the session moved: at the longest pause, if it did."""
        at_s = [round(arrival_s - slowed_s, 3) for arrival_s in row.arrivals_s]
        row.arrivals_s, row.load = at_s, round(os.getloadavg()[0], 2)
        row.before_ms = gaps_ms(at_s[:AT_TOKEN])
        later = range(AT_TOKEN, len(at_s))
        if row.epochs < 2 or not later:
            return
        moved = max(later, key=lambda index: at_s[index] - at_s[index - 1])
        row.tokens_slow = moved - AT_TOKEN
        row.moved_s, row.pause_s = at_s[moved], round(at_s[moved] - at_s[moved - 1], 3)
        row.slow_ms, row.after_ms = gaps_ms(at_s[AT_TOKEN:moved]), gaps_ms(at_s[moved:])

    async def hang(self, *, hedged: bool) -> Hung:
        """One prompt whose first stage has been stopped."""
        row = Hung(self.planned(0), hedged)
        asked = replace(self.asked, hedge_share=1.0) if hedged else self.asked
        await asyncio.to_thread(request, self.directory, "hang", row.node)
        since_s = time.monotonic()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                async for item in self.client.stream(self.model, PROMPTS[0], asked):
                    if isinstance(item, Answer):
                        row.ok, row.same = True, item.token_ids == self.wanted.token_ids
                    elif row.first_token_s is None:
                        row.first_token_s = round(time.monotonic() - since_s, 3)
        except (PlaitError, TimeoutError) as error:
            row.failure = f"{type(error).__name__}: {error}"
        await asyncio.to_thread(request, self.directory, "resume", row.node)
        row.load = round(os.getloadavg()[0], 2)
        return row


async def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds and their sums."""
    slow, hung = list[Slow](), list[Hung]()
    async with AsyncClient(directory / "network.toml", account=directory / "client") as client:
        bench = Bench(directory, client, options)
        await bench.prepare()
        for number in range(options.rounds):
            await usable(client, bench.names)
            slow.append(await bench.slow(number % STAGES))
            print(slow[-1], file=sys.stderr, flush=True)
            for hedged in (False, True):
                await usable(client, bench.names)
                hung.append(await bench.hang(hedged=hedged))
                print(hung[-1], file=sys.stderr, flush=True)
    moved = [row for row in slow if row.moved_s is not None]

    def of(name: str) -> dict[str, Any]:
        return distribution([getattr(row, name) for row in moved])

    def first(hedged: bool) -> dict[str, Any]:
        rows = [row for row in hung if row.hedged is hedged and row.first_token_s is not None]
        return distribution([row.first_token_s or 0.0 for row in rows])

    every: list[Slow | Hung] = [*slow, *hung]
    return {
        "benchmark": "slow_stage",
        "model": options.model,
        "factor": options.factor,
        "rounds": options.rounds,
        "tokens": options.tokens,
        "how": sorted({row.how for row in slow}),
        "answers": len(every),
        "failed": sum(not row.ok for row in every),
        "changed": sum(row.ok and not row.same for row in every),
        "moved": len(moved),
        "tokens_until_moved": of("tokens_slow"),
        "moved_after_s": of("moved_s"),
        "pause_s": of("pause_s"),
        "tpot_ms": {name: of(f"{name}_ms") for name in ("before", "slow", "after")},
        "hung_first_token_s": {"plain": first(False), "hedged": first(True)},
        "history": [asdict(row) for row in every],
    }


def main() -> int:
    """Start the testnet, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--factor", type=float, default=10.0)
    options = parser.parse_args()
    shape = ("--stages", str(STAGES), "--replicas", str(REPLICAS))
    with running_testnet(options.model, *shape) as net:
        report = asyncio.run(measure(net.directory, options))
    print(json.dumps(report))
    return 1 if report["failed"] or report["changed"] or not report["moved"] else 0


if __name__ == "__main__":
    sys.exit(main())
