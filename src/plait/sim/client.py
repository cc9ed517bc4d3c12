"""A client: production session cores behind modelled calls, links, lanes and timers.

It performs a core's actions in order and reports each outcome as an event, as
``plait.client.generation`` and ``pipeline`` do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from plait.client.actions import (
    Action,
    AskView,
    Cancelled,
    CloseEpoch,
    CloseStages,
    ConfirmStage,
    Event,
    Failed,
    Finished,
    LeaveStages,
    Note,
    OpenStages,
    Reserve,
    Send,
    SetTimer,
    ShowGrant,
    Started,
    Ticked,
    Viewed,
)
from plait.client.demand import Demand
from plait.client.driver import Deliver, Embedded
from plait.client.epoch import Order, Party
from plait.client.hedging import HedgeBudget
from plait.client.prefix import WarmRoutes
from plait.client.session import SessionCore
from plait.envelope import digest, seal
from plait.errors import PlaitError
from plait.network_file import NetworkFile
from plait.sim.asking import Asking, Ended
from plait.sim.authority import LEDGER
from plait.sim.client_pipeline import Pipeline
from plait.sim.engine import MS, Engine, S, Timer
from plait.sim.gossip import GossipPeer, Swarming
from plait.sim.host import START_MS
from plait.sim.keys import key_of, peer_of
from plait.sim.lanes import LaneDisk, Reserving
from plait.sim.model import SPANS
from plait.sim.network import Wires
from plait.sim.request import Request
from plait.testing.accounting import NETWORK_ID
from plait.types import PeerId
from plait.v1.ledger_pb2 import IssueOrder, IssueRequest

CHANGE_WAIT_US = 3 * S
RETRY_US = 300 * MS
SETTLE_US = 3 * S
"""How long a client waits for a view of every layer, as ``net.watch`` does."""
CREDIT = 10**9


def _ignore(request: Request) -> None:
    """Until somebody listens."""


class ClientHost(Swarming):
    """Asks its requests one after the other, once it has credit."""

    def __init__(
        self,
        engine: Engine,
        wires: Wires,
        name: str,
        network: NetworkFile,
        *,
        watches: Sequence[str],
        addresses: Mapping[PeerId, str],
    ) -> None:
        super().__init__(engine, name)
        self.requests: list[Request] = []
        self.lanes = LaneDisk()
        self.warm = WarmRoutes()
        self.asking: Asking | None = None
        self._request: Request | None = None
        self.on_event: Callable[[Request], None] = _ignore
        """Told before each event that a session takes."""
        self.network = network
        self._wires = wires
        self._watches, self._addresses = watches, addresses
        self._issued = False
        self.demand, self.hedges = Demand(), HedgeBudget()

    def on_start(self) -> None:
        """Watch the network, get credit, go on with the next request."""
        self.lanes.unlock_all()
        self.asking = self._request = None
        self.demand, self.hedges = Demand(), HedgeBudget()
        self._started_us = self.engine.now_us
        self.gossip = GossipPeer(
            self,
            self._wires,
            self.network,
            key_of(self.name),
            neighbours=self._watches,
            addresses=self._addresses,
            publishes=False,
            on_change=self._changed,
        )
        self.reserving = Reserving(self, self._wires, self.lanes, key_of(f"{self.name} ledger"))
        self.after(self.engine.random.randrange(S), "", self._begin)

    def on_crash(self) -> None:
        """The request under way is lost with its process."""
        if self._request is not None:
            self._request.vanished = True
            self.asking = self._request = None

    def name_of(self, peer: PeerId) -> str:
        """The host behind a peer id."""
        return self._addresses[peer]

    @property
    def done(self) -> bool:
        """Whether every request is over."""
        return all(request.over for request in self.requests)

    def _begin(self) -> None:
        if not self._issued:
            self._issue()
            return
        waiting = [request for request in self.requests if not request.over]
        waited_us = self.engine.now_us - self._started_us
        if not self._sees_all_layers() and waited_us < SETTLE_US:
            self.after(RETRY_US, "", self._begin)
        elif waiting:
            self._ask(waiting[0])

    def _ask(self, request: Request) -> None:
        def make(
            order: Order, take: Callable[[int], None], ended: Callable[[Ended], None]
        ) -> _Session:
            return _Session(self, self._wires, self._addresses, request, order, take, ended)

        def over(core: SessionCore, outcome: Ended) -> None:
            request.core, request.outcome = core, outcome
            request.ended_us = self.engine.now_us
            self.asking = self._request = None
            self.after(self.engine.random.randrange(S), "", self._begin)

        request.began_us = self.engine.now_us
        self._request = request
        self.asking = Asking(
            self,
            request.order,
            make,
            me=peer_of(self.name),
            view=self.gossip.view,
            demand=self.demand,
            hedges=self.hedges,
            share=request.hedge_share,
            deliver=request.deliver,
            over=over,
        )
        request.cores = self.asking.cores
        self.asking.start()

    def _sees_all_layers(self) -> bool:
        offers = self.gossip.view().offers.values()
        return all(any(offer.span.contains(span) for offer in offers) for span in SPANS)

    def _issue(self) -> None:
        order = IssueOrder(
            network_id=NETWORK_ID,
            account=peer_of(self.name),
            amount=CREDIT,
            order_id=digest(self.name.encode())[:16],
            issued_ms=START_MS,
        )

        def answered(answer: object) -> None:
            self._issued = not isinstance(answer, PlaitError)
            self.after(RETRY_US, "", self._begin)

        request = IssueRequest(order=seal(key_of("issuer"), order))
        ledger = self._wires.hosts[LEDGER]
        self._wires.call(self, ledger, "Issue", request, 5 * S, answered)

    def _changed(self) -> None:
        if self.asking is not None:
            self.asking.view_changed()


class _Session:
    """One core at work."""

    def __init__(
        self,
        host: ClientHost,
        wires: Wires,
        addresses: Mapping[PeerId, str],
        request: Request,
        order: Order,
        take: Callable[[int], None],
        ended: Callable[[Ended], None],
    ) -> None:
        self.request = request
        self._host, self._addresses = host, addresses
        self._take_token, self._ended = take, ended
        self._pipeline = Pipeline(host, wires, addresses, self._report)
        self._timer: Timer | None = None
        self._view_wanted = False
        self._over = False
        if order.reuse is not None:
            order = replace(order, warm=host.warm.find(order.reuse.names(order.prompt_ids)))
        self.core = SessionCore(
            order,
            Party(
                network_id=NETWORK_ID,
                authorities=host.network.authorities,
                peer=peer_of(host.name),
                ledger_key=key_of(f"{host.name} ledger"),
            ),
            host.engine.random.randbytes,
            demand=host.demand,
        )

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """The stages of the pipeline that is open or being opened."""
        return self._pipeline.peers

    def start(self) -> None:
        """Begin."""
        self._report(Started())

    def cancel(self) -> None:
        """Nobody wants its answer any more."""
        self._report(Cancelled())

    # Events and actions ---------------------------------------------------------------

    def _report(self, event: Event) -> None:
        """Events are taken one after the other, never within an action."""
        if not self._over:
            self._host.after(0, "", lambda: self._take(event))

    def _take(self, event: Event) -> None:
        if self._over:
            return
        host = self._host
        self.request.events += 1
        host.on_event(self.request)
        if self._over or not host.running:
            return
        if not isinstance(event, Viewed | Ticked):
            host.engine.note(f"{host.name}: {_event_text(event, self._addresses)}")
        for action in self.core.handle(event, host.now_ms()):
            if not isinstance(action, SetTimer | AskView):
                host.engine.note(f"{host.name} → {_action_text(action, self._addresses)}")
            self._perform(action)

    def _perform(self, action: Action) -> None:
        match action:
            case Embedded():
                pass
            case Deliver():
                self._take_token(action.token_id)
            case SetTimer():
                self._set_timer(action.at_ms)
            case AskView():
                self._ask_view(action)
            case Reserve():
                self._host.reserving.reserve(action, self._report)
            case Note():
                pass
            case OpenStages():
                self._pipeline.open(action)
            case ConfirmStage():
                self._pipeline.confirm(action)
            case ShowGrant():
                self._pipeline.show(action)
            case CloseEpoch():
                self._pipeline.close_epoch(action)
            case Send():
                self._pipeline.send(action)
            case LeaveStages():
                self._pipeline.leave(action)
            case CloseStages():
                if action.prefix:
                    self._host.warm.note(action.prefix, self.core.epoch.stages)
                self._pipeline.close(action)
            case Finished() | Failed():
                self._end(action)

    def _end(self, action: Finished | Failed) -> None:
        self._over = True
        self._set_timer(None)
        self._ended(action)

    def _set_timer(self, at_ms: int | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if at_ms is not None:
            delay_us = max(at_ms - self._host.now_ms(), 0) * MS
            self._timer = self._host.after(delay_us, "", lambda: self._report(Ticked()))

    def _ask_view(self, action: AskView) -> None:
        if action.when_changed:
            self._view_wanted = True
            self._host.after(CHANGE_WAIT_US, "", self.view_changed)
        else:
            self._report_view()

    def view_changed(self) -> None:
        """The view may have changed: report it if that was asked for."""
        if self._view_wanted:
            self._view_wanted = False
            self._report_view()

    def _report_view(self) -> None:
        gossip = self._host.gossip
        for envelope in gossip.membership.envelopes():
            self.request.envelopes[digest(envelope.payload)] = envelope
        self._report(Viewed(gossip.view()))


def _event_text(event: Event, addresses: Mapping[PeerId, str]) -> str:
    peer = getattr(event, "peer", None)
    words = [type(event).__name__]
    if peer is not None:
        words.append(addresses[peer])
    for name in ("epoch", "traversal", "ids", "positions", "retained", "code", "reason", "error"):
        if (value := getattr(event, name, None)) is not None:
            words.append(f"{name}={value}")
    return " ".join(words)


def _action_text(action: Action, addresses: Mapping[PeerId, str]) -> str:
    match action:
        case Send():
            frame = action.frame
            end = frame.first_position + frame.rows
            kind = "replay" if frame.replay else "frame"
            return f"{kind} e{action.epoch} t{frame.traversal} [{frame.first_position}, {end})"
        case Deliver():
            return f"deliver {action.token_id}"
        case OpenStages():
            stages = [
                f"{addresses[one.peer]} {one.span}{' rebuilt' if one.rebuilt else ''}"
                for one in action.terms.stages
            ]
            position = action.terms.resume_position
            return f"open e{action.terms.epoch} at {position}: {', '.join(stages)}"
        case Note():
            return f"{action.event}: {action.reason}"
        case Finished():
            return f"finished: {action.reason}"
        case Failed():
            return f"failed: {action.error}"
        case _:
            peer = getattr(action, "peer", None)
            return type(action).__name__ + (f" {addresses[peer]}" if peer is not None else "")
