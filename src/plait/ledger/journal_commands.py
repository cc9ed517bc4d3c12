"""What the books are asked, and what they answer."""

from dataclasses import dataclass

from plait.ledger.balances import Entry
from plait.types import AccountId, Digest, SessionId
from plait.v1.ledger_pb2 import (
    BudgetReservation,
    IssueOrder,
    LimitOrder,
    SessionVoucher,
    SettlementRequest,
    SubAccountOrder,
)


@dataclass(frozen=True, slots=True)
class Issue:
    """Credit from nothing to an account, by the network's issuer."""

    order: IssueOrder
    digest: Digest


@dataclass(frozen=True, slots=True)
class Reserve:
    """Credit from an account to a session's hold.

    ``certified``: a quorum of the committee has granted it, so that it is booked even if this
    authority granted another under its number. ``dated`` is false in a committee, where a
    late reservation must be granted too, lest its number stay open: its hold soon expires.
    """

    reservation: BudgetReservation
    digest: Digest
    certified: bool = False
    dated: bool = True


@dataclass(frozen=True, slots=True)
class Settle:
    """A payee shows a voucher: all payees in it are paid up to it."""

    voucher: SessionVoucher
    voucher_digest: Digest
    request: SettlementRequest
    request_digest: Digest


@dataclass(frozen=True, slots=True)
class SetLimit:
    """How far below zero an account may stand, by the network's issuer."""

    order: LimitOrder
    digest: Digest


@dataclass(frozen=True, slots=True)
class SetSubAccount:
    """The terms of a sub-account, by the account's owner."""

    order: SubAccountOrder
    digest: Digest


@dataclass(frozen=True, slots=True)
class Decline:
    """A payee wants nothing, or nothing more, from a session, and shows no voucher."""

    request: SettlementRequest
    digest: Digest


@dataclass(frozen=True, slots=True)
class Expire:
    """Void every hold whose grace time is over, and return escrow whose window is."""


@dataclass(frozen=True, slots=True)
class Forfeit:
    """A quorum of judges found a payee exposed in a session; ``digest`` is of what they signed."""

    session_id: SessionId
    payee: AccountId
    digest: Digest


Command = Issue | SetLimit | SetSubAccount | Reserve | Settle | Decline | Expire | Forfeit


@dataclass(frozen=True, slots=True)
class Release:
    """A payee wants nothing more from one hold."""

    session_id: SessionId
    epoch: int
    payee: AccountId


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a command did. ``value`` is the entry index of an order or a reservation (also
    when it was booked earlier), what the settling payee has been paid in the session, or
    what was forfeited in it."""

    entries: tuple[Entry, ...]
    releases: tuple[Release, ...]
    value: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a command did nothing: a stable code and a sentence."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fork:
    """Two different reservations signed under one number; freezes the account."""

    account: AccountId
    first: Digest
    second: Digest


Outcome = Accepted | Refusal | Fork
Cause = IssueOrder | LimitOrder | SubAccountOrder | BudgetReservation | None
