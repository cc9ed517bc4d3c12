"""Which entries touch an account: kept by the books, asked by statements and evidence. Pure."""

from collections.abc import Mapping

from plait.ledger.balances import HOLD, Entry, escrow_of
from plait.ledger.journal_holds import Hold
from plait.types import AccountId


class History:
    """Indexes of entries by account, session (in hex) and sub-account (``account/name``)."""

    def __init__(self) -> None:
        self._indexes: dict[str, list[int]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._indexes

    def of(self, name: str) -> tuple[int, ...]:
        """The entries that touch an account, its holds and escrow, or a session."""
        return tuple(self._indexes.get(name, ()))

    def add(self, entry: Entry, holds: Mapping[AccountId, Hold]) -> None:
        """Note an entry; ``holds`` are all that were ever opened, by the name of their account."""
        touched = {entry.session_id.hex()} if entry.session_id else set()
        if entry.limit is not None:
            touched.add(entry.limit.account)
        if entry.terms is not None:
            touched |= {entry.terms.account, f"{entry.terms.account}/{entry.terms.name}"}
        for account, *_ in entry.lines:
            if account.startswith(HOLD):
                hold = holds[account]
                touched.add(hold.account)
                if hold.sub_account:
                    touched.add(f"{hold.account}/{hold.sub_account}")
            else:
                touched.add(escrow_of(account) or account)
        for name in touched:
            self._indexes.setdefault(name, []).append(entry.index)
