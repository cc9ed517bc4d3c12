"""``Progress`` against an oracle that remembers every row that was ever fed."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import RemoteProtocolError
from plait.ledger.progress import Progress
from plait.ledger.terms import DRAFTS_MAX, SessionTerms
from plait.testing.accounting import Plot, terms_of
from plait.types import TokenCounts

FIRST = terms_of(Plot(max_tokens=40))
PROMPT = FIRST.prompt_tokens
PREFILL = FIRST.prefill_chunk_tokens


def resumed(position: int, cached: int = 0, rejected: int = 0) -> SessionTerms:
    """A second epoch, in which everybody stayed and is rebuilt."""
    start = FIRST.counts_at(position, cached, rejected)
    stages = tuple(replace(stage, rebuilt=True) for stage in FIRST.stages)
    return replace(FIRST, epoch=2, stages=stages, resume_position=position, start=start)


@dataclass
class Oracle:
    """All live rows fed in an epoch, in order, by position; the last one of a position counts."""

    terms: SessionTerms
    cached: int
    rows: list[int] = field(default_factory=list)
    frames: list[tuple[int, int]] = field(default_factory=list)
    ended: bool = False

    @property
    def end(self) -> int:
        """One past the row fed last."""
        if self.frames:
            return sum(self.frames[-1])
        return max(self.terms.resume_position, self.cached)

    def allows(self, first: int, rows: int, drafts: int, sample: bool, close: bool) -> bool:
        """Whether a live frame may come here."""
        if self.ended:
            return False
        after_prompt = first >= PROMPT and first <= self.end and self.end >= PROMPT
        # Of each frame that draws, at least the first draw is accepted.
        least = self.terms.resume_position
        if self.frames:
            start, fed = self.frames[-1]
            least = max(least, start + (min(fed, 1) if start >= PROMPT else fed))
        accepted = after_prompt and first >= least
        if rows == 0:
            closes = close and not sample and not drafts
            again = bool(self.frames) and self.frames[-1][1] == 0
            return closes and accepted and not again
        if first < PROMPT:
            fits = first == self.end and rows <= PREFILL and first + rows <= PROMPT
            return fits and close and not drafts and sample == (first + rows == PROMPT)
        whole = sample and rows == 1 + drafts and drafts <= DRAFTS_MAX
        room = first + rows - PROMPT + 1 <= self.terms.max_tokens
        return whole and accepted and room and not (close and drafts)

    def take(self, first: int, rows: int) -> None:
        """Feed the rows."""
        self.rows += range(first, first + rows)
        self.frames.append((first, rows))
        self.ended = rows == 0

    def counts(self, position: int) -> TokenCounts:
        """If ``position`` is the next to feed: what was fed, and what of it was in vain."""
        kept = len({row for row in self.rows if row < position})
        cached = self.cached if self.terms.epoch == 1 else self.terms.start.cached_prompt
        return TokenCounts(
            prompt=min(position, PROMPT) - cached,
            output=max(position - PROMPT + 1, 0),
            cached_prompt=cached,
            rejected_draft=self.terms.start.rejected_draft + len(self.rows) - kept,
        )


@st.composite
def beginnings(draw: st.DrawFn) -> tuple[SessionTerms, int]:
    if draw(st.booleans()):
        return FIRST, draw(st.integers(0, PROMPT - 1))
    cached = draw(st.integers(0, PROMPT - 1))
    position = draw(st.integers(cached, PROMPT + 20))
    rejected = draw(st.integers(0, 9)) if position > PROMPT else 0
    return resumed(position, cached, rejected), 0


@settings(max_examples=300, deadline=None)
@given(beginnings(), st.data())
def test_every_frame_is_judged_and_counted_as_by_the_oracle(
    beginning: tuple[SessionTerms, int], data: st.DataObject
) -> None:
    terms, cached = beginning
    progress, oracle = Progress(terms, cached), Oracle(terms, cached)
    for _ in range(data.draw(st.integers(1, 14))):
        end = oracle.end
        honest = data.draw(st.integers(0, 5))
        if honest and end >= PROMPT and oracle.frames:
            start, fed = oracle.frames[-1]
            accepted = data.draw(st.integers(min(1, fed), fed)) if start >= PROMPT else fed
            first, drafts = start + accepted, data.draw(st.integers(0, 3))
            rows, sample, close = 1 + drafts, True, not drafts and data.draw(st.booleans())
        elif honest and end < PROMPT:
            rows = data.draw(st.integers(1, min(PREFILL, PROMPT - end)))
            first, drafts, sample, close = end, 0, end + rows == PROMPT, True
        else:
            first = max(end - data.draw(st.integers(-1, 4)), 0)
            rows = data.draw(st.integers(0, 5))
            drafts = data.draw(st.sampled_from([max(rows - 1, 0), 0, 1]))
            sample, close = data.draw(st.sampled_from([bool(rows), True, False])), not drafts
            close = data.draw(st.sampled_from([close, False, True]))
        if not oracle.allows(first, rows, drafts, sample, close):
            with pytest.raises(RemoteProtocolError):
                progress.take(first, rows, drafts=drafts, sample=sample, close_chunk=close)
            return
        taken = progress.take(first, rows, drafts=drafts, sample=sample, close_chunk=close)
        oracle.take(first, rows)
        if close:
            assert taken.counts == taken.worst == oracle.counts(first + rows)
        assert taken.worst.output >= taken.counts.output
        least = first + (min(rows, 1) if first >= PROMPT else rows)
        for position in range(least, first + rows + 1):
            assert progress.at(position) == oracle.counts(position)
            assert progress.at(position).output <= taken.worst.output


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 30), st.data())
def test_a_replay_comes_first_and_whole(position: int, data: st.DataObject) -> None:
    progress, fed = Progress(resumed(position)), 0
    while fed < position:
        first = data.draw(st.sampled_from([fed, fed, fed, fed + 1, max(fed - 1, 0)]))
        rows = data.draw(st.integers(0, position + 1 - fed))
        fits = first == fed and rows and first + rows <= position
        if not fits:
            with pytest.raises(RemoteProtocolError):
                progress.take(first, rows, sample=False, close_chunk=False, replay=True)
            return
        taken = progress.take(first, rows, sample=False, close_chunk=False, replay=True)
        assert taken.counts == progress.at(position)
        fed += rows
        assert progress.replayed == fed
    assert progress.next_position == position


@pytest.mark.parametrize("wrong", ["sample", "close_chunk", "drafts"])
def test_a_replay_draws_and_closes_nothing(wrong: str) -> None:
    arguments = {"sample": False, "close_chunk": False, "drafts": 0, wrong: 1}
    with pytest.raises(RemoteProtocolError, match="replay"):
        Progress(resumed(3)).take(0, 1, replay=True, **arguments)  # type: ignore[arg-type]


def test_no_replay_follows_a_live_frame() -> None:
    progress = Progress(resumed(PROMPT + 2))
    progress.take(PROMPT + 2, 1, sample=True, close_chunk=True)
    with pytest.raises(RemoteProtocolError, match="replay"):
        progress.take(0, 1, sample=False, close_chunk=False, replay=True)
