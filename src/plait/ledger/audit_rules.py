"""What an opened chunk must be, and what its replay amounts to. Pure.

A stage opens the frames it received since its stint began (its cache follows from them),
and what it sent in the challenged chunk. All of it must lead to the commitments that it
signed in its receipts, so it can open nothing but what it committed to. Whoever has the
layers then computes the same frames and compares.

Activations are compared row by row by relative L2 distance, also those that the last stage
draws from. Draws are judged by the margin: how far the logits would have to be off for the
drawn id, and for the two numbers of its logits that the stage committed to, to be the right
ones. The bounds are per dtype (``TOLERANCES``), calibrated on honest stages, and wider by what
the wire rounds off (``WIRE_ROUNDING``); see docs/ledger.md.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from plait.errors import BadProof, RemoteProtocolError
from plait.ledger.blame import about
from plait.ledger.handoff import HandoffChain
from plait.ledger.terms import SessionTerms, accelerator_of
from plait.types import Digest, WireDtype
from plait.v1.ledger_pb2 import StageReceipt

Verdict = Literal["consistent", "exposed", "unresponsive"]
"""``unresponsive`` is suspicion, never proof: nothing was opened, or it cannot be replayed."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The most that an honest stage of a dtype is off.

    ``distance`` is the relative L2 distance of a row of activations, ``margin`` is in
    logits. A replay of the very frames is held to these.
    """

    distance: float
    margin: float


TOLERANCES = {
    "fp32": Tolerance(1e-4, 1e-3),
    "bf16": Tolerance(3e-2, 0.5),
    "int4": Tolerance(3e-2, 0.5),
    "int8": Tolerance(1e-1, 2.0),
}

KERNEL_TOLERANCES = dict.fromkeys(("mlas-w4a8", "ggml-w4a8", "ggml-w4a8-v2"), Tolerance(6e-2, 1.0))
"""Where a kernel is further off than others of its dtype; ``ggml-w4a8`` is that of evidence from
before ADR 21. These round activations to 8 bits:
on a processor with other instructions sums differ by 1e-6, and some are rounded to the next step.
On processors of one kind a replay gives the same bits."""

WIRE_ROUNDING: dict[WireDtype, float] = {"fp32": 0.0, "bf16": 2**-8, "int8": 32**0.5 / 2 / 126.9}
"""The most that encoding moves a row, relative to its length. bf16 keeps each number to half
an ulp. int8 keeps each to half a step of its group of 32, of which one number is 127 steps
long, less what half precision takes from the scale."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """What crossed one end of a stage in a traversal.

    ``rows`` counts activations or ids. ``payload`` is None where only its SHA-256 is opened.
    """

    traversal: int
    first_position: int
    rows: int
    payload_digest: Digest
    payload: bytes | None = None

    @classmethod
    def of(cls, traversal: int, first_position: int, rows: int, payload: bytes) -> "Crossing":
        """A crossing whose bytes are opened."""
        hashed = Digest(hashlib.sha256(payload).digest())
        return cls(traversal, first_position, rows, hashed, payload)


@dataclass(frozen=True, slots=True)
class OpenedEpoch:
    """What a stage opens of one epoch of its stint.

    ``receipt`` is its own, checked: for the challenged chunk in the last epoch, and in those
    before the one that closed the epoch. ``previous`` is the one before the challenged chunk.
    """

    terms: SessionTerms
    receipt: StageReceipt
    received: tuple[Crossing, ...]
    sent: tuple[Crossing, ...]
    states: tuple[Crossing, ...] = ()
    """What a last stage drew from, by traversal."""
    previous: StageReceipt | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A frame to replay: rows from ``first_position`` on, as they were received.

    ``sent`` is what the stage says came of it, None where nothing is compared;
    ``sent_rows`` counts activations or ids.
    """

    first_position: int
    rows: int
    received: bytes
    sample: bool
    drafts: int = 0
    """Of the rows, the last ones that were guesses: the first draw is behind the row before."""
    sent_rows: int = 0
    sent: bytes | None = None
    state: bytes = b""
    """What the last stage says it drew from: see ``handoff``."""
    judge_draws: bool = True
    """Whether the ids can be judged: not where they depend on ids that nobody opened."""


@dataclass(frozen=True, slots=True)
class Finding:
    """How far off a replay found a step: a distance or a margin, whichever applies."""

    first_position: int
    distance: float = 0.0
    margin: float = 0.0


def tolerance_of(numeric_class: str, output: WireDtype = "fp32") -> Tolerance:
    """The tolerance of a numeric class; raises ``BadProof`` for one that has none.

    ``output`` is what the compared activations are encoded in. Replays start from the very
    frames that were received, so only the rounding of the output counts, on both sides:
    rows h and h' that are e apart relative to h' are, encoded within u of their length,
    at most (e + u (1 + e) + u) / (1 - u) apart.

    Accelerators have none: honest stages were measured on CPUs only.
    """
    parts = numeric_class.split("/")
    known = TOLERANCES.get(parts[1]) if len(parts) > 1 else None
    if known is not None and len(parts) > 2:
        known = KERNEL_TOLERANCES.get(parts[2], known)
    if known is None or accelerator_of(numeric_class):
        raise BadProof(f"no tolerance is published for the numeric class {numeric_class!r}")
    off, rounding = known.distance, WIRE_ROUNDING[output]
    return replace(known, distance=(off + rounding * (2 + off)) / (1 - rounding))


