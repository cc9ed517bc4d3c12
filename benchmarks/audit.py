"""Audits on a real model: how far off honest stages are, what exposes dishonest ones, and when.

    python benchmarks/audit.py PART [--model smollm2-135m] [--seconds 240] [--json FILE]

PART is honest (fp32, also with another number of threads and with the prefix computed in
one go), cheats (each kind of dishonest stage in the fp32 class), lower (bf16, int4, int8:
honest in batches, and what cheats look like), or tiny. Sessions run through three stages of
this process; each chunk of each stage is replayed alone by a host of the same layers. The
hashes and signatures around it are not part of this: the unit tests have those. Results are
put into FILE by part; with ``honest`` and ``tiny``, --seconds bounds the time.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plait.compute.load import load_stage
from plait.compute.port import Work
from plait.ledger.audit_rules import TOLERANCES, Finding, Step, judge
from plait.ledger.handoff import ids_payload
from plait.ledger.lottery import Lot, chunks_to_exposure, is_drawn
from plait.model import catalog
from plait.model.tokenizer import Tokenizer
from plait.node.replaying import distance, replay
from plait.testing.dishonest import CHEATS
from plait.testing.reference import equal_spans
from plait.types import MILLION, Digest, Sampling, SessionId

STAGES = 3
CHUNK_TOKENS = 32
TOKENS = 64
RATE_PERCENT = 2
LOTTERIES = 2_000
PROMPTS = (
    "Explain in a few sentences why the sky is blue and sunsets are red.",
    "Write a short story about a lighthouse keeper who finds a map in a bottle.",
    "List five reasons to learn a second language, one sentence each.",
    "def quicksort(items):\n    # Sort a list of numbers and return a new list.\n",
    "Summarise the causes of the First World War for a school pupil.",
    "Translate into French: the train leaves at seven and arrives before noon.",
    "What is the difference between a virus and a bacterium? Answer in detail.",
    "Give me a recipe for bread with only four ingredients and explain each step.",
)


@dataclass
class Session:
    """One generation: its ids, and per stage the frames that crossed it."""

    id: SessionId
    prompt: tuple[int, ...]
    sampling: Sampling
    drawn: list[int] = field(default_factory=list)
    steps: list[list[Step]] = field(default_factory=lambda: [[] for _ in range(STAGES)])

    def next(self) -> tuple[int, tuple[int, ...]]:
        """The position and the ids to feed next."""
        if not self.drawn:
            return 0, self.prompt
        return len(self.prompt) + len(self.drawn) - 1, (self.drawn[-1],)

    def chunk_of(self, step: Step) -> int:
        """The prompt is chunk 0."""
        after = step.first_position - len(self.prompt)
        return 0 if after < 0 else 1 + after // CHUNK_TOKENS


class Pipeline:
    """Stages of this process; sessions go through them together, as in a node's batches."""

    def __init__(self, stages: Sequence[Any]) -> None:
        self.stages = stages

    def run(self, sessions: Sequence[Session], tokens: int) -> None:
        """Draw ``tokens`` ids in each session."""
        for stage in self.stages:
            for one in sessions:
                stage.reserve(one.id, len(one.prompt) + tokens, one.sampling, stage.span)
        while len(sessions[0].drawn) < tokens:
            self._traverse(sessions)
        for stage in self.stages:
            for one in sessions:
                stage.free(one.id)

    def _traverse(self, sessions: Sequence[Session]) -> None:
        fed = [one.next() for one in sessions]
        works = [
            Work(one.id, position, ids, None, sample=True)
            for one, (position, ids) in zip(sessions, fed, strict=True)
        ]
        for index, stage in enumerate(self.stages):
            done = stage.step(works)
            for number, (one, work, outcome) in enumerate(zip(sessions, works, done, strict=True)):
                if outcome.error is not None:
                    raise outcome.error
                received = payload_of(work)
                last = index == len(self.stages) - 1
                sent = ids_payload(outcome.drawn.ids) if last else outcome.hidden.tobytes()
                rows = 1 if last else work.rows
                one.steps[index].append(
                    Step(work.first_position, work.rows, received, last, 0, rows, sent)
                )
                if last:
                    one.drawn += outcome.drawn.ids
                else:
                    works[number] = Work(
                        one.id, work.first_position, None, outcome.hidden, sample=True
                    )


def payload_of(work: Work) -> bytes:
    """What a hand-off chain would hash."""
    if work.hidden is not None:
        return work.hidden.tobytes()
    return ids_payload(work.ids or ())


