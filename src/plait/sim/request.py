"""What a user asks of the simulated network, and what came of it."""

from dataclasses import dataclass, field

from plait.client.actions import Failed, Finished
from plait.client.epoch import Order
from plait.client.session import SessionCore
from plait.sim.engine import Violation
from plait.sim.model import Question
from plait.types import Digest
from plait.v1.identity_pb2 import SignedEnvelope


@dataclass(slots=True)
class Request:
    """What a user asks, and what came of it."""

    question: Question
    order: Order
    reference: tuple[int, ...]
    hedge_share: float = 0.0
    core: SessionCore | None = None
    """Of the session that answers."""
    cores: list[SessionCore] = field(default_factory=list)
    """Of all its sessions: a hedged request may have two."""
    delivered: list[int] = field(default_factory=list)
    outcome: Finished | Failed | None = None
    events: int = 0
    vanished: bool = False
    """The client died on the way."""
    began_us: int = 0
    ended_us: int = 0
    envelopes: dict[Digest, SignedEnvelope] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.vanished or self.outcome is not None

    def deliver(self, token_id: int) -> None:
        """Take a token of the answer; raises ``Violation`` for one that is not the reference's."""
        place = len(self.delivered)
        self.delivered.append(token_id)
        if self.reference[place : place + 1] != (token_id,):
            raise Violation(
                "tokens", f"token {place} is {token_id}, not {self.reference[place : place + 1]}"
            )
