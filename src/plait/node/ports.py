"""What a stage's core needs of its surroundings: links, a worker, settlement."""

from dataclasses import dataclass
from typing import Protocol

from plait.compute.port import Work
from plait.identity import SigningKey
from plait.ledger.progress import FrameCounts
from plait.node.overload import PRIORITY, REPLAY_PRIORITY
from plait.node.sessions import StageSession
from plait.node.wire import StageFrame
from plait.types import PeerId, SessionId
from plait.v1 import stage_pb2
from plait.v1.identity_pb2 import SignedEnvelope


@dataclass(frozen=True, slots=True)
class Job:
    """A frame that waits to be computed."""

    session: StageSession
    frame: StageFrame
    counts: FrameCounts
    sender: PeerId
    received_us: int
    """By the stage's monotonic clock."""

    @property
    def key(self) -> SessionId:
        """Jobs of one key are computed one after the other."""
        return self.session.id

    @property
    def client(self) -> PeerId:
        """Who pays: clients share a stage by tokens."""
        return self.session.terms.client

    @property
    def rows(self) -> int:
        """Positions."""
        return self.frame.rows

    @property
    def priority(self) -> int:
        """Lower is computed first."""
        return REPLAY_PRIORITY if self.frame.replay else PRIORITY[self.session.terms.qos]

    @property
    def live(self) -> bool:
        """Whether its result still counts."""
        session = self.session
        return session.phase == "live" and session.terms.epoch == self.frame.epoch

    def work(self) -> Work:
        """What the backend is given."""
        return Work(
            session=self.session.id,
            first_position=self.frame.first_position,
            ids=self.frame.ids,
            hidden=self.frame.hidden,
            sample=self.frame.sample,
            drafts=self.frame.drafts,
            embedding=self.frame.embedding,
            scored=self.frame.scored,
        )


class Links(Protocol):
    """Messages to neighbours; each call raises ``NetworkError`` or ``CapacityError`` at once."""

    def send_down(self, peer: PeerId, message: stage_pb2.LinkRequest) -> None:
        """To a stage that we feed, on our link to it."""

    def send_up(self, peer: PeerId, message: stage_pb2.LinkResponse) -> None:
        """To a peer that has a link to us: the stage that feeds us, or the client."""

    def has_room(self, peer: PeerId) -> bool:
        """Whether a replay may go on: the link to a stage that we feed is not congested."""


class Worker(Protocol):
    """Computes jobs and hands each, with its outcome, to ``Stage.finish``."""

    @property
    def queued(self) -> int:
        """Jobs that wait."""

    def submit(self, job: Job) -> None:
        """Queue a job; raises ``CapacityError``."""


class Settlement(Protocol):
    """Presents vouchers to the ledger."""

    @property
    def key(self) -> SigningKey:
        """The ledger key that signs receipts."""

    @property
    def cert(self) -> SignedEnvelope:
        """The NodeKeyCert of that key."""

    def settle_later(self, session: StageSession) -> None:
        """Present the session's best voucher, if it has one."""
