"""What the books ask of orders and reservations, whatever stands in them."""

from functools import lru_cache

from plait.identity import public_key_of
from plait.ledger.balances import EntryKind
from plait.ledger.journal_commands import Refusal
from plait.v1.ledger_pb2 import BudgetReservation, IssueOrder, LimitOrder

PAYEES_MAX = 64


def reservation_malformed(reservation: BudgetReservation, network_id: str) -> Refusal | None:
    """Why no books of a network could take a reservation, if none could."""
    caps = reservation.caps
    if reservation.network_id != network_id:
        return Refusal("network", "the reservation is for another network")
    if len(reservation.session_id) != 16 or not is_peer(reservation.account):
        return Refusal("malformed", "the session id or the account is not one")
    payees = {cap.payee for cap in caps}
    if not 1 <= len(caps) <= PAYEES_MAX or len(payees) != len(caps):
        return Refusal("malformed", f"it needs 1 to {PAYEES_MAX} payees, each once")
    if not all(map(is_peer, payees)):
        return Refusal("malformed", "a payee is no peer id")
    if reservation.amount == 0 or sum(cap.microcredits for cap in caps) > reservation.amount:
        return Refusal("amount", "the amount is zero or less than the caps together")
    return None


def order_key(order: IssueOrder | LimitOrder) -> tuple[EntryKind, str, int]:
    """What an order with a known id must say again."""
    if isinstance(order, IssueOrder):
        return EntryKind.ISSUE, order.account, order.amount
    return EntryKind.LIMIT, order.account, order.credit_limit


@lru_cache(maxsize=4_096)  # base58 is slow, and the payees are always the same
def is_peer(account: str) -> bool:
    """Whether an account name is a peer id."""
    try:
        public_key_of(account)
    except ValueError:
        return False
    return True


def stale(what: str) -> Refusal:
    """What was signed too long ago, or by a clock that is ahead."""
    return Refusal("stale", f"the {what} was not signed within two minutes of the ledger's clock")
