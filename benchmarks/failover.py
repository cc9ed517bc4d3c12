"""Kill a node of the route in the middle of an answer, again and again, unattended.

    python benchmarks/failover.py [--model smollm2-135m] [--dtype fp32] [--runs 300]
                                  [--tokens 48] [--signal KILL|STOP] [--wan PROFILE] [--seed 1]
                                  [--minutes M] [--resume] [--no-reuse]

Two hosts for every layer, three stages, one client. In each run a random node of the route is
hit at a random token; the answer is compared token for token with the undisturbed one, and the
longest pause after the blow is the gap. The node is brought back and waited for before the next
run. A blow that changed nothing (the answer took another route, or was about to end) is repeated
and counted as missed. Each run is a line of the history file as soon as it ends, so that they can
be made in pieces: ``--minutes`` begins no run after so long, ``--resume`` goes on behind the runs
in the history and counts them. ``load`` is the machine's load average at the end of each run.

Prints one JSON object; exit code 1 if an answer failed or a token is wrong (outside fp32: was
changed after it was delivered; there the share of answers that agree is a figure, not a promise).
"""

import argparse
import asyncio
import json
import math
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from plait.client import Answer, AsyncClient, Options
from plait.errors import PlaitError
from plait.testing.testnets import running_testnet
from plait.testnet.chaos_report import distribution
from plait.testnet.control import await_node, request
from plait.testnet.load import PROMPTS
from plait.types import PeerId

STAGES, REPLICAS = 3, 2
ATTEMPTS_PER_RUN = 5
BACK_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Run:
    """One blow and what came of it."""

    prompt: int
    at_token: int
    node: str
    position: int
    hit: bool = False
    ok: bool = False
    epochs: int = 0
    wrong: int = 0
    gap_s: float | None = None
    failure: str = ""
    changed: int = 0
    """Tokens of the finished answer that are not the ones that were delivered."""
    agrees: bool = False
    """Whether the whole answer is the undisturbed one."""
    arrivals_s: list[float] = field(default_factory=list)
    load: float = 0.0


async def usable(client: AsyncClient, names: Mapping[PeerId, str]) -> None:
    """Wait until each of these nodes is offered, measured and idle."""
    deadline_s = time.monotonic() + BACK_TIMEOUT_S
    while True:
        view, me = client.view(), client.account.peer
        if all(
            peer in view.offers
            and view.offers[peer].state == "ready"
            and view.offers[peer].sessions_active == 0
            and (me, peer) in view.rtt_us
            for peer in names
        ):
            return
        if time.monotonic() > deadline_s:
            absent = [name for peer, name in names.items() if peer not in view.offers]
            raise SystemExit(f"not usable again after {BACK_TIMEOUT_S:g} s; absent: {absent}")
        await asyncio.sleep(0.05)


class Bench:
    """The runs on one testnet."""

    def __init__(self, directory: Path, client: AsyncClient, options: argparse.Namespace) -> None:
        self.directory = directory
        self.client = client
        self.options = options
        self.model: str = options.model
        self.draw = random.Random(options.seed)
        status = request(directory, "status")
        self.names = {node["peer"]: node["name"] for node in status["nodes"] if node["span"]}
        self.asked: list[tuple[str, Options]] = []
        self.wanted: list[Answer] = []

    async def prepare(self) -> None:
        """The undisturbed answers, greedy and drawn."""
        await usable(self.client, self.names)
        for number, prompt in enumerate(PROMPTS):
            temperature = 0.8 * (number % 2)
            asked = Options(
                max_tokens=self.options.tokens,
                seed=number,
                temperature=temperature,
                reuse=not self.options.no_reuse,
            )
            self.asked.append((prompt, asked))
            self.wanted.append(await self.client.generate(self.model, prompt, asked))

    async def run(self) -> Run:
        """One answer with one blow."""
        number = self.draw.randrange(len(self.asked))
        prompt, asked = self.asked[number]
        wanted = self.wanted[number]
        plan = self.client.plan(self.model, wanted.prompt_tokens, asked)
        planned = [stage.offer.peer for stage in plan.stages]
        position = self.draw.randrange(len(planned))
        at_token = self.draw.randrange(1, max(2, len(wanted.token_ids) - 2))
        run = Run(number, at_token, self.names[planned[position]], position)
        blow = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            striking = tasks.create_task(self.strike(run, blow))
            await self.listen(run, prompt, asked, wanted, blow)
            blow.set()  # an answer that ended early must not leave it waiting
            struck_s = await striking
        gaps = [
            later - earlier
            for earlier, later in zip(run.arrivals_s, run.arrivals_s[1:], strict=False)
            if later > struck_s
        ]
        run.gap_s = round(max(gaps), 4) if gaps and run.hit else None
        run.arrivals_s = [round(at_s - struck_s, 3) for at_s in run.arrivals_s]
        return run

    async def strike(self, run: Run, blow: asyncio.Event) -> float:
        await blow.wait()
        command = "kill" if self.options.signal == "KILL" else "hang"
        struck_s = time.monotonic()
        await asyncio.to_thread(request, self.directory, command, run.node)
        return struck_s

    async def listen(
        self,
        run: Run,
        prompt: str,
        asked: Options,
        wanted: Answer,
        blow: asyncio.Event,
    ) -> None:
        """Take the answer as a user would and judge it."""
        delivered: list[int] = []
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                async for item in self.client.stream(self.model, prompt, asked):
                    if isinstance(item, Answer):
                        run.changed = _differing(item.token_ids, delivered)
                        run.wrong = _differing(item.token_ids, wanted.token_ids)
                        run.ok, run.epochs = True, item.epochs
                        run.agrees = not run.wrong
                        run.hit = item.epochs > 1
                        continue
                    if not item.token_ids:
                        continue  # the end of a character that no token completed
                    run.arrivals_s.append(time.monotonic())
                    delivered += item.token_ids
                    run.wrong = _differing(delivered, wanted.token_ids[: len(delivered)])
                    if len(delivered) >= run.at_token:
                        blow.set()
        except (PlaitError, TimeoutError) as error:
            run.failure, run.hit = f"{type(error).__name__}: {error}", True

    async def bring_back(self, run: Run) -> None:
        """End the fault and wait until the node serves again."""
        command = "restart" if self.options.signal == "KILL" else "resume"
        answer = await asyncio.to_thread(request, self.directory, command, run.node)
        starts = next(node["starts"] for node in answer["nodes"] if node["name"] == run.node)
        await asyncio.to_thread(
            await_node, self.directory, run.node, ("ready",), starts=starts, timeout_s=60.0
        )
        await usable(self.client, self.names)


