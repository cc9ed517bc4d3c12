"""``Upstream`` over ``AsyncClient``."""

from collections.abc import Collection
from dataclasses import replace

from plait.client import AsyncClient, Embedding, Options
from plait.errors import LedgerError
from plait.gateway.budgets import Share
from plait.gateway.port import Ask, Stream
from plait.ledger.sub_accounts import BudgetPeriod, SubAccount
from plait.router.plan import Plan
from plait.router.view import View


class ClientUpstream:
    """A client that is entered, as the gateway sees it."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    def view(self) -> View:
        """The offers and links known now."""
        return self._client.view()

    def plan(self, model: str, prompt_tokens: int, options: Options) -> Plan:
        """The route that would be taken now; raises ``NoRoute`` or ``PeerUnreachable``."""
        return self._client.plan(model, prompt_tokens, options)

    def stream(self, ask: Ask) -> Stream:
        """Begin a generation."""
        return self._client.stream(ask.model, ask.prompt_ids, _options(ask))

    async def set_share(self, share: Share) -> None:
        """Order the sub-account's limit, unless it is what the ledger has."""
        if await self._has(share):
            return
        limit, period, period_limit = limits_of(share)
        try:
            await self._client.set_sub_account(
                share.name, limit=limit, period=period, period_limit=period_limit
            )
        except LedgerError:
            # Another gateway of this account may have ordered the same at the same time.
            if not await self._has(share):
                raise

    async def close_shares(self, names: Collection[str]) -> None:
        """Nothing may draw on these any more: their keys are revoked."""
        for use in await self._client.sub_accounts():
            if use.terms.name in names and not use.terms.closed:
                await self._client.set_sub_account(
                    use.terms.name,
                    limit=use.terms.limit,
                    period=use.terms.period,
                    period_limit=use.terms.period_limit,
                    closed=True,
                )

    async def _has(self, share: Share) -> bool:
        known = {use.terms.name: use.terms for use in await self._client.sub_accounts()}
        return share.name in known and _kept(known[share.name]) == limits_of(share)

    async def embed(self, ask: Ask) -> Embedding:
        """The embedding of what is asked. Raises ``PlaitError`` subclasses."""
        return await self._client.embed(ask.model, ask.prompt_ids, _options(ask))


def limits_of(share: Share) -> tuple[int, BudgetPeriod | None, int]:
    """Limit in all, period, and limit in each; at the ledger 0 is no limit at all."""
    budget = max(1, share.budget)
    if share.period == "total":
        return budget, None, 0
    return 0, BudgetPeriod[share.period.upper()], budget


def _kept(terms: SubAccount) -> tuple[int, BudgetPeriod | None, int] | None:
    return None if terms.closed else (terms.limit, terms.period, terms.period_limit)


def _options(ask: Ask) -> Options:
    return replace(ask.options, sampling=ask.sampling, qos=ask.qos)
