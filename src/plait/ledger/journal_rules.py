"""What the books ask of orders and reservations, whatever stands in them."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from plait.identity import public_key_of
from plait.ledger.balances import EntryKind, Line
from plait.ledger.journal_commands import Refusal, Reserve, Settle
from plait.ledger.journal_holds import FRESHNESS_MS, Hold
from plait.types import AccountId
from plait.v1.ledger_pb2 import (
    BudgetReservation,
    IssueOrder,
    LimitOrder,
    SessionVoucher,
    SettlementRequest,
)

PAYEES_MAX = 64
RESERVATION_TTL_MAX_MS = 24 * 3_600_000
Paid = Callable[[AccountId], int]
"""What a payee was paid in a session."""


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


@dataclass(frozen=True, slots=True)
class Standing:
    """What the books know that decides on a reservation."""

    frozen: bool
    next_sequence: int
    holds: Mapping[int, Hold]
    """Of its session, by epoch."""
    available: int


def reservation_refused(command: Reserve, known: Standing, now_ms: int) -> Refusal | None:
    """Why the books do not set aside what a well-formed reservation asks for, if they do not."""
    reservation = command.reservation
    if known.frozen and not command.certified:
        return Refusal("frozen", "the account signed two reservations under one number")
    expected = known.next_sequence
    if reservation.sequence > expected or (
        reservation.sequence < expected and not command.certified
    ):
        return Refusal("sequence", f"the next number of this lane is {expected}")
    if command.dated and abs(reservation.issued_ms - now_ms) > FRESHNESS_MS:
        return stale("reservation")
    expired = command.dated and reservation.expires_ms <= now_ms
    if expired or reservation.expires_ms > now_ms + RESERVATION_TTL_MAX_MS:
        return Refusal("expiry", "the reservation has expired or is too long")
    others = any(hold.account != reservation.account for hold in known.holds.values())
    if reservation.epoch in known.holds or others:
        return Refusal("session", "the session's epoch is reserved already, or not by you")
    if known.available < reservation.amount:
        return Refusal("credit", f"{reservation.amount} asked, {known.available} available")
    return None


def settlement_malformed(command: Settle, network_id: str) -> Refusal | None:
    """Why no books of a network could take a settlement, if none could."""
    voucher, request = command.voucher, command.request
    if not voucher.network_id == request.network_id == network_id:
        return Refusal("network", "the settlement is for another network")
    if request.session_id != voucher.session_id or request.voucher_digest != command.voucher_digest:
        return Refusal("malformed", "the request names another voucher or session")
    payees = [amount.payee for amount in voucher.amounts]
    if len(payees) > PAYEES_MAX or len(set(payees)) != len(payees):
        return Refusal("malformed", "the voucher names too many payees, or one twice")
    return None


def settlement_refused(command: Settle, holds: Collection[Hold]) -> Refusal | None:
    """Why the holds of its session pay nothing for a settlement, if they do not.

    An old request is as good as a new one: a stage may have waited out an outage.
    """
    if not holds or any(hold.account != command.voucher.account for hold in holds):
        return Refusal("session", "the voucher's account has no reservation in this session")
    if not any(command.request.payee in hold.caps for hold in holds):
        return Refusal("payee", "nothing is reserved for this payee")
    return None


def decline_refused(request: SettlementRequest, network_id: str) -> Refusal | None:
    """Why no books of a network could take a request without a voucher, if none could."""
    if request.network_id != network_id:
        return Refusal("network", "the request is for another network")
    if request.voucher_digest or not request.release:
        return Refusal("malformed", "a request without a voucher can only release")
    return None


def payment_lines(voucher: SessionVoucher, holds: Iterable[Hold], paid: Paid) -> list[Line]:
    """Per open hold, oldest first, one debit and its credits.

    What is promised beyond a cap is not paid, and is no reason to leave the other
    payees unpaid: a client cannot spoil their vouchers by overbidding one of them.
    """
    owed: dict[AccountId, int] = {}
    for amount in voucher.amounts:
        payee = AccountId(amount.payee)
        owed[payee] = amount.microcredits - paid(payee)
    lines: list[Line] = []
    for hold in holds:
        total, credits = 0, list[Line]()
        for payee, sum_owed in owed.items():
            take = min(sum_owed, hold.room(payee))
            if take > 0:
                total += take
                credits.append(Line(payee, 0, take))
                owed[payee] = sum_owed - take
        if credits:
            lines.append(Line(hold.name, total))
            lines += credits
    return lines


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
