"""Which stages still wait to see the ledger's grant, and what they do until then. Pure.

A stage that enters by a reroute starts on the client's signed reservation alone: one chunk
of new work, and the replay that builds it. The grant follows when the ledger answers.
"""

from collections.abc import Iterable, Sequence

from plait.client.actions import ShowGrant
from plait.client.driver import SendFrame
from plait.client.epoch import Epoch
from plait.ledger.terms import SessionTerms
from plait.types import PeerId, TokenCounts


class BoundedCredit:
    """The stages on bounded credit."""

    def __init__(self) -> None:
        self._waiting: set[PeerId] = set()

    def enter(self, peers: Iterable[PeerId]) -> None:
        """These stages were confirmed without a grant."""
        self._waiting.update(peers)

    def stay(self, terms: SessionTerms) -> None:
        """A new epoch began: forget who is not in it."""
        self._waiting &= {stage.peer for stage in terms.stages}

    def shows(self, epochs: Sequence[Epoch], terms: SessionTerms) -> list[ShowGrant]:
        """The grants that came and that a waiting stage has not seen."""
        return [
            ShowGrant(terms.epoch, stage.peer, epoch.reservation, epoch.grant)
            for epoch in epochs
            for stage in terms.stages
            if stage.entered_epoch == epoch.number
            and stage.peer in self._waiting
            and epoch.reservation is not None
            and epoch.grant is not None
        ]

    def shown(self, peers: Iterable[PeerId]) -> None:
        """These stages have seen their grant."""
        self._waiting.difference_update(peers)

    def covers(self, frame: SendFrame, terms: SessionTerms, counts: TokenCounts) -> bool:
        """Whether every stage may compute the frame; ``counts`` are the session's so far."""
        if frame.replay:
            return True
        end = frame.first_position + frame.rows
        outputs = max(0, end - terms.prompt_tokens + 1) if frame.sample else counts.output
        for stage in terms.stages:
            if stage.peer not in self._waiting:
                continue
            # One chunk since it entered, which may have been in an earlier epoch.
            began = stage.base.prompt + stage.base.cached_prompt
            prompt, output = min(end, terms.prompt_tokens) - began, outputs - stage.base.output
            if prompt > terms.prefill_chunk_tokens or output > terms.chunk_tokens:
                return False
            if prompt > 0 and output > 1:
                return False
        return True
