"""Audits on a real model: how far off honest stages are, what exposes dishonest ones, and when.

    python benchmarks/audit.py PART [--model smollm2-135m] [--seconds 240] [--json FILE]

PART is honest (honest stages of --dtype, with --wire between them, until --target chunks are
audited), cheats (each kind of dishonest stage in the fp32 class), threads (an auditor with
another number of threads), orders (int4: an auditor whose kernel adds up in another order, as one
for other instructions does), or lower (bf16, int4, int8: honest in batches, and what cheats look
like).
Sessions run through three stages of this process, --batch of them together; each chunk of
each stage is then replayed frame by frame by a host of the same layers, --replay-batch
sessions together, and all frames of a session once more as one prompt. The hashes and
signatures around it are not part of this: the unit tests have those. Results are put into
FILE by part. ``honest`` saves after each round and goes on from there when it is called
again; it also ends after --seconds, ``cheats`` saves after each. Progress is on stderr.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plait.compute.device import accelerators, resolve
from plait.compute.device_memory import memory_of
from plait.compute.load import load_stage
from plait.compute.port import Hidden, Work
from plait.compute.wire_formats import decode, encode, rounded, wire_bytes
from plait.ledger.audit_rules import TOLERANCES, Finding, Step, judge, tolerance_of
from plait.ledger.handoff import ids_payload
from plait.ledger.lottery import Lot, chunks_to_exposure, is_drawn
from plait.model import catalog
from plait.model.tokenizer import Tokenizer
from plait.node.replaying import distance, replay, replay_steps
from plait.node.wire import state_of
from plait.testing.dishonest import CHEATS
from plait.testing.reference import equal_spans
from plait.types import MILLION, Digest, Sampling, SessionId, WireDtype

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
    """Stages of this process; sessions go through them together, as in a node's batches.

    Between stages rows are what ``wire`` makes of them.
    """

    def __init__(self, stages: Sequence[Any], wire: WireDtype = "fp32") -> None:
        self.stages = stages
        self._wire = wire

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
        received = [ids_payload(ids) for _, ids in fed]
        for index, stage in enumerate(self.stages):
            done = stage.step(works)
            for number, (one, work, outcome) in enumerate(zip(sessions, works, done, strict=True)):
                if outcome.error is not None:
                    raise outcome.error
                last = index == len(self.stages) - 1
                sent = (
                    ids_payload(outcome.drawn.ids) if last else encode(outcome.hidden, self._wire)
                )
                state = state_of(outcome) if last else b""
                rows = 1 if last else work.rows
                one.steps[index].append(
                    Step(
                        work.first_position, work.rows, received[number], last, 0, rows, sent, state
                    )
                )
                if last:
                    one.drawn += outcome.drawn.ids
                else:
                    arrived = decode(sent, work.rows, stage.width, self._wire)
                    works[number] = Work(one.id, work.first_position, None, arrived, sample=True)
                    received[number] = sent


def audit(stage: Any, one: Session, index: int) -> dict[int, list[Finding]]:
    """Replay a stage's frames alone; the findings of each chunk."""
    session = SessionId(bytes(reversed(one.id)))
    findings = replay(stage, session, one.steps[index], stage.span, one.sampling)
    return by_chunk(one, index, findings)


def audit_together(
    stage: Any, sessions: Sequence[Session], index: int, wire: WireDtype
) -> list[dict[int, list[Finding]]]:
    """The same of several sessions, whose frames are computed in one batch."""
    replays, works = [], []
    for one in reversed(sessions):  # another order than when they were generated
        session = SessionId(bytes(reversed(one.id)))
        tokens = max(step.first_position + step.rows for step in one.steps[index])
        stage.reserve(session, tokens, one.sampling, stage.span)
        steps = replay_steps(
            session,
            one.steps[index],
            first_stage=index == 0,
            last_stage=index == STAGES - 1,
            width=stage.width,
            wire_dtype=wire,
        )
        replays.append((one, session, steps))
        works.append(next(steps))
    found = {}
    while works:
        waiting, works = zip(works, stage.step(works), strict=True), []
        for work, done in waiting:
            one, _, steps = next(item for item in replays if item[1] == work.session)
            try:
                works.append(steps.send(done))
            except StopIteration as end:
                found[one.id] = end.value
                stage.free(work.session)
    return [by_chunk(one, index, found[one.id]) for one in sessions]


