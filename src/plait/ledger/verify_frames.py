"""Claims about frames: every position went through, and who is covered by which receipt."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from plait.errors import BadProof
from plait.ledger.blame import about
from plait.ledger.bundle import BundleParts, EpochParts
from plait.ledger.progress import Progress
from plait.ledger.receipt import ChunkClose
from plait.ledger.report import Absent
from plait.ledger.terms import StageTerms
from plait.types import TokenCounts


@dataclass(frozen=True, slots=True)
class EpochFrames:
    """What an epoch's frames amount to.

    ``closes`` are its whole chunks, ``cut`` the one that was cut short, if it was;
    ``drawn`` are the ids drawn by each frame; ``ends`` gives the next position to feed
    after each traversal; ``counts`` are the session's when it ended.
    """

    closes: tuple[ChunkClose, ...]
    cut: ChunkClose | None
    drawn: tuple[tuple[int, ...], ...]
    ends: dict[int, int]
    counts: TokenCounts


def check_frames(parts: BundleParts) -> tuple[EpochFrames, ...]:
    """Every position went through in order, epoch after epoch; returns where chunks ended."""
    terms = parts.terms
    if len(parts.prompt_ids) != terms.prompt_tokens:
        raise BadProof(f"{len(parts.prompt_ids)} prompt ids, {terms.prompt_tokens} were agreed")
    if not parts.token_ids:
        raise BadProof("nothing was drawn")
    found = []
    ends = [epoch.terms.resume_position for epoch in parts.epochs[1:]]
    last = terms.prompt_tokens + len(parts.token_ids) - 1
    for epoch, end in zip(parts.epochs, [*ends, last], strict=True):
        with about(_of(parts, epoch)):
            found.append(_epoch_frames(parts, epoch, end))
    if len(parts.epochs[-1].frames) == 0:
        raise BadProof("the last epoch has no frames")
    for (epoch, frames), (after, _) in pairwise(zip(parts.epochs, found, strict=True)):
        if after.terms.start != frames.counts:
            raise BadProof(f"epoch {after.terms.epoch} does not count on from {epoch.terms.epoch}")
    return tuple(found)


def check_coverage(parts: BundleParts, frames: Sequence[EpochFrames]) -> int:
    """Each layer signed for each position that the answer rests on; returns how many.

    A replay covers what lies before it. Only the end of an answer that was cut short may
    lack the receipts of the stages that were lost: that is missing evidence, not a lie.
    """
    last = parts.terms.prompt_tokens + len(parts.token_ids) - 1
    layers = parts.epochs[0].terms.stages[-1].span.end
    covered = [list[tuple[int, int]]() for _ in range(layers)]
    for epoch, found in zip(parts.epochs, frames, strict=True):
        for index, stage in enumerate(epoch.terms.stages):
            reach = _reach(epoch, found, index)
            if reach is not None:
                for layer in range(stage.span.start, min(stage.span.end, layers)):
                    covered[layer].append((_begin(epoch, stage), reach))
    gaps = [(layer, gap) for layer in range(layers) if (gap := _gap(covered[layer], last))]
    if not gaps:
        return layers * last
    layer, (start, end) = gaps[0]
    what = f"nobody signed for layer {layer} at positions {start} to {end}"
    if frames[-1].cut is None or any(gap[0] < _whole(parts, frames) for _, gap in gaps):
        raise BadProof(what)
    raise Absent(f"{what}: the answer was cut short there")


def _epoch_frames(parts: BundleParts, epoch: EpochParts, end: int) -> EpochFrames:
    terms = epoch.terms
    live = [frame for frame in epoch.frames if not frame[6]]
    cached = live[0][1] if live and terms.epoch == 1 else 0
    progress = Progress(terms, cached)
    closes: list[ChunkClose] = []
    drawn: list[tuple[int, ...]] = []
    ends: dict[int, int] = {}
    starts = [frame[1] for frame in live[1:]] + [end]
    draws = terms.start.output
    for number, frame in enumerate(epoch.frames):
        traversal, first_position, rows, drafts, sample, close_chunk, replay = frame
        with about(f"frame {number}"):
            _check_number(epoch, number, traversal, replay=replay)
            taken = progress.take(
                first_position,
                rows,
                drafts=len(drafts),
                sample=sample,
                close_chunk=close_chunk,
                replay=replay,
            )
            if replay:
                drawn.append(())
                continue
            after = starts.pop(0)
            count = _draws(terms.prompt_tokens, first_position, rows, sample, after)
            if not int(sample) <= count <= int(sample) * (1 + len(drafts)):
                raise BadProof(f"{count} ids drawn do not fit a frame with {len(drafts)} drafts")
            ids = parts.token_ids[draws : draws + count]
            if ids[:-1] != drafts[: max(len(ids) - 1, 0)]:
                raise BadProof("an id was accepted that was not drafted")
            draws += count
            drawn.append(ids)
            ends[traversal] = after
            if close_chunk:
                closes.append(ChunkClose(len(closes), traversal, taken.counts))
            if taken.worst.output - _since(closes, epoch, close_chunk) > terms.chunk_tokens:
                raise BadProof(f"a chunk has more than {terms.chunk_tokens} draws")
    _check_replay(epoch, progress)
    if draws != terms.counts_at(end).output:
        raise BadProof(f"{draws} ids are drawn, {terms.counts_at(end).output} are counted")
    counts = progress.at(end) if live else terms.start
    cut = _cut(epoch, closes, ends, counts)
    return EpochFrames(
        tuple(close for close in closes if cut is None or close.traversal < cut.traversal),
        cut,
        tuple(drawn),
        ends,
        counts,
    )


def _check_number(epoch: EpochParts, number: int, traversal: int, *, replay: bool) -> None:
    replays = sum(frame[6] for frame in epoch.frames)
    expected = number if replay else epoch.terms.resume_position + number - replays
    if traversal != expected:
        raise BadProof(f"it is traversal {traversal}, not {expected}")


def _check_replay(epoch: EpochParts, progress: Progress) -> None:
    terms = epoch.terms
    due = terms.resume_position if terms.stages[0].rebuilt and epoch.frames else 0
    if progress.replayed != due:
        raise BadProof(f"{progress.replayed} positions were replayed to stage 0, not {due}")


def _draws(prompt: int, first_position: int, rows: int, sample: bool, after: int) -> int:
    if not sample:
        return 0
    if first_position < prompt:
        return 1 if after == first_position + rows else -1
    return after - first_position


def _since(closes: Sequence[ChunkClose], epoch: EpochParts, closed: bool) -> int:
    """Outputs counted when the chunk of the newest frame began."""
    before = closes[:-1] if closed else closes
    return before[-1].counts.output if before else epoch.terms.start.output


def _cut(
    epoch: EpochParts,
    closes: Sequence[ChunkClose],
    ends: dict[int, int],
    counts: TokenCounts,
) -> ChunkClose | None:
    last = max(ends, default=-1)
    whole = len(epoch.receipts) // len(epoch.terms.stages)
    if epoch.cut is None:
        if ends and (not closes or closes[-1].traversal != last):
            raise BadProof("the last frame does not close a chunk, and no cut is stated")
        return None
    if epoch.cut.traversal != last:
        raise BadProof("the epoch is not cut after its last frame")
    if not whole <= len(closes) <= whole + 1:
        raise BadProof(f"{whole} chunks have receipts, {len(closes)} were closed before the cut")
    if len(closes) == whole + 1 and closes[-1].traversal != last:
        raise BadProof("a chunk that was closed before the cut has no receipts")
    return ChunkClose(whole, last, counts)


def _reach(epoch: EpochParts, frames: EpochFrames, stage_index: int) -> int | None:
    """The position up to which a stage signed receipts in an epoch; None if it signed none."""
    cut = epoch.cut
    signed = cut.receipts[stage_index : stage_index + 1] if cut is not None else ()
    if cut is not None and frames.cut is not None and any(signed):
        return frames.ends[cut.traversal]
    if not frames.closes:
        return None
    return frames.ends[frames.closes[-1].traversal]


def _begin(epoch: EpochParts, stage: StageTerms) -> int:
    """The first position that a stage's receipts of an epoch speak for."""
    if stage.replayed or stage.rebuilt or epoch.terms.epoch == 1:
        return 0
    return epoch.terms.resume_position


def _gap(intervals: Sequence[tuple[int, int]], last: int) -> tuple[int, int] | None:
    """The first positions before ``last`` that no interval covers."""
    reached = 0
    for start, end in sorted(intervals):
        if start > reached:
            return reached, start
        reached = max(reached, end)
    return (reached, last) if reached < last else None


def _whole(parts: BundleParts, frames: Sequence[EpochFrames]) -> int:
    """The position after the last whole chunk of the answer."""
    found = frames[-1]
    if found.closes:
        return found.ends[found.closes[-1].traversal]
    return parts.epochs[-1].terms.resume_position


def _of(parts: BundleParts, epoch: EpochParts) -> str:
    return f"epoch {epoch.terms.epoch}" if len(parts.epochs) > 1 else "frames"
