"""Who leaves in the middle of an answer: a node that is told to end, a client that is killed.

    python benchmarks/leaving.py [--model smollm2-135m] [--rounds 5] [--tokens 96]

Three stages of two hosts each. In each round a node of the route gets SIGTERM while it serves an
answer: is the answer the undisturbed one, how long is the longest pause after the signal, when
does the node hold no session, when is its process gone? Then a client process in mid-answer gets
SIGKILL: when is nothing left of its session on any node? Nodes are asked through their control
sockets. An answer that took another route than the one planned a moment before, or had ended
before the client was killed, is counted as missed. Prints one JSON object; exit code 1 if an
answer failed or changed, or if no round of a kind was a hit.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from failover import ANSWER_TIMEOUT_S, REPLICAS, STAGES, usable

from plait.client import Answer, AsyncClient, Options
from plait.errors import ConfigError, NetworkError, PlaitError
from plait.node.control import ask
from plait.testing.testnets import running_testnet
from plait.testnet.chaos_report import distribution
from plait.testnet.control import await_node, request
from plait.testnet.folder import data_dir
from plait.testnet.load import PROMPTS
from plait.types import PeerId

AT_TOKEN = 5
POLL_S = 0.02
PATIENCE_S = 60.0
HELD = ("sessions", "kv_tokens_used", "frames_queued", "retained_bytes", "spill_files")
"""What a node holds of sessions; retained audit evidence and unsent settlements stay by design."""


@dataclass(slots=True)
class Drain:
    """A node told to end in mid-answer, and what came of it; times count from the signal."""

    node: str
    ok: bool = False
    wrong: int = 0
    epochs: int = 0
    pause_s: float | None = None
    empty_s: float | None = None
    gone_s: float | None = None
    failure: str = ""
    arrivals_s: list[float] = field(default_factory=list, repr=False)

    @property
    def hit(self) -> bool:
        """Whether the answer had to move, or failed."""
        return self.epochs > 1 or not self.ok


def node_names(directory: Path) -> dict[PeerId, str]:
    """Names of the nodes that host layers, by peer."""
    nodes = request(directory, "status")["nodes"]
    return {PeerId(node["peer"]): node["name"] for node in nodes if node["span"]}


class Bench:
    """The rounds on one testnet."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        self.directory = directory
        self.model: str = options.model
        self.tokens: int = options.tokens
        self.asked = Options(max_tokens=options.tokens, drafts=False)
        self.names = node_names(directory)

    async def drain(self, client: AsyncClient, wanted: Answer, stage: int) -> Drain:
        """SIGTERM to a stage of the route at a token; then start the node again."""
        plan = client.plan(self.model, wanted.prompt_tokens, self.asked)
        row = Drain(self.names[plan.stages[stage % len(plan.stages)].offer.peer])
        signalled = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            leaving = tasks.create_task(self.leave(row, signalled))
            await self.listen(client, row, wanted, signalled)
            signalled.set()  # an answer that ended early must not leave it waiting
            since_s = await leaving
        after_s = [at_s for at_s in row.arrivals_s if at_s > since_s]
        pauses = [b - a for a, b in zip([since_s, *after_s], after_s, strict=False)]
        row.pause_s = round(max(pauses), 4) if pauses else None
        row.arrivals_s = [round(at_s - since_s, 4) for at_s in row.arrivals_s]
        await self.bring_back(row.node)
        return row

    async def leave(self, row: Drain, signalled: asyncio.Event) -> float:
        """Send the signal when it is due and see the node go; returns when it was sent."""
        await signalled.wait()
        since_s = time.monotonic()
        await asyncio.to_thread(request, self.directory, "stop", row.node)
        row.empty_s = await asyncio.to_thread(self._freed, (row.node,), since_s)
        row.gone_s = await asyncio.to_thread(self._gone, row.node, since_s)
        return since_s

    async def listen(
        self, client: AsyncClient, row: Drain, wanted: Answer, signalled: asyncio.Event
    ) -> None:
        """Take the answer as a user would and judge it."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                async for item in client.stream(self.model, PROMPTS[0], self.asked):
                    if isinstance(item, Answer):
                        row.ok, row.epochs = True, item.epochs
                        row.wrong = int(item.token_ids != wanted.token_ids)
                        continue
                    row.arrivals_s.append(time.monotonic())
                    if len(row.arrivals_s) == AT_TOKEN:
                        signalled.set()
        except (PlaitError, TimeoutError) as error:
            row.failure = f"{type(error).__name__}: {error}"

    async def bring_back(self, name: str) -> None:
        """Start a node again and wait until it serves."""
        answer = await asyncio.to_thread(request, self.directory, "restart", name)
        starts = next(node["starts"] for node in answer["nodes"] if node["name"] == name)
        await asyncio.to_thread(
            await_node, self.directory, name, ("ready",), starts=starts, timeout_s=PATIENCE_S
        )

    def kill_client(self) -> float | None:
        """Seconds from a client's SIGKILL until no node holds anything of its session.

        None if nothing was held at the signal: the answer had ended.
        """
        command = [sys.executable, __file__, "--child", str(self.directory)]
        shape = ["--model", self.model, "--tokens", str(self.tokens)]
        with subprocess.Popen([*command, *shape], stdout=subprocess.PIPE) as asking:
            assert asking.stdout is not None
            asking.stdout.readline()  # it has its fifth token, or has ended
            asking.kill()
            since_s = time.monotonic()
        if not self._held(self.names.values()):
            return None
        return self._freed(self.names.values(), since_s)

    def _freed(self, names: Iterable[str], since_s: float) -> float:
        while self._held(names):
            if time.monotonic() > since_s + PATIENCE_S:
                raise SystemExit(f"{', '.join(names)} hold something after {PATIENCE_S:g} s")
            time.sleep(POLL_S)
        return round(time.monotonic() - since_s, 3)

    def _held(self, names: Iterable[str]) -> bool:
        return any(_holds(self.directory, name) for name in names)

    def _gone(self, name: str, since_s: float) -> float:
        """Seconds until a node's process has ended."""
        # A node that does not end by itself is killed by the testnet, so that this ends.
        while True:
            nodes = request(self.directory, "status")["nodes"]
            node = next(node for node in nodes if node["name"] == name)
            if node["state"] in ("stopped", "dead"):
                return round(time.monotonic() - since_s, 3)
            time.sleep(POLL_S)