def by_chunk(one: Session, index: int, findings: Sequence[Finding]) -> dict[int, list[Finding]]:
    """Findings put to their chunks."""
    chunks: dict[int, list[Finding]] = {}
    for step, finding in zip(one.steps[index], findings, strict=True):
        chunks.setdefault(one.chunk_of(step), []).append(finding)
    return chunks


def audit_merged(stage: Any, one: Session, index: int, wire: WireDtype) -> list[float]:
    """Distances if all frames are computed as one prompt: the quick replay."""
    hidden = None
    ids: tuple[int, ...] | None = None
    if index == 0:
        ids = tuple(int(i) for s in one.steps[0] for i in np.frombuffer(s.received, "<u4"))
    else:
        hidden = rows_of([(s.received, s.rows) for s in one.steps[index]], stage.width, wire)
    rows = sum(step.rows for step in one.steps[index])
    session = SessionId(bytes(reversed(one.id)))
    stage.reserve(session, rows, one.sampling, stage.span)
    [done] = stage.step([Work(session, 0, ids, hidden)])
    stage.free(session)
    output: WireDtype = "fp32" if index == STAGES - 1 else wire  # a last stage commits to states
    sent = [
        ((s.state or s.sent or b"")[: wire_bytes(s.rows, stage.width, output)], s.rows)
        for s in one.steps[index]
    ]
    claimed, again = rows_of(sent, stage.width, output), rounded(done.hidden, output)
    return [distance(a[None], b[None]) for a, b in zip(claimed, again, strict=True)]


def rows_of(payloads: Sequence[tuple[bytes, int]], width: int, wire: WireDtype) -> Hidden:
    """The activations of several payloads, each of so many rows."""
    return np.concatenate([decode(data, rows, width, wire) for data, rows in payloads])


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

    def __init__(self, numeric_class: str, wire: WireDtype = "fp32") -> None:
        self._class = numeric_class
        self._wire = wire
        self.distances: list[float] = []
        self.margins: list[float] = []
        self.exposed: list[bool] = []

    def add(self, findings: Sequence[Finding], *, last: bool) -> None:
        """Count one audited chunk."""
        self.distances += [one.distance for one in findings]
        if last:
            self.margins += [one.margin for one in findings]
        tolerance = tolerance_of(self._class, "fp32" if last else self._wire)
        self.exposed.append(judge(findings, tolerance) is not None)

    def figures(self) -> dict[str, Any]:
        """For the results."""
        return {
            "chunks": len(self.exposed),
            "exposed": sum(self.exposed),
            "distance": shown(self.distances),
            "margin_logits": shown(self.margins),
        }


def load(local: Any, dtype: str, threads: int = 1, device: str = "cpu") -> list[Any]:
    """Three stages of a model."""
    spans = equal_spans(local.manifest.layers, STAGES)
    where = resolve(device, accelerators())
    return [load_stage(local, one, dtype, threads, memory=memory_of(where)) for one in spans]


