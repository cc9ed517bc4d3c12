"""One session's whole course: plan, open, reserve, drive, reroute, close. Pure.

``handle(event, now_ms)`` changes the state and returns actions; no clock, no socket, no
randomness of its own. Tokens are the ``Driver``'s business, signatures the
``ClientBooks``'. What can go wrong ends in ``_trouble``: the epoch is closed on every stage
that answers, the cut is paid for, the router fills the gap, and the driver goes on where
the last answer ended. Nothing that was delivered changes, and no reroute waits for the
ledger.

    PLANNING → OPENING → RESERVING → CONFIRMING → LIVE → OVER
                  ↑                       │         │
              REROUTING ←──── CLOSING ←───┴─────────┘
"""

from collections.abc import Callable, Iterable, Mapping
from enum import Enum, auto

from plait.client.actions import (
    Action,
    AskView,
    Call,
    Cancelled,
    CloseEpoch,
    CloseStages,
    Drafted,
    EpochClosed,
    Event,
    Failed,
    Faulted,
    Finished,
    Granted,
    GrantShown,
    LeaveStages,
    LinkLost,
    Note,
    ReservationSigned,
    ReserveFailed,
    Resulted,
    Send,
    SetTimer,
    StageConfirmed,
    StageFailed,
    StageOpened,
    Started,
    Stopped,
    Ticked,
    Viewed,
)
from plait.client.calls import Answer, Calls
from plait.client.credit import BoundedCredit
from plait.client.demand import Demand
from plait.client.driver import (
    Drafter,
    Driver,
    Extra,
    Finish,
    FinishReason,
    SendFrame,
)
from plait.client.epoch import Epoch, Order, Party
from plait.client.opening import Opening
from plait.client.pace import Pace
from plait.client.prefix import Reuse
from plait.client.recovery import Recovery
from plait.client.reroute import Asked, next_terms
from plait.client.suspects import Kind
from plait.errors import (
    LocalProtocolError,
    PlaitError,
    RemoteProtocolError,
    SessionLost,
    VerificationError,
)
from plait.ledger.client_books import ClientBooks
from plait.ledger.terms import SessionTerms
from plait.types import PeerId
from plait.v1.identity_pb2 import SignedEnvelope

CONFIRM_TIMEOUT_MS = 6_000
CLOSE_EPOCH_TIMEOUT_MS = 700
FRAME_TTL_MS = 60_000
DRAFTS_WAIT_MS = 500
"""The longest that a frame waits for the drafter."""
WAIT_RETRY_MS = 500
TROUBLE_FACTOR = 3
"""Reroutes that bring no token end after so many times the wait for a replica."""
NEIGHBOUR_RETRY_MS = 450
MOVE_RETRY_MS = 2_000
MOVE_GAIN = 0.7
"""A slow stage is left for a route that takes at most this share of the time."""


class _Phase(Enum):
    PLANNING = auto()
    OPENING = auto()
    RESERVING = auto()
    CONFIRMING = auto()
    LIVE = auto()
    CLOSING = auto()
    REROUTING = auto()
    OVER = auto()


