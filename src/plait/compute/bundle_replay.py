"""Computing a bundle's answer again on this machine, from the prompt's ids alone.

In the fp32 class splitting a model changes nothing, so one stage with all layers stands for
all of the route. Every frame is computed as it was, rejected drafts included, and each drawn
id is held against the keyed draw. That proves the answer end to end; it does not say which
stage was wrong, which is what an audit of one stage is for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from plait.compute.port import StageCompute, Work
from plait.errors import BadProof
from plait.ledger.audit_rules import Finding, judge, tolerance_of
from plait.ledger.bundle import BundleParts
from plait.ledger.verify_frames import EpochFrames, cached_positions
from plait.types import Sampling, SessionId

_ROWS = 256
_SESSION = SessionId(b"plait/replaying!")


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay found: ids drawn exactly alike, all ids, and the largest margin."""

    exact: int
    ids: int
    margin: float


def dtype_of(parts: BundleParts) -> str:
    """The dtype that every stage of a bundle states; raises ``BadProof`` if they differ."""
    classes = {stage.numeric_class for epoch in parts.epochs for stage in epoch.terms.stages}
    dtypes = {name.split("/")[1] for name in classes if name.count("/")}
    if len(dtypes) != 1:
        raise BadProof(f"the stages do not state one dtype: {', '.join(sorted(classes))}")
    return dtypes.pop()


def replay_bundle(
    parts: BundleParts, frames: Sequence[EpochFrames], sampling: Sampling, compute: StageCompute
) -> Replayed:
    """Compute the whole answer on ``compute``, which has all layers and steps for nobody else.

    ``frames`` are those of ``verify_frames.check_frames``. Raises ``BadProof`` for an id
    beyond the tolerance of the stages' numeric class.
    """
    if compute.shape.digest != parts.terms.model_digest:
        raise BadProof("the weights here are of another model")
    tolerance = tolerance_of(parts.terms.stages[0].numeric_class)
    sequence = (*parts.prompt_ids, *parts.token_ids)
    margins: list[float] = []
    prompt = len(parts.prompt_ids)
    compute.reserve(_SESSION, len(sequence) + 16, sampling, None, parts.prompt_ids, prompt)
    try:
        # What came from caches is computed like any prompt: here the ids are all that counts.
        cached = parts.prompt_ids[: cached_positions(parts)]
        for start in range(0, len(cached), _ROWS):
            _margins(compute, Work(_SESSION, start, cached[start : start + _ROWS], None))
        for epoch, found in zip(parts.epochs, frames, strict=True):
            for frame, drawn in zip(epoch.frames, found.drawn, strict=True):
                _, first_position, rows, drafts, sample, _, replay = frame
                if not rows or replay:
                    continue
                known = sequence[first_position : first_position + rows - len(drafts)]
                work = Work(
                    _SESSION, first_position, (*known, *drafts), None, sample, drafts, drawn
                )
                margins += _margins(compute, work)
    finally:
        compute.free(_SESSION)
    for number, margin in enumerate(margins):
        if judge([Finding(prompt + number, margin=margin)], tolerance) is not None:
            raise BadProof(f"the id at position {prompt + number} is {margin:.3g} logits off")
    exact = sum(margin == 0.0 for margin in margins)
    return Replayed(exact, len(margins), max(margins, default=0.0))


def _margins(compute: StageCompute, work: Work) -> tuple[float, ...]:
    [done] = compute.step([work])
    if done.error is not None:
        raise done.error
    return done.drawn.margins if done.drawn is not None else ()
