"""Credit set aside for one epoch of a session, and when it goes back."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from plait.types import AccountId, Digest
from plait.v1.ledger_pb2 import SettlementRequest

GRACE_MS = 60_000
"""How long payees may still settle after a reservation's expiry."""
FRESHNESS_MS = 120_000


@dataclass(slots=True)
class Hold:
    """Credit of ``account`` set aside for one epoch of a session, in the account ``name``."""

    name: AccountId
    account: AccountId
    epoch: int
    reservation: Digest
    granted_ms: int
    expires_ms: int
    caps: Mapping[AccountId, int]
    paid: dict[AccountId, int] = field(default_factory=dict)
    released: set[AccountId] = field(default_factory=set)
    sub_account: str = ""
    """Name of the sub-account that it draws on."""

    def room(self, payee: AccountId) -> int:
        """What the payee's cap leaves."""
        return self.caps.get(payee, 0) - self.paid.get(payee, 0)


def paid_to(payee: AccountId, holds: Mapping[int, Hold]) -> int:
    """What a payee has been paid in a session, all epochs together; ``holds`` are the session's."""
    paid = 0
    for hold in holds.values():
        paid += hold.paid.get(payee, 0)
    return paid


def may_release(hold: Hold, request: SettlementRequest) -> bool:
    """Whether a payee's request releases a hold of its session.

    An old request must not be replayed against a hold that was opened after it, nor one of a
    payee's first stint release what is reserved for its second.
    """
    return (
        request.payee in hold.caps
        and hold.epoch <= (request.epoch or hold.epoch)
        and request.issued_ms >= hold.granted_ms - FRESHNESS_MS
    )


def has_expired(hold: Hold, now_ms: int) -> bool:
    """Whether a hold's remainder goes back without anybody's word."""
    return hold.expires_ms + GRACE_MS <= now_ms