class SessionCore:
    """One session. ``entropy`` gives unguessable bytes for its id and salts; ``demand`` is
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
        self._phase = _Phase.PLANNING
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
    def epoch(self) -> Epoch:
        """The newest epoch; raises ``LocalProtocolError`` before the first."""
        if self._newest is None:
            raise LocalProtocolError("no epoch is open")
        return self._newest

    def handle(self, event: Event, now_ms: int) -> list[Action]:
        """Take an event; return what to do, in order."""
        if self._phase is _Phase.OVER:
            return []
        self._now_ms, self._out = now_ms, []
        match event:
            case Started():
                self._demand.request(now_ms)
                self._out.append(AskView())
            case Viewed():
                self._on_view(event)
            case StageOpened() | StageConfirmed() | GrantShown() | EpochClosed() | StageFailed():
                self._on_answer(event)
            case ReservationSigned() | ReserveFailed():
                self._on_reserved(event)
            case Granted():
                self._on_grant(event)
            case Resulted():
                self._on_result(event)
            case Faulted():
                self._on_fault(event)
            case LinkLost():
                if self._is_current(event.epoch):
                    self._lose(event.peer, f"the link to {event.peer} ended: {event.reason}")
            case Ticked():
                self._on_tick()
            case Drafted():
                if self._phase is _Phase.LIVE:
                    self._perform(self.driver.drafted())
            case Stopped():
                self.driver.stop()
            case Cancelled():
                self._end_early(SessionLost("the session was cancelled"))
        return self._out

    def _on_view(self, event: Viewed) -> None:
        match self._phase:
            case _Phase.PLANNING:
                self._plan_first(event)
            case _Phase.REROUTING:
                self._plan_again(event)
            case _Phase.LIVE if self._unwanted:
                self._try_to_move(event)

    def _on_answer(self, event: Answer) -> None:
        """Note an answer of the calls that are out; with the last of them, go on."""
        calls = self._calls
        if not self._is_current(event.epoch) or not calls.take(event):
            return
        match event:
            case StageOpened():
                self._take_cert(event)
            case EpochClosed():
                self._recovery.states[event.peer] = event
        if calls.name == "close-epoch":
            if calls.due <= self._recovery.excluded:
                self._cut()
        elif not calls.due:
            self._answered()

    def _answered(self) -> None:
        if self._calls.failed:
            self._calls_failed()
            return
        match self._calls.name:
            case "open":
                self._opened()
            case "confirm":
                self._go_live()
            case "grant":
                self._grant_shown()

    def _calls_failed(self) -> None:
        if self._driven == 0:
            self._try_another_route(self._calls)
        else:
            first = self._calls.first_failure
            self._trouble(self._calls.kinds, f"{first.peer}: {first.reason}")

    def _on_tick(self) -> None:
        match self._phase:
            case _Phase.LIVE if self.driver.thinking and self._now_ms >= self._silent_at_ms:
                self._perform(self.driver.drafted(late=True))
            case _Phase.LIVE if self._now_ms >= self._silent_at_ms:
                waited_s = (self._now_ms - self._sent_ms) / 1000
                self._trouble({}, f"the pipeline was silent for {waited_s:.1f} s")
            case _Phase.LIVE:
                self._out.append(SetTimer(self._silent_at_ms))
            case _Phase.OPENING | _Phase.CONFIRMING:
                self._time_out_calls()
            case _Phase.CLOSING:
                self._cut()
            case _Phase.PLANNING | _Phase.REROUTING:
                self._out.append(AskView())

    def _time_out_calls(self) -> None:
        self._calls.fail(self._calls.due, "no answer in time")
        self._answered()

    # Opening ------------------------------------------------------------------------

    def _plan_first(self, event: Viewed) -> None:
        avoid = self._recovery.suspects.avoided(event.view, self._now_ms)
        try:
            epoch = self._opening.first_epoch(event.view, avoid, self._now_ms)
        except PlaitError as error:
            self._fail(error)
            return
        if epoch is None:
            self._out.append(SetTimer(self._now_ms + NEIGHBOUR_RETRY_MS))
        else:
            self._open(epoch)

    def _open(self, epoch: Epoch) -> None:
        self._newest = epoch
        self._phase = _Phase.OPENING
        self._await("open", epoch.peers)
        ask = self._opening.ask_stages(epoch, self.driver.drawn, self._now_ms)
        self._out += [ask, SetTimer(self._now_ms + ask.timeout_ms)]

    def _take_cert(self, event: StageOpened) -> None:
        try:
            self._opening.take_cert(event, self._now_ms)
        except (VerificationError, RemoteProtocolError) as error:
            self._calls.fail([event.peer], str(error))

    def _opened(self) -> None:
        reserve = self._opening.opened(self.epoch)
        self._phase = _Phase.RESERVING
        self._out.append(SetTimer(None))
        if reserve is not None:
            self._out.append(reserve)
        else:
            self._confirm()

    def _on_reserved(self, event: ReservationSigned | ReserveFailed) -> None:
        if not self._is_current(event.epoch):
            return
        if isinstance(event, ReserveFailed):
            self._end_early(event.error)
            return
        self.epoch.reservation = event.reservation
        if event.epoch > 1 and self._phase is _Phase.RESERVING:
            self._confirm()

    def _on_grant(self, event: Granted) -> None:
        epochs = self.epochs if self.epoch in self.epochs else [*self.epochs, self.epoch]
        try:
            epoch = self._opening.take_grant(event, epochs, self._now_ms)
        except PlaitError as error:
            self._end_early(error)
            return
        if epoch is None:
            return
        if self._phase is _Phase.RESERVING and epoch.number == 1:
            self._confirm()
        elif self._phase is _Phase.LIVE:
            self._show_grants()

    def _confirm(self) -> None:
        epoch = self.epoch
        terms = epoch.terms
        if self._books is None:
            self._books = ClientBooks(terms, self._party.ledger_key)
        else:
            self._books = self._books.next_epoch(terms)
        self.epochs.append(epoch)
        entered = set(epoch.entered)
        if epoch.grant is None:
            self._credit.enter(entered)
        self._phase = _Phase.CONFIRMING
        self._await("confirm", epoch.peers)
        self._out += epoch.confirmations(self.books.voucher, self._opening.start(epoch))
        self._out.append(SetTimer(self._now_ms + CONFIRM_TIMEOUT_MS))

    def _try_another_route(self, calls: Calls) -> None:
        """Nothing was delivered yet: let go of everybody and begin anew."""
        epoch = self.epoch
        self._out += [self._opening.refused(epoch, calls, self._now_ms), SetTimer(None)]
        for peer, kind in calls.kinds.items():
            self._recovery.exclude(epoch, peer, kind, self._now_ms)
        self._books = None
        if calls.name == "open":
            self._newest = None  # nothing was granted, and who holds is let go of above
        self.epochs.clear()
        exhausted = self._opening.exhausted
        if exhausted is not None:
            self._fail(exhausted)
            return
        self._phase = _Phase.PLANNING
        self._out.append(AskView())

    # Driving ------------------------------------------------------------------------

    def _go_live(self) -> None:
        epoch = self.epoch
        terms = epoch.terms
        self._phase = _Phase.LIVE
        self._driven = epoch.number
        self._credit.stay(terms)
        self.driver.may_draft = not any(stage.prices.rejected_draft for stage in terms.stages)
        self._pace = Pace(epoch.expected_us, epoch.plan.predicted.ttft_s * 1000)
        if epoch.number > 1:
            route = ", ".join(f"{stage.peer[-6:]} {stage.span}" for stage in terms.stages)
            self._out.append(Note("rerouted", f"epoch {epoch.number}: {route}"))
            self._perform(self.driver.resume(replay=terms.stages[0].rebuilt))
        else:
            self._perform(self.driver.start(self._opening.start(epoch)))
        self._show_grants()
        if self._unwanted:
            self._out.append(AskView())

    def _show_grants(self) -> None:
        shows = self._credit.shows(self.epochs, self.epoch.terms)
        if shows:
            self._await("grant", (show.peer for show in shows))
            self._out += shows

    def _grant_shown(self) -> None:
        self._credit.shown(show.peer for show in self._credit.shows(self.epochs, self.epoch.terms))
        held, self._held = self._held, None
        if held is not None:
            self._send(held)

    def _perform(self, actions: Iterable[SendFrame | Extra | Finish]) -> None:
        for action in actions:
            match action:
                case SendFrame():
                    self._send(action)
                case Finish():
                    self._finish(action.reason)
                case _:
                    self._out.append(action)

    def _send(self, frame: SendFrame) -> None:
        terms = self.epoch.terms
        if not self._credit.covers(frame, terms, self.books.counts):
            self._held = frame
            self._be_patient(FRAME_TTL_MS)
            return
        self.books.sent(
            frame.traversal,
            frame.first_position,
            frame.ids,
            drafts=frame.drafts,
            replay=frame.replay,
        )
        deadline_ms = self._now_ms + FRAME_TTL_MS
        self._out.append(Send(terms.epoch, frame, self._new_voucher, deadline_ms))
        self._new_voucher = None
        if self._pace is not None and not frame.replay:
            self._be_patient(self._pace.patience_ms(decode=frame.rows <= 1 + frame.drafts))

    def _be_patient(self, patience_ms: int) -> None:
        self._sent_ms = self._now_ms
        self._silent_at_ms = self._now_ms + patience_ms
        self._out.append(SetTimer(self._silent_at_ms))

    def _on_result(self, event: Resulted) -> None:
        if not self._is_current(event.epoch) or self._phase is not _Phase.LIVE:
            return
        driver, sent = self.driver, self.driver.in_flight
        try:
            if not driver.is_due(event.traversal, event.ids, event.logprobs, event.extras):
                return
            self.books.drawn(sent.traversal, sent.first_position, event.ids, event.statement)
        except (RemoteProtocolError, VerificationError) as error:
            self._trouble({self.epoch.peers[-1]: "gone"}, str(error))
            return
        self._recovery.progressed()
        elapsed_ms = self._elapsed_ms(sent)
        actions = driver.on_result(
            event.traversal, event.ids, event.logprobs, elapsed_ms, event.extras
        )
        liar = self._take_receipts(sent, event)
        if liar is not None:
            self._perform(one for one in actions if isinstance(one, Extra))
            self._trouble({liar: "gone"}, f"a receipt of {liar} does not hold")
            return
        self._perform(actions)
        if self._phase is _Phase.LIVE:
            if driver.thinking:
                self._be_patient(DRAFTS_WAIT_MS)
            self._note_pace(event, elapsed_ms)

    def _elapsed_ms(self, sent: SendFrame) -> float | None:
        """How long a decode traversal took; None for the first of an epoch, and the prompt's."""
        if sent.rows != 1 + sent.drafts or sent.traversal == self.epoch.terms.resume_position:
            return None
        return self._now_ms - self._sent_ms

    def _take_receipts(self, sent: SendFrame, event: Resulted) -> PeerId | None:
        """Check the receipts of a closed chunk; returns a peer whose receipt is false."""
        if not sent.close_chunk:
            return None
        try:
            self._new_voucher = self.books.accept_receipts(
                event.receipts, sent.traversal, self._now_ms
            )
        except (RemoteProtocolError, VerificationError):
            return next(iter(self.books.faults), self.epoch.peers[-1])
        return None

    def _note_pace(self, event: Resulted, elapsed_ms: float | None) -> None:
        terms, pace = self.epoch.terms, self._pace
        if pace is None or elapsed_ms is None:
            return
        pace.note(elapsed_ms, event.stage_us)
        slow = pace.straggler()
        if slow is not None:
            self._unwanted.setdefault(terms.stages[slow].peer, "slow")
        if self._unwanted and self._now_ms - self._move_asked_ms >= MOVE_RETRY_MS:
            self._ask_to_move()

    def _finish(self, reason: FinishReason) -> None:
        self._close(self.epoch.peers, reason, reuse=self.order.reuse)
        self._out.append(Finished(reason))

    # Trouble ------------------------------------------------------------------------

    def _on_fault(self, event: Faulted) -> None:
        if not self._is_current(event.epoch):
            return
        if event.code != "draining":
            # Who has lost the session may well begin anew, unlike who is out of reach.
            kind: Kind = "refused" if event.code == "unknown-session" else "gone"
            self._lose(event.blamed, f"{event.blamed} failed: {event.code}: {event.reason}", kind)
            return
        self._unwanted[event.blamed] = "leaving"
        if self._phase is _Phase.LIVE:
            self._ask_to_move()

    def _lose(self, peer: PeerId, reason: str, kind: Kind = "gone") -> None:
        """A stage is out of the epoch."""
        calls, recovery = self._calls, self._recovery
        match self._phase:
            case _Phase.LIVE:
                self._trouble({peer: kind}, reason)
            case _Phase.CLOSING:
                recovery.exclude(self.epoch, peer, kind, self._now_ms)
                if calls.due <= recovery.excluded:
                    self._cut()
            case _Phase.CONFIRMING:
                calls.fail([peer], reason)
                if not calls.due:
                    self._answered()

    def _trouble(self, blamed: Mapping[PeerId, Kind], reason: str) -> None:
        """Close the epoch on every stage; whoever answers may stay."""
        epoch = self.epoch
        self._recovery.begin(epoch, blamed, reason, self._now_ms)
        self._phase = _Phase.CLOSING
        self._held = None
        self._await("close-epoch", epoch.peers)
        traversal = self.driver.answered if self._driven == epoch.number else None
        timeout_ms, position = CLOSE_EPOCH_TIMEOUT_MS, self.driver.position
        self._out += [
            Note("rerouting", reason, tuple(blamed)),
            CloseEpoch(epoch.number, epoch.peers, traversal, position, timeout_ms),
            SetTimer(self._now_ms + timeout_ms),
        ]

    def _cut(self) -> None:
        """All who will answer have answered: pay for the cut, then find a way on."""
        epoch, driver = self.epoch, self.driver
        for peer in self._calls.due | self._calls.failed.keys():
            self._recovery.exclude(epoch, peer, "gone", self._now_ms)
        self._out.append(SetTimer(None))
        if self._driven == epoch.number:
            self._pay_cut(epoch)
            self._blame_the_stuck(epoch)
        if driver.finish is not None:
            self._finish(driver.finish)
        elif self._ending is not None:
            self._fail(self._ending)
        elif self._recovery.lasted_ms(self._now_ms) >= TROUBLE_FACTOR * self.order.replica_wait_ms:
            self._give_up("no pipeline gave another token")
        else:
            self._phase = _Phase.REROUTING
            self._out.append(AskView())

    def _pay_cut(self, epoch: Epoch) -> None:
        states, driver = self._recovery.states, self.driver
        receipts = [states[peer].receipt if peer in states else None for peer in epoch.peers]
        self.books.close_epoch(receipts, driver.answered, driver.position, self._now_ms)
        for peer in self.books.faults:
            self._recovery.exclude(epoch, peer, "gone", self._now_ms)
        self._keep_evidence()

    def _blame_the_stuck(self, epoch: Epoch) -> None:
        """Everybody answers, and yet no result came: who had the frame last?"""
        if self._recovery.excluded or not self.driver.awaiting:
            return
        peer = self._recovery.stuck(epoch, self.driver.in_flight.traversal)
        if peer is not None:
            self._recovery.exclude(epoch, peer, "slow", self._now_ms)

    def _plan_again(self, event: Viewed) -> None:
        epoch, recovery = self.epoch, self._recovery
        confirmed = epoch in self.epochs
        try:
            chosen, survivors = recovery.route(
                epoch, self._asked, event.view, self._now_ms, confirmed=confirmed
            )
        except PlaitError as error:
            self._wait_for_a_replica(error)
            return
        if not self.books.counts.prompt:
            self.driver.forget_cached()
        terms = next_terms(
            epoch.terms,
            chosen.stages,
            survivors,
            position=self.driver.position,
            counts=self.books.counts,
            promised=self.books.promised,
            salt=self._entropy(32),
        )
        self._leave(terms)
        old = {one.offer.digest: one.offer for one in survivors}
        new = {stage.offer.peer: stage.offer for stage in chosen.stages}
        offers = (old.get(stage.offer_digest, new[stage.peer]) for stage in terms.stages)
        self._open(self._opening.epoch(terms, chosen, tuple(offers), self._now_ms))

    def _leave(self, terms: SessionTerms) -> None:
        """Let go of who is in the route no more, so that a draining node is soon empty."""
        epoch, stays = self.epoch, {stage.peer for stage in terms.stages}
        gone = tuple(peer for peer in epoch.peers if peer not in stays)
        if gone:
            self._demand.ended(gone, self.order.qos)
            self._out.append(LeaveStages(epoch.number, gone, self.books.voucher))

    def _wait_for_a_replica(self, error: PlaitError) -> None:
        if self._recovery.lasted_ms(self._now_ms) < self.order.replica_wait_ms:
            retry_ms = self._now_ms + WAIT_RETRY_MS
            self._out += [
                Note("waiting", str(error)),
                AskView(when_changed=True),
                SetTimer(retry_ms),
            ]
            return
        self._give_up(f"nobody took the place: {error}")

    def _give_up(self, why: str) -> None:
        delivered = len(self.driver.token_ids)
        self._fail(
            SessionLost(
                f"{self._recovery.reason}; {why} ({delivered} tokens were delivered)",
                resumable_from=delivered,
                cost_microcredits=self.books.cost,
                remedy="run it again once the layers have a host: plait route MODEL --explain",
            )
        )

    # Moving off a stage that still works ----------------------------------------------

    def _ask_to_move(self) -> None:
        self._move_asked_ms = self._now_ms
        self._out.append(AskView())

    def _try_to_move(self, event: Viewed) -> None:
        """Leave the unwanted stages if there is a better way on without them."""
        epoch, position = self.epoch, self.driver.position
        unwanted = {peer: kind for peer, kind in self._unwanted.items() if peer in epoch.peers}
        # Who is slow is judged anew by the next results; who drains stays unwanted.
        self._unwanted = {peer: kind for peer, kind in unwanted.items() if kind == "leaving"}
        if not unwanted:
            return
        asked, now_ms = self._asked, self._now_ms
        try:
            better = self._recovery.route_without(
                epoch, asked, event.view, now_ms, unwanted.keys(), position
            )
        except PlaitError:
            return
        usual_ms = self._pace.traversal_ms if self._pace is not None else None
        gain = better.predicted.tpot_s * 1000 < MOVE_GAIN * (usual_ms or 0)
        if self._unwanted or gain:
            self._trouble(unwanted, f"moving off {', '.join(unwanted)}")

    # Endings ----------------------------------------------------------------------------

    def _end_early(self, error: PlaitError) -> None:
        """Give up, but pay for what was delivered."""
        self._ending = error
        if self._phase is _Phase.LIVE:
            self._trouble({}, str(error))
        elif self._phase is not _Phase.CLOSING:
            self._fail(error)

    def _fail(self, error: PlaitError) -> None:
        peers = {peer for epoch in self.epochs[-1:] for peer in epoch.peers}
        if self._newest is not None:
            self._close(tuple(sorted(peers.union(self._newest.peers))), error.code)
        self._phase = _Phase.OVER
        self._out.append(Failed(error))

    def _close(self, peers: tuple[PeerId, ...], reason: str, reuse: Reuse | None = None) -> None:
        self._keep_evidence()
        voucher = self._books.voucher if self._books is not None else None
        if self._driven:
            self._demand.ended(peers, self.order.qos)
        else:
            self._demand.let_go(peers, self.order.qos)
        self._phase = _Phase.OVER
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

    # Small things -----------------------------------------------------------------------

    def _is_current(self, number: int) -> bool:
        return self._newest is not None and self._newest.number == number

    def _await(self, name: Call, peers: Iterable[PeerId]) -> None:
        self._calls = Calls(name, self.epoch.number, set(peers))