def honest_part(
    local: Any, arguments: argparse.Namespace, known: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Honest sessions until enough chunks are audited or the time is up; totals each round.

    ``known`` are the totals of earlier calls: it goes on with other sessions.
    """
    stages = load(local, arguments.dtype, device=arguments.device)
    wire: WireDtype = arguments.wire
    pipeline = Pipeline(stages, wire)
    total = known or {"sessions": 0, "chunks": 0, "exposed": 0}
    ends = time.monotonic() + arguments.seconds
    while total["chunks"] < arguments.target and time.monotonic() < ends:
        tally, merged = Tally(stages[0].numeric_class(), wire), []
        group = sessions_of(local, arguments.batch, arguments.seed + total["sessions"])
        pipeline.run(group, TOKENS)
        for index, stage in enumerate(stages):
            for start in range(0, len(group), arguments.replay_batch):
                some = group[start : start + arguments.replay_batch]
                for chunks in audit_together(stage, some, index, wire):
                    for findings in chunks.values():
                        tally.add(findings, last=index == STAGES - 1)
            merged += [value for one in group for value in audit_merged(stage, one, index, wire)]
        total = added(total, len(group), tally, merged)
        yield total


def added(
    total: dict[str, Any], sessions: int, tally: Tally, merged: Sequence[float]
) -> dict[str, Any]:
    """Totals with one more round. Of distances and margins the largest is kept."""
    found = dict(total)
    found["sessions"] += sessions
    found["chunks"] += len(tally.exposed)
    found["exposed"] += sum(tally.exposed)
    for name, values in (
        ("distance", tally.distances),
        ("margin_logits", tally.margins),
        ("as_one_prompt_distance", merged),
    ):
        found[f"{name}_max"] = max([found.get(f"{name}_max", 0.0), *values])
        found[f"{name}_zero"] = found.get(f"{name}_zero", 0) + sum(one == 0.0 for one in values)
        found[f"{name}_count"] = found.get(f"{name}_count", 0) + len(values)
    # With none exposed of n, the rate is below 3/n with 95 % confidence (the rule of three).
    found["false_positive_rate_95_below"] = None if found["exposed"] else 3.0 / found["chunks"]
    return found


def honest_rounds(local: Any, dtype: str, batch: int, seconds: float) -> dict[str, Any]:
    """An honest part with other settings, from nothing."""
    settings = argparse.Namespace(
        dtype=dtype,
        seconds=seconds,
        target=10**9,
        batch=batch,
        replay_batch=1,
        seed=1,
        wire="fp32",
        device="cpu",
    )
    return list(honest_part(local, settings, {}))[-1]


def other_threads(local: Any, dtype: str) -> dict[str, Any]:
    """What the replay looks like in another class: two compute threads instead of one."""
    stages = load(local, dtype)
    [one] = sessions_of(local, 1, 3)
    Pipeline(stages).run([one], TOKENS)
    torch.set_num_threads(2)
    tally = Tally(stages[0].numeric_class())
    for index, stage in enumerate(stages):
        for findings in audit(stage, one, index).values():
            tally.add(findings, last=index == STAGES - 1)
    torch.set_num_threads(1)
    return tally.figures()


def other_order(local: Any, count: int, kernel: str) -> dict[str, Any]:
    """int4 by a kernel, replayed by sums in another order.

    It stands for an auditor whose processor has other instructions: the sums differ by 1e-6, and
    where that changes how an activation is rounded to 8 bits, by more. onnxruntime's is replayed
    by its own kernel for single rows, so that only decoding differs, ggml's by onnxruntime's.
    """
    honest, auditing = load(local, f"int4/{kernel}"), load(local, "int4/mlas")
    if kernel == "mlas":
        for stage in auditing:
            for layer in stage._model._layers:
                layer.projection._fewest_rows = layer.end._fewest_rows = 1
    tally = Tally(honest[0].numeric_class())
    for seed in range(count):
        [one] = sessions_of(local, 1, seed)
        Pipeline(honest).run([one], TOKENS)
        for index, stage in enumerate(auditing):
            for findings in audit(stage, one, index).values():
                tally.add(findings, last=index == STAGES - 1)
        print(f"session {seed + 1}/{count}", tally.figures(), file=sys.stderr, flush=True)
    return tally.figures()


def exposures(
    local: Any, honest: list[Any], dtype: str, cheat: str, index: int, count: int
) -> Tally:
    """Sessions with one dishonest stage; only its chunks are audited."""
    stages = list(honest)
    stages[index] = CHEATS[cheat](honest[index], local)
    tally = Tally(honest[0].numeric_class())
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
    "head": (2,),
    "copied-output": (1,),
    "seed": (2,),
    "prompt": (0,),
    "sometimes": (1,),
}


def cheats_part(
    local: Any,
    dtype: str = "fp32",
    count: int = 4,
    cheats: Sequence[str] = (),
    stages: Sequence[int] = (),
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each cheat (or those named) at each stage where it can be (or those named)."""
    honest = load(local, dtype)
    for cheat, places in PLACES.items():
        if cheats and cheat not in cheats:
            continue
        for index in places:
            if stages and index not in stages:
                continue
            if dtype != "fp32" and cheat not in ("copied-output", "seed", "prompt", "int8"):
                continue  # they need the modules of the fp32 class
            tally = exposures(local, honest, dtype, cheat, index, count)
            figures = {**tally.figures(), "lottery": until_exposed(tally.exposed)}
            yield f"{cheat} at stage {index}", figures


def lower_part(local: Any, seconds: float) -> dict[str, Any]:
    """Honest noise of each lower class in batches, and how cheats compare with it."""
    found: dict[str, Any] = {}
    for dtype in ("bf16", "int4", "int8"):
        found[dtype] = {
            "honest_alone": honest_rounds(local, dtype, 1, seconds / 6),
            "honest_batch_8": honest_rounds(local, dtype, 8, seconds / 6),
            "cheats": dict(cheats_part(local, dtype, 2)),
        }
        print(dtype, json.dumps(found[dtype]), file=sys.stderr, flush=True)
    return found


def parts(
    arguments: argparse.Namespace, local: Any, known: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """The results of what was asked for; of ``honest`` the totals after each round."""
    match arguments.part:
        case "honest":
            name = (
                f"honest {arguments.model} {arguments.dtype}, "
                f"{arguments.batch} together, replayed {arguments.replay_batch} together"
            )
            if arguments.device != "cpu":
                name += f", on {arguments.device}"
            if arguments.wire != "fp32":
                name += f", {arguments.wire} between stages"
            for total in honest_part(local, arguments, known.get(name, {})):
                yield name, total
        case "threads":
            yield "other_threads_fp32", other_threads(local, "fp32")
        case "orders":
            yield "other_order_int4", other_order(local, arguments.count, "mlas")
            yield "other_order_int4_ggml", other_order(local, arguments.count, "ggml")
        case "cheats":
            found = dict(known.get("cheats_fp32", {}))
            some = cheats_part(local, "fp32", arguments.count, arguments.cheat, arguments.stage)
            for name, figures in some:
                found[name] = figures
                yield "cheats_fp32", dict(found)
        case "lower":
            yield "lower", lower_part(local, arguments.seconds)


def main() -> None:
    """Run one part and put its results into the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("honest", "cheats", "threads", "orders", "lower"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="fp32", choices=tuple(TOLERANCES))
    parser.add_argument("--device", default="cpu", help="for honest: cuda, mps")
    parser.add_argument("--wire", default="fp32", choices=("fp32", "bf16", "int8"))
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--target", type=int, default=2_000, help="chunks, with honest")
    parser.add_argument("--batch", type=int, default=4, help="sessions generated together")
    parser.add_argument("--replay-batch", type=int, default=1, help="and replayed together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=4, help="sessions of each cheat, or order")
    parser.add_argument("--cheat", nargs="*", default=(), choices=tuple(PLACES))
    parser.add_argument("--stage", nargs="*", type=int, default=(), help="cheats at these only")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    local = catalog.load(arguments.model)
    known: dict[str, Any] = {}
    if arguments.json is not None and arguments.json.exists():
        known = json.loads(arguments.json.read_text())
    found: dict[str, Any] = {}
    for name, figures in parts(arguments, local, known):
        found = {name: figures}
        known |= found
        print(name, json.dumps(figures), file=sys.stderr, flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
