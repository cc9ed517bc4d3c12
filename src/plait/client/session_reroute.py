"""Trouble, and the way on: close the epoch, pay for the cut, fill the gap. Pure.

Also the way off a stage that still works but is slow or drains.
"""

from collections.abc import Mapping

from plait.client.actions import AskView, CloseEpoch, LeaveStages, Note, SetTimer, Viewed
from plait.client.epoch import Epoch
from plait.client.reroute import next_terms
from plait.client.session_state import Phase, SessionState
from plait.client.suspects import Kind
from plait.errors import PlaitError, SessionLost
from plait.ledger.terms import SessionTerms
from plait.types import PeerId

CLOSE_EPOCH_TIMEOUT_MS = 700
WAIT_RETRY_MS = 500
TROUBLE_FACTOR = 3
"""Reroutes that bring no token end after so many times the wait for a replica."""
MOVE_GAIN = 0.7
"""A slow stage is left for a route that takes at most this share of the time."""


class Rerouting(SessionState):
    """A session that can lose its stages."""

    def _trouble(self, blamed: Mapping[PeerId, Kind], reason: str) -> None:
        """Close the epoch on every stage; whoever answers may stay."""
        epoch = self.epoch
        self._recovery.begin(epoch, blamed, reason, self._now_ms)
        self._phase = Phase.CLOSING
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
            self._phase = Phase.REROUTING
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
                remedy="run it again once the layers have a host: `explain`",
            )
        )

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

    def _end_early(self, error: PlaitError) -> None:
        """Give up, but pay for what was delivered."""
        self._ending = error
        if self._phase is Phase.LIVE:
            self._trouble({}, str(error))
        elif self._phase is not Phase.CLOSING:
            self._fail(error)