def _holds(directory: Path, name: str) -> bool:
    try:
        status = ask(data_dir(directory, name), "status")
    except (ConfigError, NetworkError):
        return False  # it is gone, and all that it held
    return any(status[figure] for figure in HELD)


async def child(options: argparse.Namespace) -> None:
    """A client that says when it is in mid-answer."""
    directory = options.child
    asked = Options(max_tokens=options.tokens, drafts=False)
    count = 0
    async with AsyncClient(directory / "network.toml", account=directory / "client") as client:
        await client.wait_ready(options.model, PATIENCE_S)
        async for _ in client.stream(options.model, PROMPTS[0], asked):
            count += 1
            if count == AT_TOKEN:
                print("ready", flush=True)


async def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds and their sums."""
    bench = Bench(directory, options)
    drains, kills = list[Drain](), list[float | None]()
    async with AsyncClient(directory / "network.toml", account=directory / "client") as client:
        await usable(client, bench.names)
        wanted = await client.generate(options.model, PROMPTS[0], bench.asked)
        print("undisturbed:", len(wanted.token_ids), "tokens", file=sys.stderr, flush=True)
        for number in range(options.rounds):
            await usable(client, bench.names)
            drains.append(await bench.drain(client, wanted, number % STAGES))
            print("node told to end:", drains[-1], file=sys.stderr, flush=True)
            await usable(client, bench.names)
            kills.append(await asyncio.to_thread(bench.kill_client))
            print("client killed:", kills[-1], file=sys.stderr, flush=True)
    hits = [row for row in drains if row.hit]
    freed = [freed_s for freed_s in kills if freed_s is not None]
    return {
        "benchmark": "leaving",
        "model": options.model,
        "rounds": options.rounds,
        "drains": len(hits),
        "drains_missed": len(drains) - len(hits),
        "drains_failed": sum(not row.ok for row in drains),
        "answers_wrong": sum(row.wrong for row in drains),
        "pause_s": distribution([row.pause_s for row in hits if row.pause_s is not None]),
        "empty_s": distribution([row.empty_s for row in hits if row.empty_s is not None]),
        "gone_s": distribution([row.gone_s for row in hits if row.gone_s is not None]),
        "client_kills": len(freed),
        "client_kills_missed": len(kills) - len(freed),
        "freed_after_client_kill_s": distribution(freed),
        "history": [asdict(row) for row in drains],
        "kills_s": kills,
    }


def main() -> int:
    """Start the testnet, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        asyncio.run(child(options))
        return 0
    shape = ("--stages", str(STAGES), "--replicas", str(REPLICAS))
    with running_testnet(options.model, *shape) as net:
        report = asyncio.run(measure(net.directory, options))
    print(json.dumps(report))
    bad = report["drains_failed"] or report["answers_wrong"]
    return 1 if bad or not report["drains"] or not report["client_kills"] else 0


if __name__ == "__main__":
    sys.exit(main())
