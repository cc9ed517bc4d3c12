"""Dishonest stages of a real model on a live testnet, in the fp32 class: who is exposed, when.

    python benchmarks/audit_live.py [--model NAME] [--cheat NAME …] [--answers 2] [--tokens 64]

For each cheat a testnet of six nodes (three spans, two hosts each) is started with one liar
among the hosts of the middle span, or of the first or last for a cheat that only that one can
try. Answers that pass through the liar are generated, every chunk of every stage is audited by
the other hosts (network file with an audit rate of 100 %), and the tokens after which 95 % of
2,000 simulated lotteries at 2 % have exposed the liar are given beside the formula. Exit code 1
if an honest stage is exposed or a liar never. Progress is on stderr, one JSON object on stdout.
"""

import argparse
import asyncio
import functools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from audit import until_exposed

from plait.client.auditing import Audited
from plait.client.client import AsyncClient, Options
from plait.model import catalog
from plait.network_file import NetworkFile
from plait.testing.dishonest import CHEATS
from plait.testnet import cluster, control, launch
from plait.testnet.layout import place
from plait.types import PeerId, Span

STAGES = 3
LAST_STAGE_ONLY = ("head", "seed")
FIRST_STAGE_ONLY = ("prompt",)
PROMPT = "Explain in a few sentences why the sky is blue and sunsets are red."
ATTEMPTS = 4


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def stage_of(cheat: str) -> int:
    """Which stage tries a cheat."""
    if cheat in LAST_STAGE_ONLY:
        return STAGES - 1
    return 0 if cheat in FIRST_STAGE_ONLY else 1


@contextmanager
def testnet(directory: Path, model: str, cheat: str, span: Span) -> Iterator[PeerId]:
    """A testnet with one liar while the context is open; its peer."""
    mark = directory.with_name(directory.name + "-liar")
    layers = catalog.load(model).manifest.layers
    supervisor = (sys.executable, "-P", "-m", "plait.testing.dishonest", cheat, str(span.start))
    audited = functools.partial(NetworkFile, audit_rate_percent=100)
    with patch.object(cluster, "NetworkFile", audited):
        process = launch.start(
            directory,
            place(layers, nodes=None, stages=STAGES, replicas=2),
            model=model,
            with_parent=True,
            command=(*supervisor, str(mark)),
        )
    try:
        launch.wait_until_ready(directory, process, timeout_s=launch.START_TIMEOUT_S, tell=say)
        launch.issue_credit(directory)
        launch.wait_until_routable(directory, model, timeout_s=launch.ROUTE_TIMEOUT_S)
        pid = int(mark.read_text())
        nodes = control.request(directory, "status")["nodes"]
        [liar] = [node["peer"] for node in nodes if node["pid"] == pid]
        yield PeerId(liar)
    finally:
        launch.abandon(directory, process)


async def audited_answers(
    network: Path, model: str, liar: PeerId, span: Span, answers: int, tokens: int
) -> list[Audited]:
    """Answers that passed the liar, each of their chunks audited."""
    found: list[Audited] = []
    temperature = 1.0  # so that a wrong seed shows, and answers differ
    async with AsyncClient(network, audits=False) as client:
        for number in range(answers):
            options = Options(
                max_tokens=tokens,
                bundle=True,
                pin=((span, liar),),
                temperature=temperature,
                seed=number + 1,
                raw=True,
            )
            for _ in range(ATTEMPTS):  # one that moved leaves no host that took no part
                answer = await client.generate(model, PROMPT, options)
                if answer.epochs == 1 and answer.bundle is not None:
                    break
            say(f"answer {number + 1}: {len(answer.token_ids)} tokens in {answer.epochs} epochs")
            if answer.bundle is not None:
                found += await client.audit(answer.bundle)
    return found


def judged(model: str, cheat: str, answers: int, tokens: int) -> dict[str, Any]:
    """What became of one cheat."""
    layers = catalog.load(model).manifest.layers
    placed = place(layers, nodes=None, stages=STAGES, replicas=2)
    span = sorted({item.span for item in placed}, key=lambda one: one.start)[stage_of(cheat)]
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="audit-live-") as scratch:
        directory = Path(scratch) / "net"
        with testnet(directory, model, cheat, span) as liar:
            work = audited_answers(directory / "network.toml", model, liar, span, answers, tokens)
            found = asyncio.run(work)
    looked = [one for one in found if one.auditor is not None]
    lies = [one.outcome == "exposed" for one in looked if one.peer == liar]
    honest = [one for one in looked if one.peer != liar]
    return {
        "stage": stage_of(cheat),
        "chunks_of_the_liar": len(lies),
        "exposed": sum(lies),
        "chunks_of_others": len(honest),
        "others_exposed": sum(one.outcome == "exposed" for one in honest),
        "unaudited": len(found) - len(looked),
        "lottery_at_2_percent": until_exposed(lies),
        "seconds": round(time.monotonic() - start_s, 1),
    }


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    default = ["skipped-layer", "int8", "matrix"]
    parser.add_argument("--cheat", nargs="*", default=default, choices=tuple(CHEATS))
    parser.add_argument("--answers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    cheats: dict[str, Any] = {}
    for cheat in arguments.cheat:
        say(f"cheat: {cheat}")
        cheats[cheat] = judged(arguments.model, cheat, arguments.answers, arguments.tokens)
        say(json.dumps(cheats[cheat]))
    print(json.dumps({"model": arguments.model, "class": "fp32", "cheats": cheats}))
    wrong = [one for one in cheats.values() if one["others_exposed"] or not one["exposed"]]
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
