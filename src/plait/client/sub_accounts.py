"""Sub-accounts of the client's own account: read them, open, change and close them."""

from collections.abc import Sequence

from plait.client.account import Account
from plait.envelope import seal
from plait.ledger.service.committee import Ledger
from plait.ledger.sub_accounts import BudgetPeriod, SubAccount, SubAccountUse, terms_message
from plait.types import AccountId
from plait.v1.ledger_pb2 import AccountQuery, SubAccountOrder

_CERT_TTL_MS = 600_000


async def read_sub_accounts(
    ledger: Ledger, account: Account, network_id: str, now_ms: int, name: str = ""
) -> Sequence[SubAccountUse]:
    """All sub-accounts by name, or the one named if it exists. Raises what the ledger does."""
    query = AccountQuery(
        network_id=network_id, account=account.peer, issued_ms=now_ms, sub_account=name
    )
    return await ledger.sub_accounts(
        seal(account.ledger_key, query), account.certificate(network_id, now_ms)
    )


async def order_sub_account(
    ledger: Ledger,
    account: Account,
    network_id: str,
    now_ms: int,
    name: str,
    *,
    limit: int = 0,
    period: BudgetPeriod | None = None,
    period_limit: int = 0,
    closed: bool = False,
) -> SubAccount:
    """Give a sub-account new terms, the whole of them; a name that is new is opened.

    Amounts are microcredits, 0 is no limit. Raises ``LedgerError`` if the ledger refuses
    them, for one because somebody else ordered at the same time.
    """
    known = await read_sub_accounts(ledger, account, network_id, now_ms, name)
    sequence = known[0].terms.sequence + 1 if known else 1
    owner = AccountId(account.peer)
    terms = SubAccount(owner, name, sequence, limit, period, period_limit, closed)
    order = SubAccountOrder(network_id=network_id, terms=terms_message(terms), issued_ms=now_ms)
    await ledger.set_sub_account(
        seal(account.ledger_key, order), account.certificate(network_id, now_ms)
    )
    return terms
