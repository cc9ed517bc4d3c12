"""Calls to a session's stages that are out together: who owes an answer, who failed. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from plait.client.actions import (
    Call,
    EpochClosed,
    GrantShown,
    StageConfirmed,
    StageFailed,
    StageOpened,
)
from plait.client.suspects import Kind
from plait.types import PeerId

Answer = StageOpened | StageConfirmed | GrantShown | EpochClosed | StageFailed

_CALL_OF: dict[type, Call] = {
    StageOpened: "open",
    StageConfirmed: "confirm",
    GrantShown: "grant",
    EpochClosed: "close-epoch",
}


@dataclass(slots=True)
class Calls:
    """One kind of call to several stages of an epoch."""

    name: Call
    epoch: int
    due: set[PeerId] = field(default_factory=set)
    failed: dict[PeerId, StageFailed] = field(default_factory=dict)

    def take(self, answer: Answer) -> bool:
        """Note an answer; False if it is not one of these calls', or came before."""
        call = answer.call if isinstance(answer, StageFailed) else _CALL_OF[type(answer)]
        if (call, answer.epoch) != (self.name, self.epoch) or answer.peer not in self.due:
            return False
        self.due.discard(answer.peer)
        if isinstance(answer, StageFailed):
            self.failed[answer.peer] = answer
        return True

    def fail(self, peers: Iterable[PeerId], reason: str) -> None:
        """These will not answer."""
        for peer in tuple(peers):
            self.due.discard(peer)
            self.failed[peer] = StageFailed(self.epoch, peer, self.name, "", reason, gone=True)

    @property
    def first_failure(self) -> StageFailed:
        """The failure to name."""
        return next(iter(self.failed.values()))

    @property
    def kinds(self) -> dict[PeerId, Kind]:
        """How to think of those that failed."""
        return {peer: "gone" if one.gone else "refused" for peer, one in self.failed.items()}
