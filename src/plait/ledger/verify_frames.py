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


def cached_positions(parts: BundleParts) -> int:
    """How many leading positions of the prompt came from the stages' caches.

    Only a first epoch that fed something can have begun so; a later one is rebuilt.
    """
    live = (frame for frame in parts.epochs[0].frames if not frame[6])
    return next((frame[1] for frame in live), 0)


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
    layers = parts.terms.stages[-1].span.end
    signed = [
        (stage.span, _intervals(epoch, stage, reach))
        for epoch, found in zip(parts.epochs, frames, strict=True)
        for index, stage in enumerate(epoch.terms.stages)
        if (reach := _reach(epoch, found, index)) is not None
    ]
    short = ""
    # Between two borders of spans every layer has the same hosts.
    borders = sorted({0, *(span.start for span, _ in signed), *(span.end for span, _ in signed)})
    for layer in [border for border in borders if border < layers]:
        covered = [one for span, some in signed if span.start <= layer < span.end for one in some]
        gap = _gap(covered, last)
        if gap is None:
            continue
        what = f"nobody signed for layer {layer} at positions {gap[0]} to {gap[1]}"
        if frames[-1].cut is None or gap[0] < _whole(parts, frames):
            raise BadProof(what)
        short = short or f"{what}: the answer was cut short there"
    if short:
        raise Absent(short)
    return layers * last


def _epoch_frames(parts: BundleParts, epoch: EpochParts, end: int) -> EpochFrames:
    terms = epoch.terms
    live = [frame for frame in epoch.frames if not frame[6]]
    cached = live[0][1] if live and terms.epoch == 1 else 0
    progress = Progress(terms, cached)
    replays = len(epoch.frames) - len(live)
    closes: list[ChunkClose] = []
    drawn: list[tuple[int, ...]] = []
    ends: dict[int, int] = {}
    starts = iter([*(frame[1] for frame in live[1:]), end])
    draws = terms.start.output
    for number, frame in enumerate(epoch.frames):
        traversal, first_position, rows, drafts, sample, close_chunk, replay = frame
        with about(f"frame {number}"):
            expected = number if replay else terms.resume_position + number - replays
            if traversal != expected:
                raise BadProof(f"it is traversal {traversal}, not {expected}")
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
            after = next(starts)
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


def _check_replay(epoch: EpochParts, progress: Progress) -> None:
    terms = epoch.terms
    due = terms.resume_position if terms.stages[0].rebuilt and epoch.frames else 0
    if progress.replayed != due:
        raise BadProof(f"{progress.replayed} positions were replayed to stage 0, not {due}")


def _draws(prompt: int, first_position: int, rows: int, sample: bool, after: int) -> int:
    """How many ids a frame drew, by where the next one starts."""
    if first_position < prompt and after != first_position + rows:
        raise BadProof(f"what follows starts at position {after}, not {first_position + rows}")
    if first_position < prompt or not sample:
        return int(sample)
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


def _intervals(epoch: EpochParts, stage: StageTerms, reach: int) -> list[tuple[int, int]]:
    """The positions that a stage's receipts of an epoch speak for.

    What was replayed when it entered is in each of its receipts. What is replayed to a
    stage that stayed is not, and need not be: it signed for it before.
    """
    begin = 0 if epoch.terms.epoch == 1 else epoch.terms.resume_position
    return [(0, stage.replayed), (begin, reach)]


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
