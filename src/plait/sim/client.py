"""A client: production session cores behind modelled calls, links, lanes and timers.

It performs a core's actions in order and reports each outcome as an event, as
``plait.client.generation`` and ``pipeline`` do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from plait.client.actions import (
    Action,
    AskView,
    Call,
    Cancelled,
    CloseEpoch,
    CloseStages,
    ConfirmStage,
    EpochClosed,
    Event,
    Failed,
    Faulted,
    Finished,
    GrantShown,
    LeaveStages,
    LinkLost,
    Note,
    OpenStages,
    Reserve,
    Resulted,
    Send,
    SetTimer,
    ShowGrant,
    StageConfirmed,
    StageFailed,
    StageOpened,
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
from plait.errors import NetworkError, PlaitError, RemoteProtocolError
from plait.network_file import NetworkFile
from plait.sim.asking import Asking, Ended
from plait.sim.authority import LEDGER
from plait.sim.engine import MS, Engine, S, Timer, Violation
from plait.sim.gossip import GossipPeer, Swarming
from plait.sim.host import START_MS
from plait.sim.keys import cert_of, key_of, peer_of
from plait.sim.lanes import LaneDisk, Reserving
from plait.sim.model import SPANS, Question
from plait.sim.network import Connection, Wires
from plait.sim.stage import DISHONEST, accept_link, check_fault
from plait.testing.accounting import NETWORK_ID
from plait.types import Digest, PeerId
from plait.v1 import session_pb2, stage_pb2
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import IssueOrder, IssueRequest

CONFIRM_TIMEOUT_US = 6 * S
CLOSE_TIMEOUT_US = 6 * S
CHANGE_WAIT_US = 3 * S
RETRY_US = 300 * MS
SETTLE_US = 3 * S
"""How long a client waits for a view of every layer, as ``net.watch`` does."""
CREDIT = 10**9


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
        self._host, self._wires, self._addresses = host, wires, addresses
        self._take_token, self._ended = take, ended
        self.peers: tuple[PeerId, ...] = ()
        self._session_id = b""
        self._links: dict[PeerId, Connection] = {}
        self._timer: Timer | None = None
        self._view_wanted = False
        self._epoch = 0
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
                self._open(action)
            case ConfirmStage():
                self._confirm(action)
            case ShowGrant():
                self._show(action)
            case CloseEpoch():
                self._close_epoch(action)
            case Send():
                self._send(action)
            case LeaveStages():
                self._end_on(action.epoch, action.peers, action.voucher, "replaced")
            case CloseStages():
                self._close(action)
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

    # Calls ----------------------------------------------------------------------------

    def _call(
        self,
        epoch: int,
        peer: PeerId,
        call: Call,
        request: session_pb2.OpenRequest
        | session_pb2.ConfirmRequest
        | session_pb2.CloseEpochRequest,
        timeout_us: int,
        done: Callable[[object], None],
    ) -> None:
        session_id = self._session_id

        def answered(answer: object) -> None:
            if session_id != self._session_id:
                return
            if isinstance(answer, RemoteProtocolError) and call == "open":
                raise Violation("protocol", f"{self._addresses[peer]}: {answer}")
            if isinstance(answer, PlaitError):
                failed = StageFailed(epoch, peer, call, "peer-unreachable", str(answer), gone=True)
                self._report(failed)
            elif isinstance(
                answer, session_pb2.OpenResponse | session_pb2.ConfirmResponse
            ) and answer.HasField("refusal"):
                refusal = answer.refusal
                if refusal.code in DISHONEST:
                    raise Violation("protocol", f"{self._addresses[peer]}: {refusal.reason}")
                self._report(
                    StageFailed(
                        epoch,
                        peer,
                        call,
                        refusal.code,
                        f"refused: {refusal.reason}",
                        gone=False,
                        retry_after_ms=refusal.retry_after_ms,
                    )
                )
            else:
                done(answer)

        self._wires.call(
            self._host,
            self._wires.hosts[self._addresses[peer]],
            f"{call} e{epoch}",
            request,
            timeout_us,
            answered,
        )

    def _open(self, action: OpenStages) -> None:
        terms = action.terms
        self._session_id, self._epoch = terms.session_id, terms.epoch
        self.peers = tuple(stage.peer for stage in terms.stages)
        for index, offer in enumerate(action.offers):
            request = session_pb2.OpenRequest(
                session_open=action.opening,
                client_cert=cert_of(self._host.name),
                stage_index=index,
                context_ids=action.context_ids if index == len(action.offers) - 1 else (),
                prefix_digests=action.prefix,
            )
            peer = offer.peer

            def opened(answer: object, peer: PeerId = peer) -> None:
                assert isinstance(answer, session_pb2.OpenResponse)
                self._report(
                    StageOpened(terms.epoch, peer, answer.stage_cert, answer.reusable_tokens)
                )

            self._call(terms.epoch, peer, "open", request, action.timeout_ms * MS, opened)

    def _confirm(self, action: ConfirmStage) -> None:
        request = session_pb2.ConfirmRequest(
            session_id=self._session_id,
            epoch=action.epoch,
            reservation=action.reservation,
            grant=action.grant,
            voucher=action.voucher,
            cached_tokens=action.cached_tokens,
        )

        def confirmed(answer: object) -> None:
            if action.link:
                self._link(action)
            else:
                self._report(StageConfirmed(action.epoch, action.peer))

        self._call(action.epoch, action.peer, "confirm", request, CONFIRM_TIMEOUT_US, confirmed)

    def _show(self, action: ShowGrant) -> None:
        request = session_pb2.ConfirmRequest(
            session_id=self._session_id,
            epoch=action.epoch,
            reservation=action.reservation,
            grant=action.grant,
        )
        self._call(
            action.epoch,
            action.peer,
            "grant",
            request,
            CONFIRM_TIMEOUT_US,
            lambda answer: self._report(GrantShown(action.epoch, action.peer)),
        )

    def _close_epoch(self, action: CloseEpoch) -> None:
        request = session_pb2.CloseEpochRequest(
            session_id=self._session_id,
            epoch=action.epoch,
            traversal=action.traversal,
            position=action.position,
        )
        for peer in action.peers:

            def closed(answer: object, peer: PeerId = peer) -> None:
                assert isinstance(answer, session_pb2.CloseEpochResponse)
                self._report(
                    EpochClosed(
                        epoch=action.epoch,
                        peer=peer,
                        receipt=answer.receipt if answer.HasField("receipt") else None,
                        positions=answer.positions,
                        retained=answer.retained,
                        traversals_received=answer.traversals_received,
                        traversals_sent=answer.traversals_sent,
                    )
                )

            timeout_us = action.timeout_ms * MS
            self._call(action.epoch, peer, "close-epoch", request, timeout_us, closed)

    def _close(self, action: CloseStages) -> None:
        """Nothing of this session is reported any more; the next one may have another id."""
        self._end_on(
            action.epoch, action.peers, action.voucher, action.reason, prefix=action.prefix
        )
        if action.prefix:
            self._host.warm.note(action.prefix, self.core.epoch.stages)
        self._session_id = b""
        links, self._links = self._links, {}
        for link in links.values():
            link.close(self._host.name)

    def _end_on(
        self,
        epoch: int,
        peers: tuple[PeerId, ...],
        voucher: SignedEnvelope | None,
        reason: str,
        *,
        prefix: tuple[bytes, ...] = (),
    ) -> None:
        request = session_pb2.CloseRequest(
            session_id=self._session_id,
            epoch=epoch,
            voucher=voucher,
            reason=reason,
            prefix_digests=prefix,
        )
        for peer in peers:
            self._wires.call(
                self._host,
                self._wires.hosts[self._addresses[peer]],
                f"close e{epoch}",
                request,
                CLOSE_TIMEOUT_US,
                lambda answer: None,
            )

    # Links ----------------------------------------------------------------------------

    def _link(self, action: ConfirmStage) -> None:
        peer, name = action.peer, self._host.name
        link = self._links.get(peer)
        confirmed, session_id = StageConfirmed(action.epoch, peer), self._session_id
        if link is not None and link.is_open(name):
            self._report(confirmed)
            return

        def dialled(answer: Connection | NetworkError) -> None:
            if isinstance(answer, NetworkError):
                if session_id != self._session_id:
                    return
                self._report(
                    StageFailed(
                        action.epoch, peer, "confirm", "peer-unreachable", str(answer), gone=True
                    )
                )
                return
            answer.sides[name].end = _ClientEnd(self, peer, answer)
            if session_id != self._session_id:
                answer.close(name)
                return
            self._links[peer] = answer
            self._report(confirmed)

        listener = self._wires.hosts[self._addresses[peer]]
        self._wires.connect(
            self._host, listener, "link", lambda link: accept_link(link, name), dialled
        )

    def _send(self, action: Send) -> None:
        frame, peer = action.frame, self.peers[0]
        message = stage_pb2.Frame(
            session_id=self._session_id,
            epoch=action.epoch,
            traversal=frame.traversal,
            first_position=frame.first_position,
            sample=frame.sample,
            close_chunk=frame.close_chunk,
            voucher=action.voucher,
            deadline_ms=action.deadline_ms,
            replay=frame.replay,
            draft_ids=frame.draft_ids,
        )
        if frame.ids:
            message.token_ids.ids.extend(frame.ids)
        try:
            self._links[peer].send(self._host.name, stage_pb2.LinkRequest(frame=message))
        except NetworkError as error:
            self._report(LinkLost(action.epoch, peer, str(error)))

    def received(self, peer: PeerId, message: object) -> None:
        """Something came on one of our links."""
        assert isinstance(message, stage_pb2.LinkResponse)
        if message.WhichOneof("kind") == "result":
            result = message.result
            if result.session_id == self._session_id and peer == self.peers[-1]:
                self._report(_result(result))
        else:
            fault = message.fault
            if fault.session_id == self._session_id:
                check_fault(fault, self._addresses)
                blamed = PeerId(fault.peer_id) if fault.peer_id in self.peers else peer
                self._report(Faulted(fault.epoch, peer, blamed, fault.code, fault.reason))

    def lost(self, peer: PeerId, connection: Connection, reason: str) -> None:
        """One of our links ended."""
        if self._links.get(peer) is connection and peer in (self.peers[0], self.peers[-1]):
            self._report(LinkLost(self._epoch, peer, reason))


@dataclass(frozen=True, slots=True)
class _ClientEnd:
    """Our end of a link to a stage."""

    session: _Session
    peer: PeerId
    connection: Connection

    def on_message(self, message: object) -> None:
        """A result or a fault."""
        self.session.received(self.peer, message)

    def on_broken(self, reason: str) -> None:
        """The stage is gone."""
        self.session.lost(self.peer, self.connection, reason)


def _result(message: stage_pb2.TokenResult) -> Resulted:
    return Resulted(
        epoch=message.epoch,
        traversal=message.traversal,
        ids=tuple(message.ids),
        logprobs=tuple(message.logprobs),
        receipts=tuple(message.receipts),
        statement=message.draws if message.HasField("draws") else None,
        stage_us=tuple(message.stage_us),
    )


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