def audit(stage: Any, one: Session, index: int) -> dict[int, list[Finding]]:
    """Replay a stage's frames alone; the findings of each chunk."""
    session = SessionId(bytes(reversed(one.id)))
    findings = replay(stage, session, one.steps[index], stage.span, one.sampling)
    chunks: dict[int, list[Finding]] = {}
    for step, finding in zip(one.steps[index], findings, strict=True):
        chunks.setdefault(one.chunk_of(step), []).append(finding)
    return chunks


def audit_merged(stage: Any, one: Session, index: int) -> list[float]:
    """Distances if all frames are computed as one prompt: the quick replay."""
    hidden = None
    ids: tuple[int, ...] | None = None
    if index == 0:
        ids = tuple(int(i) for s in one.steps[0] for i in np.frombuffer(s.received, "<u4"))
    else:
        data = b"".join(step.received for step in one.steps[index])
        hidden = np.frombuffer(data, "<f4").reshape(-1, stage.width)
    rows = sum(step.rows for step in one.steps[index])
    session = SessionId(bytes(reversed(one.id)))
    stage.reserve(session, rows, one.sampling, stage.span)
    [done] = stage.step([Work(session, 0, ids, hidden)])
    stage.free(session)
    sent = b"".join(step.sent or b"" for step in one.steps[index])
    claimed = np.frombuffer(sent, "<f4").reshape(-1, stage.width)
    return [distance(a[None], b[None]) for a, b in zip(claimed, done.hidden, strict=True)]


def sessions_of(local: Any, count: int, seed: int) -> list[Session]:
    """Sessions on varied prompts, every other one sampled."""
    tokenizer, rng = Tokenizer.load(local), random.Random(seed)
    made = []
    for number in range(count):
        text = PROMPTS[(seed + number) % len(PROMPTS)] * rng.choice((1, 1, 2, 4))
        sampled = (seed + number) % 2
        sampling = Sampling(
            temperature_micros=MILLION * sampled, seed=rng.getrandbits(64), top_p_micros=950_000
        )
        made.append(Session(SessionId(rng.randbytes(16)), tuple(tokenizer.encode(text)), sampling))
    return made


def shown(values: Sequence[float]) -> dict[str, float]:
    """The distribution of distances or margins."""
    if not values:
        return {"count": 0}
    ordered = sorted(values)
    p50, p99 = (ordered[int(share * len(ordered))] for share in (0.5, 0.99))
    return {
        "count": len(values),
        "zero": sum(value == 0.0 for value in values),
        "p50": p50,
        "p99": p99,
        "max": ordered[-1],
    }


class Tally:
    """What audits of one kind found."""

    def __init__(self, dtype: str) -> None:
        self._tolerance = TOLERANCES[dtype]
        self.distances: list[float] = []
        self.margins: list[float] = []
        self.exposed: list[bool] = []

    def add(self, findings: Sequence[Finding], *, last: bool) -> None:
        """Count one audited chunk."""
        if last:
            self.margins += [one.margin for one in findings]
        else:
            self.distances += [one.distance for one in findings]
        self.exposed.append(judge(findings, self._tolerance) is not None)

    def figures(self) -> dict[str, Any]:
        """For the results."""
        return {
            "chunks": len(self.exposed),
            "exposed": sum(self.exposed),
            "distance": shown(self.distances),
            "margin_logits": shown(self.margins),
        }


def load(local: Any, dtype: str, threads: int = 1) -> list[Any]:
    """Three stages of a model."""
    spans = equal_spans(local.manifest.layers, STAGES)
    return [load_stage(local, span, dtype, threads) for span in spans]


def honest_part(
    local: Any, seconds: float, dtype: str, batch: int, seed: int = 1
) -> dict[str, Any]:
    """Honest sessions until the time is up."""
    stages = load(local, dtype)
    pipeline, tally = Pipeline(stages), Tally(dtype)
    ends = time.monotonic() + seconds
    merged: list[float] = []
    sessions = 0
    while time.monotonic() < ends:
        group = sessions_of(local, batch, seed + sessions)
        pipeline.run(group, TOKENS)
        for one in group:
            for index, stage in enumerate(stages):
                for findings in audit(stage, one, index).values():
                    tally.add(findings, last=index == STAGES - 1)
                if index < STAGES - 1:
                    merged += audit_merged(stage, one, index)
        sessions += len(group)
    return {"sessions": sessions, "batch": batch, **tally.figures(), "merged": shown(merged)}


def other_threads(local: Any, dtype: str) -> dict[str, Any]:
    """What the replay looks like in another class: two compute threads instead of one."""
    stages = load(local, dtype)
    [one] = sessions_of(local, 1, 3)
    Pipeline(stages).run([one], TOKENS)
    torch.set_num_threads(2)
    tally = Tally(dtype)
    for index, stage in enumerate(stages):
        for findings in audit(stage, one, index).values():
            tally.add(findings, last=index == STAGES - 1)
    torch.set_num_threads(1)
    return tally.figures()