def _differing(got: Sequence[int], wanted: Sequence[int]) -> int:
    return sum(a != b for a, b in zip_longest(got, wanted))


def earlier_runs(options: argparse.Namespace) -> list[Run]:
    """The runs of earlier pieces, from the history."""
    if not options.history.exists():
        return []
    return [Run(**json.loads(line)) for line in options.history.read_text().splitlines()]


async def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All runs and their sums; each run is kept in the history file as it ends."""
    runs, until_s = earlier_runs(options), time.monotonic() + options.minutes * 60
    async with AsyncClient(directory / "network.toml", account=directory / "client") as client:
        bench = Bench(directory, client, options)
        await bench.prepare()
        bench.draw.seed(f"{options.seed} from run {len(runs)}")
        hits = sum(run.hit for run in runs)
        while (
            hits < options.runs
            and len(runs) < options.runs * ATTEMPTS_PER_RUN
            and time.monotonic() < until_s
        ):
            run = await bench.run()
            run.load = round(os.getloadavg()[0], 2)
            runs.append(run)
            with options.history.open("a") as history:
                history.write(json.dumps(asdict(run)) + "\n")
            hits += run.hit
            summary = f"gap {run.gap_s} s, epochs {run.epochs}" if run.ok else run.failure
            where = f"{run.node} (stage {run.position}) at token {run.at_token}"
            print(f"{len(runs):4} {where}: {summary if run.hit else 'missed'}", file=sys.stderr)
            await bench.bring_back(run)
    hit = [run for run in runs if run.hit]
    return {
        "benchmark": "failover",
        "model": options.model,
        "dtype": options.dtype,
        "signal": options.signal,
        "wan": options.wan,
        "seed": options.seed,
        "runs": len(hit),
        "missed": len(runs) - len(hit),
        "ok": sum(run.ok for run in hit),
        "failed": sum(not run.ok for run in hit),
        "tokens_changed": sum(run.changed for run in runs),
        "tokens_wrong": sum(run.wrong for run in runs),
        "agree_share": round(sum(run.agrees for run in hit) / max(1, len(hit)), 4),
        "gap_s": distribution([run.gap_s for run in hit if run.ok and run.gap_s is not None]),
        "load": distribution([run.load for run in runs]),
        "history": options.history.name,
    }


def main() -> int:
    """Start the testnet, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--signal", choices=("KILL", "STOP"), default="KILL")
    parser.add_argument("--wan")
    parser.add_argument("--no-reuse", action="store_true", help="No prompts kept by stages.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--history", type=Path, help="JSON lines; default in benchmarks/results.")
    options = parser.parse_args()
    if options.history is None:
        name = f"failover_{options.signal.lower()}_{options.model}_{options.dtype}.jsonl"
        options.history = Path(__file__).parent / "results" / name
    if not options.resume:
        options.history.unlink(missing_ok=True)
    shape = ("--stages", str(STAGES), "--replicas", str(REPLICAS), "--dtype", options.dtype)
    wan = ("--wan", options.wan) if options.wan else ()
    with running_testnet(options.model, *shape, *wan) as net:
        report = asyncio.run(measure(net.directory, options))
    print(json.dumps(report))
    # Only in fp32 is what follows a reroute the same text; what was delivered never changes.
    wrong = report["tokens_wrong" if options.dtype == "fp32" else "tokens_changed"]
    return 1 if report["failed"] or wrong or not report["ok"] else 0


if __name__ == "__main__":
    sys.exit(main())
