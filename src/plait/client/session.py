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

from plait.client.actions import (
    Action,
    AskView,
    Cancelled,
    Drafted,
    EpochClosed,
    Event,
    Faulted,
    Granted,
    GrantShown,
    LinkLost,
    ReservationSigned,
    ReserveFailed,
    Resulted,
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
from plait.client.session_live import Driving
from plait.client.session_state import Phase
from plait.client.suspects import Kind
from plait.errors import PlaitError, RemoteProtocolError, SessionLost, VerificationError
from plait.ledger.client_books import ClientBooks
from plait.types import PeerId

CONFIRM_TIMEOUT_MS = 6_000
NEIGHBOUR_RETRY_MS = 450


class SessionCore(Driving):
    """One session: takes events, returns actions; see ``SessionState`` for its making."""

    def handle(self, event: Event, now_ms: int) -> list[Action]:
        """Take an event; return what to do, in order."""
        if self._phase is Phase.OVER:
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
                if self._phase is Phase.LIVE:
                    self._perform(self.driver.drafted())
            case Stopped():
                self.driver.stop()
            case Cancelled():
                self._end_early(SessionLost("the session was cancelled"))
        return self._out

    def _on_view(self, event: Viewed) -> None:
        match self._phase:
            case Phase.PLANNING:
                self._plan_first(event)
            case Phase.REROUTING:
                self._plan_again(event)
            case Phase.LIVE if self._unwanted:
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
        elif not calls.due or self._is_refused(event):
            self._answered()

    def _is_refused(self, event: Answer) -> bool:
        """Whether one no is enough: nothing of the route is worth waiting for any more."""
        refused = isinstance(event, StageFailed) and not event.gone
        return refused and self._phase is Phase.OPENING and self._driven == 0

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
            case Phase.LIVE if self.driver.thinking and self._now_ms >= self._silent_at_ms:
                self._perform(self.driver.drafted(late=True))
            case Phase.LIVE if self._now_ms >= self._silent_at_ms:
                waited_s = (self._now_ms - self._sent_ms) / 1000
                self._trouble({}, f"the pipeline was silent for {waited_s:.1f} s")
            case Phase.LIVE:
                self._out.append(SetTimer(self._silent_at_ms))
            case Phase.OPENING | Phase.CONFIRMING:
                self._time_out_calls()
            case Phase.CLOSING:
                self._cut()
            case Phase.PLANNING | Phase.REROUTING:
                self._out.append(AskView())

    def _time_out_calls(self) -> None:
        self._calls.fail(self._calls.due, "no answer in time")
        self._answered()

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

    def _take_cert(self, event: StageOpened) -> None:
        try:
            self._opening.take_cert(event, self._now_ms)
        except (VerificationError, RemoteProtocolError) as error:
            self._calls.fail([event.peer], str(error))

    def _opened(self) -> None:
        reserve = self._opening.opened(self.epoch)
        self._phase = Phase.RESERVING
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
        if event.epoch > 1 and self._phase is Phase.RESERVING:
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
        if self._phase is Phase.RESERVING and epoch.number == 1:
            self._confirm()
        elif self._phase is Phase.LIVE:
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
        self._phase = Phase.CONFIRMING
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
        self._phase = Phase.PLANNING
        self._out.append(AskView())

    def _on_fault(self, event: Faulted) -> None:
        if not self._is_current(event.epoch):
            return
        if event.code != "draining":
            # Who has lost the session may well begin anew, unlike who is out of reach.
            kind: Kind = "refused" if event.code == "unknown-session" else "gone"
            self._lose(event.blamed, f"{event.blamed} failed: {event.code}: {event.reason}", kind)
            return
        self._unwanted[event.blamed] = "leaving"
        if self._phase is Phase.LIVE:
            self._ask_to_move()

    def _lose(self, peer: PeerId, reason: str, kind: Kind = "gone") -> None:
        """A stage is out of the epoch."""
        calls, recovery = self._calls, self._recovery
        match self._phase:
            case Phase.LIVE:
                self._trouble({peer: kind}, reason)
            case Phase.CLOSING:
                recovery.exclude(self.epoch, peer, kind, self._now_ms)
                if calls.due <= recovery.excluded:
                    self._cut()
            case Phase.CONFIRMING:
                calls.fail([peer], reason)
                if not calls.due:
                    self._answered()
