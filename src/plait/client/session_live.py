"""Frames go out, results come back, receipts are checked, vouchers follow. Pure."""

from collections.abc import Iterable

from plait.client.actions import AskView, Note, Resulted, Send
from plait.client.driver import Extra, Finish, SendFrame
from plait.client.pace import Pace
from plait.client.session_reroute import Rerouting
from plait.client.session_state import MOVE_RETRY_MS, Phase
from plait.compute.drafts import Took
from plait.errors import RemoteProtocolError, VerificationError
from plait.types import PeerId

FRAME_TTL_MS = 60_000
DRAFTS_WAIT_MS = 500
"""The longest that a frame waits for the drafter."""


class Driving(Rerouting):
    """A session with a pipeline that works."""

    def _go_live(self) -> None:
        epoch = self.epoch
        terms = epoch.terms
        self._phase = Phase.LIVE
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

    def _on_result(self, event: Resulted) -> None:
        if not self._is_current(event.epoch) or self._phase is not Phase.LIVE:
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
        took = self._took(sent, event)
        actions = driver.on_result(event.traversal, event.ids, event.logprobs, took, event.extras)
        liar = self._take_receipts(sent, event)
        if liar is not None:
            self._perform(one for one in actions if isinstance(one, Extra))
            self._trouble({liar: "gone"}, f"a receipt of {liar} does not hold")
            return
        self._perform(actions)
        if self._phase is Phase.LIVE:
            if driver.thinking:
                self._be_patient(DRAFTS_WAIT_MS)
            self._note_pace(event, took)

    def _took(self, sent: SendFrame, event: Resulted) -> Took | None:
        """How long a decode traversal took; None for the first of an epoch, and the prompt's."""
        if sent.rows != 1 + sent.drafts or sent.traversal == self.epoch.terms.resume_position:
            return None
        return Took(self._now_ms - self._sent_ms, sum(event.stage_us) / 1000)

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

    def _note_pace(self, event: Resulted, took: Took | None) -> None:
        terms, pace = self.epoch.terms, self._pace
        if pace is None or took is None:
            return
        pace.note(took.elapsed_ms, event.stage_us)
        slow = pace.straggler()
        if slow is not None:
            self._unwanted.setdefault(terms.stages[slow].peer, "slow")
        if self._unwanted and self._now_ms - self._move_asked_ms >= MOVE_RETRY_MS:
            self._ask_to_move()
