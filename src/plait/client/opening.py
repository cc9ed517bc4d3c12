"""How a route becomes a pipeline that is ready: sealed, opened, reserved, granted. Pure.

The session core says when; this keeps what the steps leave behind: which routes were
refused and why, whose key signs a stage's receipts, and which epoch a grant is for.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from plait.client.actions import CloseStages, Granted, OpenStages, Reserve, StageOpened
from plait.client.calls import Calls
from plait.client.demand import Demand
from plait.client.epoch import Epoch, Order, Party, first_terms, session_ms_max
from plait.client.prefix import agreed_start
from plait.client.reroute import Asked, plan_first
from plait.envelope import seal
from plait.errors import CapacityError, NoRoute
from plait.ledger.certs import check_key_cert
from plait.ledger.committee import check_grants
from plait.ledger.lottery import nonce_commitment, session_nonce
from plait.ledger.opening import opening_to_message
from plait.ledger.terms import SessionTerms
from plait.router.plan import Plan
from plait.router.view import Offer, View
from plait.types import PeerId
from plait.v1.identity_pb2 import SignedEnvelope

ATTEMPTS_MAX = 6
"""Routes tried before the first token is due."""
CAPACITY = "capacity"
"""The code of a refusal that another moment may change."""
OPEN_TIMEOUT_MS = 5_000
"""Connecting for the first time included; who is connected gets less (``client.pipeline``)."""
REOPEN_TIMEOUT_MS = 2_000


class Opening:
    """One session's openings, the first and those of its reroutes."""

    def __init__(
        self,
        order: Order,
        party: Party,
        asked: Asked,
        entropy: Callable[[int], bytes],
        demand: Demand,
    ) -> None:
        self._order = order
        self._demand = demand
        self._party = party
        self._asked = asked
        self._entropy = entropy
        self._attempts = 0
        self._refusal: CapacityError | None = None
        self._may_soon_agree = False
        self._refused_ms = 0
        self._began_ms: int | None = None
        self._signed_ms = 0
        self._opened_by: dict[PeerId, tuple[bytes, SignedEnvelope]] = {}
        self._reusable: dict[PeerId, int] = {}

    def first_epoch(self, view: View, avoid: Collection[PeerId], now_ms: int) -> Epoch | None:
        """The epoch to open first; None if there may be a route in a moment: who refused may
        agree, or a host that has just fallen out of view may be back.

        Raises ``NoRoute``, or ``CapacityError`` if there was a route until it was refused, if
        there is none but through stages that have just refused another session of this client,
        or if its retries are used up.
        """
        if self._began_ms is None:
            self._began_ms = now_ms
        busy = self._demand.busy(self._order.qos, now_ms)
        try:
            chosen = plan_first(self._asked, view, {*avoid, *busy}, now_ms, self._order.warm)
        except NoRoute as error:
            if error.missing and self._demand.misses(self._asked.request, view, now_ms):
                error.options = ()
            if self._refusal is None and not busy:
                if error.missing and not error.options and self._may_come_back(now_ms):
                    return None
                raise
            if self._refusal is None:
                raise CapacityError(
                    f"{len(busy)} stages have no room for now",
                    retry_after_s=min(busy.values()) / 1000,
                ) from error
            if self._may_soon_agree and now_ms < self._refused_ms + self._order.replica_wait_ms:
                return None
            raise CapacityError(
                f"no pipeline took the session: {self._refusal}",
                retry_after_s=self._refusal.retry_after_s,
                remedy="try again in a moment, or see why each peer was rejected: `explain`",
            ) from error
        route = [stage.offer.peer for stage in chosen.stages]
        self._demand.routed(self._order.model.digest, route, now_ms)
        if self._refusal is not None and not self._demand.may_retry(now_ms):
            raise CapacityError(
                f"this client's retries are used up; the last refusal: {self._refusal}",
                retry_after_s=self._refusal.retry_after_s,
            )
        terms = first_terms(self._order, self._party, chosen, self._entropy)
        offers = tuple(stage.offer for stage in chosen.stages)
        return self.epoch(terms, chosen, offers, now_ms)

    def _may_come_back(self, now_ms: int) -> bool:
        """Whether layers without a host are worth waiting for: they had one a moment ago."""
        waited_ms = now_ms - (self._began_ms or now_ms)
        lately = self._demand.was_routed(self._order.model.digest, now_ms)
        return lately and waited_ms < self._order.replica_wait_ms

    def epoch(
        self, terms: SessionTerms, chosen: Plan, offers: tuple[Offer, ...], now_ms: int
    ) -> Epoch:
        """An epoch on these terms, with the client's seal on them.

        None is dated before the one before it, whatever the clock says: a bundle must show that
        they followed each other.
        """
        self._signed_ms = max(self._signed_ms, now_ms)
        key = self._party.ledger_key
        commit = nonce_commitment(session_nonce(key, terms.session_id))
        expires_ms = self._signed_ms + session_ms_max(chosen)
        message = opening_to_message(
            terms, self._order.sampling, self._signed_ms, expires_ms, audit_commit=commit
        )
        return Epoch(terms, seal(key, message), offers, chosen)

    def ask_stages(self, epoch: Epoch, drawn: Sequence[int], now_ms: int) -> OpenStages:
        """What makes every stage hold its share of an epoch."""
        self._demand.asking(epoch.entered, self._order.qos, now_ms)
        ids = (*self._order.prompt_ids, *drawn)
        timeout_ms = OPEN_TIMEOUT_MS if epoch.number == 1 else REOPEN_TIMEOUT_MS
        prefix = self._order.prefix
        return OpenStages(epoch.terms, epoch.opening, epoch.offers, ids, timeout_ms, prefix)

    def start(self, epoch: Epoch) -> int:
        """The first position to feed: those before it are in every stage's cache."""
        if epoch.number > 1 or not self._order.prefix:
            return 0
        return agreed_start((self._reusable.get(peer, 0) for peer in epoch.peers), epoch.terms)

    def take_cert(self, event: StageOpened, now_ms: int) -> None:
        """Note whose key signs a stage's receipts, and what it has cached.

        Raises ``VerificationError`` or ``RemoteProtocolError`` for a certificate that is
        not that peer's.
        """
        party = self._party
        _, key = check_key_cert(event.cert, party.network_id, now_ms, event.peer, party.revoked())
        self._opened_by[event.peer] = key, event.cert
        self._reusable[event.peer] = event.reusable_tokens

    def opened(self, epoch: Epoch) -> Reserve | None:
        """Every stage holds its share: complete the terms; None if there is nothing to reserve."""
        self._demand.taken(epoch.entered, self._order.qos)
        stages = tuple(
            replace(stage, ledger_key=stage.ledger_key or self._opened_by[stage.peer][0])
            for stage in epoch.terms.stages
        )
        epoch.terms = replace(epoch.terms, stages=stages)
        epoch.certs = tuple(self._opened_by[stage.peer][1] for stage in stages)
        return Reserve(epoch.terms, session_ms_max(epoch.plan)) if epoch.entered else None

    def take_grant(self, event: Granted, epochs: Sequence[Epoch], now_ms: int) -> Epoch | None:
        """Add a grant to its epoch and return that; None if it is nobody's or came before.

        A grant may come when its epoch is over, but the stages it is for still serve.
        Raises ``PlaitError`` for a grant that does not hold.
        """
        epoch = next((one for one in epochs if one.number == event.epoch), None)
        if epoch is None or epoch.reservation is None or epoch.grant is not None:
            return None
        authorities = self._party.authorities
        check_grants(event.grant, epoch.reservation, authorities, epoch.terms, None, now_ms)
        epoch.grant = event.grant
        return epoch

    def refused(self, epoch: Epoch, calls: Calls, now_ms: int) -> CloseStages:
        """Some stage did not take a first epoch: note why, and let go of the others."""
        first, qos = calls.first_failure, self._order.qos
        for one in calls.failed.values():
            if one.code == CAPACITY:
                self._demand.refused(one.peer, qos, one.retry_after_ms, now_ms)
        self._demand.let_go(epoch.peers, qos)
        self._refused_ms = now_ms
        self._refusal = CapacityError(
            f"{first.peer}: {first.reason}", retry_after_s=first.retry_after_ms / 1000
        )
        # A stage whose view lags behind ours says no to its neighbour, and soon yes; and one
        # that does not answer is soon out of the view, or back.
        self._may_soon_agree = first.gone or first.code == "neighbour"
        self._attempts += 1
        # Who refused holds nothing; who did not answer may.
        held = tuple(peer for peer in epoch.peers if calls.kinds.get(peer) != "refused")
        only_held = calls.name == "open"
        return CloseStages(epoch.number, held, None, "not opened", only_held=only_held)

    @property
    def exhausted(self) -> CapacityError | None:
        """Why no further route is tried; None while one may be."""
        if self._refusal is None or self._attempts < ATTEMPTS_MAX:
            return None
        return CapacityError(
            f"{ATTEMPTS_MAX} routes were refused, the last because {self._refusal}",
            retry_after_s=self._refusal.retry_after_s,
        )
