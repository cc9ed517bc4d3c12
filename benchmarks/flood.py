"""A flood of sessions against a node whose memory is limited by a control group.

    python benchmarks/flood.py [--model smollm2-135m] [--dtype int4] [--sessions 96]

Starts a testnet of one stage and puts its process in a memory group (version 1, needs root)
that may grow by its KV cache and a fixed allowance, without swap. Then many sessions at once ask
for several times the KV cache and to have their prompts kept, while one client asks one
question again and again. Prints one JSON object; exit code 1: a limit was broken, the node died,
or the honest client was not answered; 77: memory groups cannot be made here.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from plait.client import AsyncClient, Options
from plait.client.account import open_account
from plait.errors import CapacityError, PlaitError
from plait.node.control import ask
from plait.testing.testnets import running_testnet

GROUPS = Path("/sys/fs/cgroup/memory")
CANNOT = 77
ALLOWANCE_MB = 192
"""For frames, retained rows, gRPC and torch's scratch memory."""
SAMPLE_S = 0.2
HONEST_MIN = 3
"""So many times at least the honest client asks."""
CREDIT = 10**12
QUESTION = "Name three rivers."


@contextlib.contextmanager
def limited(pid: int, limit_bytes: int) -> Iterator[Path]:
    """A memory group with one process; what it holds already is charged elsewhere."""
    group = GROUPS / f"plait-flood-{pid}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        with contextlib.suppress(OSError):
            (group / "memory.swappiness").write_text("0")
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        print(f"no memory group can be made: {error}", file=sys.stderr)
        sys.exit(CANNOT)
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):
            (GROUPS / "cgroup.procs").write_text(str(pid))
            group.rmdir()


async def flood(client: AsyncClient, model: str, tokens: int, outcomes: dict[str, int]) -> None:
    """One session with a long random prompt, that asks for room and to be kept."""
    chance = random.SystemRandom()
    ids = [chance.randrange(3, 250) for _ in range(tokens)]
    options = Options(max_tokens=tokens, raw=True, drafts=False, keep_alive_s=600)
    try:
        stream = client.stream(model, ids, options)
        async with contextlib.aclosing(stream):
            async for _ in stream:
                stream.finish()
        outcomes["answered"] += 1
    except CapacityError:
        outcomes["refused"] += 1
    except PlaitError as error:
        outcomes[error.code] = outcomes.get(error.code, 0) + 1


async def watch(node: Path, group: Path, pid: int, seen: dict[str, int]) -> None:
    """Note the most of everything until cancelled."""
    while True:
        status = await asyncio.to_thread(ask, node, "status")
        rss = next(
            int(line.split()[1]) * 1024
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("VmRSS")
        )
        sample = {
            "kv_tokens_used": status["kv_tokens_used"],
            "kv_tokens_total": status["kv_tokens_total"],
            "sessions": status["sessions"],
            "prefix_tokens_parked": status["prefix_tokens_parked"],
            "rss_bytes": rss,
            "group_bytes": int((group / "memory.max_usage_in_bytes").read_text()),
        }
        for name, value in sample.items():
            seen[name] = max(seen.get(name, 0), value)
        await asyncio.sleep(SAMPLE_S)


@contextlib.asynccontextmanager
async def clients(network: Path, folder: Path) -> AsyncIterator[tuple[AsyncClient, AsyncClient]]:
    """The honest one and the other, each with an account of its own."""
    async with (
        AsyncClient(network, account=folder / "client") as honest,
        AsyncClient(network, account=folder / "flooder") as other,
    ):
        yield honest, other


async def run(
    folder: Path, node: Path, group: Path, pid: int, asked: argparse.Namespace
) -> dict[str, Any]:
    """Flood, and ask between."""
    outcomes, seen, wrong, honest_answers = {"answered": 0, "refused": 0}, {}, 0, 0
    question = Options(max_tokens=8, qos="interactive", replica_wait_s=60.0)
    async with clients(folder / "network.toml", folder) as (honest, other):
        right = (await honest.generate(asked.model, QUESTION, question)).token_ids
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(watch(node, group, pid, seen))
            crowd = [
                tasks.create_task(flood(other, asked.model, asked.tokens, outcomes))
                for _ in range(asked.sessions)
            ]
            while honest_answers < HONEST_MIN or not all(task.done() for task in crowd):
                try:
                    answer = await honest.generate(asked.model, QUESTION, question)
                    honest_answers += 1
                    wrong += answer.token_ids != right
                except CapacityError:
                    await asyncio.sleep(SAMPLE_S)
            watching.cancel()
    return {"flood": outcomes, "most": seen, "honest_answers": honest_answers, "wrong": wrong}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="int4")
    parser.add_argument("--sessions", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=600)
    asked = parser.parse_args()
    with running_testnet(asked.model, "--stages", "1", "--dtype", asked.dtype) as net:
        [stage] = [one for one in net.nodes().values() if one["span"]]
        node, pid = net.directory / "nodes" / stage["name"], stage["pid"]
        limit = ask(node, "status")["kv_bytes_total"] + ALLOWANCE_MB * 2**20
        flooder = open_account(net.directory / "flooder").peer
        net.plait("ledger", "issue", flooder, str(CREDIT), "--network", str(net.network))
        with limited(pid, limit) as group:
            figures = asyncio.run(run(net.directory, node, group, pid, asked))
        alive = Path(f"/proc/{pid}").exists()
    most = figures["most"]
    figures["limit_bytes"] = limit
    figures["held"] = (
        alive
        and most["kv_tokens_used"] <= most["kv_tokens_total"]
        and most["group_bytes"] <= limit
        and figures["honest_answers"] > 0
        and not figures["wrong"]
    )
    print(json.dumps(figures))
    sys.exit(0 if figures["held"] else 1)


if __name__ == "__main__":
    main()
