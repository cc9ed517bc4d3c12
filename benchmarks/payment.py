"""What accounting costs of the time per token, with no switch that turns it off.

    python benchmarks/payment.py [--model smollm2-135m] [--dtype int4] [--rounds 5] [--tokens 128]

Starts a testnet of three stages and, in turn, asks it for an answer (no drafts: every token is
a frame, the dearest case) and plays the frames of that very answer, as its bundle names them,
through the books of the client and of each stage, with payloads as large as the answer's and
keys of its own. Every call that the programs make for accounting is timed, on one thread:

  client       hash of what is sent and drawn, receipts checked, voucher signed
  stages       counts, voucher checked, hand-off hashes, receipts and draw statements signed
  tape         frames kept for audits, in files (a part of the stages' time)
  carriage     receipts, statements and vouchers put in messages and taken out at each hop

All of it lies on a token's path: a receipt or a statement rides the result, a voucher the next
frame. So ``path_us_per_token`` is the sum, and ``share`` is that over the time per token of the
answer beside it. What is not on the path, and not in the sum: the reservation (before the first
token), settlement, log, witnesses and audits (after the last).

``warm`` plays the frames one after another; ``cold`` walks over ``--evict-mb`` of memory before
each process's turn, as if the model's weights had taken its caches. ``client_in_answer_us`` is
the client's part as it was timed inside the real answers, to judge the two by. Prints one JSON
object; compare figures within one run only. Where the machine is busy, the processor's time
(``cpu_us_per_token``) says what the work is, the clock's what it was made to wait as well.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns, thread_time_ns
from typing import Any, TypeVar

from plait.client import Client, Options
from plait.compute.wire_formats import wire_bytes
from plait.ledger.bundle import BundleParts, Frame, read_bundle
from plait.ledger.client_books import ClientBooks
from plait.ledger.handoff import ids_payload
from plait.ledger.progress import Progress
from plait.ledger.stage_books import StageBooks
from plait.node.spill import SpillFiles
from plait.node.tape import EpochTape, Tape
from plait.testing.accounting import NOW_MS, key_of
from plait.testing.testnets import running_testnet
from plait.types import Microcredits
from plait.v1.bundle_pb2 import ModelManifest
from plait.v1.identity_pb2 import SignedEnvelope

PROMPTS = (
    "Explain in a few sentences why the sky is blue and sunsets are red.",
    "Write a short story about a lighthouse keeper and a lost boat.",
    "How does a bicycle stay upright? Explain it to a child.",
)
TAPE_BYTES_MAX = 1 << 30
Result = TypeVar("Result")


class Stopwatch:
    """Nanoseconds by part: of the clock, and of the processor."""

    def __init__(self) -> None:
        self.ns: Counter[str] = Counter()
        self.cpu_ns: Counter[str] = Counter()
        self.on = True

    def time(self, part: str, call: Callable[..., Result], *given: Any, **named: Any) -> Result:
        """Make a call and add its time to a part."""
        start, cpu = perf_counter_ns(), thread_time_ns()
        try:
            return call(*given, **named)
        finally:
            if self.on:
                self.cpu_ns[part] += thread_time_ns() - cpu
                self.ns[part] += perf_counter_ns() - start


class TimedTape:
    """A tape whose time is known apart."""

    def __init__(self, tape: EpochTape, watch: Stopwatch) -> None:
        self._tape = tape
        self._watch = watch

    def received(self, *given: Any) -> None:
        """Keep what came."""
        self._watch.time("tape", self._tape.received, *given)

    def sent(self, *given: Any) -> None:
        """Keep what went out."""
        self._watch.time("tape", self._tape.sent, *given)

    def drew_from(self, *given: Any) -> None:
        """Keep what was drawn from."""
        self._watch.time("tape", self._tape.drew_from, *given)


class Replay:
    """The accounting of one answer, played again."""

    def __init__(self, parts: BundleParts, tape: Tape, number: int, evict: bytearray) -> None:
        epoch = parts.epochs[0]
        self.frames = epoch.frames
        self.sequence = (*parts.prompt_ids, *parts.token_ids)
        stages = tuple(
            replace(stage, ledger_key=key_of(f"stage {index}").public)
            for index, stage in enumerate(epoch.terms.stages)
        )
        client_key = key_of("client")
        self.terms = replace(epoch.terms, stages=stages, client_ledger_key=client_key.public)
        self.watch = Stopwatch()
        self.client = ClientBooks(self.terms, client_key)
        self.stages = []
        self.progress = [Progress(self.terms, self.frames[0][1]) for _ in stages]
        for index, _ in enumerate(stages):
            session = number.to_bytes(8, "big") + index.to_bytes(8, "big")
            kept = tape.begin(session, 1, "client", b"c" * 32)  # type: ignore[arg-type]
            assert kept is not None
            key, cap = key_of(f"stage {index}"), Microcredits(10**15)
            self.stages.append(StageBooks(self.terms, index, key, cap, TimedTape(kept, self.watch)))
        manifest = ModelManifest.FromString(parts.manifest or b"")
        self.width = manifest.hidden_size
        self.voucher: SignedEnvelope | None = None
        self.tokens = 0
        self._evict = evict

    def play(self) -> float:
        """Play all frames; returns microseconds per decoded token."""
        for frame, after in zip(self.frames, (*self.frames[1:], None), strict=True):
            self.watch.on = frame[1] >= self.terms.prompt_tokens
            drawn = self._drawn(frame, after)
            self.tokens += len(drawn) if self.watch.on else 0
            self._traverse(frame, drawn)
        return sum(self.watch.ns.values()) / 1000 / self.tokens

    def _drawn(self, frame: Frame, after: Frame | None) -> tuple[int, ...]:
        if not frame[4]:
            return ()
        first = max(frame[1] + 1, self.terms.prompt_tokens)
        return self.sequence[first : after[1] + 1 if after else len(self.sequence)]

    def _traverse(self, frame: Frame, drawn: tuple[int, ...]) -> None:
        traversal, position, rows, drafts, _, closes, _ = frame
        time, ids = self.watch.time, self.sequence[position : position + rows]
        self._cool()
        time("client", self.client.sent, traversal, position, ids, drafts=len(drafts))
        payload, receipts, statement = ids_payload(ids), [], None
        voucher, self.voucher = self.voucher, None
        for index, books in enumerate(self.stages):
            self._cool()
            if voucher is not None:
                voucher = time("carriage", carried, voucher)
                time("stages", books.accept_voucher, voucher)
            payload = self._stage(index, frame, payload, drawn)
            if closes:
                receipts.append(self._close(index, traversal))
            receipts = [time("carriage", carried, receipt) for receipt in receipts]
        if drawn:
            statement = time("stages", self.stages[-1].draw_statement, traversal)
            statement = time("carriage", carried, statement)
        self._cool()
        time("client", self.client.drawn, traversal, position, drawn, statement)
        if closes:
            self.voucher = time("client", self.client.accept_receipts, receipts, traversal, NOW_MS)

    def _stage(self, index: int, frame: Frame, payload: bytes, drawn: tuple[int, ...]) -> bytes:
        traversal, position, rows, drafts, sample, closes, _ = frame
        time, books = self.watch.time, self.stages[index]
        counts = time(
            "stages",
            self.progress[index].take,
            position,
            rows,
            drafts=len(drafts),
            sample=sample,
            close_chunk=closes,
        )
        self.counts = counts.counts
        time("stages", books.admit, counts)
        time("stages", books.received, traversal, position, rows, payload)
        if index < len(self.stages) - 1:
            size = wire_bytes(rows, self.width, self.terms.wire_dtype) if rows else 0
            payload = (b"\x5a" + traversal.to_bytes(7, "big")) * (size // 8 + 1)
            payload = payload[:size]
            time("stages", books.sent, traversal, position, rows, payload)
            return payload
        state, out = bytes(4 * self.width * rows + 8 * len(drawn)), ids_payload(drawn)
        time("stages", books.sent, traversal, position, len(drawn), out, state)
        return out

    def _close(self, index: int, traversal: int) -> SignedEnvelope:
        books = self.stages[index]
        return self.watch.time("stages", books.close_chunk, traversal, self.counts, NOW_MS)

    def _cool(self) -> None:
        """Read every line of a buffer that is larger than the caches."""
        self._evict.count(1)


def carried(envelope: SignedEnvelope) -> SignedEnvelope:
    """An envelope as it leaves one process and enters the next."""
    return SignedEnvelope.FromString(envelope.SerializeToString())


@contextmanager
def client_timed(watch: Stopwatch) -> Iterator[None]:
    """Time the client's books inside a real answer, this benchmark's process being the client."""

    def timed(name: str) -> Callable[..., Any]:
        call = getattr(ClientBooks, name)
        return lambda *given, **named: watch.time("client", call, *given, **named)

    plain = {name: getattr(ClientBooks, name) for name in ("sent", "drawn", "accept_receipts")}
    for name in plain:
        setattr(ClientBooks, name, timed(name))
    try:
        yield
    finally:
        for name, call in plain.items():
            setattr(ClientBooks, name, call)


def measure(client: Client, arguments: argparse.Namespace, tape: Tape) -> list[dict[str, Any]]:
    """One row a round: an answer, then its accounting warm and cold."""
    rows, evict = [], bytearray(arguments.evict_mb << 20)
    options = Options(max_tokens=arguments.tokens, drafts=False, bundle=True)
    for number in range(arguments.rounds):
        inside = Stopwatch()
        with client_timed(inside):
            answer = client.generate(arguments.model, PROMPTS[number % len(PROMPTS)], options)
        assert answer.bundle is not None
        parts = read_bundle(answer.bundle).parts
        if len(parts.epochs) > 1:
            print(f"round {number + 1}: rerouted, left out", file=sys.stderr)
            continue
        warm = Replay(parts, tape, 2 * number, bytearray())
        cold = Replay(parts, tape, 2 * number + 1, evict)
        tpot_us = answer.tpot_s * 1e6
        row = {
            "tokens": len(answer.token_ids),
            "tpot_us": tpot_us,
            "warm_us": warm.play(),
            "cold_us": cold.play(),
            "client_in_answer_us": inside.ns["client"] / 1000 / len(answer.token_ids),
            "parts": {
                name: {p: ns / 1000 / one.tokens for p, ns in one.watch.ns.items()}
                for name, one in (("warm", warm), ("cold", cold))
            },
            "cpu": {
                name: {p: ns / 1000 / one.tokens for p, ns in one.watch.cpu_ns.items()}
                for name, one in (("warm", warm), ("cold", cold))
            },
            "wire": parts.terms.wire_dtype,
        }
        rows.append(row)
        print(f"round {number + 1}: {row}", file=sys.stderr)
    return rows


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds."""

    def median(value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(value, rows))

    out: dict[str, Any] = {
        "benchmark": "payment",
        "model": arguments.model,
        "dtype": arguments.dtype,
        "wire": rows[0]["wire"],
        "stages": 3,
        "rounds": len(rows),
        "tokens": [row["tokens"] for row in rows],
        "tpot_ms": round(median(lambda row: row["tpot_us"]) / 1000, 3),
        "client_in_answer_us": round(median(lambda row: row["client_in_answer_us"]), 1),
    }
    for name in ("warm", "cold"):
        # The tape's time is inside the stages' calls: it is shown apart, and counted once.
        path = {
            part: round(median(lambda row: row["parts"][name][part]), 1)  # noqa: B023
            for part in ("client", "stages", "carriage", "tape")
        }
        total = median(lambda row: row[f"{name}_us"] - row["parts"][name]["tape"])  # noqa: B023
        share = median(
            lambda row: (row[f"{name}_us"] - row["parts"][name]["tape"]) / row["tpot_us"]  # noqa: B023
        )
        cpu = {
            part: round(median(lambda row: row["cpu"][name][part]), 1)  # noqa: B023
            for part in path
        }
        out[name] = {
            "us_per_token": path,
            "cpu_us_per_token": cpu,
            "path_us_per_token": round(total, 1),
            "share_of_tpot": round(share, 5),
        }
    out["tpot_without_ms"] = round(out["tpot_ms"] - out["cold"]["path_us_per_token"] / 1000, 3)
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="int4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--evict-mb", type=int, default=64)
    arguments = parser.parse_args()
    shape = ("--stages", "3", "--replicas", "1", "--dtype", arguments.dtype)
    with (
        tempfile.TemporaryDirectory() as scratch,
        closing(SpillFiles(Path(scratch))) as files,
        running_testnet(arguments.model, *shape) as net,
        Client(net.network) as client,
    ):
        tape = Tape(files, bytes_max=TAPE_BYTES_MAX, window_ms=0)
        client.generate(arguments.model, PROMPTS[0], Options(max_tokens=4))
        rows = measure(client, arguments, tape)
    print(json.dumps(report(rows, arguments)))


if __name__ == "__main__":
    main()
