"""How far an epoch has come: which frame may follow, and what it counts.

Driver, client books, stages and verifiers all count with this, so that they agree to the
token. A frame of the prompt follows the one before it. A decode frame feeds the id drawn
last and then drafts; where the next one starts says how many draws were accepted, and what
lies behind was rejected. A replay comes before everything else and counts nothing.
"""

from dataclasses import dataclass

from plait.errors import RemoteProtocolError
from plait.ledger.terms import DRAFTS_MAX, SessionTerms
from plait.types import TokenCounts


@dataclass(frozen=True, slots=True)
class FrameCounts:
    """The session's counts after a frame: at least, and with every draft accepted."""

    counts: TokenCounts
    worst: TokenCounts


class Progress:
    """The frames of one epoch, seen from anywhere in the pipeline."""

    def __init__(self, terms: SessionTerms, cached: int = 0) -> None:
        """``cached`` prompt positions were taken from the stages' caches in epoch 1."""
        self.next_position = max(terms.resume_position, cached)
        """One past the last row fed, drafts included."""
        self.replayed = 0
        """Positions replayed so far."""
        self._terms = terms
        self._cached = cached if terms.epoch == 1 else terms.start.cached_prompt
        self._rejected = terms.start.rejected_draft
        self._floor = terms.resume_position - 1
        self._live = False
        self._ended = False

    def take(
        self,
        first_position: int,
        rows: int,
        *,
        drafts: int = 0,
        sample: bool,
        close_chunk: bool,
        replay: bool = False,
    ) -> FrameCounts:
        """Count a frame; raises ``RemoteProtocolError`` if it cannot come here."""
        if self._ended:
            raise RemoteProtocolError("a frame follows the one that ended the answer")
        if replay:
            return self._take_replay(
                first_position, rows, plain=not (drafts or sample or close_chunk)
            )
        if rows and first_position < self._terms.prompt_tokens:
            if drafts or not close_chunk:
                raise RemoteProtocolError("a frame of the prompt is a chunk of its own")
            taken = self._take_prompt(first_position, rows, sample)
        elif rows:
            if not sample or rows != 1 + drafts or (close_chunk and drafts):
                raise RemoteProtocolError("a decode frame has one row, and one for each draft")
            taken = self._take_decode(first_position, drafts)
        else:
            if sample or drafts or not close_chunk:
                raise RemoteProtocolError("a frame without rows can only close a chunk")
            taken = self._take_end(first_position)
        self._live = True
        return taken

    def at(self, position: int) -> TokenCounts:
        """The session's counts if the epoch is cut with ``position`` as the next to feed."""
        rejected = self._rejected
        if position >= self._terms.prompt_tokens:
            rejected += self.next_position - position
        return self._terms.counts_at(position, self._cached, rejected)

    def _take_replay(self, first_position: int, rows: int, *, plain: bool) -> FrameCounts:
        end = first_position + rows
        if not plain or not rows or self._live:
            raise RemoteProtocolError("a replay comes first, and draws and closes nothing")
        if first_position != self.replayed or end > self._terms.resume_position:
            raise RemoteProtocolError(f"no replay covers positions {first_position} to {end}")
        self.replayed = end
        return FrameCounts(self._terms.start, self._terms.start)

    def _take_prompt(self, first_position: int, rows: int, sample: bool) -> FrameCounts:
        terms, end = self._terms, first_position + rows
        if first_position != self.next_position:
            raise RemoteProtocolError(
                f"a frame starts at position {first_position}, not {self.next_position}"
            )
        if not 0 < rows <= terms.prefill_chunk_tokens or end > terms.prompt_tokens:
            raise RemoteProtocolError(f"no frame covers positions {first_position} to {end}")
        if sample != (end == terms.prompt_tokens):
            raise RemoteProtocolError("only the frame that ends the prompt draws, and it must")
        self.next_position = end
        self._floor = end - 1
        counts = terms.counts_at(end, self._cached, self._rejected)
        return FrameCounts(counts, counts)

    def _take_decode(self, first_position: int, drafts: int) -> FrameCounts:
        terms = self._terms
        if not 0 <= drafts <= DRAFTS_MAX:
            raise RemoteProtocolError(f"a frame has at most {DRAFTS_MAX} drafts")
        self._accept(first_position)
        self.next_position = first_position + 1 + drafts
        worst = terms.counts_at(self.next_position, self._cached, self._rejected)
        if worst.output > terms.max_tokens:
            raise RemoteProtocolError(f"no answer token is drawn at position {first_position}")
        counts = worst
        if drafts:
            counts = terms.counts_at(first_position + 1, self._cached, self._rejected)
        return FrameCounts(counts, worst)

    def _take_end(self, first_position: int) -> FrameCounts:
        self._accept(first_position)
        self.next_position = first_position
        self._ended = True
        counts = self._terms.counts_at(first_position, self._cached, self._rejected)
        return FrameCounts(counts, counts)

    def _accept(self, first_position: int) -> None:
        """The draws before ``first_position`` were accepted, the rows from it on rejected."""
        if first_position < self._terms.prompt_tokens:
            raise RemoteProtocolError("the prompt has not ended")
        if not self._floor < first_position <= self.next_position:
            raise RemoteProtocolError(
                f"a frame starts at position {first_position}, not after {self._floor} "
                f"and at most at {self.next_position}"
            )
        self._rejected += self.next_position - first_position
        self._floor = first_position
