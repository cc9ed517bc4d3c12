"""What accounting costs of the time per token, with no switch that turns it off.

    python benchmarks/payment.py [--model smollm2-135m] [--dtype int4] [--rounds 5] [--tokens 128]

Starts a testnet of three stages and, in turn, asks it for an answer (no drafts: every token is
a frame, the dearest case) and plays the frames of that very answer, as its bundle names them,
through the books of the client and of each stage, with payloads as large as the answer's and
keys of its own. Every call that the programs make for accounting is timed, on one thread:

  client       hash of what is sent and drawn, receipts checked, voucher signed
  stages       counts, voucher checked, hand-off hashes, receipts and draw statements signed
  carriage     receipts, statements and vouchers put in messages and taken out at each hop
  behind       what a stage hashes and keeps when the frame has left it already
  tape         frames kept for audits, in files (a part of the stages' time, and of behind)

The first three lie on a token's path: a receipt or a statement rides the result, a voucher the
next frame. So ``path_us_per_token`` is their sum, and ``share_of_tpot`` is that over the time per
token of the answer beside it; ``cpu_share_of_tpot`` is the processor's time of all, also behind.
What is not in the sums: the reservation (before the first token), settlement, log, witnesses and
audits (after the last).

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
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from secrets import token_bytes
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
from plait.types import Microcredits, SessionId
from plait.v1.bundle_pb2 import ModelManifest
from plait.v1.identity_pb2 import SignedEnvelope

PROMPTS = (
    "Explain in a few sentences why the sky is blue and sunsets are red.",
    "Write a short story about a lighthouse keeper and a lost boat.",
    "How does a bicycle stay upright? Explain it to a child.",
)
TAPE_BYTES_MAX = 1 << 30
CACHE_LINE_BYTES = 64
PATH = ("client", "stages", "carriage")
"""The parts that make up the path."""
PARTS = (*PATH, "behind")
"""All parts; the tape's time is within the stages' and behind, and taken apart."""
Clock = Callable[[], int]
Result = TypeVar("Result")


class Stopwatch:
    """Nanoseconds by part, less what reading the clock takes; the calls of other parts run untimed.

    Reading the processor's clock is a system call that takes longer than some of the calls.
    """

    def __init__(self, clock: Clock, parts: Collection[str]) -> None:
        self.ns: Counter[str] = Counter()
        self.on = True
        self._clock = clock
        self._parts = parts
        reads = sorted(-clock() + clock() for _ in range(1_000))
        self._read_ns = statistics.median(reads)

    def time(self, part: str, call: Callable[..., Result], *given: Any, **named: Any) -> Result:
        """Make a call and add its time to a part."""
        if not self.on or part not in self._parts:
            return call(*given, **named)
        start = self._clock()
        try:
            return call(*given, **named)
        finally:
            self.ns[part] += self._clock() - start - self._read_ns


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

    def __init__(self, parts: BundleParts, tape: Tape, evict: bytearray, watch: Stopwatch) -> None:
        epoch = parts.epochs[0]
        self.frames = epoch.frames
        self.sequence = (*parts.prompt_ids, *parts.token_ids)
        stages = tuple(
            replace(stage, ledger_key=key_of(f"stage {index}").public)
            for index, stage in enumerate(epoch.terms.stages)
        )
        client_key = key_of("client")
        self.terms = replace(epoch.terms, stages=stages, client_ledger_key=client_key.public)
        self.watch = watch
        self.client = ClientBooks(self.terms, client_key)
        self.stages = []
        self.progress = [Progress(self.terms, self.frames[0][1]) for _ in stages]
        for index, _ in enumerate(stages):
            kept = tape.begin(SessionId(token_bytes(16)), 1, "client", b"c" * 32)
            assert kept is not None
            key, cap = key_of(f"stage {index}"), Microcredits(10**15)
            self.stages.append(StageBooks(self.terms, index, key, cap, TimedTape(kept, self.watch)))
        manifest = ModelManifest.FromString(parts.manifest or b"")
        self.width = manifest.hidden_size
        self.voucher: SignedEnvelope | None = None
        self.tokens = 0
        self._evict = evict

    def play(self) -> dict[str, float]:
        """Play all frames; returns microseconds per decoded token by part."""
        for frame, after in zip(self.frames, (*self.frames[1:], None), strict=True):
            self.watch.on = frame[1] >= self.terms.prompt_tokens
            drawn = self._drawn(frame, after)
            self.tokens += len(drawn) if self.watch.on else 0
            self._traverse(frame, drawn)
        return {part: ns / 1000 / self.tokens for part, ns in self.watch.ns.items()}

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
            self._behind(closes, books.sent, books.sent_later, traversal, position, rows, payload)
            time("behind", books.catch_up)
            return payload
        state, out = bytes(4 * self.width * rows + 8 * len(drawn)), ids_payload(drawn)
        time("stages", books.sent, traversal, position, len(drawn), out)
        place = traversal, position, len(drawn)
        self._behind(closes, books.drew_from, books.drew_from_later, *place, state)
        time("behind", books.catch_up)
        return out

    def _behind(
        self, closes: bool, now: Callable[..., None], later: Callable[..., None], *given: Any
    ) -> None:
        """Note what a stage notes behind the send, if the frame closes no chunk."""
        self.watch.time("stages", now if closes else later, *given)

    def _close(self, index: int, traversal: int) -> SignedEnvelope:
        books = self.stages[index]
        return self.watch.time("stages", books.close_chunk, traversal, self.counts, NOW_MS)

    def _cool(self) -> None:
        """Read every line of a buffer that is larger than the caches."""
        _ = self._evict[::CACHE_LINE_BYTES]


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


def played(parts: BundleParts, tape: Tape, evict: bytearray) -> dict[str, dict[str, float]]:
    """Microseconds per token by part, of the clock and of the processor."""
    out: dict[str, dict[str, float]] = {}
    for name, clock in (("us", perf_counter_ns), ("cpu_us", thread_time_ns)):
        out[name] = {}
        for timed in (PARTS, ("tape",)):
            out[name] |= Replay(parts, tape, evict, Stopwatch(clock, timed)).play()
    return out


def measure(client: Client, arguments: argparse.Namespace, tape: Tape) -> list[dict[str, Any]]:
    """One row a round: an answer, then its accounting warm and cold."""
    rows, evict = [], bytearray(arguments.evict_mb << 20)
    options = Options(max_tokens=arguments.tokens, drafts=False, bundle=True)
    for number in range(arguments.rounds):
        inside = Stopwatch(perf_counter_ns, PATH)
        with client_timed(inside):
            answer = client.generate(arguments.model, PROMPTS[number % len(PROMPTS)], options)
        assert answer.bundle is not None
        parts = read_bundle(answer.bundle).parts
        if len(parts.epochs) > 1:
            print(f"round {number + 1}: rerouted, left out", file=sys.stderr)
            continue
        row = {
            "tokens": len(answer.token_ids),
            "tpot_us": answer.tpot_s * 1e6,
            "client_in_answer_us": inside.ns["client"] / 1000 / len(answer.token_ids),
            "warm": played(parts, tape, bytearray()),
            "cold": played(parts, tape, evict),
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
        out[name] = {
            f"{kind}_per_token": {
                part: round(median(lambda row: row[name][kind][part]), 1)  # noqa: B023
                for part in (*PARTS, "tape")
            }
            for kind in ("us", "cpu_us")
        }
        path = [path_us(row[name]["us"]) for row in rows]
        shares = [us / row["tpot_us"] for us, row in zip(path, rows, strict=True)]
        out[name]["path_us_per_token"] = round(statistics.median(path), 1)
        out[name]["share_of_tpot"] = round(statistics.median(shares), 5)
        cpu = [sum(row[name]["cpu_us"][part] for part in PARTS) for row in rows]
        shares = [us / row["tpot_us"] for us, row in zip(cpu, rows, strict=True)]
        out[name]["all_cpu_us_per_token"] = round(statistics.median(cpu), 1)
        out[name]["cpu_share_of_tpot"] = round(statistics.median(shares), 5)
    out["tpot_without_ms"] = round(out["tpot_ms"] - out["cold"]["path_us_per_token"] / 1000, 3)
    return out


def path_us(parts: dict[str, float]) -> float:
    """The sum of what lies on a token's path."""
    return sum(parts[part] for part in PATH)


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
