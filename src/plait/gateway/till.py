"""Money of one request: a hold before its work, a settlement after it."""

from dataclasses import replace

from plait.client import Options
from plait.errors import NoRoute
from plait.gateway.budgets import Key
from plait.gateway.failure import ApiError
from plait.gateway.key_store import Cashier, OverBudget, Spent
from plait.gateway.orders import Job
from plait.gateway.port import Upstream
from plait.gateway.shares import Shares
from plait.types import PeerId

_SLACK = 1.5
"""A hold is this much above the predicted price, for a route that is dearer by then."""


def check_model(model: str, key: Key | None) -> None:
    """Raise ``ApiError`` (403) unless the key may use a model."""
    if key is not None and not key.allows(model):
        raise ApiError(
            403, f"this key may not use {model}", code="model_not_allowed", param="model"
        )


def within(options: Options, key: Key | None) -> Options:
    """Options that keep to the key's peers and place in queues; raises ``ApiError`` (403)."""
    if key is None:
        return options
    options = replace(options, qos=key.qos)
    if not key.peers:
        return options
    peers = frozenset(PeerId(peer) for peer in key.peers)
    if options.only and not options.only & peers:
        raise ApiError(
            403,
            "this key may use none of these peers",
            code="peer_not_allowed",
            param="provider.only",
        )
    return replace(options, only=options.only & peers or peers)


def permitted(jobs: list[Job], key: Key | None) -> list[Job]:
    """Jobs within the key's models and peers; raises ``ApiError`` (403)."""
    if key is None:
        return jobs
    check_model(jobs[0].model.name, key)
    return [
        replace(job, ask=replace(job.ask, qos=key.qos, options=within(job.ask.options, key)))
        for job in jobs
    ]


def check_peers(
    upstream: Upstream, model: str, prompt_tokens: int, options: Options, key: Key | None
) -> None:
    """Raise ``ApiError`` (403) if it is the key's peers, not the request's, that make no route."""
    if key is None or not key.peers or options.only != key.peers:
        return  # what the request narrowed further is the request's to mend
    try:
        upstream.plan(model, prompt_tokens, options)
    except NoRoute as error:
        if "only" in error.options:
            raise ApiError(
                403, f"with the peers that this key may use, {error}", code="peer_not_allowed"
            ) from error


class Till:
    """Holds and settles the money of one request. ``open`` before the work, ``close`` after."""

    def __init__(
        self, cashier: Cashier | None, shares: Shares, key: Key | None, upstream: Upstream
    ) -> None:
        self._cashier, self._shares, self._key = cashier, shares, key
        self._upstream = upstream
        self._hold: int | None = None

    async def open(self, jobs: list[Job]) -> list[Job]:
        """Hold what the jobs may cost at most; each is then routed within its share.

        Raises ``ApiError`` when the key's peers make no route (403) or its budget does not allow
        it (402), what planning raises when there is no route, and what the ledger does when it
        will not keep the limit.
        """
        if self._cashier is None or self._key is None:
            return jobs
        first = jobs[0]
        asked = first.ask.options
        check_peers(self._upstream, first.model.name, first.prompt_tokens, asked, self._key)
        priced = jobs
        amount = 0
        share = self._key.share
        if share is not None:
            priced = [self._bounded(job) for job in jobs]
            amount = sum(job.ask.options.max_price or 0 for job in priced)
        hold = await self._cashier.hold(self._key, jobs[0].model.name, amount)
        if isinstance(hold, OverBudget):
            raise ApiError(
                402,
                f"this may cost {hold.amount} microcredits, and {hold.whose} has {hold.left} left "
                f"of {hold.budget} per {hold.period}",
                kind="insufficient_quota",
                code="insufficient_quota",
                remedy="ask for fewer tokens (max_tokens), or wait for the next period",
            )
        self._hold = hold
        if share is None:
            return priced
        await self._shares.ensure(share)
        return [_drawing_on(job, share.name) for job in priced]

    def close(self, spent: Spent) -> None:
        """Settle what was used."""
        if self._cashier is not None and self._hold is not None:
            self._cashier.settle(self._hold, spent)
            self._hold = None

    def _bounded(self, job: Job) -> Job:
        """The job with a price limit, which the router keeps."""
        options = job.ask.options
        plan = self._upstream.plan(job.model.name, job.prompt_tokens, options)
        most = round(_SLACK * plan.predicted.price_microcredits) + 1
        limit = most if options.max_price is None else min(most, options.max_price)
        bounded = replace(options, max_price=limit)
        return replace(job, ask=replace(job.ask, options=bounded))


def _drawing_on(job: Job, share: str) -> Job:
    options = replace(job.ask.options, sub_account=share)
    return replace(job, ask=replace(job.ask, options=options))