def check_opening(
    epochs: Sequence[OpenedEpoch], stage_index: int, *, judge_draws: bool = True
) -> tuple[Step, ...]:
    """What is to be replayed, in order; the steps of the challenged chunk have ``sent``.

    Without ``judge_draws`` it does not matter which ids a last stage drew. Raises ``BadProof``
    if what was opened is not what the receipts commit to, or does not reach back to position 0.
    """
    if not epochs:
        raise BadProof("no epoch is opened")
    steps: list[Step] = []
    for number, epoch in enumerate(epochs):
        with about(f"epoch {epoch.terms.epoch}"):
            _check_commitments(epoch)
            challenged = number == len(epochs) - 1
            steps += _steps(epoch, stage_index, challenged=challenged, judge_draws=judge_draws)
    _check_reach(steps)
    if all(step.sent is None for step in steps):
        raise BadProof("nothing of the challenged chunk is compared")
    return tuple(steps)


def judge(findings: Sequence[Finding], tolerance: Tolerance) -> Finding | None:
    """The first finding beyond the tolerance, or None: the chunk is consistent.

    Written so that what is not a number is beyond it.
    """
    for finding in findings:
        if not (finding.distance <= tolerance.distance and finding.margin <= tolerance.margin):
            return finding
    return None


def _check_commitments(epoch: OpenedEpoch) -> None:
    receipt = epoch.receipt
    boundaries = [
        ("received", receipt.stage_index, epoch.received, receipt.input_commit),
        ("sent", receipt.stage_index + 1, epoch.sent, receipt.output_commit),
    ]
    if receipt.stage_index == len(epoch.terms.stages) - 1:
        state = receipt.stage_index + 2, epoch.states, receipt.state_commit
        boundaries.append(("drawn from", *state))
    elif epoch.states:
        raise BadProof("only a last stage draws")
    for name, boundary, crossings, commit in boundaries:
        with about(f"what was {name}"):
            if _committed(epoch.terms, boundary, crossings) != commit:
                raise BadProof("it is not what the receipt commits to")


def _committed(terms: SessionTerms, boundary: int, crossings: Sequence[Crossing]) -> Digest:
    chain = HandoffChain(terms, boundary)
    for one in crossings:
        if one.payload is not None and hashlib.sha256(one.payload).digest() != one.payload_digest:
            raise BadProof(f"the bytes of traversal {one.traversal} do not have their digest")
        try:
            chain.add_digest(one.traversal, one.first_position, one.rows, one.payload_digest)
        except (RemoteProtocolError, OverflowError) as error:
            raise BadProof(str(error)) from error
        chain.forget(one.traversal)
    return chain.commit


def _steps(
    epoch: OpenedEpoch, stage_index: int, *, challenged: bool, judge_draws: bool
) -> list[Step]:
    begin = epoch.previous.traversal if epoch.previous is not None else -1
    sent = {one.traversal: one for one in epoch.sent}
    states = {one.traversal: one for one in epoch.states}
    is_last = stage_index == len(epoch.terms.stages) - 1
    steps = []
    for one in epoch.received:
        if not one.rows:
            continue
        if one.payload is None:
            raise BadProof(f"what was received in traversal {one.traversal} is not opened")
        answer = sent.get(one.traversal) if challenged and one.traversal > begin else None
        if answer is not None and answer.payload is None:
            raise BadProof(f"what was sent in traversal {one.traversal} is not opened")
        replay = epoch.terms.epoch > 1 and one.traversal < epoch.terms.resume_position
        end = one.first_position + one.rows
        sample = is_last and not replay and end >= epoch.terms.prompt_tokens
        if answer is not None:
            _check_answer(one, answer, draws=is_last, sample=sample)
        steps.append(
            Step(
                one.first_position,
                one.rows,
                one.payload,
                sample,
                one.rows - 1 if one.first_position >= epoch.terms.prompt_tokens else 0,
                answer.rows if answer is not None else 0,
                answer.payload if answer is not None else None,
                _state(states.get(one.traversal)) if answer is not None and is_last else b"",
                judge_draws,
            )
        )
    return steps


def _state(crossing: Crossing | None) -> bytes:
    """What was drawn from. Nothing, where the stage committed to nothing: that exposes it."""
    if crossing is None:
        return b""
    if crossing.payload is None:
        raise BadProof(f"what traversal {crossing.traversal} drew from is not opened")
    return crossing.payload


def _check_answer(received: Crossing, sent: Crossing, *, draws: bool, sample: bool) -> None:
    """A stage sends as many rows as it received, or draws at least one id if it is to."""
    if sent.first_position != received.first_position:
        fits = False
    elif draws:
        fits = (1 <= sent.rows <= received.rows) if sample else sent.rows == 0
    else:
        fits = sent.rows == received.rows
    if not fits:
        raise BadProof(f"traversal {sent.traversal} sent what no such frame can lead to")


def _check_reach(steps: Sequence[Step]) -> None:
    end = 0
    for step in steps:
        if step.first_position > end:
            raise BadProof(
                f"positions {end} to {step.first_position} are not opened: they came from a cache"
            )
        end = step.first_position + step.rows