def exposures(
    local: Any, honest: list[Any], dtype: str, cheat: str, index: int, count: int
) -> Tally:
    """Sessions with one dishonest stage; only its chunks are audited."""
    stages = list(honest)
    stages[index] = CHEATS[cheat](honest[index], local)
    tally = Tally(dtype)
    for number in range(count):
        sampled = 1 if cheat == "seed" else number
        group = sessions_of(local, 1, 2 * number + 1 if sampled == 1 else number)
        Pipeline(stages).run(group, TOKENS)
        for findings in audit(honest[index], group[0], index).values():
            tally.add(findings, last=index == STAGES - 1)
    return tally


def until_exposed(exposed: Sequence[bool]) -> dict[str, float]:
    """Chunks until a lottery at the rate draws one that exposes, over many lotteries."""
    if not any(exposed):
        return {}
    taken = []
    for number in range(LOTTERIES):
        seed = Digest(number.to_bytes(32, "big"))
        chunk = 0
        while not (
            exposed[chunk % len(exposed)] and is_drawn(seed, Lot(1, chunk, 0), RATE_PERCENT)
        ):
            chunk += 1
        taken.append(chunk + 1)
    ordered = sorted(taken)
    share = sum(exposed) / len(exposed)
    formula = chunks_to_exposure(RATE_PERCENT / 100, 1.0, share, 0.95)
    return {
        "share_of_chunks_exposing": round(share, 4),
        "chunks_mean": round(statistics.mean(taken), 1),
        "chunks_95": ordered[int(0.95 * LOTTERIES)],
        "formula_95": round(formula, 1),
        "tokens_95": ordered[int(0.95 * LOTTERIES)] * CHUNK_TOKENS,
        "formula_tokens_95": round(formula * CHUNK_TOKENS),
    }


PLACES = {
    "int8": (0, 1, 2),
    "skipped-layer": (0, 1, 2),
    "matrix": (0, 1, 2),
    "copied-output": (1,),
    "seed": (2,),
    "prompt": (0,),
    "sometimes": (1,),
}


def cheats_part(
    local: Any, dtype: str = "fp32", count: int = 4, cheats: Sequence[str] = ()
) -> dict[str, Any]:
    """Each cheat (or those named) at each stage where it can be."""
    honest = load(local, dtype)
    found = {}
    for cheat, places in PLACES.items():
        if cheats and cheat not in cheats:
            continue
        for index in places:
            if dtype != "fp32" and cheat not in ("copied-output", "seed", "prompt", "int8"):
                continue  # they need the modules of the fp32 class
            tally = exposures(local, honest, dtype, cheat, index, count)
            name = f"{cheat} at stage {index}"
            found[name] = {**tally.figures(), "lottery": until_exposed(tally.exposed)}
            print(name, json.dumps(found[name]), flush=True)
    return found


def lower_part(local: Any, seconds: float) -> dict[str, Any]:
    """Honest noise of each lower class in batches, and how cheats compare with it."""
    found: dict[str, Any] = {}
    for dtype in ("bf16", "int4", "int8"):
        found[dtype] = {
            "honest_alone": honest_part(local, seconds / 6, dtype, 1),
            "honest_batch_8": honest_part(local, seconds / 6, dtype, 8),
            "cheats": cheats_part(local, dtype, 2),
        }
        print(dtype, json.dumps(found[dtype]), flush=True)
    return found


def parts(arguments: argparse.Namespace, local: Any) -> Iterator[tuple[str, Any]]:
    """The results of what was asked for."""
    match arguments.part:
        case "honest":
            yield "honest_fp32", honest_part(local, arguments.seconds, "fp32", 4, arguments.seed)
            yield "other_threads_fp32", other_threads(local, "fp32")
        case "cheats":
            yield "cheats_fp32", cheats_part(local, "fp32", arguments.count, arguments.cheat)
        case "lower":
            yield "lower", lower_part(local, arguments.seconds)
        case "tiny":
            yield (
                "honest_tiny_fp32",
                honest_part(local, arguments.seconds, "fp32", 4, arguments.seed),
            )


def main() -> None:
    """Run one part and put its results into the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("honest", "cheats", "lower", "tiny"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=4, help="sessions of each cheat")
    parser.add_argument("--cheat", nargs="*", default=(), choices=tuple(PLACES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    local = catalog.load("tiny-random" if arguments.part == "tiny" else arguments.model)
    known = {}
    if arguments.json is not None and arguments.json.exists():
        known = json.loads(arguments.json.read_text())
    for name, figures in parts(arguments, local):
        print(name, json.dumps(figures), flush=True)
        earlier = known.get(name) if arguments.cheat else None
        known[name] = {**(earlier or {}), **figures}
    known["model"] = arguments.model
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
