"""Replaying an opened chunk on a stage's own layers, frame by frame, and measuring it.

The frames are computed in the very shapes in which they came, so that in the fp32 class the
replay is bitwise equal. The work is handed out one frame at a time: whoever computes it can
serve others in between.
"""

from collections.abc import Callable, Generator, Sequence
from math import inf

import numpy as np
import numpy.typing as npt

from plait.compute.port import Done, Hidden, StageCompute, Work
from plait.compute.wire_formats import decode, rounded
from plait.errors import BadProof, PlaitError, RemoteProtocolError
from plait.ledger.audit_rules import Finding, Step
from plait.types import Sampling, SessionId, Span, WireDtype

_BYTES_PER_VALUE = 4  # of an id


def replay_steps(
    session: SessionId,
    steps: Sequence[Step],
    *,
    first_stage: bool,
    last_stage: bool,
    width: int,
    wire_dtype: WireDtype = "fp32",
) -> Generator[Work, Done, list[Finding]]:
    """Yield the work of each step, take its outcome, and return what was found.

    What was computed is rounded as it would have been on the wire before it is compared.
    Raises ``BadProof`` for rows that this model cannot have.
    """
    findings: list[Finding] = []
    for step in steps:
        hidden = None if first_stage else _rows(step, width, wire_dtype)
        done = yield _work(session, step, hidden)
        if done.error is not None:
            if isinstance(done.error, PlaitError):
                raise BadProof(f"what was opened cannot be computed: {done.error}") from done.error
            raise done.error
        if step.sent is not None:
            dtype: WireDtype = "fp32" if last_stage else wire_dtype
            findings.append(_finding(step, done, last_stage=last_stage, width=width, dtype=dtype))
    return findings


def replay(
    compute: StageCompute,
    session: SessionId,
    steps: Sequence[Step],
    span: Span,
    sampling: Sampling,
    context_ids: Sequence[int] = (),
    prompt_tokens: int = 0,
    wire_dtype: WireDtype = "fp32",
) -> list[Finding]:
    """Replay at once on ``compute``, which must not be stepping; its session is freed after.

    ``context_ids`` are the ids before the first draw, where the sampling needs them.
    """
    tokens = max(step.first_position + step.rows for step in steps)
    compute.reserve(session, tokens, sampling, span, context_ids, prompt_tokens)
    try:
        works = replay_steps(
            session,
            steps,
            first_stage=span.start == 0,
            last_stage=span.end == compute.shape.layers,
            width=compute.width,
            wire_dtype=wire_dtype,
        )
        return run_replay(works, lambda work: compute.step([work])[0])
    finally:
        compute.free(session)


def run_replay(
    works: Generator[Work, Done, list[Finding]], step: Callable[[Work], Done]
) -> list[Finding]:
    """Drive a replay to its end."""
    try:
        work = next(works)
        while True:
            work = works.send(step(work))
    except StopIteration as end:
        found: list[Finding] = end.value
        return found


def distance(claimed: npt.NDArray[np.float32], replayed: npt.NDArray[np.float32]) -> float:
    """Largest relative L2 distance of a row; infinite if a claimed value is not finite."""
    if not np.isfinite(claimed).all():
        return float("inf")
    exact = replayed.astype(np.float64)
    off = np.linalg.norm(claimed.astype(np.float64) - exact, axis=1)
    size = np.linalg.norm(exact, axis=1)
    return float(np.max(off / np.maximum(size, np.finfo(np.float32).tiny)))


def _work(session: SessionId, step: Step, hidden: Hidden | None) -> Work:
    """``hidden`` is None for the first stage, which takes ids."""
    ids: tuple[int, ...] | None = None
    if hidden is None:
        if len(step.received) != step.rows * _BYTES_PER_VALUE:
            raise BadProof("the opened ids are not of the rows stated")
        ids = tuple(int(one) for one in np.frombuffer(step.received, "<u4"))
    claimed = _ids(step) if step.sample and step.sent is not None else ()
    return Work(
        session,
        step.first_position,
        ids,
        hidden,
        sample=bool(claimed),
        # What was guessed does not matter, only how many rows were guesses.
        drafts=(ids or (0,) * step.rows)[step.rows - step.drafts :] if claimed else (),
        claimed=claimed,
    )


def _ids(step: Step) -> tuple[int, ...]:
    sent = step.sent or b""
    if len(sent) != step.sent_rows * _BYTES_PER_VALUE:
        raise BadProof("the opened draws are not of the number stated")
    return tuple(int(one) for one in np.frombuffer(sent, "<u4"))


def _rows(step: Step, width: int, wire_dtype: WireDtype) -> Hidden:
    try:
        return decode(step.received, step.rows, width, wire_dtype)
    except RemoteProtocolError as error:
        raise BadProof(f"what was opened is no activations: {error}") from error


def _finding(step: Step, done: Done, *, last_stage: bool, width: int, dtype: WireDtype) -> Finding:
    """``dtype`` is that of the activations: a last stage commits to its own in fp32."""
    if done.hidden is None:
        raise BadProof("the replay gave no activations")
    claimed = step.state if last_stage else step.sent or b""
    drawn = done.drawn.ids if done.drawn is not None else ()
    size = max(0, len(claimed) - 2 * len(drawn) * _BYTES_PER_VALUE)
    try:
        rows = decode(claimed[:size], step.rows, width, dtype)
    except RemoteProtocolError:
        # It committed to what no stage of this model can compute.
        return Finding(step.first_position, inf, inf)
    off = distance(rows, rounded(done.hidden, dtype))
    return Finding(step.first_position, off, _margin(step, done, claimed[size:]))


def _margin(step: Step, done: Done, claimed: bytes) -> float:
    """The least change of logits that would make the draws, and what is said of them, right."""
    if done.drawn is None:
        return 0.0
    logprobs, totals = np.frombuffer(claimed, "<f4").astype(np.float64).reshape(-1, 2).T
    right = np.array(done.drawn.totals)
    # Neither can move further than the logits do.
    off = np.maximum(
        np.abs(totals - right), np.abs(logprobs + totals - np.array(done.drawn.logprobs) - right)
    )
    draws = max(done.drawn.margins, default=0.0) if step.judge_draws else 0.0
    # What is not a number stays one, and is beyond every bound.
    return float(np.max([draws, *off]))
