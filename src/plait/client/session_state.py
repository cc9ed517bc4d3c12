"""What a session is made of, how its epochs are opened and how it ends. Pure.

The lowest of four layers that make up ``client.session.SessionCore``: each knows only those below.
"""

from collections.abc import Callable, Iterable
from enum import Enum, auto

from plait.client.actions import Action, Call, CloseStages, Failed, Finished, SetTimer
from plait.client.calls import Calls
from plait.client.credit import BoundedCredit
from plait.client.demand import Demand
from plait.client.driver import Drafter, Driver, FinishReason, SendFrame
from plait.client.epoch import Epoch, Order, Party
from plait.client.opening import Opening
from plait.client.pace import Pace
from plait.client.prefix import Reuse
from plait.client.recovery import Recovery
from plait.client.reroute import Asked
from plait.client.suspects import Kind
from plait.errors import LocalProtocolError, PlaitError
from plait.ledger.client_books import ClientBooks
from plait.types import PeerId
from plait.v1.identity_pb2 import SignedEnvelope

MOVE_RETRY_MS = 2_000


class Phase(Enum):
    """Where a session is; the picture is in ``client.session``."""

    PLANNING = auto()
    OPENING = auto()
    RESERVING = auto()
    CONFIRMING = auto()
    LIVE = auto()
    CLOSING = auto()
    REROUTING = auto()
    OVER = auto()


class SessionState:
    """One session's state. ``entropy`` gives unguessable bytes for its id and salts; ``demand`` is
    shared by all sessions of the client."""

    def __init__(
        self,
        order: Order,
        party: Party,
        entropy: Callable[[int], bytes],
        drafter: Drafter | None = None,
        demand: Demand | None = None,
    ) -> None:
        self.order = order
        self.epochs: list[Epoch] = []
        """Every epoch that came as far as to be confirmed."""
        self.driver = Driver(
            order.prompt_ids,
            order.route.max_tokens,
            frozenset(order.sampling.end_ids),
            order.accounting,
            order.vocabulary_size,
            drafter,
            embed=order.embed,
            score=order.score,
        )
        self._party = party
        self._entropy = entropy
        self._asked = Asked(order.model, order.route, party.peer)
        self._phase = Phase.PLANNING
        self._now_ms = 0
        self._out: list[Action] = []
        self._demand = demand or Demand()
        self._opening = Opening(order, party, self._asked, entropy, self._demand)
        self._newest: Epoch | None = None
        self._driven = 0
        self._calls = Calls("open", 0)
        self._books: ClientBooks | None = None
        self._new_voucher: SignedEnvelope | None = None
        self._credit = BoundedCredit()
        self._held: SendFrame | None = None
        self._recovery = Recovery()
        self._ending: PlaitError | None = None
        self._pace: Pace | None = None
        self._sent_ms = 0
        self._silent_at_ms = 0
        self._unwanted: dict[PeerId, Kind] = {}
        self._move_asked_ms = -MOVE_RETRY_MS

    @property
    def books(self) -> ClientBooks:
        """The accounts of the session; raises ``LocalProtocolError`` before it is confirmed."""
        if self._books is None:
            raise LocalProtocolError("no epoch was confirmed")
        return self._books

    @property
    def cost_microcredits(self) -> int:
        """What the session's vouchers promise by now; final once it is over."""
        return self._books.cost if self._books is not None else 0

    @property
    def epoch(self) -> Epoch:
        """The newest epoch; raises ``LocalProtocolError`` before the first."""
        if self._newest is None:
            raise LocalProtocolError("no epoch is open")
        return self._newest

    def _is_current(self, number: int) -> bool:
        return self._newest is not None and self._newest.number == number

    def _await(self, name: Call, peers: Iterable[PeerId]) -> None:
        self._calls = Calls(name, self.epoch.number, set(peers))

    def _be_patient(self, patience_ms: int) -> None:
        self._sent_ms = self._now_ms
        self._silent_at_ms = self._now_ms + patience_ms
        self._out.append(SetTimer(self._silent_at_ms))

    def _open(self, epoch: Epoch) -> None:
        self._newest = epoch
        self._phase = Phase.OPENING
        self._await("open", epoch.peers)
        ask = self._opening.ask_stages(epoch, self.driver.drawn, self._now_ms)
        self._out += [ask, SetTimer(self._now_ms + ask.timeout_ms)]

    def _finish(self, reason: FinishReason) -> None:
        self._close(self.epoch.peers, reason, reuse=self.order.reuse)
        self._out.append(Finished(reason))

    def _fail(self, error: PlaitError) -> None:
        peers = {peer for epoch in self.epochs[-1:] for peer in epoch.peers}
        if self._newest is not None:
            self._close(tuple(sorted(peers.union(self._newest.peers))), error.code)
        self._phase = Phase.OVER
        self._out.append(Failed(error))

    def _close(self, peers: tuple[PeerId, ...], reason: str, reuse: Reuse | None = None) -> None:
        self._keep_evidence()
        voucher = self._books.voucher if self._books is not None else None
        if self._driven:
            self._demand.ended(peers, self.order.qos)
        else:
            self._demand.let_go(peers, self.order.qos)
        self._phase = Phase.OVER
        names: tuple[bytes, ...] = ()
        if reuse is not None:
            known = (*self.order.prompt_ids, *self.driver.drawn)[: self.driver.position]
            names = reuse.names(known)
        self._out += [
            SetTimer(None),
            CloseStages(
                self.epoch.number,
                peers,
                voucher,
                reason,
                last=True,
                prefix=names,
                keep_alive_s=reuse.keep_alive_s if reuse is not None else 0,
            ),
        ]

    def _keep_evidence(self) -> None:
        """Note what the epoch leaves behind, if it was driven."""
        epoch, answered = self.epoch, self.driver.answered
        if epoch.number != self._driven or answered is None:
            return
        epoch.evidence = self.books.evidence()
        epoch.frames = tuple(
            frame for frame in self.driver.frames if frame.replay or frame.traversal <= answered
        )
