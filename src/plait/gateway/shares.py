"""The ledger's side of budgets: each key or team with a budget is a sub-account.

The gateway's own holds refuse early and count what a request may cost at most; the ledger
counts what its reservations take, whatever this gateway or another believes.
"""

import asyncio
from typing import Protocol

from plait.gateway.budgets import Share


class ShareLedger(Protocol):
    """Who keeps the limits of the account's shares."""

    async def set_share(self, share: Share) -> None:
        """Give a share its limit. Raises ``LedgerError`` or ``NetworkError``."""
        ...


class Shares:
    """Orders a share at the ledger before its first use, and when its budget changes."""

    def __init__(self, ledger: ShareLedger) -> None:
        self._ledger = ledger
        self._ordered: dict[str, Share] = {}
        self._ordering = asyncio.Lock()

    async def ensure(self, share: Share) -> None:
        """Return once the ledger keeps the share's limit; raises what ordering raises."""
        if self._ordered.get(share.name) == share:
            return
        # Orders of a name are numbered: two at once would refuse each other.
        async with self._ordering:
            if self._ordered.get(share.name) != share:
                await self._ledger.set_share(share)
                self._ordered[share.name] = share
